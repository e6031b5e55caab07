//! The blobs that this node coordinates, and when each of them is to be looked at next.
//!
//! A member may speak of thousands of blobs, and what one message costs must not grow with their number:
//! whoever speaks much would slow down what the others say. So only what was touched is looked at again,
//! and a tick goes to those that are due. Not here: what is known of one blob (`coordinator`).

use std::collections::{BTreeMap, BTreeSet};

use super::coordinator::Coordinator;
use super::limits::Limits;
use super::time::Time;
use crate::Digest;

#[derive(Debug, Default)]
pub(super) struct Coordinated {
    states: BTreeMap<Digest, State>,
    /// Those that have a time, by it.
    due: BTreeSet<(Time, Digest)>,
    /// Lent for a change since the last `settle`.
    touched: BTreeSet<Digest>,
    /// How often one was looked at.
    #[cfg(test)]
    looks: usize,
}

#[derive(Debug)]
struct State {
    coordinator: Coordinator,
    due: Time,
}

impl Coordinated {
    pub(super) fn get(&self, blob: &Digest) -> Option<&Coordinator> {
        Some(&self.states.get(blob)?.coordinator)
    }

    pub(super) fn get_mut(&mut self, blob: &Digest) -> Option<&mut Coordinator> {
        let state = self.states.get_mut(blob)?;
        self.touched.insert(*blob);
        Some(&mut state.coordinator)
    }

    pub(super) fn contains(&self, blob: &Digest) -> bool {
        self.states.contains_key(blob)
    }

    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Digest, &Coordinator)> {
        self.states.iter().map(|(blob, state)| (blob, &state.coordinator))
    }

    /// All of them, for a change.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&Digest, &mut Coordinator)> {
        self.touched.extend(self.states.keys());
        self.states.iter_mut().map(|(blob, state)| (blob, &mut state.coordinator))
    }

    pub(super) fn insert(&mut self, blob: Digest, coordinator: Coordinator) {
        self.remove(&blob);
        self.states.insert(blob, State { coordinator, due: Time::NEVER });
        self.touched.insert(blob);
    }

    pub(super) fn remove(&mut self, blob: &Digest) {
        if let Some(state) = self.states.remove(blob) {
            self.due.remove(&(state.due, *blob));
        }
    }

    /// Forgets those of which nobody speaks any more.
    pub(super) fn forget_idle(&mut self) {
        let Self { states, due, .. } = self;
        states.retain(|blob, state| {
            let is_kept = !state.coordinator.is_idle();
            if !is_kept {
                due.remove(&(state.due, *blob));
            }
            is_kept
        });
    }

    /// Those that are to be looked at by now.
    pub(super) fn due_by(&self, now: Time) -> Vec<Digest> {
        self.due.iter().take_while(|(at, _)| *at <= now).map(|(_, blob)| *blob).collect()
    }

    /// Puts down when those that were touched are to be looked at. `settled_at`: from when on this node knows
    /// the others.
    pub(super) fn settle(&mut self, now: Time, settled_at: Time, limits: &Limits) {
        while let Some(blob) = self.touched.pop_first() {
            let Some(state) = self.states.get_mut(&blob) else { continue };
            #[cfg(test)]
            {
                self.looks += 1;
            }
            let due = state.coordinator.deadline(now, settled_at, limits);
            if due == state.due {
                continue;
            }
            self.due.remove(&(state.due, blob));
            state.due = due;
            if due != Time::NEVER {
                self.due.insert((due, blob));
            }
        }
    }

    /// When the first of them is to be looked at.
    pub(super) fn deadline(&self) -> Time {
        self.due.first().map_or(Time::NEVER, |(at, _)| *at)
    }

    /// Whether no lease of any of them becomes late before it is looked at.
    pub(super) fn due_is_right(&self, limits: &Limits) -> bool {
        let is_right = |(blob, state): (&Digest, &State)| {
            let is_listed = state.due == Time::NEVER || self.due.contains(&(state.due, *blob));
            is_listed && state.due <= state.coordinator.overdue_at(limits)
        };
        self.touched.is_empty() && self.due.len() <= self.states.len() && self.states.iter().all(is_right)
    }
}

impl Coordinator {
    /// When `tick` is due: a lease is late, or the origin may be read again, or for the first time, or those
    /// who wait for that are to hear of it.
    fn deadline(&self, now: Time, settled_at: Time, limits: &Limits) -> Time {
        let times = [self.budget.deadline(), settled_at, self.gathers_until, self.tells_at(limits)];
        let times = times.into_iter().filter(|at| *at > now && self.incomplete > 0);
        times.fold(self.overdue_at(limits), Time::min)
    }

    /// When the first lease is late, unless it shows something before.
    fn overdue_at(&self, limits: &Limits) -> Time {
        let tables = self.tables.values().map(|table| table.deadline(limits.lease_patience));
        tables.min().unwrap_or(Time::NEVER)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Action, Event, Join, Member, Members, Message, PeerId, Swarm, Zone};
    use super::*;
    use crate::pieces::{Bitfield, Layout};

    const SIZE: u64 = 64 << 20;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn blob(n: u64) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn at(seconds: u64) -> Time {
        Time::from_micros(seconds * 1_000_000)
    }

    /// Node 1 of three, which knows them all.
    fn node() -> Swarm {
        let mut swarm = Swarm::new(peer(1), Zone::default(), Limits::default(), 7);
        let members = (1..=3).map(|n| Member { id: peer(n), zone: Zone::default(), is_seed: false }).collect();
        swarm.handle(Time::ZERO, Event::Members(Members::new(members)));
        swarm
    }

    fn wants(swarm: &mut Swarm, now: Time, n: u64) -> Vec<Action> {
        let have = Bitfield::new(Layout::new(SIZE).pieces());
        let join = Join::of(SIZE, have);
        swarm.handle(now, Event::Message { from: peer(2), blob: blob(n), message: Message::Join(join) })
    }

    #[test]
    fn what_one_message_costs_does_not_grow_with_the_number_of_blobs() {
        let mut swarm = node();
        for n in 0..200 {
            wants(&mut swarm, at(10), n);
        }
        assert_eq!(swarm.coordinated.len(), 200);
        let looks = swarm.coordinated.looks;
        swarm.handle(at(11), Event::Tick);
        assert_eq!(swarm.coordinated.looks, looks, "none is due");
        wants(&mut swarm, at(11), 7);
        assert_eq!(swarm.coordinated.looks, looks + 1, "what it speaks of, and no other");
        assert_eq!(swarm.check_invariants(), Ok(()));
    }

    #[test]
    fn each_blob_is_looked_at_in_its_time_and_those_that_are_gone_never() {
        let mut swarm = node();
        let mine: Vec<u64> = (0..100).filter(|n| swarm.node.is_first(&blob(*n))).take(2).collect();
        let [early, late] = [mine[0], mine[1]];
        wants(&mut swarm, at(10), early);
        let first = swarm.deadline();
        wants(&mut swarm, at(11), late);
        assert_eq!(swarm.deadline(), first, "the first comes first");
        let leave = |n: u64| Event::Message { from: peer(2), blob: blob(n), message: Message::Leave };
        swarm.handle(at(11), leave(early));
        assert_eq!(swarm.deadline(), first + Duration::from_secs(1));
        swarm.handle(at(11), Event::PeerLost(peer(2)));
        assert_eq!((swarm.deadline(), swarm.coordinated.len()), (Time::NEVER, 0));
        assert_eq!(swarm.check_invariants(), Ok(()));
    }
}
