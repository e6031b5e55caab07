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
    /// Who was refused, about which blob.
    waiting: BTreeMap<PeerId, Digest>,
    /// How long an upload takes, smoothed.
    piece_time: Duration,
}

impl Slots {
    /// Takes a slot for an upload to `peer`, or says how long to wait.
    pub(super) fn take(
        &mut self,
        now: Time,
        request: RequestId,
        peer: PeerId,
        blob: Digest,
        limits: &Limits,
    ) -> Result<(), Duration> {
        let is_kept = self.kept.remove(&peer).is_some();
        let to_peer = self.running.values().filter(|(other, _)| *other == peer).count();
        let has_room = is_kept || self.free(now, limits) > 0;
        if !has_room || to_peer >= usize::from(limits.slots_per_peer) {
            if self.waiting.len() < limits.waiting_max {
                self.waiting.insert(peer, blob);
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

    /// The peer that was called needs nothing, or is gone.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.kept.remove(peer);
        self.waiting.remove(peer);
    }

    /// Whom to call now: as long as a slot is free, of those that wait the one that has least.
    pub(super) fn call(
        &mut self,
        now: Time,
        limits: &Limits,
        wealth: impl Fn(&PeerId, &Digest) -> u64,
    ) -> Option<(PeerId, Digest)> {
        if self.waiting.is_empty() || self.free(now, limits) == 0 {
            return None;
        }
        let (peer, blob) = self.waiting.iter().min_by_key(|(peer, blob)| wealth(peer, blob))?;
        let called = (*peer, *blob);
        self.waiting.remove(&called.0);
        self.kept.insert(called.0, now + limits.slot_patience);
        Some(called)
    }

    /// Uploads that could start now.
    pub(super) fn free(&self, now: Time, limits: &Limits) -> u8 {
        let kept = self.kept.values().filter(|until| **until > now).count();
        limits.slots.saturating_sub(u8::try_from(self.running.len() + kept).unwrap_or(u8::MAX))
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
