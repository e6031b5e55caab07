//! What a pull took, for its log line. Filled in as it goes: a pull can end at any point.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::activity::Activity;

#[derive(Debug)]
pub(super) struct Account {
    started: Instant,
    origin_bytes: AtomicU64,
    peer_bytes: AtomicU64,
    resumed_bytes: AtomicU64,
    retries: AtomicU32,
    first_byte: OnceLock<Duration>,
    activity: Activity,
}

impl Account {
    /// Of a pull that starts now.
    pub(super) fn new(activity: Activity) -> Self {
        Self {
            started: Instant::now(),
            origin_bytes: AtomicU64::new(0),
            peer_bytes: AtomicU64::new(0),
            resumed_bytes: AtomicU64::new(0),
            retries: AtomicU32::new(0),
            first_byte: OnceLock::new(),
            activity,
        }
    }

    pub(super) fn read_from_origin(&self, bytes: u64) {
        self.origin_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.came();
    }

    pub(super) fn got_from_peer(&self, bytes: u64) {
        self.peer_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.came();
    }

    fn came(&self) {
        self.activity.touch();
        self.first_byte.get_or_init(|| self.started.elapsed());
    }

    pub(super) fn resumed(&self, bytes: u64) {
        self.resumed_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn origin_bytes(&self) -> u64 {
        self.origin_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn peer_bytes(&self) -> u64 {
        self.peer_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn resumed_bytes(&self) -> u64 {
        self.resumed_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn retries(&self) -> u32 {
        self.retries.load(Ordering::Relaxed)
    }

    pub(super) fn first_byte(&self) -> Option<Duration> {
        self.first_byte.get().copied()
    }

    /// When bytes came last.
    pub(super) const fn activity(&self) -> &Activity {
        &self.activity
    }
}
