//! What this node owns: segments that it reads from where they are scarce, for everybody.

use super::Cx;
use super::download::Download;
use super::event::{Action, ImportFailure, Lease, LeaseEnd, Message, Reading};
use super::peer::PeerId;
use crate::pieces::{Bitfield, Layout};

/// The leases of one download.
#[derive(Debug)]
pub(super) struct Leases {
    running: Vec<Running>,
    /// Pieces of every segment that was ever leased to us: they may be taken from scarce sources.
    owned: Bitfield,
}

#[derive(Debug)]
struct Running {
    lease: Lease,
    /// Pieces that `Action::Import` asked for and that did not come yet.
    importing: Vec<u32>,
}

impl Leases {
    pub(super) fn new(pieces: u64) -> Self {
        Self { running: Vec::new(), owned: Bitfield::new(pieces) }
    }

    pub(super) const fn owned(&self) -> &Bitfield {
        &self.owned
    }

    pub(super) fn readings(&self) -> impl Iterator<Item = Reading> {
        self.running.iter().map(|running| Reading { segment: running.lease.segment, from: running.lease.from })
    }

    /// What is to be read from peers: the peer and the piece.
    pub(super) fn duties(&self, layout: Layout) -> Vec<(PeerId, u32)> {
        let from_peers = self.running.iter().filter_map(|running| Some((running.lease.from?, running.lease.segment)));
        from_peers.flat_map(|(from, segment)| pieces_of(layout, segment).map(move |piece| (from, piece))).collect()
    }

    /// Whether the piece is on its way from the origin.
    pub(super) fn imports(&self, piece: u32) -> bool {
        self.running.iter().any(|running| running.importing.contains(&piece))
    }

    pub(super) fn is_importing(&self) -> bool {
        self.running.iter().any(|running| !running.importing.is_empty())
    }
}

/// The segment that a piece belongs to.
pub(super) fn segment_of(layout: Layout, piece: u64) -> u32 {
    u32::try_from(layout.piece(piece).start / layout.segment_size()).unwrap_or(u32::MAX)
}

/// The pieces of a segment.
pub(super) fn pieces_of(layout: Layout, segment: u32) -> std::ops::Range<u32> {
    let span = layout.segment(u64::from(segment));
    let index = |offset: u64| u32::try_from(offset / layout.piece_size()).unwrap_or(u32::MAX);
    index(span.start)..u32::try_from(span.end.div_ceil(layout.piece_size())).unwrap_or(u32::MAX)
}

impl Download {
    /// A segment was given to us.
    pub(super) fn leased(&mut self, from: PeerId, lease: Lease, cx: &mut Cx<'_>) {
        if self.seat.heard_of(&from, cx.answers, cx.limits) {
            // It did not answer, and now it does. It learns what is read already, and gives leases anew.
            return self.join(cx);
        }
        // Anybody else would make us read the origin, or ask whom it likes.
        let is_ours = from == self.coordinator(cx) && lease.from != Some(cx.me);
        if !is_ours || u64::from(lease.segment) >= self.layout.segments() {
            return;
        }
        if lease.from.is_some_and(|from| self.is_shunned(&from, cx)) {
            // Nothing is read from it, and somebody else must be.
            return self.end_lease(lease, LeaseEnd::Broken, cx);
        }
        self.interest(lease.interested, cx);
        let is_again = self.leases.readings().any(|reading| reading.segment == lease.segment);
        if let Some(from) = lease.from {
            self.meet(from, lease.is_whole, cx);
            if is_again {
                // Nothing of it came, and a word of what is there may have been lost: it says all of it once more.
                self.hello(from, true, cx);
            }
        }
        pieces_of(self.layout, lease.segment).for_each(|piece| self.leases.owned.set(u64::from(piece)));
        match self.leases.running.iter_mut().find(|running| running.lease.segment == lease.segment) {
            // Given again: from somewhere else, if the source before did not do.
            Some(running) => running.lease = lease,
            None => self.leases.running.push(Running { lease, importing: Vec::new() }),
        }
        self.work_leases(cx);
    }

    /// Imports what our leases ask for and no neighbour has, and ends those that are fulfilled.
    pub(super) fn work_leases(&mut self, cx: &mut Cx<'_>) {
        self.read_leases(false, cx);
    }

    /// The same. `is_stuck`: whatever neighbours say that they have, for long they gave nothing.
    pub(super) fn read_leases(&mut self, is_stuck: bool, cx: &mut Cx<'_>) {
        for at in (0..self.leases.running.len()).rev() {
            let lease = self.leases.running[at].lease;
            let pieces = pieces_of(self.layout, lease.segment);
            if pieces.clone().all(|piece| self.have.has(u64::from(piece))) {
                self.leases.running.swap_remove(at);
                self.end_lease(lease, LeaseEnd::Done, cx);
                continue;
            }
            if lease.from.is_some() {
                continue;
            }
            let wanted: Vec<u32> = pieces
                .map(u64::from)
                .filter(|piece| self.open.has(*piece) && (is_stuck || !self.can_be_had(*piece)))
                .filter_map(|piece| u32::try_from(piece).ok())
                .collect();
            for run in wanted.chunk_by(|piece, next| piece + 1 == *next) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
                let import = Action::Import { blob: self.blob, segment: lease.segment, first: *first, end: *last + 1 };
                cx.out.push(import);
            }
            wanted.iter().for_each(|piece| self.open.clear(u64::from(*piece)));
            self.leases.running[at].importing.extend(wanted);
        }
    }

    /// A piece of one of our segments may have come: the coordinator hears of it.
    pub(super) fn owner_got(&mut self, piece: u32, cx: &mut Cx<'_>) {
        let layout = self.layout;
        let owner = self.leases.running.iter_mut().find(|own| pieces_of(layout, own.lease.segment).contains(&piece));
        let Some(running) = owner else { return };
        running.importing.retain(|other| *other != piece);
        let coordinator = self.coordinator(cx);
        cx.send(coordinator, self.blob, Message::Released { piece, is_whole: true });
        self.work_leases(cx);
    }

    /// The origin did not give the rest of a segment.
    pub(super) fn import_failed(&mut self, segment: u32, reason: ImportFailure, cx: &mut Cx<'_>) {
        let Some(at) = self.leases.running.iter().position(|running| running.lease.segment == segment) else { return };
        let Running { lease, importing } = self.leases.running.swap_remove(at);
        for piece in importing {
            if !self.have.has(u64::from(piece)) {
                self.open.set(u64::from(piece));
            }
        }
        let end = match reason {
            ImportFailure::Throttled(wait) => LeaseEnd::Throttled(wait),
            ImportFailure::Forbidden => {
                self.can_import = false;
                LeaseEnd::Forbidden
            }
            ImportFailure::Broken => LeaseEnd::Broken,
        };
        self.end_lease(lease, end, cx);
    }

    /// A peer is gone: what was leased to be read from it goes back.
    pub(super) fn lost_source(&mut self, peer: &PeerId, cx: &mut Cx<'_>) {
        for at in (0..self.leases.running.len()).rev() {
            if self.leases.running[at].lease.from == Some(*peer) {
                let lease = self.leases.running.swap_remove(at).lease;
                self.end_lease(lease, LeaseEnd::Broken, cx);
            }
        }
    }

    fn end_lease(&self, lease: Lease, end: LeaseEnd, cx: &mut Cx<'_>) {
        let (coordinator, Lease { segment, from, .. }) = (self.coordinator(cx), lease);
        cx.send(coordinator, self.blob, Message::LeaseEnd { segment, from, end, upload_time: cx.upload_time });
    }
}
