//! A seed: a node that stays, and keeps a copy of every blob that the cluster pulled lately.
//!
//! Whoever has a blob tells the seeds, as it tells the coordinator. A seed takes it from the nodes that
//! have it, never from the origin, once nobody spoke of the blob for a while: those that pull it now
//! come first. So the nodes that pulled it may all go, and those that come later find it here.
//! Not here: how much room there is, and what leaves for it, which is the store's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Swarm;
use super::event::Action;
use super::limits::Limits;
use super::peer::{Members, PeerId, Zone, score};
use super::time::Time;
use crate::Digest;

/// Seeds that are told of a blob. More copies than this save nothing, and each word costs.
const TOLD_MAX: usize = 4;

/// After the first failure; it doubles with each.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// The seeds that keep `blob`, best ranked first, as far as they are in `scope`.
pub(super) fn told(members: &Members, blob: &Digest, scope: Option<Zone>) -> Vec<PeerId> {
    let mut seeds = members.seeds().to_vec();
    seeds.retain(|id| members.is_within(scope, id));
    if seeds.len() > 1 {
        seeds.sort_by_cached_key(|id| std::cmp::Reverse((score(blob, id), *id)));
        seeds.truncate(TOLD_MAX);
    }
    seeds
}

/// What this node means to take, if it is a seed.
#[derive(Debug, Default)]
pub(super) struct Seed {
    wanted: BTreeMap<Digest, Wanted>,
    /// The same, but for what it takes now, by when it may be taken.
    due: BTreeSet<(Time, Digest)>,
}

#[derive(Debug)]
struct Wanted {
    size: u64,
    /// Not before.
    at: Time,
    failures: u8,
    is_taken: bool,
}

impl Seed {
    /// Somebody has a blob that is not here.
    fn hears(&mut self, now: Time, blob: Digest, size: u64, limits: &Limits) {
        let at = now + limits.seed_quiet;
        let is_full = self.wanted.len() >= limits.seed_wanted_max;
        match self.wanted.get(&blob) {
            Some(wanted) if wanted.is_taken => return,
            Some(wanted) => _ = self.due.remove(&(wanted.at, blob)),
            None if size == 0 || is_full => return,
            None => {}
        }
        self.wanted.insert(blob, Wanted { size, at, failures: 0, is_taken: false });
        self.due.insert((at, blob));
    }

    /// A blob is here, whoever wanted it. Whether somebody else pulled it before.
    pub(super) fn is_here(&mut self, blob: &Digest) -> bool {
        let wanted = self.wanted.remove(blob);
        if let Some(wanted) = &wanted {
            self.due.remove(&(wanted.at, *blob));
        }
        wanted.is_some()
    }

    /// What was to be kept did not come.
    pub(super) fn failed(&mut self, now: Time, blob: &Digest, limits: &Limits) {
        let Some(wanted) = self.wanted.get_mut(blob).filter(|wanted| wanted.is_taken) else { return };
        wanted.failures += 1;
        if wanted.failures >= limits.seed_tries {
            self.wanted.remove(blob);
            return;
        }
        wanted.is_taken = false;
        wanted.at = now + TRY_AGAIN * (1 << wanted.failures);
        self.due.insert((wanted.at, *blob));
    }

    pub(super) fn tick(&mut self, now: Time, limits: &Limits, out: &mut Vec<Action>) {
        while self.has_room(limits) {
            let Some((at, blob)) = self.due.first().copied().filter(|(at, _)| *at <= now) else { break };
            self.due.remove(&(at, blob));
            if let Some(wanted) = self.wanted.get_mut(&blob) {
                wanted.is_taken = true;
                out.push(Action::Keep { blob, size: wanted.size });
            }
        }
    }

    /// When the next blob may be taken.
    pub(super) fn deadline(&self, limits: &Limits) -> Time {
        self.due.first().filter(|_| self.has_room(limits)).map_or(Time::NEVER, |(at, _)| *at)
    }

    fn has_room(&self, limits: &Limits) -> bool {
        self.wanted.len() - self.due.len() < limits.seed_takes
    }
}

