//! Stage 1: what a report is worth, by its age.

use serde::{Deserialize, Serialize};

use crate::state::{Node, Report};
use crate::{Millis, Policy};

/// What a node's word is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// Its report says how it is.
    Fresh,
    /// Its report speaks for keeping it, and for nothing else.
    Stale,
    /// Nothing is known of it: it is no victim, no copy, and no spare capacity.
    Unknown,
}

/// A report that missed two in a row is stale.
pub(super) const PERIODS: u64 = 3;

pub(super) fn of(node: &Node, policy: &Policy, now: Millis) -> Trust {
    let Some(report) = &node.report else { return Trust::Unknown };
    match now.since(report.heard) {
        age if age <= PERIODS * policy.report_period_ms => Trust::Fresh,
        age if age <= policy.report_lifetime_ms => Trust::Stale,
        _ => Trust::Unknown,
    }
}

/// The report, where it says anything of now.
pub(super) fn word(node: &Node, trust: Trust) -> Option<&Report> {
    node.report.as_ref().filter(|_| trust != Trust::Unknown)
}
