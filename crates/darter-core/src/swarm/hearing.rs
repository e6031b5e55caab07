//! What other nodes say: to this node as a coordinator, as a neighbour, or as somebody they wait for.

use super::coordinator::Coordinator;
use super::{Action, Message, Node, PeerId, Rejection, Swarm, Time};
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

impl Swarm {
    pub(super) fn heard(&mut self, now: Time, from: PeerId, blob: Digest, message: Message, out: &mut Vec<Action>) {
        match message {
            Message::Join(join) => {
                match self.coordinate(blob, (join.size, Word::Wants), from) {
                    Ok((coordinator, node)) => {
                        if !coordinator.joined(from, &join, &mut node.cx(now, out)) {
                            self.forget_if_idle(&blob);
                            out.push(Action::Reject { peer: from, reason: Rejection::Flood });
                            // No node wants so much at once.
                            self.strike(now, from, out);
                        }
                    }
                    // It may have a large store, which is no lie: it wants a blob like any other, of somebody else.
                    Err(Uncoordinated::Flood) => out.push(Action::Reject { peer: from, reason: Rejection::Flood }),
                    Err(Uncoordinated::OtherSize) => {}
                }
                self.bridge(now, from, blob, out);
            }
            Message::Holds { size } => {
                match self.coordinate(blob, (size, Word::Has), from) {
                    Ok((coordinator, node)) => coordinator.holds(from, &mut node.cx(now, out)),
                    Err(Uncoordinated::Flood) => out.push(Action::Reject { peer: from, reason: Rejection::Flood }),
                    Err(Uncoordinated::OtherSize) => {}
                }
                self.heard_of_holder(now, from, blob, size, out);
            }
            Message::Leave => {
                if let Some(coordinator) = self.coordinated.get_mut(&blob) {
                    coordinator.left(&from, &mut self.node.cx(now, out));
                    self.forget_if_idle(&blob);
                }
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.drop_neighbour(&from, &mut self.node.cx(now, out));
                }
            }
            Message::Take { size, is_for_elsewhere } => {
                self.asked_to_take(now, (from, is_for_elsewhere), blob, size, out);
            }
            Message::TakeEnd { is_kept } => self.take_ended(from, &blob, is_kept, out),
            Message::RoomWanted => self.room_wanted(from, blob, out),
            Message::Room { bytes } => self.heard_room(from, bytes, out),
            Message::Slot => self.offered(now, from, blob, out),
            Message::NoNeed => self.node.slots.not_needed(&from, &blob),
            Message::Hello { have, wants_answer } => self.heard_hello(now, from, blob, have, wants_answer, out),
            message => self.heard_in_session(now, from, blob, message, out),
        }
    }

    /// Somebody came here because it does not reach who ranks higher: it meets the swarm through us.
    fn bridge(&mut self, now: Time, from: PeerId, blob: Digest, out: &mut Vec<Action>) {
        let Some(coordinator) = self.coordinated.get(&blob).filter(|state| state.is_first == Some(false)) else {
            return;
        };
        let download = self.downloads.get(&blob);
        if from != self.node.me && (download.is_some() || self.held.contains_key(&blob)) {
            let others = download.into_iter().flat_map(|download| download.neighbours.iter().map(|other| other.id));
            let others = others.filter(|id| *id != from).take(self.node.limits.neighbours);
            let neighbours = std::iter::once(self.node.me).chain(others).collect();
            let interested = coordinator.count();
            self.node.cx(now, out).send(from, blob, Message::Welcome { neighbours, holders: Vec::new(), interested });
        }
    }

    /// A neighbour keeps a slot for us: the piece is chosen now.
    fn offered(&mut self, now: Time, from: PeerId, blob: Digest, out: &mut Vec<Action>) {
        let room = self.room();
        let is_used = self
            .downloads
            .get_mut(&blob)
            .is_some_and(|download| download.offered(from, room, &mut self.node.cx(now, out)));
        if !is_used {
            out.push(Action::Send { to: from, blob, message: Message::NoNeed });
        }
    }

    /// What only those say and hear that know each other about the blob already.
    fn heard_in_session(&mut self, now: Time, from: PeerId, blob: Digest, message: Message, out: &mut Vec<Action>) {
        let coordinator = self.coordinated.get_mut(&blob);
        let download = self.downloads.get_mut(&blob);
        match (message, coordinator, download) {
            (Message::Welcome { neighbours, holders, interested }, _, Some(download)) => {
                let cx = &mut self.node.cx(now, out);
                download.welcomed(from, &neighbours, interested, cx);
                download.compare(from, holders, cx);
            }
            (Message::Lease(lease), _, Some(download)) => download.leased(from, lease, &mut self.node.cx(now, out)),
            (Message::Have { pieces, .. }, _, Some(download)) if pieces.is_empty() => {
                download.hears_it_comes(from, &mut self.node.cx(now, out));
            }
            (Message::Have { pieces, free_slots, interested }, _, Some(download)) => {
                download.heard_have(from, &pieces, free_slots, interested, &self.node.cx(now, out));
            }
            (Message::Released { piece, is_whole: true }, Some(coordinator), _) => {
                coordinator.released(from, piece, &mut self.node.cx(now, out));
            }
            (Message::Released { piece, is_whole: false }, Some(coordinator), _) => {
                coordinator.reads_on(from, piece, &mut self.node.cx(now, out));
            }
            (Message::LeaseEnd { segment, from: source, end, upload_time }, Some(coordinator), _) => {
                coordinator.lease_ended(from, (segment, source), (end, upload_time), &mut self.node.cx(now, out));
            }
            (Message::Missing { segments, without }, Some(coordinator), _) => {
                coordinator.missing(from, &segments, &without, &mut self.node.cx(now, out));
            }
            // Late words about a blob that is done with, here or there.
            _ => {}
        }
    }

    fn heard_hello(
        &mut self,
        now: Time,
        from: PeerId,
        blob: Digest,
        have: Bitfield,
        answer: bool,
        out: &mut Vec<Action>,
    ) {
        if let Some(download) = self.downloads.get_mut(&blob) {
            download.heard_hello(from, have, answer, &mut self.node.cx(now, out));
        } else if let Some(layout) = self.held.get(&blob).filter(|_| answer) {
            let have = Bitfield::full(layout.pieces());
            out.push(Action::Send { to: from, blob, message: Message::Hello { have, wants_answer: false } });
        } else if answer {
            out.push(Action::Send { to: from, blob, message: Message::Leave });
        }
    }
}

