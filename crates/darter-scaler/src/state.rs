//! What the scaler knows at one moment: nodes with their newest report, workloads with their demand,
//! pools with their prices, what it did lately.
//!
//! Plain values. Who fills them translates ages into moments, and keeps the bounds that [`State::check`]
//! asks for. Everything that was heard is a moment, and a moment that is missing means "not known".

use std::collections::BTreeMap;

use darter_core::Digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Millis;

/// Nodes of the largest cluster that Kubernetes supports, and twice that.
pub const NODES_MAX: usize = 10_000;
/// A kubelet keeps 110 pods by default, and a disk some hundreds of images.
pub const HELD_MAX: usize = 2_000;
/// Different images of a cluster.
pub const IMAGES_MAX: usize = 1_000_000;
/// Workloads that ask for GPUs.
pub const WORKLOADS_MAX: usize = 10_000;
/// The newest gaps of a workload: what it did weeks ago says little of today.
pub const GAPS_MAX: usize = 200;
/// Samples that a slope is taken over.
pub const SAMPLES_MAX: usize = 20;
/// Samples are kept this far apart, so that all of them tell of minutes.
pub const SAMPLE_STEP_MS: u64 = 5000;
/// The newest increments of a pool.
pub const INCREMENTS_MAX: usize = 200;

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// By UID: a name may be used again.
    pub nodes: BTreeMap<String, Node>,
    /// What [`Held::image`] counts into. The order means nothing.
    pub images: Vec<Image>,
    /// By `namespace/name`.
    pub workloads: BTreeMap<String, Workload>,
    /// By name.
    pub pools: BTreeMap<String, Pool>,
    /// Nodes that were removed lately.
    pub removals: Vec<Removal>,
    /// Somebody said: hold everything.
    pub freeze: Option<Freeze>,
    /// When the API server was last heard.
    pub watched: Millis,
}

/// Hold everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// Since when.
    pub since: Millis,
    /// In the words of who said it.
    pub why: String,
}

/// An image that some node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Its name.
    #[serde(serialize_with = "write_digest", deserialize_with = "read_digest")]
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

fn write_digest<S: Serializer>(digest: &Digest, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(digest)
}

fn read_digest<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name, for people.
    pub name: String,
    /// Its pool.
    pub pool: String,
    /// Its zone.
    pub zone: String,
    /// When it was asked for.
    pub created: Millis,
    /// Whether it has joined.
    pub registered: bool,
    /// Whether the startup taint is still there.
    pub tainted: bool,
    /// When the taint went; none where that is not known.
    pub untainted: Option<Millis>,
    /// Whether it is on its way out already.
    pub deleting: bool,
    /// Pods with GPUs.
    pub pods: Vec<Pod>,
    /// What protects it now.
    pub lease: Option<Lease>,
    /// Images that it was asked to bring.
    pub asked: Vec<u32>,
    /// Its newest report; none before the first since the scaler started.
    pub report: Option<Report>,
}

/// A pod with GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    /// Its UID.
    pub uid: String,
    /// Whose replica it is; none of those without a controller that counts replicas.
    pub workload: Option<String>,
    /// Its deletion cost now.
    pub cost: i32,
    /// When we last wrote that.
    pub ranked: Option<Millis>,
}

/// A protection that lapses by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Since when the node has been protected without a break.
    pub since: Millis,
    /// Until when.
    pub until: Millis,
}

/// What a node's agent said last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// When it was heard.
    pub heard: Millis,
    /// Its GPUs.
    pub gpus: Vec<Gpu>,
    /// Whole images.
    pub held: Vec<Held>,
    /// Images that are coming: how much of them is missing.
    pub pulls: Vec<Pull>,
    /// Jobs that asked not to be disturbed.
    pub jobs: Vec<Job>,
    /// The cloud takes the node back then.
    pub notice: Option<Millis>,
    /// When it last gave something to a peer.
    pub served: Option<Millis>,
    /// Whether all that it is to have is there.
    pub warm: bool,
}

