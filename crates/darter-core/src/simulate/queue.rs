//! The calendar of the model: what happens next.

/// Nanoseconds since the start of a run.
pub(super) type Nanos = u64;

/// One thing that will happen. Small: tens of millions of them pass through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A node wants the blob.
    Start(u32),
    /// Messages that a node sent at one time arrive: their place in the post.
    Messages(u32),
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
    /// The receiver of a transfer sees that its connection broke.
    Cut { to: u32, from: u32, blob: u16, piece: u32 },
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

/// A radix heap. Nothing is scheduled before what was played last, so entries lie in buckets by the
/// highest bit in which their time differs from it, and move to lower buckets as it comes near: short
/// runs over memory in its order, where a binary heap of millions jumps about.
///
/// Entries of one time are always in one bucket, in the order in which they were scheduled.
#[derive(Debug)]
pub(super) struct Queue {
    /// The first holds what is due at `last`.
    buckets: Vec<Vec<(Nanos, Due)>>,
    /// How many of the first bucket were played.
    played: usize,
    last: Nanos,
}

impl Default for Queue {
    fn default() -> Self {
        Self { buckets: (0..=Nanos::BITS).map(|_| Vec::new()).collect(), played: 0, last: 0 }
    }
}

impl Queue {
    pub(super) fn at(&mut self, time: Nanos, due: Due) {
        let time = time.max(self.last);
        let bucket = self.bucket(time);
        self.buckets[bucket].push((time, due));
    }

    pub(super) fn next(&mut self) -> Option<(Nanos, Due)> {
        if self.played == self.buckets[0].len() {
            self.advance()?;
        }
        let entry = self.buckets[0][self.played];
        self.played += 1;
        Some(entry)
    }

    fn bucket(&self, time: Nanos) -> usize {
        (Nanos::BITS - (time ^ self.last).leading_zeros()) as usize
    }

    /// Goes to the next time at which something is due.
    fn advance(&mut self) -> Option<()> {
        self.buckets[0].clear();
        self.played = 0;
        let bucket = self.buckets.iter().position(|bucket| !bucket.is_empty())?;
        let mut entries = std::mem::take(&mut self.buckets[bucket]);
        self.last = entries.iter().map(|(time, _)| *time).min()?;
        for (time, due) in entries.drain(..) {
            let lower = self.bucket(time);
            self.buckets[lower].push((time, due));
        }
        // Its memory is used again.
        self.buckets[bucket] = entries;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a list that is sorted by time, and kept in order where times are the same.
        #[test]
        fn what_is_due_comes_by_time_then_in_the_order_of_scheduling(steps in prop::collection::vec((0_u64..300, any::<bool>()), 0..200)) {
            let (mut queue, mut list, mut now) = (Queue::default(), Vec::new(), 0);
            for (n, (wait, is_next)) in (0_u32..).zip(steps) {
                queue.at(now + wait * wait, Due::Tick(n));
                let place = list.partition_point(|(time, _)| *time <= now + wait * wait);
                list.insert(place, (now + wait * wait, Due::Tick(n)));
                if is_next {
                    let first = list.remove(0);
                    now = first.0;
                    prop_assert_eq!(queue.next(), Some(first));
                }
            }
            for entry in list {
                prop_assert_eq!(queue.next(), Some(entry));
            }
            prop_assert_eq!(queue.next(), None);
        }
    }
}
