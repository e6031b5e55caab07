//! A second opinion before pieces are believed: two that have the whole blob are asked what it consists of.
//!
//! Whoever has the whole vouches for its pieces itself, and a liar would be found out by the blob's sha256
//! only, after all of it has come. Where two agree, no piece that is otherwise is taken from anybody. Not
//! here: the values themselves, and what follows where the two differ (the agent's `pulls::compare`).

use super::Cx;
use super::coordinator::Coordinator;
use super::download::Download;
use super::event::{Action, Join};
use super::peer::{PeerId, Zone};
use crate::pieces::Layout;

/// Holders that are named: two, and one each for two that do not say.
const NAMED: usize = 4;
/// So many of those that want a blob ask: all of a few, and of many no more than whoever has it can answer.
/// What they refuse does not reach the others through them.
const ASKING: u32 = 64;

impl Download {
    /// Asks two of those that its coordinator names, before the first piece is asked for.
    pub(super) fn compare(&mut self, from: PeerId, mut holders: Vec<PeerId>, cx: &mut Cx<'_>) {
        if is_late(self.layout, self.missing)
            || self.compared.is_some()
            || holders.is_empty()
            || from != self.coordinator(cx)
        {
            return;
        }
        holders.retain(|id| *id != cx.me && !self.is_shunned(id, cx));
        holders.truncate(NAMED);
        let asks = self.interested <= ASKING || cx.dice.below(self.interested as usize) < ASKING as usize;
        self.compared = Some(if asks { holders } else { Vec::new() });
        self.compare_next(cx);
    }

    /// One of them does not say. The next two are asked: a liar must not be able to prevent it.
    pub(super) fn not_compared(&mut self, peer: PeerId, cx: &mut Cx<'_>) {
        let before = self.compared.as_ref().map_or(0, Vec::len);
        self.compared.iter_mut().for_each(|holders| holders.retain(|id| *id != peer));
        if self.compared.as_ref().is_some_and(|holders| holders.len() < before) {
            self.compare_next(cx);
        }
    }

    fn compare_next(&self, cx: &mut Cx<'_>) {
        if let Some([one, other, ..]) = self.compared.as_deref() {
            cx.out.push(Action::Compare { blob: self.blob, holders: [*one, *other] });
        }
    }
}

impl Coordinator {
    /// Some that have all of it, by lot, so that not all newcomers ask the same. The first two are of different
    /// zones, if there are such: what spoils one zone's copies seldom spoils others.
    pub(super) fn holders_to_compare(
        &self,
        newcomer: &PeerId,
        join: &Join,
        zone: Zone,
        cx: &mut Cx<'_>,
    ) -> Vec<PeerId> {
        let is_cold = self.holders.is_empty() && self.incomplete == self.interested.len();
        if is_cold || is_late(self.layout, self.layout.pieces().saturating_sub(join.have.count())) {
            return Vec::new();
        }
        let complete = self.interested.iter().filter(|(_, node)| node.is_complete).map(|(id, node)| (id, node.zone));
        let all = self.holders.iter().map(|(id, holder)| (id, holder.zone)).chain(complete);
        let is_within = |its: Zone| !cx.limits.scope_is_zone || its == zone;
        let mut left: Vec<_> = all.filter(|(id, its)| *id != newcomer && is_within(*its)).collect();
        // One alone has nobody to be compared with.
        if left.len() < 2 {
            return Vec::new();
        }
        let mut named = Vec::new();
        while named.len() < NAMED && !left.is_empty() {
            let first = if named.len() == 1 { named.first().map(|(_, zone)| *zone) } else { None };
            let apart: Vec<usize> =
                (0..left.len()).filter(|at| first.is_some_and(|zone| left[*at].1 != zone)).collect();
            let at = if apart.is_empty() { cx.dice.below(left.len()) } else { apart[cx.dice.below(apart.len())] };
            let (id, its) = left.swap_remove(at);
            named.push((*id, its));
        }
        named.into_iter().map(|(id, _)| id).collect()
    }
}

