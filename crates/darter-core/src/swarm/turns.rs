//! Which of the blobs on their way here is asked for first.
//!
//! Those of a lower turn, since containerd unpacks layers in the order of their image. But after the first
//! few, which containerd waits for, small ones come in an order of this node's own: if all nodes took them
//! in the same one, all would wait for whoever has them first, and have nothing for each other.

use super::peer::{PeerId, score};
use crate::Digest;

/// containerd downloads so many layers of an image at a time, the first ones first.
const IN_ORDER: usize = 3;

#[derive(Debug)]
pub(super) struct Turns {
    me: PeerId,
    /// By turn.
    wanted: Vec<Wanted>,
    /// As they are asked for: looked at with every event, and changed with few.
    asked: Vec<Digest>,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    turn: u64,
    blob: Digest,
    /// It has one segment: there is nothing in it to share out.
    is_small: bool,
}

impl Turns {
    pub(super) const fn new(me: PeerId) -> Self {
        Self { me, wanted: Vec::new(), asked: Vec::new() }
    }

    /// Of two with one turn the later comes later.
    pub(super) fn insert(&mut self, turn: u64, blob: Digest, is_small: bool) {
        let at = self.wanted.partition_point(|other| other.turn <= turn);
        self.wanted.insert(at, Wanted { turn, blob, is_small });
        self.arrange();
    }

    pub(super) fn remove(&mut self, blob: &Digest) {
        self.wanted.retain(|other| other.blob != *blob);
        self.arrange();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Digest> {
        self.asked.iter()
    }

    fn arrange(&mut self) {
        let mut wanted = self.wanted.clone();
        if let Some(later) = wanted.get_mut(IN_ORDER..) {
            for run in later.chunk_by_mut(|one, next| one.is_small && next.is_small) {
                run.sort_by_cached_key(|wanted| score(&wanted.blob, &self.me));
            }
        }
        self.asked.clear();
        self.asked.extend(wanted.iter().map(|wanted| wanted.blob));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(n: u64) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn order(turns: &Turns) -> Vec<u64> {
        turns.iter().map(|other| (0..24).find(|n| blob(*n) == *other).unwrap()).collect()
    }

    #[test]
    fn small_blobs_after_the_first_few_come_in_an_order_of_each_nodes_own() {
        let order = |me: u8| {
            let mut turns = Turns::new(PeerId::from_bytes([me; 32]));
            // One that is large lies between them, and keeps its place.
            (0..24).for_each(|n| turns.insert(n, blob(n), n != 12));
            order(&turns)
        };
        let (one, other) = (order(1), order(2));
        for order in [&one, &other] {
            assert_eq!((&order[..3], order[12]), (&[0, 1, 2][..], 12), "{order:?}");
            assert!(order[3..12].iter().all(|n| *n < 12) && order[13..].iter().all(|n| *n > 12), "{order:?}");
        }
        assert_ne!(one, other);
    }

    #[test]
    fn large_blobs_come_by_turn_and_those_of_one_turn_as_they_came() {
        let mut turns = Turns::new(PeerId::from_bytes([1; 32]));
        for (turn, n) in [(5, 0), (1, 1), (5, 2), (9, 3), (1, 4)] {
            turns.insert(turn, blob(n), false);
        }
        assert_eq!(order(&turns), [1, 4, 0, 2, 3]);
        turns.remove(&blob(0));
        assert_eq!(order(&turns), [1, 4, 2, 3]);
    }
}
