//! Pieces on their way from node to node.

use super::queue::Due;
use super::wires::{Transfer, TransferState};
use super::world::{World, nanos, number};
use crate::swarm::{Event, FetchFailure, PeerId, Refusal, RequestId};

impl World<'_> {
    pub(super) fn fetch(&mut self, n: u32, blob: u16, piece: u32, peer: &PeerId) {
        self.serial = self.serial.wrapping_add(1);
        let place = self.transfers.put(Transfer {
            serial: self.serial,
            from: number(peer),
            to: n,
            blob,
            piece,
            left: self.scenario.blocks,
            state: TransferState::Asked,
            refusal: None,
        });
        self.nodes[n as usize].incoming.push(place);
        self.queue.at(self.now + nanos(self.scenario.latency), Due::Ask(place));
    }

    /// A request arrives at the node that is asked, if it does.
    pub(super) fn ask(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        if transfer.state != TransferState::Asked {
            return self.transfers.release(place);
        }
        if !self.nodes[transfer.from as usize].is_alive || self.is_out_of_reach(transfer.to, transfer.from) {
            return self.queue.at(self.now + nanos(self.scenario.detection), Due::Broke(place));
        }
        if self.nodes[transfer.from as usize].paused_until > self.now {
            self.wait(place);
        }
        if self.is_of_liar(transfer.from, transfer.to, transfer.blob, transfer.piece) {
            // It sees by the head of the answer who vouches.
            self.transfers.release(place);
            self.forget(transfer.to, place);
            return self.fetch_failed(&transfer, FetchFailure::Refused(Refusal::NotHere));
        }
        let from = self.ids[transfer.to as usize];
        let (blob, piece, request) = (self.digest(transfer.blob), transfer.piece, RequestId(u64::from(place)));
        self.tell(transfer.from, Event::Asked { from, blob, piece, request });
    }

    pub(super) fn serve(&mut self, n: u32, place: u32) {
        if self.transfers.at(place).state == TransferState::Asked {
            self.transfers.at(place).state = TransferState::Running;
        }
        self.next_block(n, place);
    }

    fn next_block(&mut self, n: u32, place: u32) {
        if self.nodes[n as usize].is_stalled {
            return self.queue.at(self.now + nanos(self.scenario.patience), Due::Broke(place));
        }
        let departure = self.nodes[n as usize].up.carry(self.now);
        self.queue.at(departure, Due::Block(place));
    }

    pub(super) fn refuse(&mut self, place: u32, reason: Refusal) {
        self.outcome.refused += 1;
        self.transfers.at(place).refusal = Some(reason);
        self.queue.at(self.now + nanos(self.scenario.latency), Due::NoPiece(place));
    }

    pub(super) fn no_piece(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        self.transfers.release(place);
        if transfer.state != TransferState::Asked {
            return;
        }
        self.forget(transfer.to, place);
        let reason = FetchFailure::Refused(transfer.refusal.unwrap_or(Refusal::NotHere));
        self.fetch_failed(&transfer, reason);
    }

    /// The node that asked, or the one that serves, sees that nothing comes of it.
    pub(super) fn broke(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        self.transfers.release(place);
        self.tell(transfer.from, Event::Served(RequestId(u64::from(place))));
        if matches!(transfer.state, TransferState::Asked | TransferState::Running) {
            self.forget(transfer.to, place);
            let is_stalled = self.nodes[transfer.from as usize].is_stalled;
            self.fetch_failed(&transfer, if is_stalled { FetchFailure::Stalled } else { FetchFailure::Broken });
        }
    }

    /// The receiver does not wait for ever.
    fn wait(&mut self, place: u32) {
        let serial = self.transfers.at(place).serial;
        self.queue.at(self.now + nanos(self.scenario.patience), Due::GiveUp(place, serial));
    }

    /// The receiver closes a transfer that shows no progress; the sender learns of it when it goes on.
    pub(super) fn give_up(&mut self, place: u32, serial: u32) {
        let transfer = *self.transfers.at(place);
        let is_open = matches!(transfer.state, TransferState::Asked | TransferState::Running);
        if transfer.serial == serial && is_open && self.nodes[transfer.from as usize].paused_until > self.now {
            self.transfers.at(place).state = TransferState::Broken;
            self.forget(transfer.to, place);
            self.fetch_failed(&transfer, FetchFailure::Stalled);
        }
    }

    pub(super) fn fetch_failed(&mut self, transfer: &Transfer, reason: FetchFailure) {
        let peer = self.ids[transfer.from as usize];
        let blob = self.digest(transfer.blob);
        self.tell(transfer.to, Event::FetchFailed { blob, piece: transfer.piece, peer, reason });
    }

    pub(super) fn block(&mut self, place: u32) {
        let now = self.now;
        let transfer = self.transfers.at(place);
        let from = transfer.from;
        if transfer.state != TransferState::Running {
            self.transfers.release(place);
            return self.tell(from, Event::Served(RequestId(u64::from(place))));
        }
        let paused_until = self.nodes[from as usize].paused_until;
        if paused_until > now {
            self.queue.at(paused_until, Due::Block(place));
            return self.wait(place);
        }
        transfer.left -= 1;
        let (to, left) = (transfer.to, transfer.left);
        let arrival = self.nodes[to as usize].down.carry(now + nanos(self.scenario.latency));
        if left > 0 {
            return self.next_block(from, place);
        }
        self.queue.at(arrival, Due::Piece(place));
        self.tell(from, Event::Served(RequestId(u64::from(place))));
    }

    pub(super) fn piece(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        let paused_until = self.nodes[transfer.to as usize].paused_until;
        if paused_until > self.now {
            return self.queue.at(paused_until, Due::Piece(place));
        }
        self.transfers.release(place);
        let bytes = self.bytes(transfer.blob, transfer.piece);
        self.outcome.peer_bytes += bytes;
        let zones = self.scenario.zones.max(1);
        if transfer.from % zones != transfer.to % zones {
            self.outcome.cross_zone_bytes += bytes;
        }
        if transfer.state != TransferState::Running {
            self.outcome.duplicate_bytes += bytes;
            return;
        }
        self.forget(transfer.to, place);
        if self.nodes[transfer.from as usize].is_corrupt {
            *self.outcome.wasted.entry((transfer.from, transfer.to)).or_default() += 1;
            return self.fetch_failed(&transfer, FetchFailure::Corrupt);
        }
        self.pass_on(transfer.from, transfer.to, transfer.blob, transfer.piece);
        let peer = self.ids[transfer.from as usize];
        let event = Event::Fetched { blob: self.digest(transfer.blob), piece: transfer.piece, peer };
        self.got(transfer.to, transfer.blob, transfer.piece, event);
    }

    /// A verified piece is at a node, as `event` says.
    pub(super) fn got(&mut self, n: u32, blob: u16, piece: u32, event: Event) {
        let node = &mut self.nodes[n as usize];
        if !node.is_alive || node.has_no_room {
            return;
        }
        let ingest = &mut node.ingests[usize::from(blob)];
        let (digest, layout) = self.blobs[usize::from(blob)];
        if ingest.have.has(u64::from(piece)) {
            self.outcome.duplicate_bytes += layout.piece(u64::from(piece)).len();
        } else {
            ingest.have.set(u64::from(piece));
            ingest.count += 1;
            if (blob, piece) == (0, 0) {
                node.begun = Some(self.now);
            }
        }
        let is_done = !ingest.is_proven && ingest.count == layout.pieces();
        self.tell(n, event);
        if is_done && self.is_right(n, blob) {
            self.nodes[n as usize].ingests[usize::from(blob)].is_proven = true;
            self.tell(n, Event::Proven { blob: digest, layout });
            self.finish(n);
        }
    }

    pub(super) fn cancel(&mut self, n: u32, blob: u16, piece: u32, from: u32) {
        let incoming = &self.nodes[n as usize].incoming;
        let found = incoming.iter().copied().find(|place| {
            let transfer = self.transfers.at(*place);
            transfer.to == n && transfer.piece == piece && transfer.from == from && transfer.blob == blob
        });
        if let Some(place) = found {
            self.transfers.at(place).state = TransferState::Cancelled;
            self.forget(n, place);
        }
    }

    pub(super) fn forget(&mut self, n: u32, place: u32) {
        self.nodes[n as usize].incoming.retain(|other| *other != place);
    }
}
