//! What came of it.

/// Counts and times of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Requests that were served.
    pub requests: u64,
    /// Of which so many waited for a replica to start.
    pub colds: u64,
    /// Replicas that were started.
    pub starts: u64,
    /// How long each request waited, the shortest first.
    pub waits_ms: Vec<u64>,
    /// Nodes, from when they were asked for to when they were gone.
    pub node_ms: u64,
    /// Of which replicas worked so long.
    pub busy_ms: u64,
    /// Nodes that were launched.
    pub launches: u64,
    /// Requests that lost their replica in the middle.
    pub killed: u64,
    /// Nodes that went with the only copy of an image in use lately.
    pub last_copies_lost: u64,
    /// Nodes that went although they were protected.
    pub leases_broken: u64,
}

impl Outcome {
    pub(super) fn served(&mut self, waited_ms: u64, cold: bool) {
        self.requests += 1;
        self.colds += u64::from(cold);
        self.waits_ms.push(waited_ms);
    }

    pub(super) fn finish(mut self) -> Self {
        self.waits_ms.sort_unstable();
        self
    }

    /// Nodes without work.
    pub const fn idle_ms(&self) -> u64 {
        self.node_ms.saturating_sub(self.busy_ms)
    }

    /// Idle time and started replicas, in milliseconds of a GPU.
    pub const fn total_ms(&self, cold_ms: u64) -> u64 {
        self.idle_ms().saturating_add(self.starts.saturating_mul(cold_ms))
    }

    /// The wait that so many of a thousand requests did not exceed.
    pub fn wait_ms(&self, permille: usize) -> u64 {
        let place = (self.waits_ms.len() * permille).div_ceil(1000).saturating_sub(1);
        self.waits_ms.get(place).copied().unwrap_or(0)
    }
}
