//! What is played.

use std::time::Duration;

use crate::Digest;
use crate::pieces::Layout;
use crate::swarm::{Limits, Message};

/// One blob, the nodes that want it, the links between them, and what goes wrong.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Nodes that want the blob.
    pub nodes: u32,
    /// Further nodes that have it whole from the start.
    pub holders: u32,
    /// The blob, or the first of several.
    pub layout: Layout,
    /// More blobs.
    pub further: Vec<Layout>,
    /// Which blobs a node wants: node n those of the image n modulo their number. No image: all.
    pub images: Vec<Vec<u32>>,
    /// Bytes per second that a node sends.
    pub uplink: u64,
    /// Bytes per second that a node receives.
    pub downlink: u64,
    /// Where the blob comes from if nobody has it.
    pub origin: Origin,
    /// From one node to another.
    pub latency: Duration,
    /// Blocks of a piece: what links serve in turn.
    pub blocks: u32,
    /// Nodes start within this time of each other, in an order by lot.
    pub spread: Duration,
    /// Nodes are in this many zones, in turn.
    pub zones: u32,
    /// What goes wrong, and when.
    pub faults: Vec<(Duration, Fault)>,
    /// How long everybody needs to learn that a node is gone, or that one is there.
    pub detection: Duration,
    /// Without progress for this long a node gives a request up.
    pub patience: Duration,
    /// Nodes have just started, know nobody, and find each other within this time. Zero: they know each
    /// other for long.
    pub introductions: Duration,
    /// The bounds of every node.
    pub limits: Limits,
    /// Decides every lot.
    pub seed: u64,
    /// The invariants of the node that acts are checked after every so many events; 0: never.
    pub check_every: u64,
    /// Bytes of a message on the wire, which this crate does not know; none: they are not counted.
    pub weigh: Option<fn(&Digest, &Message) -> u64>,
    /// Nothing is played after this time.
    pub end: Duration,
}

/// The registry.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// Bytes per second in all.
    pub rate: u64,
    /// Bytes per second of one connection.
    pub connection_rate: u64,
    /// From a request to its first byte.
    pub latency: Duration,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The node is gone for good.
    Kill(u32),
    /// The node that coordinates the blob is gone for good.
    KillCoordinator,
    /// A node that reads the origin at this moment is gone for good.
    KillImporter,
    /// The node stands still for this long. Its connections stay, and what comes for it waits.
    Pause(u32, Duration),
    /// The node that coordinates the blob stands still for this long.
    PauseCoordinator(Duration),
    /// Nodes of even number and those of odd number do not reach each other for this long.
    Partition(Duration),
    /// These two do not reach each other any more.
    Sever(u32, u32),
    /// The first cannot ask the second for pieces; messages pass.
    Unreachable(u32, u32),
    /// From now on so many of a thousand messages are lost.
    Lose(u32),
    /// From now on the node's uplink has a tenth of its rate.
    Slow(u32),
    /// From now on the node accepts requests and sends nothing.
    Stall(u32),
    /// From now on what the node sends does not match its hash.
    Corrupt(u32),
    /// From now on what the node reads for the others is not what the origin has, and it vouches for it.
    Lie(u32),
    /// From now on the node says that it has everything.
    Boast(u32),
    /// The node's disk is full: it wants no blob of the swarm any more.
    DiskFull(u32),
    /// The node is of a version that knows nothing of kept slots.
    Old(u32),
    /// The node's clock leaps forward by this much.
    Leap(u32, Duration),
    /// The node's clock stands still for this long, then is right again.
    Freeze(u32, Duration),
    /// The origin answers 429 to every request that starts before the given time is over.
    Throttle(Duration),
    /// The origin answers 403 to this node.
    Forbid(u32),
}

impl Scenario {
    /// `nodes` that want a blob of `size` bytes at once, on links of 10 Gbit/s, with an origin of
    /// `share` times the rate of one link.
    pub fn cold(nodes: u32, size: u64, share: u32) -> Self {
        // 10 Gbit/s less the headers of Ethernet, IP and TCP.
        let rate = 1_186_250_000;
        Self {
            nodes,
            holders: 0,
            layout: Layout::new(size),
            further: Vec::new(),
            images: Vec::new(),
            uplink: rate,
            downlink: rate,
            origin: Origin {
                rate: rate * u64::from(share),
                connection_rate: rate * u64::from(share),
                latency: Duration::from_micros(500),
            },
            latency: Duration::from_micros(50),
            blocks: 8,
            spread: Duration::ZERO,
            zones: 1,
            faults: Vec::new(),
            detection: Duration::from_millis(20),
            patience: Duration::from_millis(200),
            introductions: Duration::ZERO,
            limits: Limits::default(),
            seed: 1,
            check_every: 0,
            weigh: None,
            end: Duration::from_secs(3600),
        }
    }

    /// The layouts of all blobs.
    pub(super) fn layouts(&self) -> impl Iterator<Item = Layout> {
        std::iter::once(self.layout).chain(self.further.iter().copied())
    }

    /// Whether node `n` wants the blob of this number.
    pub(super) fn wants(&self, n: u32, blob: usize) -> bool {
        let count = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        n.checked_rem(count).is_none_or(|image| self.images[image as usize].iter().any(|other| *other as usize == blob))
    }

    /// The n-th number by lot for a seed: for scenarios that are made up.
    pub fn lot(seed: u64, n: u64) -> u64 {
        let digest = Digest::of(&[seed.to_le_bytes(), n.to_le_bytes()].concat());
        digest.as_bytes().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// `nodes` that want at once what `holders` have, and no origin is asked.
    pub fn warm(nodes: u32, holders: u32, size: u64) -> Self {
        Self { holders, ..Self::cold(nodes, size, 1) }
    }
}
