//! The neighbours of a download: who they are, and what each of them has.

use super::Cx;
use super::download::{Download, Request};
use super::event::{Action, Message, Rejection};
use super::neighbour::Neighbour;
use super::peer::PeerId;
use crate::pieces::Bitfield;

impl Download {
    pub(super) fn welcomed(&mut self, from: PeerId, neighbours: &[PeerId], interested: u32, cx: &mut Cx<'_>) {
        if self.seat.heard_of(&from, cx.answers, cx.limits) {
            // It did not answer in time, and is there.
            return self.join(cx);
        }
        if from != self.coordinator(cx) {
            return;
        }
        self.seat.answered(cx.now, cx.answers);
        self.interest(interested, cx);
        for id in neighbours {
            if self.place(id).is_ok() {
                // We miss something, and it should have it: a word of it may have been lost.
                self.hello(*id, true, cx);
                continue;
            }
            let has_room = self.neighbours.len() < cx.limits.neighbours_max;
            if *id != cx.me && has_room && !self.is_shunned(id, cx) {
                self.add_neighbour(*id, Bitfield::new(self.layout.pieces()), false, cx);
                self.hello(*id, true, cx);
            }
        }
    }

    /// Makes sure that `id` is a neighbour, for a lease that is read from it.
    pub(super) fn meet(&mut self, id: PeerId, is_whole: bool, cx: &mut Cx<'_>) {
        if self.place(&id).is_ok() {
            return;
        }
        self.make_room(cx);
        let pieces = self.layout.pieces();
        if is_whole {
            self.add_neighbour(id, Bitfield::full(pieces), true, cx);
        } else {
            self.add_neighbour(id, Bitfield::new(pieces), true, cx);
            self.hello(id, true, cx);
        }
    }

    /// Of as many neighbours as there may be, the one that has least and of whom nothing is asked goes.
    fn make_room(&mut self, cx: &mut Cx<'_>) {
        if self.neighbours.len() < cx.limits.neighbours_max {
            return;
        }
        // The coordinator would take a word of it for the end of our interest.
        let coordinator = self.coordinator(cx);
        let is_needed = |id: PeerId| id == coordinator || self.leases.readings().any(|lease| lease.from == Some(id));
        let idle = self.neighbours.iter().filter(|neighbour| neighbour.in_flight == 0 && !is_needed(neighbour.id));
        if let Some(id) = idle.min_by_key(|neighbour| neighbour.count()).map(|neighbour| neighbour.id) {
            self.drop_neighbour(&id, cx);
            cx.send(id, self.blob, Message::Leave);
        }
    }

    pub(super) fn heard_hello(&mut self, from: PeerId, have: Bitfield, wants_answer: bool, cx: &mut Cx<'_>) {
        if have.len() != self.layout.pieces() || self.is_shunned(&from, cx) {
            return;
        }
        match self.place(&from) {
            Ok(at) => {
                self.count(at, -1);
                self.neighbours[at].says_has(have);
                self.count(at, 1);
            }
            Err(_) if self.neighbours.len() < cx.limits.neighbours_max => self.add_neighbour(from, have, false, cx),
            // No room. The coordinator would take this word for the end of our interest.
            Err(_) if from == self.coordinator(cx) => return,
            Err(_) => return cx.send(from, self.blob, Message::Leave),
        }
        if wants_answer {
            self.hello(from, false, cx);
        }
        self.is_dry = false;
    }

    pub(super) fn heard_have(&mut self, from: PeerId, pieces: &[u32], free_slots: u8, interested: u32, cx: &Cx<'_>) {
        let Ok(at) = self.place(&from) else { return };
        self.interest(interested, cx);
        for piece in pieces {
            self.learn(at, *piece);
        }
        self.neighbours[at].says_free(cx.now, free_slots);
        self.is_dry = false;
    }

