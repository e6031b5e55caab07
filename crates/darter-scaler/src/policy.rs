//! What the user wants of the scaler: windows, prices of mistakes, and rails.
//!
//! Integers only: milliseconds, micro-dollars, counts, percent.

use serde::{Deserialize, Serialize};

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// All of it. What a file leaves out has its default; a key that is none is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// How often an agent reports. Three of these make a report stale.
    pub report_period_ms: u64,
    /// Older than this, a report says nothing of now.
    pub report_lifetime_ms: u64,
    /// Older than this, a sample of demand says nothing of now.
    pub demand_lifetime_ms: u64,
    /// A GPU that worked within this time is at work.
    pub busy_ms: u64,
    /// A GPU that did nothing for so long, though a pod has it, is proved idle.
    pub idle_proof_ms: u64,
    /// A node that gave peers something within this time serves them.
    pub serving_ms: u64,
    /// How long a replica without work is kept.
    pub keep: Keep,
    /// How nodes are protected.
    pub protect: Protect,
    /// Warm-up of new nodes.
    pub warm: Warm,
    /// Spare capacity.
    pub headroom: Headroom,
    /// What may take a node away by its own decision; all off by default.
    pub remove: Remove,
    /// What no decision may do, whatever speaks for it.
    pub rails: Rails,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            report_period_ms: 5 * SECOND,
            report_lifetime_ms: MINUTE,
            demand_lifetime_ms: 90 * SECOND,
            busy_ms: MINUTE,
            idle_proof_ms: 10 * MINUTE,
            serving_ms: 30 * SECOND,
            keep: Keep::default(),
            protect: Protect::default(),
            warm: Warm::default(),
            headroom: Headroom::default(),
            remove: Remove::default(),
            rails: Rails::default(),
        }
    }
}

/// How long a replica without work is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keep {
    /// Fewer gaps than this tell nothing.
    pub gaps_least: u64,
    /// What is kept where gaps tell nothing, unless a cold start is worth less.
    pub usual_ms: u64,
    /// Never shorter.
    pub least_ms: u64,
    /// Never longer.
    pub most_ms: u64,
    /// As many gaps more are taken to have been just covered by the usual time: few gaps promise much.
    pub doubt: u64,
    /// What learning has to beat, of a thousand: the saving below which the usual time stays.
    pub margin_permille: u64,
}

impl Default for Keep {
    fn default() -> Self {
        Self { gaps_least: 5, usual_ms: 300 * SECOND, least_ms: 0, most_ms: HOUR, doubt: 3, margin_permille: 20 }
    }
}

impl Keep {
    /// A time within what is allowed.
    pub(crate) fn clamp(&self, ms: u64) -> u64 {
        ms.clamp(self.least_ms, self.most_ms.max(self.least_ms))
    }
}

/// How nodes are protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Protect {
    /// A lease lapses by itself after this; so long a dead scaler keeps nodes at most.
    pub lease_ms: u64,
    /// A lease with less than this left is renewed.
    pub renew_ms: u64,
    /// No node is protected for longer without a break: an agent that lies cannot hold a GPU for ever.
    pub most_ms: u64,
    /// An image that was used within this time is hot.
    pub hot_ms: u64,
    /// Copies of a hot image that nodes have which stay.
    pub copies: u16,
    /// Images up to this size are copied to a node that stays rather than hold a node for them.
    pub copy_bytes: u64,
}

impl Default for Protect {
    fn default() -> Self {
        Self {
            lease_ms: 10 * MINUTE,
            renew_ms: 5 * MINUTE,
            most_ms: 6 * HOUR,
            hot_ms: 30 * MINUTE,
            copies: 1,
            copy_bytes: 40_000_000_000,
        }
    }
}

/// Warm-up of new nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Warm {
    /// A node that is still warming so long after it was made is stuck.
    pub deadline_ms: u64,
    /// A node that just became warm stays for its first pod.
    pub grace_ms: u64,
}

impl Default for Warm {
    fn default() -> Self {
        Self { deadline_ms: 20 * MINUTE, grace_ms: 2 * MINUTE }
    }
}

/// Spare capacity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Headroom {
    /// What it costs to have one GPU too few for an hour, in percent of what one too many costs.
    pub penalty_percent: u64,
    /// Fewer increments than this tell nothing.
    pub increments_least: u64,
    /// Never more spare GPUs in a pool than this.
    pub most: u32,
}

impl Default for Headroom {
    fn default() -> Self {
        Self { penalty_percent: 400, increments_least: 20, most: 4 }
    }
}

/// What may take a node away by its own decision.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Remove {
    /// Nodes that their cloud is about to take back.
    pub doomed: bool,
    /// Nodes whose warm-up never ends, by their own word.
    pub stuck: bool,
    /// Nodes with a GPU that cannot be given work.
    pub sick: bool,
}

/// What no decision may do. A rail only ever holds still: it raises and removes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rails {
    /// GPUs that all workloads may ask for together.
    pub gpus_most: u32,
    /// Micro-dollars an hour that all workloads may ask for together.
    pub micros_per_hour_most: u64,
    /// Removals of nodes in one zone of one pool within the window.
    pub removals_most: u32,
    /// The window.
    pub removals_window_ms: u64,
    /// Nodes of a pool that may go within the window, in percent, and never fewer than one.
    pub victims_percent: u64,
    /// No node goes, and no spare capacity, so soon after its pool grew.
    pub settle_ms: u64,
    /// No scale-in of a pool of which more nodes than this are unknown, in percent.
    pub unknown_percent: u64,
    /// No scale-in when the API server was silent for so long.
    pub partition_ms: u64,
    /// A pod is ranked at most once in this time.
    pub rank_every_ms: u64,
    /// Pods that are ranked by one decision; the rest wait for the next.
    pub ranks_most: u32,
}

impl Default for Rails {
    fn default() -> Self {
        Self {
            gpus_most: 1000,
            micros_per_hour_most: 10_000_000_000,
            removals_most: 2,
            removals_window_ms: 10 * MINUTE,
            victims_percent: 10,
            settle_ms: 2 * MINUTE,
            unknown_percent: 20,
            partition_ms: MINUTE,
            rank_every_ms: MINUTE,
            ranks_most: 50,
        }
    }
}
