//! How much room others have for what a node hands over that goes: asked once, before the first blob.
//!
//! Of those that stay, whoever has most takes a blob; nobody has to part with what it has for it, as long as
//! somebody else need not. Not here: who is asked before all others whatever its room is (`handover`).

use std::collections::BTreeMap;

use super::Swarm;
use super::event::{Action, Message};
use super::peer::{Member, PeerId, score};
use super::time::Time;
use crate::Digest;

/// Nodes that are asked, those of other zones first: enough to find one with room, few enough to hear them all.
const ASKED_MAX: usize = 16;

/// What the others said.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    /// In bytes, less what was given since; nothing before the answer.
    known: BTreeMap<PeerId, Option<u64>>,
    /// Until then their answers are waited for.
    until: Option<Time>,
}

impl Rooms {
    /// Whether answers are waited for still.
    pub(super) const fn are_asked(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn deadline(&self) -> Time {
        self.until.unwrap_or(Time::NEVER)
    }

    /// Who was asked.
    pub(super) fn iter(&self) -> impl Iterator<Item = &PeerId> {
        self.known.keys()
    }

    /// Those with most room first; of those that did not say, and where it is the same, the order is kept.
    pub(super) fn sort(&self, ids: &mut [PeerId]) {
        ids.sort_by_key(|id| std::cmp::Reverse(self.known.get(id).copied().flatten().unwrap_or(0)));
    }

    /// It was asked to take so much.
    pub(super) fn gave(&mut self, to: &PeerId, size: u64) {
        if let Some(Some(room)) = self.known.get_mut(to) {
            *room = room.saturating_sub(size);
        }
    }

    /// A peer said how much it has, or is gone.
    fn settle(&mut self, peer: PeerId, room: Option<u64>) {
        if let Some(known) = self.known.get_mut(&peer) {
            *known = Some(room.unwrap_or(0));
        }
        if self.known.values().all(Option::is_some) {
            self.until = None;
        }
    }
}

impl Swarm {
    /// Asks those that may take what is here, unless they were.
    pub(super) fn ask_for_room(&mut self, now: Time, blob: &Digest, out: &mut Vec<Action>) {
        if !self.handover.rooms.known.is_empty() {
            return;
        }
        let scope = self.node.scope(self.node.zone);
        // Seeds are asked to take it whatever room they have.
        let fits = |member: &&Member| {
            member.id != self.node.me && !member.is_seed && scope.is_none_or(|zone| member.zone == zone)
        };
        let mut asked: Vec<&Member> = self.node.members.iter().filter(fits).collect();
        // By lot, so that not all that go ask the same.
        asked.sort_by_key(|member| (!self.is_elsewhere(member.zone), score(blob, &member.id)));
        let asked: Vec<PeerId> = asked.into_iter().take(ASKED_MAX).map(|member| member.id).collect();
        for to in asked {
            self.handover.rooms.known.insert(to, None);
            out.push(Action::Send { to, blob: *blob, message: Message::RoomWanted });
        }
        let is_alone = self.handover.rooms.known.is_empty();
        self.handover.rooms.until = (!is_alone).then(|| now + self.node.limits.room_patience);
    }

    /// A peer asks how much room there is.
    pub(super) fn room_wanted(&self, to: PeerId, blob: Digest, out: &mut Vec<Action>) {
        out.push(if self.handover.is_leaving() {
            // Who goes too has nothing to keep it in.
            Action::Send { to, blob, message: Message::Room { bytes: 0 } }
        } else {
            Action::TellRoom { to, blob }
        });
    }

    /// A peer says how much room it has.
    pub(super) fn heard_room(&mut self, from: PeerId, bytes: u64, out: &mut Vec<Action>) {
        self.handover.rooms.settle(from, Some(bytes));
        self.hand_over(out);
    }

    /// A peer is gone that may have been asked.
    pub(super) fn lost_room(&mut self, peer: PeerId, out: &mut Vec<Action>) {
        self.handover.rooms.settle(peer, None);
        self.hand_over(out);
    }