impl Swarm {
    /// `from` has the blob: a seed wants it too, or knows now that it is still of use.
    pub(super) fn heard_of_holder(&mut self, now: Time, from: PeerId, blob: Digest, size: u64, out: &mut Vec<Action>) {
        let me = self.node.me;
        // What another zone has does not come here where each zone reads for itself.
        let is_beyond = !self.node.members.is_within(self.node.scope(self.node.zone), &from);
        if from == me || is_beyond || !self.node.members.is_seed(&me) {
            return;
        }
        if self.held.contains_key(&blob) {
            out.push(Action::Used(blob));
        } else if !self.downloads.contains_key(&blob) {
            self.seed.hears(now, blob, size, &self.node.limits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Member, Message, Refusal, RequestId, Zone};
    use super::*;
    use crate::pieces::Layout;

    const SIZE: u64 = 3 * 1024 * 1024;
    const HOLDS: Message = Message::Holds { size: SIZE };

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    /// Node `me` of four, of which the first is a seed.
    fn node(me: u8) -> Swarm {
        let mut swarm = Swarm::new(peer(me), Zone::default(), Limits::default(), 7);
        let member = |n| Member { id: peer(n), zone: Zone::default(), is_seed: n == 1 };
        swarm.handle(Time::ZERO, Event::Members(Members::new((1..=4).map(member).collect())));
        swarm
    }

    fn blob(n: u32) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn heard(swarm: &mut Swarm, now: Time, from: u8, blob: Digest, message: Message) -> Vec<Action> {
        swarm.handle(now, Event::Message { from: peer(from), blob, message })
    }

    fn kept(actions: &[Action]) -> Vec<Digest> {
        let blob = |action: &Action| match action {
            Action::Keep { blob, size: SIZE } => Some(*blob),
            _ => None,
        };
        actions.iter().filter_map(blob).collect()
    }

    #[test]
    fn seeds_are_told_of_every_blob_whoever_coordinates_it() {
        for n in 0..20 {
            let mut swarm = node(2);
            let told = swarm.handle(Time::ZERO, Event::Proven { blob: blob(n), layout: Layout::new(SIZE) });
            let word = Action::Send { to: peer(1), blob: blob(n), message: HOLDS };
            assert_eq!(told.iter().filter(|action| **action == word).count(), 1, "{told:?}");
            let word = Action::Send { to: peer(1), blob: blob(n), message: Message::Leave };
            assert!(swarm.handle(Time::ZERO, Event::Gone(blob(n))).contains(&word));
        }
    }

    #[test]
    fn a_seed_takes_a_blob_once_nobody_speaks_of_it_any_more_and_others_do_not() {
        let (mut seed, mut other) = (node(1), node(3));
        for second in [0, 4] {
            assert!(kept(&heard(&mut seed, at(second), 2, blob(1), HOLDS)).is_empty());
            heard(&mut other, at(second), 2, blob(1), HOLDS);
        }
        assert!(kept(&seed.handle(at(8), Event::Tick)).is_empty());
        assert!(seed.deadline() <= at(9));
        assert_eq!(kept(&seed.handle(at(9), Event::Tick)), [blob(1)]);
        assert!(kept(&seed.handle(at(60), Event::Tick)).is_empty(), "it is on its way");
        seed.handle(at(61), Event::Proven { blob: blob(1), layout: Layout::new(SIZE) });
        assert!(heard(&mut seed, at(62), 2, blob(1), HOLDS).contains(&Action::Used(blob(1))));
        assert!(kept(&seed.handle(at(120), Event::Tick)).is_empty());
        assert!(kept(&other.handle(at(120), Event::Tick)).is_empty(), "this one is no seed");
    }

    #[test]
    fn what_others_pulled_and_a_seed_finds_on_its_own_node_is_of_use_as_if_it_had_taken_it() {
        let mut seed = node(1);
        let proven = |n| Event::Proven { blob: blob(n), layout: Layout::new(SIZE) };
        heard(&mut seed, at(0), 2, blob(1), HOLDS);
        assert!(seed.handle(at(1), proven(1)).contains(&Action::Used(blob(1))));
        assert!(!seed.handle(at(1), proven(2)).contains(&Action::Used(blob(2))), "nobody else spoke of it");
        assert!(kept(&seed.handle(at(120), Event::Tick)).is_empty());
    }

    #[test]
    fn a_few_are_taken_at_a_time_and_what_fails_is_tried_again_a_few_times() {
        let limits = Limits::default();
        let mut seed = node(1);
        (0..3).for_each(|n| drop(heard(&mut seed, at(u64::from(n)), 2, blob(n), HOLDS)));
        assert_eq!(kept(&seed.handle(at(10), Event::Tick)), [blob(0), blob(1)]);
        assert_eq!(seed.deadline(), Time::NEVER, "the third has to wait for one of them");
        seed.handle(at(11), Event::Proven { blob: blob(0), layout: Layout::new(SIZE) });
        assert_eq!(kept(&seed.handle(at(11), Event::Tick)), [blob(2)]);
        seed.handle(at(12), Event::Proven { blob: blob(2), layout: Layout::new(SIZE) });
        let mut now = 12;
        for tries in 1..=limits.seed_tries {
            assert_eq!(seed.handle(at(now), Event::NotTaken(blob(1))), []);
            let due = seed.seed.deadline(&limits);
            assert_eq!(due == Time::NEVER, tries == limits.seed_tries, "{tries}");
            now += 10_000;
            assert_eq!(kept(&seed.handle(at(now), Event::Tick)).len(), usize::from(tries < limits.seed_tries));
        }
        heard(&mut seed, at(now), 2, blob(1), HOLDS);
        assert_eq!(kept(&seed.handle(at(now + 5), Event::Tick)), [blob(1)], "somebody spoke of it again");
    }

    #[test]
    fn what_a_seed_means_to_take_is_bounded() {
        let mut seed = Seed::default();
        let limits = Limits { seed_wanted_max: 2, ..Limits::default() };
        (0..3).for_each(|n| seed.hears(Time::ZERO, blob(n), SIZE, &limits));
        assert_eq!((seed.wanted.len(), seed.due.len()), (2, 2));
        seed.hears(Time::ZERO, blob(0), 0, &limits);
        assert_eq!(seed.wanted.len(), 2, "one that is known is heard all the same");
    }

    #[test]
    fn a_seed_is_served_while_nobody_else_needs_the_slots() {
        let mut swarm = node(2);
        swarm.handle(Time::ZERO, Event::Proven { blob: blob(1), layout: Layout::new(SIZE) });
        let mut ask = |from, n| {
            let asked = Event::Asked { from: peer(from), blob: blob(1), piece: 0, request: RequestId(n) };
            swarm.handle(Time::ZERO, asked)
        };
        let refused = |n| {
            let reason = Refusal::Busy(Limits::default().seed_pause);
            [Action::Refuse { request: RequestId(n), reason }]
        };
        assert_eq!(ask(1, 1), [Action::Serve(RequestId(1))]);
        assert_eq!(ask(3, 2), [Action::Serve(RequestId(2))]);
        assert_eq!(ask(1, 3), refused(3), "one slot is left, for others");
        assert_eq!(ask(4, 4), [Action::Serve(RequestId(4))]);
    }

    #[test]
    fn a_seed_owns_nothing_while_others_want_the_blob() {
        let join = |size| {
            let layout = Layout::new(size);
            let have = crate::pieces::Bitfield::new(layout.pieces());
            Message::Join(super::super::Join::of(size, have))
        };
        let size = 64 * 1024 * 1024;
        let leases = |actions: &[Action]| -> Vec<PeerId> {
            let lease = |action: &Action| match action {
                Action::Send { to, message: Message::Lease(_), .. } => Some(*to),
                _ => None,
            };
            actions.iter().filter_map(lease).collect()
        };
        let blob = (0..).map(blob).find(|blob| node(2).node.is_first(blob)).unwrap();
        let mut swarm = node(2);
        heard(&mut swarm, at(10), 3, blob, Message::Holds { size });
        let alone = heard(&mut swarm, at(10), 1, blob, join(size));
        assert!(leases(&alone).iter().all(|to| *to == peer(1)) && !leases(&alone).is_empty(), "{alone:?}");
        let mut swarm = node(2);
        heard(&mut swarm, at(10), 3, blob, Message::Holds { size });
        heard(&mut swarm, at(10), 4, blob, join(size));
        let late = heard(&mut swarm, at(10), 1, blob, join(size));
        assert!(leases(&late).iter().all(|to| *to == peer(4)), "{late:?}");
    }

    #[test]
    fn a_seed_makes_room_for_what_is_handed_to_it() {
        let take = Message::Take { size: SIZE, is_for_elsewhere: false };
        assert_eq!(kept(&heard(&mut node(1), Time::ZERO, 2, blob(1), take.clone())), [blob(1)]);
        let by_another = heard(&mut node(3), Time::ZERO, 2, blob(1), take);
        assert!(by_another.contains(&Action::Take { blob: blob(1), size: SIZE }), "{by_another:?}");
    }

    #[test]
    fn a_seed_that_comes_later_is_told_of_what_is_here() {
        let mut swarm = node(2);
        swarm.handle(Time::ZERO, Event::Proven { blob: blob(1), layout: Layout::new(SIZE) });
        let member = |n| Member { id: peer(n), zone: Zone::default(), is_seed: n == 1 || n == 5 };
        let told = swarm.handle(at(1), Event::Members(Members::new((1..=5).map(member).collect())));
        let word = |to| Action::Send { to: peer(to), blob: blob(1), message: HOLDS };
        assert!(told.contains(&word(5)) && !told.contains(&word(1)), "{told:?}");
    }

    #[test]
    fn who_goes_asks_the_seed_first() {
        let blob = (0..).map(blob).find(|blob| node(2).node.members.ranked(blob).first() == Some(&peer(3))).unwrap();
        let mut swarm = node(2);
        swarm.handle(Time::ZERO, Event::Proven { blob, layout: Layout::new(SIZE) });
        let take =
            |to| Action::Send { to: peer(to), blob, message: Message::Take { size: SIZE, is_for_elsewhere: false } };
        swarm.handle(Time::ZERO, Event::Leave(vec![blob]));
        // Nobody says how much room it has.
        let late = Time::ZERO + Limits::default().room_patience;
        assert_eq!(swarm.handle(late, Event::Tick), [take(1)]);
        assert_eq!(heard(&mut swarm, Time::ZERO, 1, blob, Message::TakeEnd { is_kept: false }), [take(3)]);
    }
}
