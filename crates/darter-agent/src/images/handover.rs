//! Blobs that were cut short a moment ago: they are not given again at once, so that containerd goes on
//! at the origin instead of coming back to the same failure.
//!
//! Who was cut short is remembered with the blob. They get their 404 before anything else is asked, since
//! they had the right to it when it began; everybody else has to show theirs first, or the 404 would
//! tell a stranger what is here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::Digest;
use darter_core::access::{CredentialKey, Place};

/// Digests remembered. Past it the oldest is asked for again, which costs one try.
const BLOBS_MAX: usize = 4096;
/// Those cut short of one blob at once who are remembered: the repositories that have it. The others wait
/// for their proof.
const ASKERS_MAX: usize = 16;

/// A blob, and who asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The credential it was asked with, not to be told from this.
    pub credential: CredentialKey,
    /// In which repository.
    pub place: Place,
    /// The blob.
    pub digest: Digest,
}

#[derive(Debug)]
struct Cut {
    at: Instant,
    askers: Vec<(CredentialKey, Place)>,
}

/// The blobs that were handed over.
#[derive(Debug)]
pub(super) struct HandedOver {
    lifetime: Duration,
    blobs: Mutex<HashMap<Digest, Cut>>,
}

impl HandedOver {
    /// Remembers each for so long (`mirror.handover`).
    pub(super) fn new(lifetime: Duration) -> Self {
        Self { lifetime, blobs: Mutex::default() }
    }

    /// Notes that a body of this blob was cut short.
    pub(super) fn note(&self, share: &Share, now: Instant) {
        let mut blobs = self.blobs();
        blobs.retain(|_, cut| now.duration_since(cut.at) < self.lifetime);
        if blobs.len() >= BLOBS_MAX && !blobs.contains_key(&share.digest) {
            let oldest = blobs.iter().min_by_key(|(_, cut)| cut.at).map(|(digest, _)| *digest);
            oldest.map(|digest| blobs.remove(&digest));
        }
        let cut = blobs.entry(share.digest).or_insert(Cut { at: now, askers: Vec::new() });
        cut.at = now;
        let asker = (share.credential, share.place.clone());
        if !cut.askers.contains(&asker) && cut.askers.len() < ASKERS_MAX {
            cut.askers.push(asker);
        }
    }

    /// Whether it was cut short, whoever got it.
    pub(super) fn holds(&self, digest: &Digest, now: Instant) -> bool {
        self.blobs().get(digest).is_some_and(|cut| now.duration_since(cut.at) < self.lifetime)
    }

    /// Whether it was cut short for this asker.
    pub(super) fn holds_for(&self, share: &Share, now: Instant) -> bool {
        let is_theirs =
            |cut: &&Cut| cut.askers.iter().any(|(c, place)| *c == share.credential && *place == share.place);
        let blobs = self.blobs();
        blobs.get(&share.digest).filter(is_theirs).is_some_and(|cut| now.duration_since(cut.at) < self.lifetime)
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Cut>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(credential: u8, repository: &str, blob: &[u8]) -> Share {
        let place = Place { registry: "reg.example".parse().unwrap(), repository: repository.parse().unwrap() };
        Share { credential: CredentialKey([credential; 32]), place, digest: Digest::of(blob) }
    }

    #[test]
    fn who_was_cut_short_is_told_at_once_and_a_stranger_only_what_all_are() {
        let (handed, start) = (HandedOver::new(Duration::from_secs(60)), Instant::now());
        let theirs = share(1, "team/app", b"x");
        handed.note(&theirs, start);
        assert!(handed.holds_for(&theirs, start) && handed.holds(&theirs.digest, start));
        for other in [share(2, "team/app", b"x"), share(1, "team/other", b"x"), share(1, "team/app", b"y")] {
            assert!(!handed.holds_for(&other, start), "{other:?}");
        }
        let over = start + Duration::from_secs(60);
        assert!(!handed.holds_for(&theirs, over) && !handed.holds(&theirs.digest, over));
    }

    #[test]
    fn a_second_cut_starts_its_time_again_and_the_memory_has_a_bound() {
        let (handed, start) = (HandedOver::new(Duration::from_secs(60)), Instant::now());
        let later = start + Duration::from_secs(40);
        let at = |number: usize| start + Duration::from_nanos(number as u64);
        handed.note(&share(1, "a", b"x"), start);
        handed.note(&share(2, "a", b"x"), later);
        assert!(handed.holds_for(&share(1, "a", b"x"), start + Duration::from_secs(99)));
        (0..2 * ASKERS_MAX).for_each(|number| handed.note(&share(3, &format!("r{number}"), b"x"), later));
        assert_eq!(handed.blobs()[&Digest::of(b"x")].askers.len(), ASKERS_MAX);
        let handed = HandedOver::new(Duration::from_secs(60));
        (0..=BLOBS_MAX).for_each(|number| handed.note(&share(1, "a", &number.to_le_bytes()), at(number)));
        assert_eq!(handed.blobs().len(), BLOBS_MAX);
        assert!(!handed.holds(&Digest::of(&0_usize.to_le_bytes()), later), "the oldest made room");
    }
}
