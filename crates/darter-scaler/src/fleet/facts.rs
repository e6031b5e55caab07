//! What Kubernetes says, as far as the scaler wants to know it.
//!
//! Whoever watches makes these, and the fleet takes them. Each replaces what was known of the same thing, so
//! that saying one twice is saying it once.

use std::collections::{BTreeMap, BTreeSet};

/// Facts that wait for the controller. A cluster of ten thousand nodes lists more than this at once: who
/// lists then waits until there is room, and nothing is lost.
pub const FACTS_WAITING_MAX: usize = 4096;

/// Something that was learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// A node is there, as it says.
    Node(NodeFact),
    /// A node is gone.
    NodeGone {
        /// metadata.uid of the Node.
        uid: String,
    },
    /// A pod that has or wants GPUs, or the agent's own.
    Pod(PodFact),
    /// It is gone, or ended.
    PodGone {
        /// Its metadata.uid.
        uid: String,
    },
    /// A pool of nodes.
    Pool(PoolFact),
    /// It is gone.
    PoolGone {
        /// Its name.
        name: String,
    },
    /// Something whose replicas KEDA counts.
    Workload(WorkloadFact),
    /// It is gone.
    WorkloadGone {
        /// `namespace/name` of what is scaled.
        name: String,
    },
    /// The API server answered, or a watch moved.
    Watched,
    /// After a list that began anew (at the start, after 410): what is not named is gone.
    Only {
        /// Of which kind.
        kind: Kind,
        /// By uid; pools and workloads by name.
        uids: BTreeSet<String>,
    },
}

/// Which facts a list was of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`Fact::Node`].
    Node,
    /// [`Fact::Pod`].
    Pod,
    /// [`Fact::Pool`].
    Pool,
    /// [`Fact::Workload`].
    Workload,
}

/// A node, as Kubernetes has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFact {
    /// metadata.uid. A claim without a Node yet comes under its own uid, and goes when its Node comes.
    pub uid: String,
    /// metadata.name.
    pub name: String,
    /// Of which pool.
    pub pool: Option<String>,
    /// topology.kubernetes.io/zone.
    pub zone: Option<String>,
    /// For how long it has existed, by its creation time.
    pub created_ms_ago: u64,
    /// Whether it has joined.
    pub registered: bool,
    /// Whether a startup taint is still there.
    pub tainted: bool,
    /// Whether it is on its way out: deletion, `karpenter.sh/disrupted`.
    pub deleting: bool,
    /// Karpenter's claim on it.
    pub claim: Option<Claim>,
    /// Capacity of the GPU resource.
    pub gpus: u32,
}

/// A NodeClaim: what a removal deletes, and which one exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// metadata.name.
    pub name: String,
    /// metadata.uid: the precondition of a delete.
    pub uid: String,
}

/// A pod that has or wants GPUs, or the agent's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFact {
    /// metadata.uid.
    pub uid: String,
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// spec.nodeName.
    pub node: Option<String>,
    /// `namespace/name` of the Deployment whose replica it is.
    pub workload: Option<String>,
    /// What it asks of the GPU resource.
    pub gpus: u32,
    /// Its deletion cost now; 0 where it has none.
    pub cost: i32,
    /// It is darter's own agent.
    pub agent: bool,
}

/// A pool of nodes, as far as Kubernetes knows it. What the configuration says of it stands over this.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolFact {
    /// Its name.
    pub name: String,
    /// GPUs of one node.
    pub gpus: u32,
    /// Never more nodes, by its limits.
    pub nodes_most: Option<u32>,
    /// Price of one node, in micro-dollars an hour.
    pub micros_per_hour: Option<u64>,
}

/// Something whose replicas KEDA counts, by our word.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadFact {
    /// `namespace/name` of what is scaled.
    pub name: String,
    /// Name of the ScaledObject, in the same namespace.
    pub scaled_object: String,
    /// Where its replicas run, where that can be told.
    pub pool: Option<String>,
    /// GPUs of one replica.
    pub gpus: u32,
    /// minReplicaCount.
    pub least: u32,
    /// maxReplicaCount.
    pub most: u32,
    /// Of the trigger that names this scaler, verbatim.
    pub metadata: BTreeMap<String, String>,
}
