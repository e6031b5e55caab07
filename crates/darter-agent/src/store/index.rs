//! What the store holds, in memory: one slot a digest, the accounting, and who has to leave.
//!
//! Pure bookkeeping: whoever holds the lock reads and changes it without waiting for a disk. Files
//! are made and removed outside of the lock, and the slot says so meanwhile (`Ingest`, `Leaving`).

use std::collections::{HashMap, VecDeque};
use std::sync::Weak;
use std::time::SystemTime;

use darter_core::Digest;

use super::blob::Open;
use super::doubt::Standing;
use super::pins::{Pin, Pins};
use super::state::StoreError;
use super::tally::Tally;

/// Ingests that run at once. containerd keeps 3 downloads in flight and prewarm a few more; each
/// holds a thread of the blocking pool (512) and at most `IN_FLIGHT_BYTES` of memory.
pub(super) const INGESTS_MAX: usize = 64;
/// Blobs and ingests kept. At some 200 bytes each this is 50 MB for a store of nothing but tiny
/// manifests; past it the oldest make room.
pub(super) const SLOTS_MAX: usize = 262_144;
/// Digests that wait for a re-hash. A sample more or less is no loss, and what is in doubt is asked for
/// again by its next reader.
const SCRUBS_MAX: usize = 64;

/// What is under one digest.
#[derive(Debug)]
pub(super) enum Slot {
    /// A complete verified blob.
    Blob(Entry),
    /// One half written.
    Ingest {
        /// The size it will have; that much is reserved.
        size: u64,
        /// When it was last written.
        touched: SystemTime,
        /// Whether the disk has set the room aside.
        allocated: bool,
        /// What happens to it.
        phase: Phase,
    },
    /// Its files are being removed.
    Leaving {
        /// Size in bytes.
        size: u64,
    },
}

/// That somebody holds the writing end of an ingest.
#[derive(Debug)]
pub(super) struct Handle;

/// What happens to an ingest.
#[derive(Debug)]
pub(super) enum Phase {
    /// Somebody writes it. Without a handle it is ending: what was queued is still written and hashed.
    Running(Weak<Handle>),
    /// What an earlier life of the agent left is being hashed.
    Verifying,
    /// Nothing. What is known of its bytes is kept, so that going on needs no hashing; `None` after
    /// a restart or a disk error.
    Parked(Option<Box<Tally>>),
}

/// How much of a blob is re-hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    OnePiece,
    Whole,
}

/// A complete blob.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) size: u64,
    /// Last use.
    pub(super) used: SystemTime,
    /// The last use that the file's modification time tells.
    pub(super) used_on_disk: SystemTime,
    /// Synced and in the journal.
    pub(super) durable: bool,
    /// The handle that readers hold, if any does: then it is in use.
    pub(super) open: Weak<Open>,
    /// Whether it may have rotted.
    pub(super) standing: Standing,
}

impl Slot {
    const fn size(&self) -> u64 {
        match self {
            Self::Blob(entry) => entry.size,
            Self::Ingest { size, .. } | Self::Leaving { size } => *size,
        }
    }

    /// Bytes that are accounted for, and that the file system still counts as free.
    const fn unallocated(&self) -> u64 {
        match self {
            Self::Ingest { size, allocated: false, .. } => *size,
            _ => 0,
        }
    }
}

/// What `begin` found.
pub(super) enum Begin {
    /// The slot is `phase` now. What is known of a resumed ingest comes along.
    Fresh,
    Resumed(Option<Box<Tally>>),
    /// Something else happens to the digest; it changes soon.
    Wait,
    /// A parked ingest of another size is in the way; it is leaving.
    Replace,
}

/// The bookkeeping.
#[derive(Debug, Default)]
pub(super) struct Index {
    slots: HashMap<Digest, Slot>,
    pins: Pins,
    bytes: u64,
    pinned_bytes: u64,
    running: usize,
    /// Bytes that may be used, as last computed.
    pub(super) limit_bytes: u64,
    /// Bytes that pinned blobs may have, as last computed.
    pub(super) pin_limit_bytes: u64,
    /// Ingests of an earlier life, still to be hashed.
    pub(super) to_verify: VecDeque<Digest>,
    scrubs: VecDeque<(Digest, Extent)>,
}

impl Index {
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of complete blobs that are pinned.
    pub(super) const fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    #[cfg(test)]
    pub(super) fn slot(&self, digest: &Digest) -> Option<&Slot> {
        self.slots.get(digest)
    }

