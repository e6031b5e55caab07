//! Why: a tree for programs, that `render` turns into sentences.
//!
//! Each action and each hold has one: what was known and how old that is, the rule, the numbers it
//! compared, the rails it ran into, and what would change the answer.

use serde::{Deserialize, Serialize};

use crate::Millis;

/// One answer and what it rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// About what.
    pub subject: Subject,
    /// The answer.
    pub verdict: Verdict,
    /// By which rule.
    pub rule: Rule,
    /// What was known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Input>,
    /// What was compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compared: Vec<Compared>,
    /// What it ran into.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rails: Vec<RailHit>,
    /// What would change it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// Answers that it rests on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<Self>,
}

/// About what.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A node, by its name.
    Node(String),
    /// A workload, by `namespace/name`.
    Workload(String),
    /// A pool.
    Pool(String),
    /// A pod, by its UID.
    Pod(String),
    /// An image, by its digest.
    Image(String),
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A node stays: it is protected.
    Kept,
    /// A node may go, as far as this scaler is concerned.
    Free,
    /// A node is removed.
    Removed,
    /// Nothing is done, for want of knowledge or because a rail says so.
    Held,
    /// More of it.
    Raised,
    /// Less of it.
    Lowered,
    /// As it is.
    Unchanged,
    /// A pod has another place in the row.
    Ranked,
    /// An image is brought to a node.
    Copied,
}

/// By which rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// A report that is missing or old says nothing of now.
    Unknown,
    /// A GPU works.
    GpuAtWork,
    /// A GPU has no reading.
    GpuUnread,
    /// A job asked not to be disturbed.
    Job,
    /// An image is coming.
    Pull,
    /// The node is warming up, or just became warm.
    WarmUp,
    /// It gives peers what they miss.
    Serving,
    /// Too few other nodes that stay have a hot image.
    LastCopy,
    /// It was protected for as long as may be.
    ProtectedTooLong,
    /// Nothing speaks for keeping it.
    NothingHoldsIt,
    /// It is on its way out.
    Leaving,
    /// The cloud takes it back.
    Doomed,
    /// Its warm-up does not end.
    Stuck,
    /// It has a GPU that cannot be given work.
    Sick,
    /// What waits, by what one replica is to have.
    Backlog,
    /// What will wait after a lead time, as it has been rising.
    Forecast,
    /// A time of the day at which replicas are to be there.
    Schedule,
    /// Replicas that are at work, or may be.
    AtWork,
    /// No fresh sample of demand.
    DemandUnknown,
    /// As long as gaps like those that were make it pay.
    KeepByGaps,
    /// As long as gaps like those of all workloads make it pay.
    KeepByFleet,
    /// Until keeping it has cost what a cold start costs.
    KeepBreakEven,
    /// Learning did worse than the usual time would have.
    KeepUsual,
    /// Asked for ahead of demand, and given up no earlier than it can have come.
    Coming,
    /// Spare capacity by how demand rose.
    HeadroomByIncrements,
    /// Spare capacity as configured.
    HeadroomConfigured,
    /// The place in the row, by what it costs to make it again.
    Rank,
}

/// Something that was known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// What.
    pub fact: Fact,
    /// Which of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// How old it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
}

/// What can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fact {
    /// The node's report.
    Report,
    /// When the node was made.
    Node,
    /// Work of a GPU.
    GpuWork,
    /// A GPU that cannot be given work.
    GpuSick,
    /// A job.
    Job,
    /// An image that is coming; the value is the bytes that are missing.
    Pull,
    /// Use of an image; the value is its bytes.
    Image,
    /// Something that a peer was given.
    Serving,
    /// A notice of the cloud.
    Notice,
    /// The taint that went.
    Untainted,
    /// A lease, since its start.
    Lease,
    /// A sample of demand, in thousandths.
    Demand,
    /// When so many replicas were last needed.
    Needed,
    /// When so many were asked for ahead of demand.
    Ahead,
    /// How many gaps were seen.
    Gaps,
    /// How many increments were seen.
    Increments,
}

/// Two numbers that were compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// What the first is.
    pub what: Quantity,
    /// The first.
    pub is: u64,
    /// How they stand.
    pub sign: Sign,
    /// What it was compared with.
    pub with: u64,
}

