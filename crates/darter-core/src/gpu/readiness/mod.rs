//! Whether this node's GPUs can be given work, and if not, why.
//!
//! `evaluate` judges one observation; `Readiness` judges one after another, so that no single reading makes a
//! node come and go. What is not known never makes a node NotReady, and an Unknown node is left alone by
//! whoever deletes nodes. Not judged at all, because healthy GPUs differ in it: PCIe width and generation, PCIe
//! replays, corrected ECC errors, errors of earlier boots, the performance state.

mod advice;
mod checks;
pub mod condition;
mod machine;
mod observation;
mod reason;
mod slowdown;
#[cfg(test)]
mod tests;
pub mod upgrade;

use serde::{Deserialize, Serialize};

pub use machine::Readiness;
pub use observation::{Fabric, Gpu, Nvml, Observation};
pub use reason::{Reason, RecoveryAction};
pub use upgrade::Upgrade;

/// What a node's GPUs are, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// There is no GPU, and there should be none: no condition, no metrics.
    NotApplicable,
    /// They can be given work.
    Ready,
    /// They can, and somebody should look.
    Degraded,
    /// That cannot be told. Nothing destructive may follow from it.
    Unknown,
    /// They must not be given work.
    NotReady,
}

impl State {
    /// The word in conditions and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotApplicable => "NotApplicable",
            Self::Ready => "Ready",
            Self::Degraded => "Degraded",
            Self::Unknown => "Unknown",
            Self::NotReady => "NotReady",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub reason: Reason,
    /// What the node is because of it, were it alone. Ready: it is worth a word, and no more.
    pub state: State,
    /// The GPUs that have it, by uuid, or by PCI address where no uuid is known. Empty: it is the node's.
    pub gpus: Vec<String>,
    /// Numbers, for people; may be empty.
    pub detail: String,
}

/// What the GPUs are, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The worst of all findings.
    pub state: State,
    /// In the order of the checks, each reason once.
    pub reasons: Vec<Finding>,
}

impl Verdict {
    fn of(mut reasons: Vec<Finding>) -> Self {
        reasons.sort_by_key(|finding| finding.reason);
        let state = reasons.iter().map(|finding| finding.state).max().unwrap_or(State::Ready);
        Self { state, reasons }
    }

    const fn not_applicable() -> Self {
        Self { state: State::NotApplicable, reasons: Vec::new() }
    }

    /// Whether this is a GPU node is not known, so nothing that is missing is missed.
    fn nobody_knows() -> Self {
        let reason = Reason::GpuNodeNotObserved;
        Self::of(vec![Finding { reason, state: State::Unknown, gpus: Vec::new(), detail: String::new() }])
    }

    /// The first finding that makes the node what it is, for a condition that has room for one.
    pub fn first(&self) -> Option<&Finding> {
        self.reasons.iter().find(|finding| finding.state == self.state)
    }

    /// What one GPU is, by what was found of it alone.
    pub fn of_gpu(&self, uuid: &str) -> State {
        let own = self.reasons.iter().filter(|finding| finding.gpus.iter().any(|gpu| gpu == uuid));
        own.map(|finding| finding.state).max().unwrap_or(State::Ready)
    }
}

/// What the operator wants judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// So many GPUs there should be: goes before the table of instance types and before what was learned.
    pub expected_gpus: Option<u32>,
    /// Whether a node without a device plugin is a broken node (checks 10 and 11). Off where GPUs are given out
    /// by DRA, or by nobody.
    pub wants_device_plugin: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { expected_gpus: None, wants_device_plugin: true }
    }
}

/// Judges one observation by itself.
pub fn evaluate(observation: &Observation, policy: &Policy) -> Verdict {
    match checks::applies(observation, policy) {
        Some(true) => Verdict::of(checks::run(observation, policy).findings),
        Some(false) => Verdict::not_applicable(),
        None => Verdict::nobody_knows(),
    }
}
