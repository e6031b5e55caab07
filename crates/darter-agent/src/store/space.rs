//! How much disk the store may use: `store.limit` and `store.min_free`, against what is free now.

use super::disk::Free;
use super::index::Index;
use super::state::State;
use crate::config;

/// Less room than this is none: not even one piece fits.
const ROOM_MIN: u64 = 1024 * 1024;

/// The configured limits in bytes, and the file system as it is now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) limit: u64,
    min_free: u64,
    free: Free,
}

impl Limits {
    pub(super) fn of(settings: &config::Store, free: Free) -> Self {
        Self { limit: settings.limit.bytes(free.total), min_free: settings.min_free.bytes(free.total), free }
    }

    /// Bytes that an empty store on an empty disk may hold.
    pub(super) fn most(&self) -> u64 {
        self.limit.min(self.free.total.saturating_sub(self.min_free))
    }

    /// Bytes that blobs and ingests may use, with what others leave free.
    pub(super) fn capacity(&self, index: &Index) -> u64 {
        self.limit.min(self.by_free(index))
    }

    /// The same by `min_free` alone: what is used already, plus what is free above it.
    pub(super) fn by_free(&self, index: &Index) -> u64 {
        let on_disk = index.bytes().saturating_sub(index.unallocated());
        on_disk.saturating_add(self.free.available).saturating_sub(self.min_free)
    }

    /// Whether nothing more fits, even after evicting all that may be.
    pub(super) fn is_full(&self, index: &Index) -> bool {
        let stays = index.bytes().saturating_sub(index.evictable_bytes());
        self.capacity(index).saturating_sub(stays) < ROOM_MIN.min(self.limit)
    }

    pub(super) const fn full(&self) -> State {
        State::Full { free_bytes: self.free.available, min_free_bytes: self.min_free }
    }
}
