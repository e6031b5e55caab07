//! What the driver's XID error codes mean for a GPU. NVIDIA's catalogue of **2025-10-29**, as data.
//!
//! The catalogue says what to do at once; the verdict is ours, and the operator may overrule it. Events come
//! from NVML and from the kernel's log (`line`), are counted once (`Record`), and stay until the node boots,
//! the GPU is reset or somebody clears them.

mod line;
mod record;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use line::{Line, LinkFault, kmsg, parse};
pub use record::{Event, Noted, Outstanding, Record};

/// What a code means for the GPU that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is counted, and no more: most of these are mistakes of programs.
    MetricOnly,
    /// The GPU works, and somebody should look.
    Degraded,
    /// The GPU must not get work until it is reset, or the node boots.
    Fatal,
}

/// What the catalogue says to do at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Nothing.
    Ignore,
    /// Start the program again.
    RestartApp,
    /// Reset the GPU.
    ResetGpu,
    /// Restart the virtual machine.
    RestartVm,
    /// Restart the machine (RESTART_BM).
    RestartBm,
    /// Look at connectors, power and cooling.
    CheckMechanicals,
    /// Look at unified memory.
    CheckUvm,
    /// Update driver or firmware.
    UpdateSwfw,
    /// Ask NVIDIA.
    ContactSupport,
    /// The code has a procedure of its own.
    Workflow,
}

/// One row of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The code.
    pub xid: u32,
    /// What NVIDIA says to do.
    pub action: Action,
    /// What it means by default. 74 and 154 depend on more: see `Policy::verdict`.
    pub verdict: Verdict,
}

use Action::{CheckMechanicals, CheckUvm, ContactSupport, Ignore, ResetGpu, RestartApp, RestartBm, RestartVm};
use Action::{UpdateSwfw, Workflow};
use Verdict::{Degraded, Fatal, MetricOnly};

/// The catalogue by action and verdict, codes ascending in each. A code that is nowhere here is counted only.
///
/// Fatal is what the EKS node monitoring agent takes for fatal, less 63: the catalogue says to ignore that
/// one, and a pending row remap is a check of its own.
const CATALOGUE: &[(Action, Verdict, &[u32])] = &[
    (ResetGpu, Fatal, &[46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158]),
    (RestartBm, Fatal, &[79]),
    (RestartVm, Fatal, &[151]),
    (Workflow, Fatal, &[48, 74]),
    (ContactSupport, Fatal, &[142]),
    (CheckMechanicals, Fatal, &[54]),
    (Workflow, Degraded, &[144, 145, 146, 147, 148, 149, 150, 154]),
    (RestartApp, Degraded, &[94]),
    (Ignore, Degraded, &[63]),
    (Workflow, MetricOnly, &[45]),
    (UpdateSwfw, MetricOnly, &[78]),
    (CheckUvm, MetricOnly, &[159]),
    (
        RestartApp,
        MetricOnly,
        &[
            8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80, 82, 83, 84, 85, 86, 88, 89, 96,
            97, 98, 99, 100, 101, 102, 103, 104, 105, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 139,
        ],
    ),
    (Ignore, MetricOnly, &[37, 38, 43, 44, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 157, 160, 161]),
];

/// NVLink error, up to Ampere and Hopper.
const NVLINK: u32 = 74;
/// The driver asks for a recovery action, or takes that back.
const RECOVERY_ACTION: u32 = 154;
/// The GPU has fallen off the bus.
pub const FALLEN_OFF_THE_BUS: u32 = 79;

/// The whole catalogue, by code.
pub fn catalogue() -> Vec<Entry> {
    let row = |(action, verdict, xids): &(Action, Verdict, &[u32])| {
        let (action, verdict) = (*action, *verdict);
        xids.iter().map(move |xid| Entry { xid: *xid, action, verdict }).collect::<Vec<_>>()
    };
    let mut entries: Vec<_> = CATALOGUE.iter().flat_map(row).collect();
    entries.sort_by_key(|entry| entry.xid);
    entries
}

/// The catalogue's row of one code.
pub fn entry(xid: u32) -> Option<Entry> {
    let (action, verdict, _) = CATALOGUE.iter().find(|(_, _, xids)| xids.contains(&xid))?;
    Some(Entry { xid, action: *action, verdict: *verdict })
}

/// What else is known of a GPU, on which some codes depend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// Whether it has NVLink.
    pub has_nvlink: Option<bool>,
    /// Its recovery action (NVML field 230); 0 is none.
    pub recovery_action: Option<u32>,
}

/// The operator's word on codes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    fatal: BTreeSet<u32>,
    ignore: BTreeSet<u32>,
}

/// A code that is to be fatal and to be ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("XID {0} cannot be both fatal and ignored")]
pub struct Contradiction(pub u32);

