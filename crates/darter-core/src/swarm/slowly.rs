//! A piece that is slow to come from the origin: who reads it says so, its lease stays, and all who wait
//! for it hear that it is worth it.

use super::Cx;
use super::coordinator::{Coordinator, Interested};
use super::download::Download;
use super::event::{Action, Message};
use super::owner::segment_of;
use super::peer::PeerId;

impl Download {
    /// Bytes of a piece come from the origin: the coordinator hears that this node is at it.
    pub(super) fn importing(&self, piece: u32, cx: &mut Cx<'_>) {
        if self.leases.imports(piece) {
            cx.send(self.coordinator(cx), self.blob, Message::Released { piece, is_whole: false });
        }
    }

    /// Somebody says that something comes. Its word counts where it should know.
    pub(super) fn hears_it_comes(&self, from: PeerId, cx: &mut Cx<'_>) {
        if from == self.coordinator(cx) && !self.is_complete() {
            cx.out.push(Action::Wait(self.blob));
        }
    }
}

impl Coordinator {
    /// Bytes of a piece come to an owner.
    pub(super) fn reads_on(&mut self, from: PeerId, piece: u32, cx: &mut Cx<'_>) {
        let (zone, segment) = (self.zone_of(&from, cx), segment_of(self.layout, u64::from(piece)));
        let (now, silence) = (cx.now, cx.limits.lease_patience);
        // Where pieces come, nobody need be told that they do.
        let is_news = self.tables.get_mut(&zone).is_some_and(|table| table.reads_on(segment, &from, now, silence));
        if !is_news {
            return;
        }
        let (interested, free_slots, is_for_zone) = (self.count(), cx.free_slots, cx.limits.scope_is_zone);
        let waits =
            |id: &PeerId, node: &Interested| !node.is_complete && *id != from && (!is_for_zone || node.zone == zone);
        for (id, _) in self.interested.iter().filter(|(id, node)| waits(id, node)) {
            cx.send(*id, self.blob, Message::Have { pieces: Vec::new(), free_slots, interested });
        }
    }
}
