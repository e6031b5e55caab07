//! Uploads: a few at a time, refused beyond, and the most deprived is called when one ends.
//!
//! With deep queues every receiver waits at the uploader of the newest piece while others have
//! nothing to do; a refusal sends it to somebody else at once. Who was refused waits without having
//! chosen a piece: when a slot is free, the one that has least gets it and chooses then.

use std::collections::BTreeMap;
use std::time::Duration;

use super::event::RequestId;
use super::limits::Limits;
use super::peer::PeerId;
use super::time::Time;
use crate::Digest;

#[derive(Debug, Default)]
pub(super) struct Slots {
    running: BTreeMap<RequestId, (PeerId, Time)>,
    /// Slots kept for peers that were called, until when.
    kept: BTreeMap<PeerId, Time>,
    /// Who was refused, about which blob, and when.
    waiting: BTreeMap<PeerId, (Digest, Time)>,
    /// How long an upload takes, smoothed.
    piece_time: Duration,
}

impl Slots {
    /// Takes a slot for an upload to `peer`, of which it may have `share` at a time, or says how long to wait.
    pub(super) fn take(
        &mut self,
        now: Time,
        request: RequestId,
        peer: PeerId,
        blob: Digest,
        (share, limits): (u8, &Limits),
    ) -> Result<(), Duration> {
        let is_kept = self.kept.remove(&peer).is_some_and(|until| until > now);
        let has_room = is_kept || self.free(now, limits) > 0;
        if !has_room || self.has_its_share(&peer, share) {
            if self.waiting.len() < limits.waiting_max {
                self.waiting.entry(peer).or_insert((blob, now));
            }
            return Err((self.piece_time / 2).max(Duration::from_millis(1)));
        }
        self.waiting.remove(&peer);
        self.running.insert(request, (peer, now));
        Ok(())
    }

    /// An upload ended.
    pub(super) fn give_back(&mut self, now: Time, request: RequestId) {
        let Some((_, since)) = self.running.remove(&request) else { return };
        let took = now.since(since);
        self.piece_time = if self.piece_time.is_zero() { took } else { (self.piece_time * 3 + took) / 4 };
    }

    /// The peer that was called about a blob needs nothing of it.
    pub(super) fn not_needed(&mut self, peer: &PeerId, blob: &Digest) {
        self.kept.remove(peer);
        if self.waiting.get(peer).is_some_and(|(wanted, _)| wanted == blob) {
            self.waiting.remove(peer);
        }
    }

    /// The peer is gone.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.kept.remove(peer);
        self.waiting.remove(peer);
    }

    /// Whom to call now: as long as a slot is free, of those that wait the one that has least, then the
    /// one that waits longest. Not who has its share: it would only be refused again.
    pub(super) fn call(
        &mut self,
        now: Time,
        (share, limits): (u8, &Limits),
        wealth: impl Fn(&PeerId, &Digest) -> u64,
    ) -> Option<(PeerId, Digest)> {
        if self.waiting.is_empty() || self.free(now, limits) == 0 {
            return None;
        }
        let may = self.waiting.iter().filter(|(peer, _)| !self.has_its_share(peer, share));
        let (peer, (blob, _)) = may.min_by_key(|(peer, (blob, since))| (wealth(peer, blob), *since))?;
        let called = (*peer, *blob);
        self.waiting.remove(&called.0);
        self.kept.insert(called.0, now + limits.slot_patience);
        Some(called)
    }

    fn has_its_share(&self, peer: &PeerId, share: u8) -> bool {
        self.running.values().filter(|(other, _)| other == peer).count() >= usize::from(share)
    }

    /// Uploads that could start now.
    pub(super) fn free(&self, now: Time, limits: &Limits) -> u8 {
        let kept = self.kept.values().filter(|until| **until > now).count();
        limits.slots.saturating_sub(u8::try_from(self.running.len() + kept).unwrap_or(u8::MAX))
    }

    /// Whether an upload more takes nothing from anybody: half of the slots are free, and nobody waits.
    pub(super) fn are_at_leisure(&self, now: Time, limits: &Limits) -> bool {
        self.waiting.is_empty() && self.free(now, limits) * 2 >= limits.slots
    }

    /// When a slot that is kept for somebody who does not come may be given to another.
    pub(super) fn deadline(&self) -> Time {
        if self.waiting.is_empty() { Time::NEVER } else { self.kept.values().min().copied().unwrap_or(Time::NEVER) }
    }

    /// Lets go of slots whose peers did not come.
    pub(super) fn tick(&mut self, now: Time) {
        self.kept.retain(|_, until| *until > now);
    }

    /// How long an upload takes; zero before the first.
    pub(super) const fn piece_time(&self) -> Duration {
        self.piece_time
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn at(millis: u64) -> Time {
        Time::from_micros(millis * 1000)
    }

    #[test]
    fn a_free_slot_goes_to_who_has_least_then_to_who_waits_longest() {
        let (limits, blob) = (Limits { slots: 1, ..Limits::default() }, Digest::of(b"x"));
        let mut slots = Slots::default();
        assert!(slots.take(at(0), RequestId(0), peer(9), blob, (2, &limits)).is_ok());
        for (millis, n) in [(1, 4), (2, 3), (3, 2)] {
            assert!(slots.take(at(millis), RequestId(millis), peer(n), blob, (2, &limits)).is_err());
        }
        slots.give_back(at(5), RequestId(0));
        let wealth = |peer: &PeerId, _: &Digest| u64::from(peer.to_bytes()[0] == 4);
        assert_eq!(slots.call(at(5), (2, &limits), wealth), Some((peer(3), blob)));
        assert_eq!(slots.call(at(5), (2, &limits), wealth), None, "the slot is kept for it");
        assert!(slots.take(at(6), RequestId(7), peer(2), blob, (2, &limits)).is_err());
        assert!(slots.take(at(6), RequestId(8), peer(3), blob, (2, &limits)).is_ok());
    }

    #[test]
    fn who_comes_too_late_for_a_kept_slot_takes_none_beyond_the_bound() {
        let (limits, blob) = (Limits { slots: 1, ..Limits::default() }, Digest::of(b"x"));
        let mut slots = Slots::default();
        slots.take(at(0), RequestId(0), peer(9), blob, (2, &limits)).unwrap();
        slots.take(at(0), RequestId(1), peer(1), blob, (2, &limits)).unwrap_err();
        slots.give_back(at(1), RequestId(0));
        assert!(slots.call(at(1), (2, &limits), |_, _| 0).is_some());
        let late = at(1) + limits.slot_patience;
        slots.take(late, RequestId(2), peer(8), blob, (2, &limits)).unwrap();
        slots.take(late, RequestId(3), peer(1), blob, (2, &limits)).unwrap_err();
        assert_eq!(slots.running(), 1);
    }

    #[test]
    fn who_has_its_share_of_uploads_is_not_called_for_more() {
        let (limits, blob) = (Limits::default(), Digest::of(b"x"));
        let mut slots = Slots::default();
        for n in 0..2 {
            slots.take(at(0), RequestId(n), peer(1), blob, (2, &limits)).unwrap();
        }
        slots.take(at(0), RequestId(9), peer(1), blob, (2, &limits)).unwrap_err();
        assert_eq!(slots.call(at(0), (2, &limits), |_, _| 0), None);
        slots.give_back(at(1), RequestId(0));
        assert_eq!(slots.call(at(1), (2, &limits), |_, _| 0), Some((peer(1), blob)));
    }
}
