//! What other nodes say: to this node as a coordinator, as a neighbour, or as somebody they wait for.

use std::collections::BTreeMap;

use super::coordinator::Coordinator;
use super::{Action, Message, Node, PeerId, Swarm, Time};
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

impl Swarm {
    pub(super) fn heard(&mut self, now: Time, from: PeerId, blob: Digest, message: Message, out: &mut Vec<Action>) {
        match message {
            Message::Join(join) => {
                if let Some(coordinator) = coordinate(&mut self.coordinated, blob, join.size, from, &self.node) {
                    coordinator.joined(from, &join, &mut self.node.cx(now, out));
                }
                self.bridge(now, from, blob, out);
            }
            Message::Holds { size } => {
                if let Some(coordinator) = coordinate(&mut self.coordinated, blob, size, from, &self.node) {
                    coordinator.holds(from, &mut self.node.cx(now, out));
                }
                self.heard_of_holder(now, from, blob, size, out);
            }
            Message::Leave => {
                if let Some(coordinator) = self.coordinated.get_mut(&blob) {
                    coordinator.left(&from, &mut self.node.cx(now, out));
                }
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.drop_neighbour(&from, &mut self.node.cx(now, out));
                }
            }
            Message::Take { size } => self.asked_to_take(now, from, blob, size, out),
            Message::TakeEnd { is_kept } => self.take_ended(from, &blob, is_kept, out),
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
            self.node.cx(now, out).send(from, blob, Message::Welcome { neighbours, interested });
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
            (Message::Welcome { neighbours, interested }, _, Some(download)) => {
                download.welcomed(from, &neighbours, interested, &mut self.node.cx(now, out));
            }
            (Message::Lease(lease), _, Some(download)) => download.leased(from, lease, &mut self.node.cx(now, out)),
            (Message::Have { pieces, free_slots, interested }, _, Some(download)) => {
                download.heard_have(from, &pieces, free_slots, interested, now);
            }
            (Message::Released { piece }, Some(coordinator), _) => {
                coordinator.released(from, piece, &mut self.node.cx(now, out));
            }
            (Message::LeaseEnd { segment, end, upload_time }, Some(coordinator), _) => {
                coordinator.lease_ended(from, segment, (end, upload_time), &mut self.node.cx(now, out));
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

/// The state about a blob, made when somebody speaks of it first.
///
/// Who names another size than those before is wrong, or they were; sha256 tells neither. Somebody who
/// wants the blob is believed over what others said who do not; the one that is not heard goes to the
/// next in rank, in the end to itself.
pub(super) fn coordinate<'a>(
    coordinated: &'a mut BTreeMap<Digest, Coordinator>,
    blob: Digest,
    size: u64,
    from: PeerId,
    node: &Node,
) -> Option<&'a mut Coordinator> {
    if !coordinated.contains_key(&blob) && coordinated.len() >= node.limits.blobs_max {
        let oldest = coordinated.iter().min_by_key(|(_, state)| state.used).map(|(blob, _)| *blob);
        oldest.map(|blob| coordinated.remove(&blob));
    }
    let made = || Coordinator::new(blob, Layout::new(size), &node.limits);
    let state = coordinated.entry(blob).or_insert_with(made);
    if state.layout.size() != size && (state.interested.is_empty() || from == node.me) {
        *state = made();
    }
    state.is_first.get_or_insert_with(|| node.is_first(&blob));
    (state.layout.size() == size).then_some(state)
}
