//! A node that goes: what it has and nobody else goes to others before.
//!
//! It asks the coordinator of each blob, the one that was used last first, a few at a time. A coordinator
//! that knows somebody else who has the blob says so at once; else it takes the blob itself, from the
//! node that goes, without anybody on its own node asking for it. What it has no room for, the next in
//! rank is asked to take. Seeds are asked before all, since they stay, and who is in another zone before who
//! shares the fate of this one. What comes while it is still there is handed over too. Not here: how long the
//! agent waits for all that, and how much room there is.

use std::collections::{BTreeMap, VecDeque};

use super::Swarm;
use super::event::{Action, Message, Rejection};
use super::hearing::{Uncoordinated, Word};
use super::peer::{Member, PeerId, Zone};
use super::room::Rooms;
use super::seed;
use super::time::Time;
use crate::Digest;

/// Both sides of it, at one node.
#[derive(Debug, Default)]
pub(super) struct Handover {
    /// What this node did not speak of yet. Nothing: it stays.
    leaving: Option<VecDeque<Digest>>,
    /// Who was asked about each blob; the last one has not answered yet.
    asked: BTreeMap<Digest, Vec<Asked>>,
    /// `Action::Left` is said once each time.
    has_left: bool,
    /// No upload begins any more.
    pub(super) is_withdrawn: bool,
    /// What this node takes for others that go.
    takes: BTreeMap<Digest, PeerId>,
    /// What others have room for.
    pub(super) rooms: Rooms,
}

impl Handover {
    pub(super) const fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }
}

/// Somebody who was asked to take a blob, and whether only if it is in another zone.
type Asked = (PeerId, bool);

impl Swarm {
    /// This node is to go, and has these blobs.
    pub(super) fn leave(&mut self, now: Time, blobs: Vec<Digest>, out: &mut Vec<Action>) {
        if let Some(blob) = blobs.first() {
            self.ask_for_room(now, blob, out);
        }
        self.handover.leaving = Some(blobs.into());
        self.handover.has_left = false;
        self.hand_over(out);
    }