impl Policy {
    /// `fatal` and `ignore` go before the catalogue, and before what it depends on.
    pub fn new(
        fatal: impl IntoIterator<Item = u32>,
        ignore: impl IntoIterator<Item = u32>,
    ) -> Result<Self, Contradiction> {
        let (fatal, ignore): (BTreeSet<_>, BTreeSet<_>) = (fatal.into_iter().collect(), ignore.into_iter().collect());
        match fatal.intersection(&ignore).next() {
            Some(both) => Err(Contradiction(*both)),
            None => Ok(Self { fatal, ignore }),
        }
    }

    /// What a code means on a GPU of which this is known. What is not known makes nothing worse.
    pub fn verdict(&self, xid: u32, facts: Facts) -> Verdict {
        match xid {
            _ if self.fatal.contains(&xid) => Fatal,
            _ if self.ignore.contains(&xid) => MetricOnly,
            // Boards without NVLink report it too, and it says nothing there.
            NVLINK if facts.has_nvlink != Some(true) => MetricOnly,
            // It comes again, with "none", once the action is taken.
            RECOVERY_ACTION if facts.recovery_action.is_none_or(|action| action == 0) => MetricOnly,
            _ => self.worst(xid),
        }
    }

    /// The worst that a code can mean.
    pub fn worst(&self, xid: u32) -> Verdict {
        match xid {
            _ if self.fatal.contains(&xid) => Fatal,
            _ if self.ignore.contains(&xid) => MetricOnly,
            _ => entry(xid).map_or(MetricOnly, |entry| entry.verdict),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(verdict: Verdict) -> Vec<u32> {
        catalogue().into_iter().filter(|entry| entry.verdict == verdict).map(|entry| entry.xid).collect()
    }

    fn to(action: Action) -> Vec<u32> {
        catalogue().into_iter().filter(|entry| entry.action == action).map(|entry| entry.xid).collect()
    }

    #[test]
    fn the_default_lists_are_those_of_the_fact_sheet() {
        assert_eq!(
            with(Fatal),
            [46, 48, 54, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 142, 143, 151, 155, 156, 158]
        );
        assert_eq!(with(Degraded), [63, 94, 144, 145, 146, 147, 148, 149, 150, 154]);
    }

    #[test]
    fn the_actions_are_those_of_the_catalogue_and_each_code_has_one() {
        assert_eq!(to(ResetGpu), [46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158]);
        assert_eq!(to(Workflow), [45, 48, 74, 144, 145, 146, 147, 148, 149, 150, 154]);
        assert_eq!((to(RestartBm), to(RestartVm)), (vec![79], vec![151]));
        assert_eq!((to(ContactSupport), to(CheckMechanicals)), (vec![142], vec![54]));
        assert_eq!((to(UpdateSwfw), to(CheckUvm)), (vec![78], vec![159]));
        let ranges =
            [8..=8, 11..=11, 13..=13, 25..=25, 31..=32, 39..=41, 60..=60, 68..=72, 75..=77, 80..=80, 82..=86, 88..=89];
        let ranges = ranges.into_iter().chain([94..=94, 96..=105, 126..=135, 139..=139]);
        assert_eq!(to(RestartApp), ranges.flatten().collect::<Vec<u32>>());
        let ignored = [37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 157, 160, 161];
        assert_eq!(to(Ignore), ignored);
        let mut codes: Vec<_> = catalogue().iter().map(|entry| entry.xid).collect();
        let all = codes.len();
        codes.dedup();
        assert_eq!(codes.len(), all, "a code stands in two rows");
        assert!(catalogue().iter().all(|row| entry(row.xid) == Some(*row)));
    }

    #[test]
    fn some_codes_depend_on_the_gpu_and_what_is_not_known_makes_nothing_worse() {
        let policy = Policy::default();
        let nvlink = |has_nvlink| policy.verdict(74, Facts { has_nvlink, ..Facts::default() });
        assert_eq!([nvlink(Some(true)), nvlink(Some(false)), nvlink(None)], [Fatal, MetricOnly, MetricOnly]);
        let recovery = |recovery_action| policy.verdict(154, Facts { recovery_action, ..Facts::default() });
        assert_eq!([recovery(Some(1)), recovery(Some(0)), recovery(None)], [Degraded, MetricOnly, MetricOnly]);
        assert_eq!(policy.verdict(79, Facts::default()), Fatal);
        assert_eq!(policy.verdict(9999, Facts::default()), MetricOnly);
    }

    #[test]
    fn the_operator_overrules_the_catalogue() {
        let policy = Policy::new([31, 74], [79, 94]).unwrap();
        let verdicts = [31, 74, 79, 94, 48].map(|xid| policy.verdict(xid, Facts::default()));
        assert_eq!(verdicts, [Fatal, Fatal, MetricOnly, MetricOnly, Fatal]);
        assert_eq!(Policy::new([31, 48], [48]), Err(Contradiction(48)));
    }
}
