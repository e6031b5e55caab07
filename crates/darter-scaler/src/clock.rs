//! The one clock of the scaler: the wall clock once, when it starts, and monotonic time from then on.
//!
//! A wall clock that is set, by hand or by NTP, moves no age and no deadline. Nothing else of the scaler reads
//! a clock.

#![allow(clippy::disallowed_methods, reason = "somebody has to")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::Millis;

/// It runs, and never back.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    began: Instant,
    at: Millis,
}

impl Clock {
    /// From now on.
    pub fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { began: Instant::now(), at: Millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)) }
    }

    /// This moment.
    pub fn now(&self) -> Millis {
        self.at.plus(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// When this is by the runtime's timers.
    pub fn instant(&self, moment: Millis) -> Instant {
        self.began + Duration::from_millis(moment.since(self.at))
    }

    /// Since it started.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// For what is measured.
pub fn stopwatch() -> Instant {
    Instant::now()
}