impl Swarm {
    /// The state about a blob, made when somebody speaks of it first.
    ///
    /// Who names another size than those before is wrong, or they were; sha256 tells neither. Somebody who
    /// wants the blob is believed over what others said who do not, and of those who have it the first; the
    /// one that is not heard goes to the next in rank, in the end to itself.
    pub(super) fn coordinate(
        &mut self,
        blob: Digest,
        (size, word): (u64, Word),
        from: PeerId,
    ) -> Result<(&mut Coordinator, &mut Node), Uncoordinated> {
        let (layout, node) = (Layout::new(size), &mut self.node);
        let is_known = match self.coordinated.get(&blob) {
            Some(state) if state.layout == layout => true,
            Some(state) if from != node.me && !state.gives_way_to(&from, word) => {
                return Err(Uncoordinated::OtherSize);
            }
            _ => false,
        };
        if !is_known {
            let charge = node.register.blob(from, node.me, &node.limits).ok_or(Uncoordinated::Flood)?;
            if !self.coordinated.contains(&blob) && self.coordinated.len() >= node.limits.blobs_max {
                let oldest = self.coordinated.iter().min_by_key(|(_, state)| state.used).map(|(blob, _)| *blob);
                if let Some(oldest) = oldest {
                    self.coordinated.remove(&oldest);
                }
            }
            self.coordinated.insert(blob, Coordinator::new(blob, layout, charge, &node.limits));
        }
        let state = self.coordinated.get_mut(&blob).ok_or(Uncoordinated::OtherSize)?;
        state.is_first.get_or_insert_with(|| node.is_first(&blob));
        Ok((state, node))
    }

    /// Nobody speaks of it any more.
    fn forget_if_idle(&mut self, blob: &Digest) {
        if self.coordinated.get(blob).is_some_and(Coordinator::is_idle) {
            self.coordinated.remove(blob);
        }
    }
}

/// What somebody says of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// It wants it.
    Wants,
    /// It has it.
    Has,
}

/// Why a node does not coordinate a blob of which a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Uncoordinated {
    /// Others, who want it, say that it has another size.
    OtherSize,
    /// The peer has made this node remember its share already.
    Flood,
}
