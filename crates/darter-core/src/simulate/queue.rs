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
    /// A piece of an import has arrived.
    OriginPiece {
        /// At which node.
        to: u32,
        /// Of which blob.
        blob: u16,
        /// Which piece.
        piece: u32,
    },
    /// Nothing comes of a transfer, and those at its ends see it.
    Broke(u32),
    /// The receiver of a transfer has waited long enough, if it is still the one of this serial.
    GiveUp(u32, u32),
    /// A node asked to be woken.
    Tick(u32),
    /// A fault of the script.
    Fault(u32),
    /// A node that stood still goes on.
    Resume(u32),
    /// Everybody learns that a node is gone.
    Lost(u32),
    /// Everybody learns who is there.
    Look,
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