/// How two numbers stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sign {
    /// The first is less.
    #[serde(rename = "<")]
    Less,
    /// The first is not less.
    #[serde(rename = ">=")]
    NotLess,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// Milliseconds since the newest report.
    ReportAgeMs,
    /// Milliseconds since a sample of demand.
    DemandAgeMs,
    /// Milliseconds since a GPU worked.
    IdleMs,
    /// Milliseconds since a node was made.
    NodeAgeMs,
    /// Milliseconds for which a GPU could not be given work.
    SickMs,
    /// Milliseconds that a node has been protected.
    ProtectedMs,
    /// Copies on other nodes that stay.
    Copies,
    /// Replicas that are needed, against what KEDA was told.
    Replicas,
    /// Milliseconds without work, against what is kept.
    GapMs,
    /// What keeping would have cost each time, in milliseconds of a replica, against the usual time.
    KeepCostMs,
    /// Spare GPUs, against those that are kept now.
    SpareGpus,
    /// A pod's place, against the one that it has.
    Place,
    /// Removals within the window.
    Removals,
}

/// A rail that an answer ran into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RailHit {
    /// Which.
    pub rail: Rail,
    /// What it allows.
    pub limit: u64,
    /// What was wanted, or is.
    pub found: u64,
}

/// Which rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rail {
    /// Somebody said: hold everything.
    Freeze,
    /// The API server is silent.
    Partition,
    /// Too many nodes of the pool are unknown, in percent.
    Unknown,
    /// The pool grew a moment ago.
    Settle,
    /// GPUs of all workloads.
    Gpus,
    /// Micro-dollars an hour of all workloads.
    Price,
    /// Nodes of the pool, at most.
    NodesMost,
    /// Nodes of the pool, at least.
    NodesLeast,
    /// Removals in one zone of one pool within the window.
    Removals,
    /// Nodes of the pool that may go within the window.
    Victims,
    /// Replicas of the workload, at most.
    ReplicasMost,
    /// Replicas of the workload, at least.
    ReplicasLeast,
    /// Protection without a break.
    Protection,
    /// Growth within one decision.
    Growth,
    /// Spare GPUs.
    Spare,
    /// It is off.
    Off,
    /// Pods ranked by one decision, and one pod within its time.
    Ranks,
}

/// Something that would change an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What would have to happen.
    pub when: When,
    /// How many or how much of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// When that is at the latest, if nothing else happens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Millis>,
}

/// What would have to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// A report comes.
    Report,
    /// Time passes.
    Time,
    /// So many nodes that stay have the image.
    Copies,
    /// The image is there.
    Pulled,
    /// The job ends.
    JobEnds,
    /// The GPU is read.
    GpuRead,
    /// A sample of demand comes.
    Demand,
    /// More waits than this, in thousandths.
    BacklogAbove,
    /// The rail is moved, or what it counts falls.
    Rail,
    /// The freeze ends.
    Thaw,
    /// The user allows it.
    Allowed,
    /// Work comes.
    Work,
}

impl Reason {
    /// An answer, with nothing that it rests on yet.
    pub const fn new(subject: Subject, verdict: Verdict, rule: Rule) -> Self {
        Self {
            subject,
            verdict,
            rule,
            inputs: Vec::new(),
            compared: Vec::new(),
            rails: Vec::new(),
            changes: Vec::new(),
            because: Vec::new(),
        }
    }

    /// With something that was known, and its age.
    pub fn knowing(mut self, fact: Fact, name: Option<String>, value: Option<u64>, age_ms: Option<u64>) -> Self {
        self.inputs.push(Input { fact, name, value, age_ms });
        self
    }

    /// With two numbers.
    pub fn comparing(mut self, what: Quantity, is: u64, with: u64) -> Self {
        let sign = if is < with { Sign::Less } else { Sign::NotLess };
        self.compared.push(Compared { what, is, sign, with });
        self
    }

    /// With a rail.
    pub fn against(mut self, hit: RailHit) -> Self {
        self.rails.push(hit);
        self
    }

    /// With what would change it.
    pub fn until(mut self, when: When, value: Option<u64>, at: Option<Millis>) -> Self {
        self.changes.push(Change { when, value, at });
        self
    }

    /// With an answer that it rests on.
    pub fn resting(mut self, on: Self) -> Self {
        self.because.push(on);
        self
    }
}