/// Whether it tells nothing any more. One piece is the whole, whose sha256 tells at once; and most of what is
/// here was taken on somebody's word.
fn is_late(layout: Layout, missing: u64) -> bool {
    layout.pieces() < 2 || missing * 2 < layout.pieces()
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::super::{Event, Limits, Member, Members, Message, Swarm, Time};
    use super::*;
    use crate::Digest;
    use crate::pieces::Bitfield;

    const MIB: u64 = 1024 * 1024;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn members() -> Members {
        let member = |n| Member { id: peer(n), zone: Zone::default(), is_seed: false };
        Members::new((1..=u8::MAX).map(member).collect())
    }

    /// A blob that node 4 coordinates.
    fn blob() -> Digest {
        static BLOB: LazyLock<Digest> = LazyLock::new(|| {
            let (members, mut all) = (members(), (0..100_000_u32).map(|n| Digest::of(&n.to_le_bytes())));
            all.find(|it| members.ranked(it)[0] == peer(4)).unwrap()
        });
        *BLOB
    }

    /// Node 1 of many, which wants a blob of eight pieces and has the first `have` of them.
    fn wanting(seed: u64, have: u64) -> Swarm {
        let mut swarm = Swarm::new(peer(1), Zone::default(), Limits::default(), seed);
        swarm.handle(Time::ZERO, Event::Members(members()));
        let mut here = Bitfield::new(8);
        (0..have).for_each(|piece| here.set(piece));
        let layout = Layout::new(8 * MIB);
        swarm.handle(Time::ZERO, Event::Want { blob: blob(), layout, have: here, can_import: true, turn: 0 });
        swarm
    }

    fn heard(swarm: &mut Swarm, from: u8, message: Message) -> Vec<Action> {
        swarm.handle(Time::ZERO, Event::Message { from: peer(from), blob: blob(), message })
    }

    fn welcome(holders: &[u8], interested: u32) -> Message {
        let holders = holders.iter().map(|n| peer(*n)).collect();
        Message::Welcome { neighbours: Vec::new(), holders, interested }
    }

    const NOBODY: [[PeerId; 2]; 0] = [];

    /// Who is compared in consequence.
    fn compared(actions: Vec<Action>) -> Vec<[PeerId; 2]> {
        let holders = |action| match action {
            Action::Compare { holders, .. } => Some(holders),
            _ => None,
        };
        actions.into_iter().filter_map(holders).collect()
    }

    #[test]
    fn the_first_two_that_the_coordinator_names_are_asked_once() {
        let mut swarm = wanting(7, 0);
        assert_eq!(compared(heard(&mut swarm, 3, welcome(&[2, 3], 2))), NOBODY, "it is not the coordinator");
        assert_eq!(compared(heard(&mut swarm, 4, welcome(&[], 2))), NOBODY);
        assert_eq!(compared(heard(&mut swarm, 4, welcome(&[1, 3, 2], 2))), [[peer(3), peer(2)]], "and not itself");
        assert_eq!(compared(heard(&mut swarm, 4, welcome(&[2, 3], 2))), NOBODY, "once");
    }

    #[test]
    fn who_does_not_say_is_replaced_by_the_next() {
        let mut swarm = wanting(7, 0);
        assert_eq!(compared(heard(&mut swarm, 4, welcome(&[2, 3, 4], 2))), [[peer(2), peer(3)]]);
        let mut silent = |n| compared(swarm.handle(Time::ZERO, Event::NotCompared { blob: blob(), peer: peer(n) }));
        assert_eq!(silent(3), [[peer(2), peer(4)]]);
        assert_eq!(silent(3), NOBODY, "that was known");
        assert_eq!(silent(2), NOBODY, "there is one left");
    }

    #[test]
    fn who_has_more_than_half_of_it_asks_nobody() {
        for (have, asks) in [(4, true), (5, false)] {
            let actions = heard(&mut wanting(7, have), 4, welcome(&[2, 3], 2));
            assert_eq!(!compared(actions).is_empty(), asks, "{have} of 8");
        }
    }

    #[test]
    fn of_many_some_ask() {
        let asks = |seed: &u64| !compared(heard(&mut wanting(*seed, 0), 4, welcome(&[2, 3], 255))).is_empty();
        let asking = (0..400).filter(asks).count();
        assert!((60..140).contains(&asking), "{asking} of 400, where 64 of 255 should");
    }

    #[test]
    fn a_coordinator_names_some_of_those_that_have_it_all_and_two_zones_first() {
        let limits = |scope_is_zone| Limits { scope_is_zone, ..Limits::default() };
        let named_to = |have, seed, scope_is_zone, others: std::ops::RangeInclusive<u8>| {
            let mut swarm = Swarm::new(peer(1), Zone(1), limits(scope_is_zone), seed);
            // Node 9 is in another zone.
            let zone = |n: u8| Zone(if n == 9 { 2 } else { 1 });
            let all = (1..=9).map(|n| Member { id: peer(n), zone: zone(n), is_seed: false }).collect();
            swarm.handle(Time::ZERO, Event::Members(Members::new(all)));
            others.for_each(|n| drop(heard(&mut swarm, n, Message::Holds { size: 8 * MIB })));
            let mut here = Bitfield::new(8);
            (0..have).for_each(|piece| here.set(piece));
            let join = Join::of(8 * MIB, here);
            let holders = |action| match action {
                Action::Send { message: Message::Welcome { holders, .. }, .. } => Some(holders),
                _ => None,
            };
            heard(&mut swarm, 2, Message::Join(join)).into_iter().find_map(holders).unwrap()
        };
        let named = |seed, scope_is_zone, others| named_to(0, seed, scope_is_zone, others);
        assert!(named_to(4, 7, false, 3..=9).len() == NAMED && named_to(5, 7, false, 3..=9).is_empty());
        assert!(named(7, false, 2..=3).is_empty(), "the newcomer itself and one other");
        for seed in 0..20 {
            let (far, all) = (peer(9), named(seed, false, 3..=9));
            let zones = all.iter().take(2).filter(|id| **id == far).count();
            assert!(all.len() == NAMED && zones == 1, "seed {seed}: {all:?}");
            assert!(!all.contains(&peer(2)));
            assert!(!named(seed, true, 3..=9).contains(&far), "each zone reads for itself");
        }
        assert_ne!(named(1, false, 3..=9), named(2, false, 3..=9));
    }
}