/// One GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// What it does.
    pub work: Work,
    /// Since when it cannot be given work.
    pub sick: Option<Millis>,
}

/// What a GPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// No reading: that is not idleness.
    Unread,
    /// It worked until then, as far as anybody saw.
    Until(Millis),
}

/// An image that a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// Which, of [`State::images`].
    pub image: u32,
    /// When it was last used here.
    pub used: Millis,
}

/// An image that is coming.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pull {
    /// Which, of [`State::images`].
    pub image: u32,
    /// What is missing.
    pub bytes_left: u64,
}

/// A job that asked not to be disturbed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// What it calls itself.
    pub name: String,
    /// Until when it asked.
    pub until: Millis,
}

/// What is scaled: a Deployment behind a ScaledObject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Where its replicas run.
    pub pool: String,
    /// GPUs of one replica.
    pub gpus: u32,
    /// Never fewer replicas.
    pub least: u32,
    /// Never more.
    pub most: u32,
    /// Backlog that one replica is to have, in thousandths.
    pub target_milli: u64,
    /// What a cold start costs, in micro-dollars.
    pub cold_start_micros: u64,
    /// How long one takes, at the 95th percentile: what demand is looked ahead by.
    pub lead_ms: u64,
    /// Newest last, at most [`SAMPLES_MAX`].
    pub samples: Vec<Sample>,
    /// Times of the day at which replicas are to be there.
    pub floors: Vec<Floor>,
    /// What KEDA was told last.
    pub answered: u32,
    /// When that was last raised.
    pub raised: Option<Millis>,
    /// The same moment, where that was for more than demand itself asked for: by a forecast, or by the clock.
    #[serde(default)]
    pub ahead: Option<Millis>,
    /// Since when this is known at all: what was needed before is not.
    pub known: Millis,
    /// When how many were last needed: fewer and fewer, later and later.
    pub needed: Vec<Needed>,
    /// How long it had nothing to do each time, newest last, at most [`GAPS_MAX`].
    pub gaps: Vec<Gap>,
}

/// Demand at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// When.
    pub at: Millis,
    /// What waits or runs, in thousandths.
    pub backlog_milli: u64,
}

/// Replicas that are to be there at a time of the day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// Days, bit 0 Monday.
    pub days: u8,
    /// First minute of the day, UTC.
    pub from_minute: u16,
    /// The minute in which it ends.
    pub to_minute: u16,
    /// How many.
    pub replicas: u32,
}

/// So many were needed last then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needed {
    /// How many.
    pub replicas: u32,
    /// When last.
    pub at: Millis,
}

/// A time without work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gap {
    /// How long it was until work came.
    pub ms: u64,
    /// How long the replica was to be kept for it.
    pub kept_ms: u64,
}

/// Nodes of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Price of one node, in micro-dollars an hour.
    pub micros_per_hour: u64,
    /// GPUs of one node.
    pub gpus: u32,
    /// Never fewer nodes, as far as it is us who removes them.
    pub nodes_least: u32,
    /// Never more nodes, as far as it is us who asks.
    pub nodes_most: u32,
    /// Spare GPUs that are kept now.
    pub buffer: u32,
    /// Spare GPUs that the user wants in any case.
    pub buffer_least: u32,
    /// By how many GPUs demand rose within one lead time, each time that was looked at.
    pub increments: Vec<u32>,
    /// When more of it was last asked for.
    pub grew: Option<Millis>,
}

/// A node that was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removal {
    /// When.
    pub at: Millis,
    /// Its pool.
    pub pool: String,
    /// Its zone.
    pub zone: String,
}

/// Why a state cannot be decided on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// More than is ever looked at.
    #[error("{what}: {found}, and at most {most} are looked at")]
    TooMany {
        /// Of what.
        what: String,
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// A number of an image that none has.
    #[error("node {node} names image {image} of {known}")]
    NoSuchImage {
        /// Which node.
        node: String,
        /// What it names.
        image: u32,
        /// How many are known.
        known: usize,
    },
    /// A node or workload in a pool that is not there.
    #[error("{who} is in pool {pool}, which is not there")]
    NoSuchPool {
        /// Whose.
        who: String,
        /// Which.
        pool: String,
    },
}