    /// Whether nothing is written, hashed or removed.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0 && !self.slots.values().any(|slot| matches!(slot, Slot::Leaving { .. }))
    }

    pub(super) fn blob(&mut self, digest: &Digest) -> Option<&mut Entry> {
        match self.slots.get_mut(digest) {
            Some(Slot::Blob(entry)) => Some(entry),
            _ => None,
        }
    }

    /// The size of a complete blob.
    pub(super) fn blob_size(&self, digest: &Digest) -> Option<u64> {
        self.slots.get(digest).filter(|slot| matches!(slot, Slot::Blob(_))).map(Slot::size)
    }

    /// The size of a blob half written.
    pub(super) fn ingest_size(&self, digest: &Digest) -> Option<u64> {
        self.slots.get(digest).filter(|slot| matches!(slot, Slot::Ingest { .. })).map(Slot::size)
    }

    pub(super) fn blobs(&self) -> impl Iterator<Item = (&Digest, &Entry)> {
        self.slots.iter().filter_map(|(digest, slot)| match slot {
            Slot::Blob(entry) => Some((digest, entry)),
            _ => None,
        })
    }

    pub(super) fn ingests(&self) -> usize {
        self.slots.values().filter(|slot| matches!(slot, Slot::Ingest { .. })).count()
    }

    pub(super) fn put(&mut self, digest: Digest, slot: Slot) {
        self.take(&digest);
        self.bytes = self.bytes.saturating_add(slot.size());
        self.running += usize::from(is_running(&slot));
        self.pinned_bytes += self.pinned_size(&digest, &slot);
        self.slots.insert(digest, slot);
    }

    pub(super) fn take(&mut self, digest: &Digest) -> Option<Slot> {
        let slot = self.slots.remove(digest)?;
        self.bytes -= slot.size();
        self.running -= usize::from(is_running(&slot));
        self.pinned_bytes -= self.pinned_size(digest, &slot);
        Some(slot)
    }

    fn pinned_size(&self, digest: &Digest, slot: &Slot) -> u64 {
        match slot {
            Slot::Blob(entry) if self.pins.until(digest).is_some() => entry.size,
            _ => 0,
        }
    }

    /// Bytes that the file system still counts as free, of those that are accounted for.
    pub(super) fn unallocated(&self) -> u64 {
        self.slots.values().map(Slot::unallocated).sum()
    }

    /// The disk has set the room aside.
    pub(super) fn allocated(&mut self, digest: &Digest) {
        if let Some(Slot::Ingest { allocated, .. }) = self.slots.get_mut(digest) {
            *allocated = true;
        }
    }

    /// Gives the slot of `digest` to an ingest. A fresh one has room reserved; the caller has to
    /// remove what is `Leaving` for it, see `victims`.
    pub(super) fn begin(&mut self, digest: &Digest, size: u64, phase: Phase) -> Result<Begin, StoreError> {
        let known = match self.slots.get_mut(digest) {
            Some(Slot::Blob(_)) => return Err(StoreError::Present(*digest)),
            Some(Slot::Ingest { phase: Phase::Running(handle), .. }) if handle.strong_count() > 0 => {
                return Err(StoreError::Busy(*digest));
            }
            // Each of them frees the slot by itself, and says so.
            Some(Slot::Leaving { .. } | Slot::Ingest { phase: Phase::Running(_) | Phase::Verifying, .. }) => {
                return Ok(Begin::Wait);
            }
            _ if self.running >= INGESTS_MAX => return Err(StoreError::Crowded),
            Some(Slot::Ingest { size: had, .. }) if *had != size => {
                self.leave(digest);
                return Ok(Begin::Replace);
            }
            Some(Slot::Ingest { phase: Phase::Parked(known), .. }) => Some(known.take()),
            None => None,
        };
        // The room of a parked ingest is taken again from the start: its file may have been cut.
        let touched = SystemTime::now();
        self.put(*digest, Slot::Ingest { size, touched, allocated: known.is_some(), phase });
        Ok(known.map_or(Begin::Fresh, Begin::Resumed))
    }

    /// Puts a running ingest aside.
    pub(super) fn park(&mut self, digest: &Digest, known: Option<Box<Tally>>) {
        if let Some(Slot::Ingest { size, allocated, .. }) = self.slots.get(digest) {
            let (size, allocated) = (*size, *allocated);
            let (touched, phase) = (SystemTime::now(), Phase::Parked(known));
            self.put(*digest, Slot::Ingest { size, touched, allocated, phase });
        }
    }

    /// Marks a slot as leaving: nobody gets it any more, and its bytes count until they are gone.
    pub(super) fn leave(&mut self, digest: &Digest) {
        if let Some(size) = self.slots.get(digest).map(Slot::size) {
            self.put(*digest, Slot::Leaving { size });
        }
    }

    /// Who has to leave so that `bytes` less are used and there are `slots` fewer: parked ingests
    /// before blobs, the longest unused first, and at last what is pinned past the share of pins.
    /// `Err` holds those that would have helped, if all of
    /// them are not enough.
    pub(super) fn victims(&self, bytes: u64, slots: usize) -> Result<Vec<Digest>, Vec<Digest>> {
        if bytes == 0 && slots == 0 {
            return Ok(Vec::new());
        }
        let mut candidates: Vec<_> = self.evictable().collect();
        candidates.sort_unstable_by_key(|(digest, slot)| match slot {
            Slot::Blob(entry) => (true, entry.used, **digest),
            Slot::Ingest { touched, .. } => (false, *touched, **digest),
            Slot::Leaving { .. } => (true, SystemTime::UNIX_EPOCH, **digest),
        });
        candidates.extend(self.pinned_past_share());
        let (mut victims, mut freed) = (Vec::new(), 0_u64);
        for (digest, slot) in candidates {
            if freed >= bytes && victims.len() >= slots {
                break;
            }
            freed = freed.saturating_add(slot.size());
            victims.push(*digest);
        }
        if freed >= bytes && victims.len() >= slots { Ok(victims) } else { Err(victims) }
    }

    /// Bytes that eviction could free.
    pub(super) fn evictable_bytes(&self) -> u64 {
        let evictable = self.evictable().chain(self.pinned_past_share());
        self.leaving_bytes() + evictable.map(|(_, slot)| slot.size()).sum::<u64>()
    }

    /// Bytes that are being removed, and count until they are gone.
    pub(super) fn leaving_bytes(&self) -> u64 {
        self.slots.values().filter(|slot| matches!(slot, Slot::Leaving { .. })).map(Slot::size).sum()
    }

    fn evictable(&self) -> impl Iterator<Item = (&Digest, &Slot)> {
        self.slots.iter().filter(|(digest, slot)| match slot {
            Slot::Blob(entry) => entry.open.strong_count() == 0 && self.pins.until(digest).is_none(),
            Slot::Ingest { phase: Phase::Parked(_), .. } => true,
            Slot::Ingest { .. } | Slot::Leaving { .. } => false,
        })
    }

    /// Pinned blobs that may leave because others took the disk: so many that the rest fits into the
    /// share of pins again. The pin that ends first comes first.
    fn pinned_past_share(&self) -> Vec<(&Digest, &Slot)> {
        let mut excess = self.pinned_bytes.saturating_sub(self.pin_limit_bytes);
        if excess == 0 {
            return Vec::new();
        }
        let closed = |digest| match self.slots.get_key_value(digest)? {
            (digest, slot @ Slot::Blob(entry)) if entry.open.strong_count() == 0 => Some((digest, slot)),
            _ => None,
        };
        let mut pinned: Vec<_> = self.pins.digests().filter_map(closed).collect();
        pinned.sort_unstable_by_key(|(digest, _)| (self.pins.until(digest), **digest));
        let is_past = |(_, slot): &(&Digest, &Slot)| {
            let is_past = excess > 0;
            excess = excess.saturating_sub(slot.size());
            is_past
        };
        pinned.into_iter().take_while(is_past).collect()
    }

    /// Slots past the bound.
    pub(super) fn excess_slots(&self) -> usize {
        self.slots.len().saturating_sub(SLOTS_MAX)
    }

    /// Pins an image, or releases it. What was before.
    pub(super) fn set_pin(&mut self, image: &str, pin: Option<Pin>) -> Option<Pin> {
        let before = self.pins.set(image, pin);
        self.count_pinned();
        before
    }

    /// Takes the pins that an earlier life of the agent wrote down.
    pub(super) fn load_pins(&mut self, images: impl IntoIterator<Item = (String, Pin)>) {
        self.pins.load(images);
        self.count_pinned();
    }

    /// Releases the pins that have ended, and names them.
    pub(super) fn expire_pins(&mut self, now: SystemTime) -> Vec<String> {
        let ended = self.pins.expire(now);
        if !ended.is_empty() {
            self.count_pinned();
        }
        ended
    }

    fn count_pinned(&mut self) {
        self.pinned_bytes = self.pins.digests().filter_map(|digest| self.blob_size(digest)).sum();
    }

    pub(super) const fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Asks for a re-hash of one piece of a blob. False if enough are asked for.
    pub(super) fn ask_scrub(&mut self, digest: &Digest) -> bool {
        let room = self.scrubs.len() < SCRUBS_MAX;
        if room {
            self.scrubs.push_back((*digest, Extent::OnePiece));
        }
        room
    }

    /// Asks for a re-hash of all of a blob, before those of pieces.
    pub(super) fn ask_rehash(&mut self, digest: &Digest) {
        let asked = (*digest, Extent::Whole);
        if self.scrubs.len() < SCRUBS_MAX && !self.scrubs.contains(&asked) {
            self.scrubs.push_front(asked);
        }
    }

    pub(super) fn next_scrub(&mut self) -> Option<(Digest, Extent)> {
        self.scrubs.pop_front()
    }

    /// The next ingest of an earlier life to hash, with its size.
    pub(super) fn next_to_verify(&mut self) -> Option<(Digest, u64)> {
        while let Some(digest) = self.to_verify.pop_front() {
            if let Some(Slot::Ingest { size, phase: Phase::Parked(None), .. }) = self.slots.get(&digest) {
                return Some((digest, *size));
            }
        }
        None
    }
}

