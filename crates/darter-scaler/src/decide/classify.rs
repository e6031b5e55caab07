//! Stage 2: what each node is doing.

use serde::{Deserialize, Serialize};

use super::Trust;
use super::trust::word;
use crate::state::{Node, Report, Work};
use crate::{Millis, Policy};

/// What a node is doing; the first that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// It was asked for, and has not joined.
    Launching,
    /// It is on its way out.
    Draining,
    /// Nothing is known of it.
    Unknown,
    /// Its cloud takes it back then.
    Doomed {
        /// When.
        at: Millis,
    },
    /// A GPU cannot be given work since then.
    Sick {
        /// Since when.
        since: Millis,
    },
    /// It is not ready for work yet.
    Warming {
        /// When it should have been.
        deadline: Millis,
    },
    /// A GPU works, or says nothing.
    Busy,
    /// Pods have its GPUs, and these do nothing since then.
    OccupiedIdle {
        /// Since when.
        since: Millis,
    },
    /// It has nothing to do but to give peers what they miss.
    Serving,
    /// It has nothing to do.
    WarmIdle,
}

pub(super) fn of(node: &Node, trust: Trust, policy: &Policy, now: Millis) -> Class {
    if node.deleting {
        return Class::Draining;
    }
    if !node.registered {
        return Class::Launching;
    }
    let Some(report) = word(node, trust) else { return Class::Unknown };
    if let Some(at) = report.notice {
        return Class::Doomed { at };
    }
    if let Some(since) = report.gpus.iter().filter_map(|gpu| gpu.sick).min() {
        return Class::Sick { since };
    }
    if node.tainted || !report.warm {
        return Class::Warming { deadline: node.created.plus(policy.warm.deadline_ms) };
    }
    let since = match work(report) {
        Some(last) if now.since(last) >= policy.busy_ms => last,
        _ => return Class::Busy,
    };
    if !node.pods.is_empty() {
        return Class::OccupiedIdle { since };
    }
    let serves = report.served.is_some_and(|served| now.since(served) < policy.serving_ms);
    if serves { Class::Serving } else { Class::WarmIdle }
}

/// When its GPUs last worked; none where one says nothing, or none is there to say it.
pub(super) fn work(report: &Report) -> Option<Millis> {
    let read = report.gpus.iter().map(|gpu| match gpu.work {
        Work::Until(last) => Some(last),
        Work::Unread => None,
    });
    read.collect::<Option<Vec<_>>>()?.into_iter().max()
}
