//! Who did not answer is not asked again for a while.
//!
//! A registry, or a host before it, that is down would cost every manifest and every range a timeout,
//! of the little time that containerd waits for the mirror. What is done instead, and how long an
//! answer is waited for, is up to whoever asks.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Whether one place is away, and until when that is taken for granted.
#[derive(Debug)]
pub struct Away {
    pause: Duration,
    pause_max: Duration,
    known: Mutex<Option<Known>>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    until: Instant,
    pause: Duration,
}

impl Away {
    /// It is left alone for `pause` at first, and for twice as long each time, up to `pause_max`.
    pub const fn new(pause: Duration, pause_max: Duration) -> Self {
        Self { pause, pause_max, known: Mutex::new(None) }
    }

    /// Whether to go past it.
    pub(super) fn holds(&self, now: Instant) -> bool {
        self.known().is_some_and(|known| now < known.until)
    }

    /// Whether it may be asked. When its pause is over, one request finds out for all.
    pub fn may_ask(&self, now: Instant) -> bool {
        match &mut *self.known() {
            Some(known) if now < known.until => false,
            Some(known) => {
                known.pause = (known.pause * 2).min(self.pause_max);
                known.until = now + known.pause;
                true
            }
            None => true,
        }
    }

    /// It did not answer; whether that is news. Others who asked at the same time say nothing new, and
    /// whoever asked again has its pause.
    pub fn begins(&self, now: Instant) -> bool {
        let mut known = self.known();
        let is_news = known.is_none();
        known.get_or_insert(Known { until: now + self.pause, pause: self.pause });
        is_news
    }

    /// It answered; whether that is news.
    pub fn ends(&self) -> bool {
        self.known().take().is_some()
    }

    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_left_alone_for_longer_each_time_and_one_finds_out_for_all() {
        let secs = Duration::from_secs;
        for (away, pauses) in
            [(Away::new(secs(30), secs(30)), [30, 30, 30, 30]), (Away::new(secs(5), secs(30)), [5, 10, 20, 30])]
        {
            let start = Instant::now();
            assert!(away.may_ask(start) && !away.holds(start) && !away.ends());
            assert!(away.begins(start));
            assert!(!away.begins(start), "a second request that was under way says nothing new");
            let mut now = start;
            for pause in pauses.map(secs) {
                let before = now + pause - Duration::from_millis(1);
                assert!(away.holds(before) && !away.may_ask(before), "{pause:?}");
                now += pause;
                assert!(!away.holds(now) && away.may_ask(now), "{pause:?}");
                assert!(!away.may_ask(now), "another asks already");
                assert!(!away.begins(now), "it is still away: no news");
            }
            assert!(away.may_ask(now + secs(60)), "whoever asked may have been cancelled");
            assert!(away.ends() && !away.ends());
            assert!(away.may_ask(now) && away.begins(now));
        }
    }
}
