//! What is to be done, with the names that doing it needs, and what came of it.

use crate::decide::Action;
use crate::fleet::facts::Claim;

/// Acts that wait for those who carry them out. Each sets a level, and what does not fit is decided again.
pub const ACTS_WAITING_MAX: usize = 1024;

/// Who carries an action out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Actuator {
    /// The answer to KEDA.
    Keda,
    /// A node's agent, which holds its removal off.
    Protect,
    /// The annotation by which a ReplicaSet chooses the pod that goes.
    DeletionCost,
    /// Spare nodes: a CapacityBuffer, or what stands in for one.
    Buffer,
    /// A node's agent, which brings an image.
    Copy,
    /// Deletes a node's claim.
    Remove,
}

impl Actuator {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Keda, Self::Protect, Self::DeletionCost, Self::Buffer, Self::Copy, Self::Remove];

    /// Whose this action is.
    pub const fn of(action: &Action) -> Self {
        match action {
            Action::Answer { .. } => Self::Keda,
            Action::Protect { .. } => Self::Protect,
            Action::Rank { .. } => Self::DeletionCost,
            Action::Buffer { .. } => Self::Buffer,
            Action::Copy { .. } => Self::Copy,
            Action::Remove { .. } => Self::Remove,
        }
    }

    /// As in the configuration and the metric.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keda => "keda",
            Self::Protect => "protect",
            Self::DeletionCost => "deletion_cost",
            Self::Buffer => "buffer",
            Self::Copy => "copy",
            Self::Remove => "remove",
        }
    }
}

/// One action that is to be carried out at Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act {
    /// What.
    pub action: Action,
    /// Why, as a sentence: for an Event, and for the log.
    pub reason: String,
    /// On what, by Kubernetes' names.
    pub target: Target,
}

/// What an act is done to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A node.
    Node {
        /// metadata.uid.
        uid: String,
        /// metadata.name.
        name: String,
        /// What its removal deletes.
        claim: Option<Claim>,
    },
    /// A pod.
    Pod {
        /// metadata.uid: the precondition of a write.
        uid: String,
        /// metadata.namespace.
        namespace: String,
        /// metadata.name.
        name: String,
    },
    /// A pool.
    Pool {
        /// Its name.
        name: String,
    },
    /// What KEDA scales.
    Workload {
        /// `namespace/name`.
        name: String,
    },
}

/// What came of an act; told back to the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub action: Action,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It would have been done, and this actuator only observes.
    Observed,
    /// Somebody else leads by now.
    NotLeading,
    /// What it was to be done to is another one by now, or gone.
    Conflict,
    /// It was not taken.
    Failed,
    /// Too many wait: it is decided again.
    Full,
}

impl Outcome {
    /// As in `darter_scaler_actions_total{outcome}`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Observed => "observed",
            Self::NotLeading => "not_leading",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
            Self::Full => "full",
        }
    }
}