    /// Who has not answered by now is not waited for.
    pub(super) fn tick_rooms(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.handover.rooms.until.is_some_and(|until| now >= until) {
            self.handover.rooms.until = None;
            self.hand_over(out);
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

    /// Of one zone but the last.
    const fn zone(n: u8) -> Zone {
        Zone(if n == 4 { 2 } else { 1 })
    }

    fn members(most: u8) -> Event {
        let member = |n| Member { id: peer(n), zone: zone(n), is_seed: false };
        Event::Members(Members::new((1..=most).map(member).collect()))
    }

    /// Node 1 of four with these blobs, about to go. What it says at once.
    fn leaving(blobs: &[Digest]) -> (Swarm, Vec<Action>) {
        let mut swarm = Swarm::new(peer(1), zone(1), Limits::default(), 7);
        swarm.handle(Time::ZERO, members(4));
        for blob in blobs {
            swarm.handle(Time::ZERO, Event::Proven { blob: *blob, layout: Layout::new(SIZE) });
        }
        let actions = swarm.handle(Time::ZERO, Event::Leave(blobs.to_vec()));
        (swarm, actions)
    }

    fn heard(swarm: &mut Swarm, from: u8, blob: Digest, message: Message) -> Vec<Action> {
        swarm.handle(Time::ZERO, Event::Message { from: peer(from), blob, message })
    }

    /// Who is asked to take what in these.
    fn takers(actions: &[Action]) -> Vec<(PeerId, Digest)> {
        let take = |action: &Action| match action {
            Action::Send { to, blob, message: Message::Take { is_for_elsewhere: false, .. } } => Some((*to, *blob)),
            _ => None,
        };
        actions.iter().filter_map(take).collect()
    }

    fn said(swarm: &mut Swarm, blob: Digest, rooms: &[(u8, u64)]) -> Vec<Action> {
        let room = |(from, bytes): &(u8, u64)| heard(swarm, *from, blob, Message::Room { bytes: *bytes });
        rooms.iter().flat_map(room).collect()
    }

    fn blobs(count: u8) -> Vec<Digest> {
        (0..count).map(|n| Digest::of(&[n])).collect()
    }

    #[test]
    fn nothing_is_handed_over_before_all_have_said_how_much_room_they_have_or_the_time_is_over() {
        let [blob] = blobs(1)[..] else { panic!("one") };
        let (mut swarm, actions) = leaving(&[blob]);
        let wanted = |n| Action::Send { to: peer(n), blob, message: Message::RoomWanted };
        assert!(actions.len() == 3 && (2..=4).all(|n| actions.contains(&wanted(n))), "{actions:?}");
        assert_eq!(said(&mut swarm, blob, &[(2, 5), (3, 5)]), []);
        swarm.handle(Time::ZERO, members(3));
        assert_eq!(swarm.handle(Time::ZERO, Event::PeerLost(peer(4))).len(), 1, "the last of them is gone");
        let (mut swarm, _) = leaving(&[blob]);
        let limits = Limits::default();
        assert_eq!(swarm.deadline(), Time::ZERO + limits.room_patience);
        assert_eq!(swarm.handle(Time::ZERO + limits.room_patience, Event::Tick).len(), 1);
    }

    #[test]
    fn of_those_in_reach_the_one_with_most_room_takes_a_blob_and_then_it_has_less() {
        let blobs = blobs(4);
        let (mut swarm, _) = leaving(&blobs);
        // The other zone comes first whatever its room, and refuses.
        let mut given = said(&mut swarm, blobs[0], &[(2, SIZE * 3 / 2), (3, SIZE * 2), (4, 0)]);
        let mut near = Vec::new();
        while let Some(action) = given.pop() {
            let Action::Send { to, blob, message: Message::Take { .. } } = action else { continue };
            if to == peer(4) || !takers(&[action]).contains(&(to, blob)) {
                given.extend(swarm.handle(
                    Time::ZERO,
                    Event::Message { from: to, blob, message: Message::TakeEnd { is_kept: false } },
                ));
            } else {
                near.push(to);
            }
        }
        assert_eq!(near, [3, 2, 3, 2].map(peer), "2, 1.5, then 1, then half of what a blob takes");
    }

    #[test]
    fn who_goes_too_has_no_room_and_who_stays_is_asked() {
        let blob = blobs(1)[0];
        let (mut swarm, _) = leaving(&[blob]);
        let none = Action::Send { to: peer(2), blob, message: Message::Room { bytes: 0 } };
        assert_eq!(heard(&mut swarm, 2, blob, Message::RoomWanted), [none]);
        swarm.handle(Time::ZERO, Event::Stay);
        assert_eq!(heard(&mut swarm, 2, blob, Message::RoomWanted), [Action::TellRoom { to: peer(2), blob }]);
    }

    #[test]
    fn who_was_not_asked_changes_nothing_and_rooms_are_asked_anew_each_time() {
        let blob = blobs(1)[0];
        let (mut swarm, _) = leaving(&[blob]);
        assert_eq!(heard(&mut swarm, 9, blob, Message::Room { bytes: u64::MAX }), []);
        assert_eq!(swarm.handle(Time::ZERO, Event::Leave(vec![blob])), [], "they are being asked");
        swarm.handle(Time::ZERO, Event::Stay);
        assert_eq!(swarm.handle(Time::ZERO, Event::Leave(vec![blob])).len(), 3);
    }
}
