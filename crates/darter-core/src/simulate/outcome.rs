//! What a run came to.

use std::collections::{BTreeMap, BTreeSet};

/// The figures of one run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// When each node that lived to the end had the blob whole, in seconds after it wanted it.
    /// Nothing for nodes that never had it.
    pub finished: Vec<Option<f64>>,
    /// Whether each node lived to the end, was honest and had room.
    pub alive: Vec<bool>,
    /// When the last node had the blob, in seconds after the first wanted it.
    pub last: f64,
    /// Bytes that the origin sent.
    pub origin_bytes: u64,
    /// Bytes of pieces that went from node to node, and those of them between zones.
    pub peer_bytes: u64,
    /// See `peer_bytes`.
    pub cross_zone_bytes: u64,
    /// Bytes of pieces that were here already when they came.
    pub duplicate_bytes: u64,
    /// Messages by kind.
    pub messages: BTreeMap<&'static str, u64>,
    /// Bytes of them, where the scenario says how they are weighed.
    pub message_bytes: u64,
    /// When each node had the first piece of the first blob, in seconds after it wanted it.
    pub first_pieces: Vec<Option<f64>>,
    /// The most neighbours that a node had for a blob at any time.
    pub neighbours: usize,
    /// Piece requests that were refused.
    pub refused: u64,
    /// Import requests that the origin throttled.
    pub throttled: u64,
    /// Peers that were banned.
    pub bans: u64,
    /// Pieces with wrong bytes that came, by who sent them and who got them.
    pub wasted: BTreeMap<(u32, u32), u64>,
    /// How often a node had all of a blob and found it wrong.
    pub restarts: u64,
    /// Invariants of nodes that did not hold.
    pub violations: BTreeSet<&'static str>,
    /// Events played: the cost of the run.
    pub events: u64,
}

impl Outcome {
    /// The completion time at `share` (0 to 1) of the nodes that finished, in seconds.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut times: Vec<f64> = self.finished.iter().flatten().copied().collect();
        times.sort_by(f64::total_cmp);
        let last = times.len().saturating_sub(1);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
        let at = (share * last as f64).round() as usize;
        times.get(at).copied().unwrap_or(f64::NAN)
    }

    /// Whether every node that lived has the blob.
    pub fn is_complete(&self) -> bool {
        self.finished.iter().zip(&self.alive).all(|(finished, alive)| finished.is_some() || !alive)
    }
}
