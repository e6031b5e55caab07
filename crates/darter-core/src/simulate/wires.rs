//! Links and what is on its way over them.

use super::queue::Nanos;
use crate::swarm::{ImportFailure, Refusal};

/// One direction of a node's link: serves blocks in the order in which they come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    block: Nanos,
    free_at: Nanos,
}

impl Link {
    /// A link of `rate` bytes per second that carries blocks of `bytes`.
    pub(super) fn new(bytes: u64, rate: u64) -> Self {
        Self { block: block_time(bytes, rate), free_at: 0 }
    }

    /// When a block that comes at `now` is through.
    pub(super) fn carry(&mut self, now: Nanos) -> Nanos {
        self.free_at = self.free_at.max(now) + self.block;
        self.free_at
    }

    pub(super) const fn slow_down(&mut self, times: u64) {
        self.block *= times;
    }
}

/// How long `bytes` take at `rate` bytes per second.
pub(super) fn block_time(bytes: u64, rate: u64) -> Nanos {
    Nanos::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1))).unwrap_or(Nanos::MAX)
}

/// One piece on its way from node to node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) blob: u16,
    pub(super) piece: u32,
    pub(super) left: u32,
    /// Tells it from what had its place before and after.
    pub(super) serial: u32,
    pub(super) state: TransferState,
    pub(super) refusal: Option<Refusal>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TransferState {
    /// The request is on its way, or a refusal is.
    Asked,
    Running,
    /// The receiver closed it.
    Cancelled,
    /// One of its ends is gone.
    Broken,
}

/// A run of pieces on its way from the origin.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImportRun {
    pub(super) to: u32,
    pub(super) blob: u16,
    pub(super) segment: u32,
    /// The piece whose blocks come next, and the end of the run.
    pub(super) piece: u32,
    pub(super) end: u32,
    /// Blocks of that piece that are to come.
    pub(super) left: u32,
    /// This connection sends nothing before.
    pub(super) paced_until: Nanos,
    /// When its node last spoke of it.
    pub(super) told: Nanos,
    /// The origin answers with this instead.
    pub(super) refusal: Option<ImportFailure>,
}

/// A table whose places are used again.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<T>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn put(&mut self, value: T) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = value;
            return place;
        }
        self.places.push(value);
        u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX)
    }

    pub(super) fn at(&mut self, place: u32) -> &mut T {
        &mut self.places[place as usize]
    }

    /// The place may be used again: nothing on the calendar names it any more.
    pub(super) fn release(&mut self, place: u32) {
        self.free.push(place);
    }

    /// Everything, also what was released and not used again, with its place.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &T)> {
        (0_u32..).zip(&self.places)
    }

    /// Everything, to be changed.
    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut()
    }
}