impl State {
    /// Whether all bounds hold, and all that is named is there. Whoever reads a state from outside asks.
    pub fn check(&self) -> Result<(), StateError> {
        bound("nodes", self.nodes.len(), NODES_MAX)?;
        bound("images", self.images.len(), IMAGES_MAX)?;
        bound("workloads", self.workloads.len(), WORKLOADS_MAX)?;
        for node in self.nodes.values() {
            self.has_pool(&node.pool, &node.name)?;
            self.check_images(node)?;
        }
        for (name, workload) in &self.workloads {
            self.has_pool(&workload.pool, name)?;
            bound(&format!("gaps of {name}"), workload.gaps.len(), GAPS_MAX)?;
            bound(&format!("samples of {name}"), workload.samples.len(), SAMPLES_MAX)?;
        }
        self.pools
            .iter()
            .try_for_each(|(name, pool)| bound(&format!("increments of {name}"), pool.increments.len(), INCREMENTS_MAX))
    }

    fn check_images(&self, node: &Node) -> Result<(), StateError> {
        let Some(report) = &node.report else { return Ok(()) };
        bound(&format!("images of {}", node.name), report.held.len(), HELD_MAX)?;
        bound(&format!("pulls of {}", node.name), report.pulls.len(), HELD_MAX)?;
        let named = report.held.iter().map(|held| held.image).chain(report.pulls.iter().map(|pull| pull.image));
        match named.chain(node.asked.iter().copied()).find(|image| *image as usize >= self.images.len()) {
            Some(image) => Err(StateError::NoSuchImage { node: node.name.clone(), image, known: self.images.len() }),
            None => Ok(()),
        }
    }

    fn has_pool(&self, pool: &str, who: &str) -> Result<(), StateError> {
        match self.pools.contains_key(pool) {
            true => Ok(()),
            false => Err(StateError::NoSuchPool { who: who.to_owned(), pool: pool.to_owned() }),
        }
    }
}

fn bound(what: &str, found: usize, most: usize) -> Result<(), StateError> {
    match found <= most {
        true => Ok(()),
        false => Err(StateError::TooMany { what: what.to_owned(), found, most }),
    }
}

impl Workload {
    /// Takes in a sample: remembers it, and when how many replicas were last needed.
    pub fn observe(&mut self, sample: Sample) {
        // What comes in quick succession is one sample, the newest: a slope over moments is noise.
        let count = self.samples.len();
        let soon = count > 1 && sample.at.since(self.samples[count - 2].at) < SAMPLE_STEP_MS;
        if soon {
            self.samples.pop();
        } else if count >= SAMPLES_MAX {
            self.samples.remove(0);
        }
        self.samples.push(sample);
        let replicas = self.level(sample.backlog_milli);
        if replicas > 0 {
            self.needed.retain(|needed| needed.replicas > replicas);
            // A level that was needed later than a higher one; the bound is the workload's own.
            self.needed.push(Needed { replicas, at: sample.at });
        }
    }

    /// KEDA is told so many from now on; whether that is more.
    pub fn tell(&mut self, replicas: u32, now: Millis) -> bool {
        let is_more = replicas > self.answered;
        if is_more {
            let asked = self.samples.last().map_or(0, |newest| self.level(newest.backlog_milli));
            self.raised = Some(now);
            self.ahead = (replicas > asked).then_some(now);
        }
        self.answered = replicas;
        is_more
    }

    /// Ends a time without work.
    pub fn resume(&mut self, gap: Gap) {
        if self.gaps.len() >= GAPS_MAX {
            self.gaps.remove(0);
        }
        self.gaps.push(gap);
    }

    /// Replicas that a backlog needs, within what the workload may have.
    pub fn level(&self, backlog_milli: u64) -> u32 {
        let wanted = backlog_milli.div_ceil(self.target_milli.max(1));
        u32::try_from(wanted).unwrap_or(u32::MAX).min(self.most)
    }
}
