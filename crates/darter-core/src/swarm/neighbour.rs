//! What a node knows of one peer that it exchanges pieces of a blob with.

use std::time::Duration;

use super::limits::Limits;
use super::peer::PeerId;
use super::time::Time;
use crate::pieces::Bitfield;

/// A failed peer is asked again after this long, doubled for each failure in a row.
const BACKOFF: Duration = Duration::from_millis(250);
/// So many times what it estimates: for the case that its word that a slot is free is lost.
const WORD_LOST: u32 = 6;
/// Failures in a row after which somebody else takes its place.
const FAILURES_MAX: u8 = 4;

/// Pieces that one who never gave any may have announced in vain, if that goes on for `lease_patience`. One
/// that has just come, or stops, refuses some too.
const PROMISES_MAX: u8 = 16;

#[derive(Debug, Clone)]
pub(super) struct Neighbour {
    pub(super) id: PeerId,
    have: Bitfield,
    /// How many pieces that is.
    count: u64,
    /// Only pieces of segments that are leased to us may be asked from it: a lone holder, or a peer
    /// in another zone.
    pub(super) is_scarce: bool,
    pub(super) in_flight: u8,
    /// Uploads that it could start, as far as we know.
    pub(super) free_slots: u8,
    /// Not to be asked before this.
    pub(super) not_before: Time,
    failures: u8,
    /// Pieces that it announced and did not have when it was asked; and since when.
    promises: u8,
    breaks_since: Time,
    /// How long a piece takes from it, smoothed; nothing before the first.
    piece_time: Option<Duration>,
}

impl Neighbour {
    pub(super) fn new(id: PeerId, have: Bitfield, is_scarce: bool) -> Self {
        Self {
            id,
            count: have.count(),
            have,
            is_scarce,
            in_flight: 0,
            // Nobody knows yet: the first requests tell.
            free_slots: 2,
            not_before: Time::ZERO,
            failures: 0,
            promises: 0,
            breaks_since: Time::NEVER,
            piece_time: None,
        }
    }

    pub(super) const fn have(&self) -> &Bitfield {
        &self.have
    }

    pub(super) fn has(&self, piece: u32) -> bool {
        self.have.has(u64::from(piece))
    }

    /// Number of pieces that it has.
    pub(super) const fn count(&self) -> u64 {
        self.count
    }

    /// It has this piece now. False: that was known.
    pub(super) fn gained(&mut self, piece: u32) -> bool {
        let is_new = !self.has(piece);
        if is_new {
            self.have.set(u64::from(piece));
            self.count += 1;
        }
        is_new
    }

    /// It does not give this piece. False: that was known.
    pub(super) fn lacks(&mut self, piece: u32) -> bool {
        let is_new = self.has(piece);
        if is_new {
            self.have.clear(u64::from(piece));
            self.count -= 1;
        }
        is_new
    }

    /// It announced a piece that it does not have.
    pub(super) fn breaks_promise(&mut self, now: Time) {
        self.promises = self.promises.saturating_add(1);
        self.breaks_since = self.breaks_since.min(now);
    }

    /// Whether it gave nothing of what it announced, as far as it was asked.
    pub(super) fn boasts(&self, now: Time, limits: &Limits) -> bool {
        let is_known = now.since(self.breaks_since) >= limits.lease_patience;
        is_known && self.promises >= PROMISES_MAX && self.piece_time.is_none()
    }

    /// What it says that it has.
    pub(super) fn says_has(&mut self, have: Bitfield) {
        self.count = have.count();
        self.have = have;
        self.may_be_free();
    }

    /// Whether one more piece may be asked from it now.
    pub(super) fn is_free(&self, now: Time, in_flight_max: u8) -> bool {
        self.in_flight < in_flight_max && self.free_slots > 0 && now >= self.not_before
    }

    pub(super) const fn asked(&mut self) {
        self.in_flight = self.in_flight.saturating_add(1);
        self.free_slots = self.free_slots.saturating_sub(1);
    }

    /// A piece came from it after `took`.
    pub(super) fn delivered(&mut self, took: Duration) {
        self.in_flight = self.in_flight.saturating_sub(1);
        // The slot that it served us from is free again, unless somebody was faster.
        self.free_slots = self.free_slots.saturating_add(1);
        self.failures = 0;
        self.piece_time = Some(self.piece_time.map_or(took, |mean| (mean * 3 + took) / 4));
    }

    /// Its slots are taken. It says when one is free.
    pub(super) fn refused(&mut self, now: Time, retry_after: Duration) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.not_before = now + retry_after * WORD_LOST;
        self.free_slots = self.free_slots.max(1);
    }

    /// It keeps a slot for us.
    pub(super) fn offers_slot(&mut self, now: Time) {
        self.free_slots = self.free_slots.max(1);
        self.not_before = self.not_before.min(now);
    }

    /// A request to it broke. False: look for another neighbour.
    pub(super) fn failed(&mut self, now: Time) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.free_slots = self.free_slots.max(1);
        self.failures = self.failures.saturating_add(1);
        self.not_before = now + BACKOFF * (1 << u32::from(self.failures.min(6)));
        self.failures < FAILURES_MAX
    }

    /// Whether the last request to it was answered.
    pub(super) const fn is_well(&self) -> bool {
        self.failures == 0
    }

    /// A request to it was closed by us.
    pub(super) const fn cancelled(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.free_slots = self.free_slots.saturating_add(1);
    }

    /// What it said of its slots is old: one request tells.
    pub(super) fn may_be_free(&mut self) {
        self.free_slots = self.free_slots.max(1);
    }

    /// It said how many uploads it could start.
    pub(super) fn says_free(&mut self, now: Time, free_slots: u8) {
        self.free_slots = free_slots;
        if free_slots > 0 && self.failures == 0 {
            self.not_before = self.not_before.min(now);
        }
    }

    pub(super) const fn piece_time(&self) -> Option<Duration> {
        self.piece_time
    }
}