    /// A neighbour has one piece more.
    pub(super) fn learn(&mut self, at: usize, piece: u32) {
        if u64::from(piece) < self.layout.pieces() && self.neighbours[at].gained(piece) {
            let count = &mut self.rarity[piece as usize];
            *count = count.saturating_add(1);
        }
    }

    /// It gave nothing of what it announced: it is no neighbour any more, whatever it says.
    pub(super) fn shun(&mut self, id: &PeerId, cx: &mut Cx<'_>) {
        if self.shunned.len() >= cx.limits.neighbours_max {
            self.shunned.remove(0);
        }
        self.shunned.push(*id);
        cx.out.push(Action::Reject { peer: *id, reason: Rejection::Boast });
        self.drop_neighbour(id, cx);
    }

    /// Whether nothing is taken from it.
    pub(super) fn is_shunned(&self, id: &PeerId, cx: &Cx<'_>) -> bool {
        cx.strikes.is_banned(cx.now, id) || self.shunned.contains(id)
    }

    pub(super) fn drop_neighbour(&mut self, id: &PeerId, cx: &mut Cx<'_>) {
        let Ok(at) = self.place(id) else { return };
        self.count(at, -1);
        self.neighbours.remove(at);
        self.judge_speed();
        let (lost, kept) = self.requests.iter().partition(|request| request.peer == *id);
        self.requests = kept;
        let lost: Vec<Request> = lost;
        for request in lost {
            cx.out.push(Action::CancelFetch { blob: self.blob, piece: request.piece, peer: *id });
            self.reopen(request.piece);
        }
        self.is_dry = false;
        self.lost_source(id, cx);
        self.work_leases(cx);
        self.refill(cx);
    }

    /// Asks for more neighbours when half of them are gone.
    pub(super) fn refill(&mut self, cx: &mut Cx<'_>) {
        let wanted = cx.limits.neighbours.min(usize::try_from(self.interested).unwrap_or(usize::MAX) - 1);
        let since = cx.now.since(self.refilled);
        if self.neighbours.len() * 2 < wanted && since > cx.limits.join_patience && self.seat.is_seated() {
            self.refilled = cx.now;
            self.join(cx);
        }
    }

    pub(super) fn hello(&self, to: PeerId, wants_answer: bool, cx: &mut Cx<'_>) {
        cx.send(to, self.blob, Message::Hello { have: self.have.clone(), wants_answer });
    }

    pub(super) fn add_neighbour(&mut self, id: PeerId, have: Bitfield, is_scarce: bool, cx: &Cx<'_>) {
        let Err(at) = self.place(&id) else { return };
        let zone = cx.members.get(&id).map_or(cx.zone, |member| member.zone);
        let is_scarce = is_scarce || zone != cx.zone;
        self.neighbours.insert(at, Neighbour::new(id, have, is_scarce));
        self.count(at, 1);
        self.judge_speed();
    }

    /// Adds all pieces of a neighbour to the rarity, or takes them out.
    pub(super) fn count(&mut self, at: usize, sign: i16) {
        for piece in self.neighbours[at].have().iter() {
            if let Some(count) = usize::try_from(piece).ok().and_then(|piece| self.rarity.get_mut(piece)) {
                *count = count.saturating_add_signed(sign);
            }
        }
    }

    pub(super) fn place(&self, id: &PeerId) -> Result<usize, usize> {
        self.neighbours.binary_search_by_key(id, |neighbour| neighbour.id)
    }

    /// Whether a neighbour that may be asked has the piece.
    pub(super) fn can_be_had(&self, piece: u64) -> bool {
        self.neighbours
            .iter()
            .any(|neighbour| !neighbour.is_scarce && neighbour.is_well() && neighbour.have().has(piece))
    }

    /// How much a peer has got, as far as is known here.
    pub(super) fn wealth(&self, peer: &PeerId) -> u64 {
        self.place(peer).map_or(0, |at| self.neighbours[at].count())
    }
}
