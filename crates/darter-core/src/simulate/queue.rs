//! The calendar of the model: what happens next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Nanoseconds since the start of a run.
pub(super) type Nanos = u64;

/// One thing that will happen. Small: tens of millions of them pass through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A node wants the blob.
    Start(u32),
    /// A message arrives: its place in the post.
    Message(u32),
    /// A piece request arrives at the node that is asked.
    Ask(u32),
    /// The answer to a piece request that is not the piece.
    NoPiece(u32),
    /// A block of a transfer has left the uplink.
    Block(u32),
    /// The last block of a piece has arrived.
    Piece(u32),
    /// A connection to the origin may send its next block.
    OriginReady(u32),
    /// A block of an import has left the origin.
    OriginBlock(u32),
    /// A piece of an import has arrived: at which node, and which piece.
    OriginPiece(u32, u32),
    /// A node asked to be woken.
    Tick(u32),
    /// A fault of the script.
    Fault(u32),
    /// Everybody learns that a node is gone.
    Lost(u32),
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<(Nanos, u64, Due)>>,
    /// Ties are played in the order in which they were scheduled.
    seq: u64,
}

impl Queue {
    pub(super) fn at(&mut self, time: Nanos, due: Due) {
        self.seq += 1;
        self.heap.push(Reverse((time, self.seq, due)));
    }

    pub(super) fn next(&mut self) -> Option<(Nanos, Due)> {
        self.heap.pop().map(|Reverse((time, _, due))| (time, due))
    }
}
