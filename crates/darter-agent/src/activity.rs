//! When something was last seen to happen: what tells a slow transfer from a dead one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A clock that whoever gets bytes sets back, and whoever waits for them reads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Activity(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    /// Milliseconds after `began`.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self(Arc::new(Inner { began: Instant::now(), last: AtomicU64::new(0) }))
    }
}

impl Activity {
    /// Something came.
    pub fn touch(&self) {
        let now = u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.last.fetch_max(now, Ordering::Relaxed);
    }

    /// When something came last; at first when this was made.
    pub fn last(&self) -> Instant {
        self.0.began + Duration::from_millis(self.0.last.load(Ordering::Relaxed))
    }
}
