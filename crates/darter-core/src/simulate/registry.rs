//! The origin of the model: its link, its limits, what it refuses.

use std::time::Duration;

use super::queue::{Due, Nanos};
use super::wires::{ImportRun, Link};
use super::world::{World, nanos};
use crate::swarm::{Event, ImportFailure};

/// A piece that is slow to come is spoken of this often.
const SPOKEN_OF_EVERY: Nanos = 1_000_000_000;

pub(super) struct Registry {
    pub(super) link: Link,
    /// What one connection needs for a block.
    pub(super) pace: Nanos,
    pub(super) latency: Nanos,
    pub(super) throttled_until: Nanos,
}

impl World<'_> {
    pub(super) fn import(&mut self, n: u32, blob: u16, segment: u32, (piece, end): (u32, u32)) {
        let refusal = if self.nodes[n as usize].is_forbidden {
            Some(ImportFailure::Forbidden)
        } else if self.now < self.origin.throttled_until {
            let wait = Duration::from_nanos(self.origin.throttled_until - self.now);
            self.outcome.throttled += 1;
            Some(ImportFailure::Throttled(wait))
        } else {
            None
        };
        let left = self.scenario.blocks;
        let run = ImportRun { to: n, blob, segment, piece, end, left, paced_until: 0, told: self.now, refusal };
        let place = self.imports.put(run);
        self.queue.at(self.now + self.origin.latency, Due::OriginReady(place));
    }

    pub(super) fn origin_ready(&mut self, place: u32) {
        let departure = self.origin.link.carry(self.now);
        self.queue.at(departure, Due::OriginBlock(place));
    }

    pub(super) fn origin_block(&mut self, place: u32) {
        let blocks = self.scenario.blocks;
        let now = self.now;
        let pace = self.origin.pace;
        let run = self.imports.at(place);
        let (to, blob, segment) = (run.to, run.blob, run.segment);
        if let Some(reason) = run.refusal {
            self.imports.release(place);
            return self.tell(to, Event::ImportFailed { blob: self.digest(blob), segment, reason });
        }
        let node = &self.nodes[to as usize];
        if !node.is_alive || node.has_no_room {
            return self.imports.release(place);
        }
        if node.paused_until > now {
            return self.queue.at(node.paused_until, Due::OriginReady(place));
        }
        run.left -= 1;
        run.paced_until = run.paced_until.max(now) + pace;
        let (piece, is_piece) = (run.piece, run.left == 0);
        if is_piece {
            run.piece += 1;
            run.left = blocks;
        }
        let is_told = !is_piece && now.saturating_sub(run.told) >= SPOKEN_OF_EVERY;
        if is_piece || is_told {
            run.told = now;
        }
        let (ready, is_over) = (run.paced_until, run.piece == run.end);
        // With its last block: a piece may be smaller than its blocks.
        self.outcome.origin_bytes += if is_piece { self.bytes(blob, piece) } else { 0 };
        let arrival = self.nodes[to as usize].down.carry(now);
        if is_piece {
            self.queue.at(arrival, Due::OriginPiece { to, blob, piece });
        }
        if is_told {
            self.tell(to, Event::Importing { blob: self.digest(blob), piece });
        }
        if is_over {
            self.imports.release(place);
        } else {
            // The first block shows that the connection may send the next one this much later.
            self.queue.at(ready.saturating_sub(pace).max(now), Due::OriginReady(place));
        }
    }

    pub(super) fn origin_piece(&mut self, to: u32, blob: u16, piece: u32) {
        let paused_until = self.nodes[to as usize].paused_until;
        if paused_until > self.now {
            return self.queue.at(paused_until, Due::OriginPiece { to, blob, piece });
        }
        self.vouch(to, blob, piece);
        let event = Event::Imported { blob: self.digest(blob), piece };
        self.got(to, blob, piece, event);
    }

    pub(super) fn throttle(&mut self, period: Duration) {
        self.origin.throttled_until = self.now + nanos(period);
    }
}
