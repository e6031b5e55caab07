//! What each peer made this node remember as a coordinator, and that nobody makes it more than a share.
//!
//! A member can speak of blobs that do not exist, as many and as large as it likes. Each costs memory
//! here, and what one member makes up must neither fill it nor push out what the others said. Whatever
//! is remembered holds a `Charge`, and is written off with it. Not here: what becomes of a peer that
//! asks for more (`hearing`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::limits::Limits;
use super::peer::PeerId;

/// What is remembered because of each peer.
#[derive(Debug, Default)]
pub(super) struct Register(BTreeMap<PeerId, Arc<Account>>);

// Atomic for the sake of `Send`: one machine is never in two threads at once.
#[derive(Debug, Default)]
struct Account {
    blobs: AtomicU64,
    tables: AtomicU64,
    segments: AtomicU64,
}

/// One entry of an account, written off when it is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    account: Arc<Account>,
    of: Of,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Blob,
    Table(u64),
}

impl Register {
    /// For what is remembered of a blob of which `peer` speaks first. None: it has its share.
    pub(super) fn blob(&mut self, peer: PeerId, me: PeerId, limits: &Limits) -> Option<Charge> {
        let account = self.account(peer);
        let has_room = peer == me || read(&account.blobs) < limits.blobs_per_peer;
        has_room.then(|| Charge::new(account, Of::Blob))
    }

    /// For the segments of a blob that `peer` wants before others of its zone do. None: it has its share.
    /// One blob is let in however large it is.
    pub(super) fn table(&mut self, peer: PeerId, segments: u64, me: PeerId, limits: &Limits) -> Option<Charge> {
        let account = self.account(peer);
        let (tables, wanted) = (read(&account.tables), read(&account.segments));
        let is_small = tables == 0 || wanted.saturating_add(segments) <= limits.segments_per_peer;
        let has_room = peer == me || (tables < limits.tables_per_peer && is_small);
        has_room.then(|| Charge::new(account, Of::Table(segments)))
    }

    fn account(&mut self, peer: PeerId) -> Arc<Account> {
        if !self.0.contains_key(&peer) {
            // As many are left as peers of which something is remembered.
            self.0.retain(|_, account| Arc::strong_count(account) > 1);
        }
        self.0.entry(peer).or_default().clone()
    }
}

impl Charge {
    fn new(account: Arc<Account>, of: Of) -> Self {
        match of {
            Of::Blob => _ = account.blobs.fetch_add(1, Ordering::Relaxed),
            Of::Table(segments) => {
                account.tables.fetch_add(1, Ordering::Relaxed);
                account.segments.fetch_add(segments, Ordering::Relaxed);
            }
        }
        Self { account, of }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        match self.of {
            Of::Blob => _ = self.account.blobs.fetch_sub(1, Ordering::Relaxed),
            Of::Table(segments) => {
                self.account.tables.fetch_sub(1, Ordering::Relaxed);
                self.account.segments.fetch_sub(segments, Ordering::Relaxed);
            }
        }
    }
}