const fn is_running(slot: &Slot) -> bool {
    matches!(slot, Slot::Ingest { phase: Phase::Running(_) | Phase::Verifying, .. })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn running(handle: &Arc<Handle>) -> Phase {
        Phase::Running(Arc::downgrade(handle))
    }

    fn blob(used: u64) -> Slot {
        let used = at(used);
        Slot::Blob(Entry {
            size: 10,
            used,
            used_on_disk: used,
            durable: true,
            open: Weak::new(),
            standing: Standing::default(),
        })
    }

    fn parked(touched: u64) -> Slot {
        Slot::Ingest { size: 10, touched: at(touched), allocated: true, phase: Phase::Parked(None) }
    }

    #[test]
    fn the_longest_unused_leave_first_and_parked_ingests_before_blobs() {
        let mut index = Index::default();
        for (n, slot) in [(1, blob(3)), (2, blob(1)), (3, blob(2)), (4, parked(9)), (5, parked(8))] {
            index.put(digest(n), slot);
        }
        let order = |bytes| index.victims(bytes, 0).unwrap();
        assert_eq!(order(0), []);
        assert_eq!(order(1), [digest(5)]);
        assert_eq!(order(45), [5, 4, 2, 3, 1].map(digest));
        assert_eq!(index.victims(0, 1), Ok(vec![digest(5)]));
        assert!(index.victims(51, 0).is_err());
    }

    #[test]
    fn a_digest_has_one_ingest_and_its_bytes_count_once() {
        let (mut index, handle) = (Index::default(), Arc::new(Handle));
        assert!(matches!(index.begin(&digest(1), 10, running(&handle)), Ok(Begin::Fresh)));
        assert!(matches!(index.begin(&digest(1), 10, running(&handle)), Err(StoreError::Busy(_))));
        index.park(&digest(1), None);
        assert!(matches!(index.begin(&digest(1), 10, Phase::Verifying), Ok(Begin::Resumed(None))));
        assert!(matches!(index.begin(&digest(1), 10, running(&handle)), Ok(Begin::Wait)));
        index.park(&digest(1), None);
        assert_eq!(index.bytes(), 10);
        assert!(matches!(index.begin(&digest(1), 11, running(&handle)), Ok(Begin::Replace)));
        assert!(matches!(index.begin(&digest(1), 11, running(&handle)), Ok(Begin::Wait)));
        index.take(&digest(1));
        assert_eq!((index.bytes(), index.running), (0, 0));
    }

    #[test]
    fn an_ingest_whose_handle_is_gone_is_waited_for() {
        let (mut index, handle) = (Index::default(), Arc::new(Handle));
        assert!(matches!(index.begin(&digest(1), 10, running(&handle)), Ok(Begin::Fresh)));
        drop(handle);
        let next = Arc::new(Handle);
        assert!(matches!(index.begin(&digest(1), 10, running(&next)), Ok(Begin::Wait)));
        index.park(&digest(1), None);
        assert!(matches!(index.begin(&digest(1), 10, running(&next)), Ok(Begin::Resumed(None))));
        assert!(matches!(index.begin(&digest(1), 10, running(&next)), Err(StoreError::Busy(_))));
    }

    #[test]
    fn ingests_at_once_have_a_bound() {
        let (mut index, handle) = (Index::default(), Arc::new(Handle));
        for n in 0..INGESTS_MAX {
            let digest = Digest::of(&n.to_le_bytes());
            assert!(index.begin(&digest, 1, running(&handle)).is_ok());
        }
        assert!(matches!(index.begin(&Digest::of(b"more"), 1, running(&handle)), Err(StoreError::Crowded)));
    }
}
