//! Pieces that are slow to come from the origin: all who wait hear that it is worth it.
//!
//! Who reads a piece that comes slowly says so, and its lease stays. Where the origin wants to be left alone
//! nobody reads, and nobody is to lose patience and ask it by himself.

use std::time::Duration;

use super::Cx;
use super::coordinator::{Coordinator, Interested};
use super::download::Download;
use super::event::{Action, Message};
use super::limits::Limits;
use super::owner::segment_of;
use super::peer::PeerId;
use super::time::Time;

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
        let is_for_zone = cx.limits.scope_is_zone;
        self.tell_it_comes(cx, |id, node| *id != from && (!is_for_zone || node.zone == zone));
    }

    /// The origin wants to be left alone, as an owner says.
    pub(super) fn throttled(&mut self, from: PeerId, source: Option<PeerId>, wait: Duration, cx: &mut Cx<'_>) {
        // Of another node that is no word.
        if source.is_none() {
            let is_sure = from == cx.me || self.incomplete <= 1;
            self.budget.throttled(cx.now, wait, from, is_sure);
            self.tell_of_pause(cx);
        }
    }

    /// All who wait hear again and again that the origin will be asked.
    pub(super) fn tell_of_pause(&mut self, cx: &mut Cx<'_>) {
        if cx.now < self.budget.throttled_until() && cx.now >= self.told + cx.limits.lease_patience {
            self.told = cx.now;
            self.tell_it_comes(cx, |_, _| true);
        }
    }

    /// When they are to hear it next.
    pub(super) fn tells_at(&self, limits: &Limits) -> Time {
        let at = self.told + limits.lease_patience;
        if at < self.budget.throttled_until() { at } else { Time::NEVER }
    }

    fn tell_it_comes(&self, cx: &mut Cx<'_>, is_told: impl Fn(&PeerId, &Interested) -> bool) {
        let (interested, free_slots) = (self.count(), cx.free_slots);
        for (id, _) in self.interested.iter().filter(|(id, node)| !node.is_complete && is_told(id, node)) {
            cx.send(*id, self.blob, Message::Have { pieces: Vec::new(), free_slots, interested });
        }
    }
}