fn read(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::{Action, Event, Join, Member, Members, Message, Swarm, Time, Zone};
    use super::*;
    use crate::Digest;
    use crate::pieces::{Bitfield, Layout};

    const MIB: u64 = 1 << 20;
    const NOW: Time = Time::from_micros(10_000_000);

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn blob(n: u32) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    /// Node 1 of four, old enough to believe that it knows them all.
    fn node(limits: Limits) -> Swarm {
        let mut swarm = Swarm::new(peer(1), Zone::default(), limits, 7);
        let members = (1..=4).map(|n| Member { id: peer(n), zone: Zone(u64::from(n % 2)), is_seed: false }).collect();
        swarm.handle(Time::ZERO, Event::Members(Members::new(members)));
        swarm
    }

    fn join(size: u64) -> Message {
        let have = Bitfield::new(Layout::new(size).pieces());
        Message::Join(Join::of(size, have))
    }

    fn heard(swarm: &mut Swarm, from: u8, blob: Digest, message: Message) -> Vec<Action> {
        heard_at(NOW, swarm, from, blob, message)
    }

    fn heard_at(now: Time, swarm: &mut Swarm, from: u8, blob: Digest, message: Message) -> Vec<Action> {
        swarm.handle(now, Event::Message { from: peer(from), blob, message })
    }

    /// Bans are over then.
    fn hours_later(hours: u64) -> Time {
        NOW + Duration::from_secs(hours * 3600)
    }

    fn is_rejected(actions: &[Action]) -> bool {
        actions.iter().any(|action| matches!(action, Action::Reject { .. }))
    }

    fn is_banned(actions: &[Action], who: u8) -> bool {
        actions.iter().any(|action| matches!(action, Action::Ban { peer: banned, .. } if *banned == peer(who)))
    }

    #[test]
    fn whoever_wants_more_blobs_than_its_share_is_banned_and_leaves_room_for_the_others() {
        let limits = Limits { tables_per_peer: 8, ..Limits::default() };
        let mut swarm = node(limits);
        for n in 0..8 {
            assert!(!is_rejected(&heard(&mut swarm, 2, blob(n), join(MIB))), "{n}");
        }
        assert!(!is_rejected(&heard(&mut swarm, 2, blob(7), join(MIB))), "it may ask again for what it has");
        let refused = heard(&mut swarm, 2, blob(8), join(MIB));
        assert!(is_rejected(&refused) && is_banned(&refused, 2), "{refused:?}");
        assert!(!is_rejected(&heard(&mut swarm, 3, blob(8), join(MIB))), "the others have theirs");
        // With its connection all goes that was remembered for it alone.
        assert_eq!(swarm.coordinated.len(), 9);
        swarm.handle(NOW, Event::PeerLost(peer(2)));
        assert_eq!(swarm.coordinated.len(), 1);
        let later = heard_at(hours_later(1), &mut swarm, 2, blob(20), join(MIB));
        assert!(!is_rejected(&later) && swarm.coordinated.len() == 2, "{later:?}");
    }

    #[test]
    fn one_blob_may_have_any_size_and_more_of_them_have_a_bound_together() {
        let terabytes = 8 << 40;
        let mut swarm = node(Limits::default());
        assert!(!is_rejected(&heard(&mut swarm, 2, blob(0), join(terabytes))));
        let refused = heard(&mut swarm, 2, blob(1), join(MIB));
        assert!(is_rejected(&refused) && is_banned(&refused, 2), "{refused:?}");
        assert_eq!(heard(&mut swarm, 2, blob(1), join(MIB)), [], "it is banned once, whatever it had said by then");
        assert!(!is_rejected(&heard(&mut swarm, 3, blob(1), join(MIB))));
        let small = 2 << 40;
        assert!(is_rejected(&heard(&mut swarm, 3, blob(2), join(small))), "the two together are too much");
        assert!(!is_rejected(&heard_at(hours_later(1), &mut swarm, 3, blob(2), join(small / 2))));
        assert_eq!(swarm.coordinated.len(), 3);
    }

    #[test]
    fn what_one_peer_says_that_it_holds_pushes_out_nothing_of_the_others() {
        let limits = Limits { blobs_max: 12, blobs_per_peer: 8, ..Limits::default() };
        let mut swarm = node(limits);
        heard(&mut swarm, 3, blob(99), Message::Holds { size: MIB });
        let rejected = (0..100).filter(|n| is_rejected(&heard(&mut swarm, 2, blob(*n), Message::Holds { size: MIB })));
        assert_eq!(rejected.count(), 91, "8 are taken, and it may say what 3 says too");
        assert!(swarm.coordinated.contains(&blob(99)));
        // A large store is no lie: nobody is banned for it, nor for a wish. What is gone is written off.
        assert!(!is_banned(&heard(&mut swarm, 2, blob(200), Message::Holds { size: MIB }), 2));
        let wish = heard(&mut swarm, 2, blob(200), join(MIB));
        assert!(is_rejected(&wish) && !is_banned(&wish, 2), "{wish:?}");
        // Nor does another size, said by one who only has it, undo what others said.
        heard(&mut swarm, 4, blob(99), Message::Holds { size: 1 });
        assert!(swarm.coordinated.get(&blob(99)).unwrap().holders.contains_key(&peer(3)));
        heard(&mut swarm, 2, blob(0), Message::Leave);
        assert!(!is_rejected(&heard(&mut swarm, 2, blob(200), Message::Holds { size: MIB })));
    }

    #[test]
    fn whoever_wants_one_blob_after_the_other_for_a_moment_leaves_nothing_behind() {
        let mut swarm = node(Limits::default());
        for n in 0..100 {
            heard(&mut swarm, 2, blob(n), join(MIB));
            heard(&mut swarm, 2, blob(n), Message::Leave);
        }
        heard(&mut swarm, 2, blob(0), join(MIB));
        assert_eq!(swarm.coordinated.len(), 1);
        swarm.handle(NOW, Event::PeerLost(peer(2)));
        assert_eq!(swarm.coordinated.len(), 0);
    }

    #[test]
    fn what_this_node_wants_itself_has_no_share() {
        let limits = Limits { blobs_per_peer: 1, tables_per_peer: 1, segments_per_peer: 1, ..Limits::default() };
        let mut swarm = Swarm::new(peer(1), Zone::default(), limits, 7);
        for n in 0..4 {
            let layout = Layout::new(64 * MIB);
            let have = Bitfield::new(layout.pieces());
            let wanted = Event::Want { blob: blob(n), layout, have, can_import: true, turn: 0 };
            assert!(!is_rejected(&swarm.handle(Time::ZERO, wanted)));
        }
        assert_eq!(swarm.coordinated.len(), 4);
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let size = || prop_oneof![Just(0), Just(5), Just(MIB), Just(40 * MIB), Just(900 * MIB)];
        prop_oneof![
            4 => size().prop_map(join),
            3 => size().prop_map(|size| Message::Holds { size }),
            1 => size().prop_map(|size| Message::Take { size, is_for_elsewhere: false }),
            2 => Just(Message::Leave),
            1 => (0u32..9).prop_map(|segment| Message::Missing { segments: vec![segment], without: vec![peer(3)] }),
        ]
    }

    proptest! {
        /// Whatever three peers say, and however often they go and come again.
        #[test]
        fn no_flood_makes_a_node_remember_more_than_three_shares(
            said in prop::collection::vec((2u8..=4, 0u32..40, prop::option::weighted(0.95, any_message())), 0..300)
        ) {
            let limits = Limits {
                blobs_max: 20, blobs_per_peer: 6, tables_per_peer: 4, segments_per_peer: 16, ..Limits::default()
            };
            let mut swarm = node(limits);
            for ((from, n, message), hours) in said.into_iter().zip(0..) {
                let now = hours_later(hours);
                match message {
                    Some(message) => drop(heard_at(now, &mut swarm, from, blob(n), message)),
                    None => drop(swarm.handle(now, Event::PeerLost(peer(from)))),
                }
                prop_assert!(swarm.coordinated.len() <= 3 * 6);
                let states = swarm.coordinated.iter().map(|(_, state)| state);
                let tables = states.flat_map(|state| state.tables.values().map(|_| state.layout.segments()));
                let tables: Vec<u64> = tables.collect();
                prop_assert!(tables.len() <= 3 * 4, "{tables:?}");
                // Each may have a single one that is larger than its share.
                let (small, large): (Vec<u64>, Vec<u64>) = tables.into_iter().partition(|segments| *segments <= 16);
                prop_assert!(large.len() <= 3 && small.iter().sum::<u64>() <= 3 * 16, "{small:?} {large:?}");
                prop_assert_eq!(swarm.check_invariants(), Ok(()));
            }
        }
    }
}