    /// Whether this node is about to go, which is news for those that give it leases.
    pub(super) fn goes(&mut self, now: Time, is_going: bool, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.node.is_going, is_going) == is_going {
            return;
        }
        for download in self.downloads.values_mut().filter(|download| !download.is_complete()) {
            download.join(&mut self.node.cx(now, out));
        }
    }

    /// It stays: what others took meanwhile they keep.
    pub(super) fn stay(&mut self) {
        (self.handover.leaving, self.handover.has_left) = (None, false);
        self.handover.asked.clear();
        self.handover.rooms = Rooms::default();
    }

    /// A blob came while the node is to go.
    pub(super) fn came(&mut self, blob: Digest, out: &mut Vec<Action>) {
        if let Some(leaving) = &mut self.handover.leaving {
            leaving.push_back(blob);
            self.handover.has_left = false;
            self.hand_over(out);
        }
    }

    pub(super) fn hand_over(&mut self, out: &mut Vec<Action>) {
        if self.handover.rooms.are_asked() {
            return;
        }
        while self.handover.asked.len() < self.node.limits.takes_max {
            let Some(blob) = self.handover.leaving.as_mut().and_then(VecDeque::pop_front) else { break };
            if !self.handover.asked.contains_key(&blob) {
                self.ask_to_take(blob, Vec::new(), out);
            }
        }
        let is_done = self.handover.leaving.as_ref().is_some_and(VecDeque::is_empty) && self.handover.asked.is_empty();
        if is_done && !self.handover.has_left {
            self.handover.has_left = true;
            out.push(Action::Left);
        }
    }

    /// Asks the next that was not asked yet. Where all were, the blob is lost with this node.
    fn ask_to_take(&mut self, blob: Digest, mut asked: Vec<Asked>, out: &mut Vec<Action>) {
        let me = self.node.me;
        let Some(size) = self.held.get(&blob).map(|layout| layout.size()) else { return };
        if self.is_held_by_others(&blob, &me) {
            return;
        }
        if let Some(next) = self.takers(&blob).into_iter().find(|next| next.0 != me && !asked.contains(next)) {
            asked.push(next);
            self.handover.asked.insert(blob, asked);
            let (to, is_for_elsewhere) = next;
            if !is_for_elsewhere {
                self.handover.rooms.gave(&to, size);
            }
            out.push(Action::Send { to, blob, message: Message::Take { size, is_for_elsewhere } });
        }
    }

    /// Who may take a blob, in the order in which they are asked: the seeds; the coordinator, who knows
    /// whether somebody has it; who is in another zone; whoever is there; of each, who has most room. Where each
    /// zone reads for itself, nobody of another.
    fn takers(&self, blob: &Digest) -> Vec<Asked> {
        let (members, scope) = (&self.node.members, self.node.scope(self.node.zone));
        let seeds = seed::told(members, blob, scope).into_iter().map(|id| (id, false));
        let mut others = self.by_room(blob, |member| scope.is_none() && self.is_elsewhere(member.zone));
        others.extend(self.by_room(blob, |member| scope.is_none_or(|zone| member.zone == zone)));
        let coordinator = members.ranked_among(blob, |member| scope.is_none_or(|zone| member.zone == zone));
        let knows = coordinator.first().filter(|id| others.first() != Some(id)).map(|id| (*id, true));
        seeds.chain(knows).chain(others.into_iter().map(|id| (id, false))).collect()
    }

    /// Those that may be asked about a blob, and those that said how much room they have.
    fn by_room(&self, blob: &Digest, fits: impl Fn(&Member) -> bool) -> Vec<PeerId> {
        let members = &self.node.members;
        let mut all = members.ranked_among(blob, &fits);
        let more = self.handover.rooms.iter().filter_map(|id| members.get(id));
        all.extend(more.filter(|member| fits(member)).map(|member| member.id));
        self.handover.rooms.sort(&mut all);
        all
    }

    /// Whether a zone is another than this node's. A node that does not know its own knows no other.
    pub(super) fn is_elsewhere(&self, zone: Zone) -> bool {
        let unknown = Zone::default();
        zone != self.node.zone && zone != unknown && self.node.zone != unknown
    }

    /// Whether somebody but this node and `leaver` has the blob, as far as this node coordinates it: of the
    /// zone of `leaver`, where each zone reads for itself.
    fn is_held_by_others(&self, blob: &Digest, leaver: &PeerId) -> bool {
        let members = &self.node.members;
        let zone = members.get(leaver).map_or(self.node.zone, |member| member.zone);
        let scope = self.node.scope(zone);
        let is_other = |id: &PeerId| {
            *id != self.node.me && id != leaver && members.get(id).is_some() && members.is_within(scope, id)
        };
        self.coordinated.get(blob).is_some_and(|state| {
            let complete = state.interested.iter().filter(|(_, node)| node.is_complete).map(|(id, _)| id);
            state.holders.keys().chain(complete).any(is_other)
        })
    }

    /// Somebody goes who has the blob.
    pub(super) fn asked_to_take(
        &mut self,
        now: Time,
        (from, is_for_elsewhere): Asked,
        blob: Digest,
        size: u64,
        out: &mut Vec<Action>,
    ) {
        let answer = |is_kept| Action::Send { to: from, blob, message: Message::TakeEnd { is_kept } };
        if self.held.contains_key(&blob) || self.is_held_by_others(&blob, &from) {
            // Who goes too has nothing to keep it in.
            return out.push(answer(self.handover.leaving.is_none() || self.is_held_by_others(&blob, &from)));
        }
        let is_busy = match self.handover.takes.get(&blob) {
            Some(other) => *other != from,
            None => self.handover.takes.len() >= self.node.limits.takes_max,
        };
        let is_unfit = is_for_elsewhere && !self.node.members.get(&from).is_some_and(|it| self.is_elsewhere(it.zone));
        if self.handover.leaving.is_some() || is_busy || is_unfit || size == 0 {
            return out.push(answer(false));
        }
        // Its word that it has the blob may have been lost, or come before this node coordinated it.
        match self.coordinate(blob, (size, Word::Has), from) {
            Ok((state, node)) => state.holds(from, &mut node.cx(now, out)),
            Err(Uncoordinated::OtherSize) => {}
            Err(Uncoordinated::Flood) => {
                out.push(Action::Reject { peer: from, reason: Rejection::Flood });
                return out.push(answer(false));
            }
        }
        let is_new = self.handover.takes.insert(blob, from).is_none();
        if is_new && !self.downloads.contains_key(&blob) {
            // A seed is full as a rule, and parts with what is of least use.
            let is_seed = self.node.members.is_seed(&self.node.me);
            out.push(if is_seed { Action::Keep { blob, size } } else { Action::Take { blob, size } });
        }
    }

    /// What this node was asked to take is here, or does not come.
    pub(super) fn taken(&mut self, blob: &Digest, is_kept: bool, out: &mut Vec<Action>) {
        if let Some(to) = self.handover.takes.remove(blob) {
            out.push(Action::Send { to, blob: *blob, message: Message::TakeEnd { is_kept } });
        }
    }

    /// Somebody answers who was asked to take a blob.
    pub(super) fn take_ended(&mut self, from: PeerId, blob: &Digest, is_kept: bool, out: &mut Vec<Action>) {
        if self.handover.asked.get(blob).and_then(|asked| asked.last()).is_none_or(|asked| asked.0 != from) {
            return;
        }
        let asked = self.handover.asked.remove(blob).unwrap_or_default();
        if !is_kept {
            self.ask_to_take(*blob, asked, out);
        }
        self.hand_over(out);
    }

    /// A peer is gone: it takes nothing any more, and needs no answer.
    pub(super) fn lost_taker(&mut self, peer: &PeerId, out: &mut Vec<Action>) {
        self.handover.takes.retain(|_, leaver| leaver != peer);
        let lost: Vec<Digest> = self
            .handover
            .asked
            .iter()
            .filter(|(_, asked)| asked.last().is_some_and(|it| it.0 == *peer))
            .map(|(blob, _)| *blob)
            .collect();
        for blob in lost {
            self.take_ended(*peer, &blob, false, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Limits, Member, Members, Zone};
    use super::*;
    use crate::pieces::Layout;

    const SIZE: u64 = 3 * 1024 * 1024;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    /// Node `me` of three.
    fn node(me: u8) -> Swarm {
        let mut swarm = Swarm::new(peer(me), Zone::default(), Limits::default(), 7);
        let members = (1..=3).map(|n| Member { id: peer(n), zone: Zone::default(), is_seed: false }).collect();
        swarm.handle(Time::ZERO, Event::Members(Members::new(members)));
        swarm
    }

    /// A blob whose ranking is this.
    fn ranked(order: [u8; 3]) -> Digest {
        let members = node(1).node.members;
        let wanted = order.map(peer).to_vec();
        (0..10_000_u32).map(|n| Digest::of(&n.to_le_bytes())).find(|blob| members.ranked(blob) == wanted).unwrap()
    }

    fn proven(swarm: &mut Swarm, blob: Digest) {
        swarm.handle(Time::ZERO, Event::Proven { blob, layout: Layout::new(SIZE) });
    }

    /// It is to go, and nobody says that it has room.
    fn leave(swarm: &mut Swarm, blobs: Vec<Digest>) -> Vec<Action> {
        let mut actions = Vec::new();
        for action in swarm.handle(Time::ZERO, Event::Leave(blobs)) {
            match action {
                Action::Send { to: from, blob, message: Message::RoomWanted } => {
                    let message = Message::Room { bytes: 0 };
                    actions.extend(swarm.handle(Time::ZERO, Event::Message { from, blob, message }));
                }
                action => actions.push(action),
            }
        }
        actions
    }

    fn heard(swarm: &mut Swarm, from: u8, blob: Digest, message: Message) -> Vec<Action> {
        swarm.handle(Time::ZERO, Event::Message { from: peer(from), blob, message })
    }

    fn send(to: u8, blob: Digest, message: Message) -> Action {
        Action::Send { to: peer(to), blob, message }
    }

    const TAKE: Message = Message::Take { size: SIZE, is_for_elsewhere: false };

    fn end(is_kept: bool) -> Message {
        Message::TakeEnd { is_kept }
    }

    #[test]
    fn who_goes_asks_in_the_order_of_rank_until_somebody_keeps_the_blob() {
        let blob = ranked([2, 1, 3]);
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        assert_eq!(leave(&mut swarm, vec![blob]), [send(2, blob, TAKE)]);
        assert_eq!(heard(&mut swarm, 3, blob, end(true)), [], "who was not asked");
        assert_eq!(heard(&mut swarm, 2, blob, end(false)), [send(3, blob, TAKE)]);
        assert_eq!(heard(&mut swarm, 3, blob, end(true)), [Action::Left]);
    }

    #[test]
    fn a_node_that_stays_after_all_takes_for_others_again_and_may_go_later() {
        let [blob, other] = [ranked([2, 1, 3]), ranked([1, 2, 3])];
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        assert_eq!(leave(&mut swarm, vec![blob]), [send(2, blob, TAKE)]);
        // Said once more, by SIGTERM after a notice: nobody is asked twice at a time.
        assert_eq!(leave(&mut swarm, vec![blob]), []);
        assert_eq!(heard(&mut swarm, 3, other, TAKE), [send(3, other, end(false))]);
        assert_eq!(swarm.handle(Time::ZERO, Event::Stay), []);
        assert_eq!(heard(&mut swarm, 2, blob, end(true)), [], "it does not go");
        assert!(heard(&mut swarm, 3, other, TAKE).contains(&Action::Take { blob: other, size: SIZE }));
        assert_eq!(leave(&mut swarm, vec![blob]), [send(2, blob, TAKE)]);
        assert_eq!(heard(&mut swarm, 2, blob, end(true)), [Action::Left]);
        assert_eq!(leave(&mut swarm, vec![]), [Action::Left], "each time");
    }

    #[test]
    fn what_comes_to_a_node_that_goes_is_handed_over_too() {
        let [blob, later] = [ranked([2, 1, 3]), ranked([3, 2, 1])];
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        assert_eq!(leave(&mut swarm, vec![blob]), [send(2, blob, TAKE)]);
        let came = swarm.handle(Time::ZERO, Event::Proven { blob: later, layout: Layout::new(SIZE) });
        assert!(came.contains(&send(3, later, TAKE)), "{came:?}");
        assert_eq!(heard(&mut swarm, 2, blob, end(true)), []);
        assert_eq!(heard(&mut swarm, 3, later, end(true)), [Action::Left]);
        // After it has left, and while it stays.
        let last = swarm.handle(Time::ZERO, Event::Proven { blob, layout: Layout::new(SIZE) });
        assert!(last.contains(&send(2, blob, TAKE)) && !last.contains(&Action::Left), "{last:?}");
        swarm.handle(Time::ZERO, Event::Stay);
        let stays = swarm.handle(Time::ZERO, Event::Proven { blob: later, layout: Layout::new(SIZE) });
        assert!(!stays.contains(&send(3, later, TAKE)), "{stays:?}");
    }

    #[test]
    fn another_zone_is_asked_before_the_own_one_and_the_coordinator_first_for_what_it_knows() {
        let blob = ranked([2, 3, 1]);
        let zone = |n: u8| if n == 3 { Zone(8) } else { Zone(7) };
        let node = |me: u8| {
            let mut swarm = Swarm::new(peer(me), zone(me), Limits::default(), 7);
            let members = (1..=3).map(|n| Member { id: peer(n), zone: zone(n), is_seed: false }).collect();
            swarm.handle(Time::ZERO, Event::Members(Members::new(members)));
            swarm
        };
        let elsewhere = Message::Take { size: SIZE, is_for_elsewhere: true };
        let mut leaver = node(1);
        proven(&mut leaver, blob);
        assert_eq!(leave(&mut leaver, vec![blob]), [send(2, blob, elsewhere.clone())]);
        assert_eq!(heard(&mut leaver, 2, blob, end(false)), [send(3, blob, TAKE)]);
        assert_eq!(heard(&mut leaver, 3, blob, end(false)), [send(2, blob, TAKE)], "better here than nowhere");
        assert_eq!(heard(&mut leaver, 2, blob, end(false)), [Action::Left]);
        let taken = |me: u8, message: &Message| {
            heard(&mut node(me), 1, blob, message.clone()).contains(&Action::Take { blob, size: SIZE })
        };
        assert!(!taken(2, &elsewhere) && taken(3, &elsewhere));
        assert!(taken(2, &TAKE) && taken(3, &TAKE));
    }

    #[test]
    fn a_taker_that_dies_is_replaced_and_without_any_the_node_goes() {
        let blob = ranked([2, 1, 3]);
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        leave(&mut swarm, vec![blob]);
        assert_eq!(swarm.handle(Time::ZERO, Event::PeerLost(peer(2))), [send(3, blob, TAKE)]);
        assert_eq!(swarm.handle(Time::ZERO, Event::PeerLost(peer(3))), [Action::Left]);
        assert_eq!(leave(&mut node(1), Vec::new()), [Action::Left]);
    }

    #[test]
    fn what_others_have_is_not_handed_over() {
        let blob = ranked([1, 2, 3]);
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        heard(&mut swarm, 3, blob, Message::Holds { size: SIZE });
        assert_eq!(leave(&mut swarm, vec![blob]), [Action::Left]);
        // The same where another node is the one that knows.
        let mut coordinator = node(1);
        heard(&mut coordinator, 3, blob, Message::Holds { size: SIZE });
        assert_eq!(heard(&mut coordinator, 2, blob, TAKE), [send(2, blob, end(true))]);
        assert!(heard(&mut coordinator, 3, blob, TAKE).contains(&Action::Take { blob, size: SIZE }), "the only one");
    }

    #[test]
    fn where_each_zone_reads_for_itself_a_blob_goes_to_who_stays_of_that_zone() {
        let blob = ranked([2, 1, 3]);
        let limits = Limits { scope_is_zone: true, ..Limits::default() };
        let zone = |n: u8| Zone(if n == 2 { 2 } else { 1 });
        let node = |me: u8| {
            let mut swarm = Swarm::new(peer(me), zone(me), limits, 7);
            let members = (1..=3).map(|n| Member { id: peer(n), zone: zone(n), is_seed: n == 2 }).collect();
            swarm.handle(Time::ZERO, Event::Members(Members::new(members)));
            swarm
        };
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        // What one beyond it has is of no help, and one beyond it cannot take it.
        heard(&mut swarm, 2, blob, Message::Holds { size: SIZE });
        assert_eq!(leave(&mut swarm, vec![blob]), [send(3, blob, TAKE)]);
        // Nor does a seed want what it cannot get.
        let mut seed = node(2);
        heard(&mut seed, 1, blob, Message::Holds { size: SIZE });
        assert_eq!(seed.handle(Time::ZERO + limits.seed_quiet * 2, Event::Tick), []);
    }

    #[test]
    fn a_taker_answers_when_the_blob_is_here_or_does_not_come() {
        let [first, second] = [ranked([1, 2, 3]), ranked([1, 3, 2])];
        let mut swarm = node(1);
        for blob in [first, second] {
            assert_eq!(heard(&mut swarm, 2, blob, TAKE), [Action::Take { blob, size: SIZE }]);
        }
        let layout = Layout::new(SIZE);
        let proven = swarm.handle(Time::ZERO, Event::Proven { blob: first, layout });
        assert!(proven.contains(&send(2, first, end(true))), "{proven:?}");
        assert_eq!(swarm.handle(Time::ZERO, Event::NotTaken(second)), [send(2, second, end(false))]);
    }

    #[test]
    fn no_more_is_taken_than_is_bounded_and_nothing_by_who_goes_itself() {
        let mut swarm = node(1);
        let most = u32::try_from(swarm.node.limits.takes_max).unwrap();
        let blob = |n: u32| Digest::of(&n.to_be_bytes());
        for n in 0..most {
            assert_eq!(heard(&mut swarm, 2, blob(n), TAKE), [Action::Take { blob: blob(n), size: SIZE }]);
        }
        assert_eq!(heard(&mut swarm, 2, blob(most), TAKE), [send(2, blob(most), end(false))]);
        let mut swarm = node(1);
        proven(&mut swarm, blob(0));
        leave(&mut swarm, vec![blob(0)]);
        for n in 0..2 {
            assert_eq!(heard(&mut swarm, 2, blob(n), TAKE), [send(2, blob(n), end(false))]);
        }
    }

    #[test]
    fn who_has_withdrawn_begins_no_upload() {
        let blob = ranked([1, 2, 3]);
        let mut swarm = node(1);
        proven(&mut swarm, blob);
        let asked = |n| Event::Asked { from: peer(2), blob, piece: 0, request: super::super::RequestId(n) };
        assert_eq!(swarm.handle(Time::ZERO, asked(1)), [Action::Serve(super::super::RequestId(1))]);
        swarm.handle(Time::ZERO, Event::Withdraw);
        let refused = swarm.handle(Time::ZERO, asked(2));
        assert!(matches!(refused[..], [Action::Refuse { .. }]), "{refused:?}");
    }
}
