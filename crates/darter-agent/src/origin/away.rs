//! Who did not answer is not asked again for a while.
//!
//! Origins before the registry are there to be faster than it. One that is down would cost every
//! manifest and every range a timeout, of the little time that containerd waits for the mirror.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long it is left alone. A host that restarts is missed for no longer than a large pull takes,
/// and one that stays down costs one request in all of that.
const AWAY: Duration = Duration::from_secs(30);
/// What such an origin has from the request to the head of the response, its token and its storage
/// included. `mirror.answer_within` is 2.5 s, and the registry is still to be asked.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// Whether one origin is away, and until when that is taken for granted.
#[derive(Default)]
pub(super) struct Away(Mutex<Option<Instant>>);

impl Away {
    /// Whether to go past it.
    pub(super) fn holds(&self, now: Instant) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now < until)
    }

    /// Whether it may be asked. When its time is over, one request finds out for all.
    pub(super) fn may_ask(&self, now: Instant) -> bool {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *until {
            Some(until) if now < *until => false,
            Some(until) => {
                *until = now + AWAY;
                true
            }
            None => true,
        }
    }

    /// It did not answer; whether that is news.
    pub(super) fn begins(&self, now: Instant) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(now + AWAY).is_none()
    }

    /// It answered; whether that is news.
    pub(super) fn ends(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_left_alone_for_a_while_and_then_one_finds_out() {
        let (away, start) = (Away::default(), Instant::now());
        assert!(away.may_ask(start) && !away.ends());
        assert!(away.begins(start));
        assert!(!away.begins(start), "a second request that was under way says nothing new");
        assert!(away.holds(start + AWAY / 2) && !away.may_ask(start + AWAY / 2));
        assert!(!away.holds(start + AWAY) && away.may_ask(start + AWAY));
        assert!(!away.may_ask(start + AWAY), "another asks already");
        assert!(away.may_ask(start + AWAY * 2), "whoever asked may have been cancelled");
        assert!(!away.begins(start + AWAY * 2), "it is still away: no news");
        assert!(away.ends());
        assert!(away.may_ask(start + AWAY * 2) && away.begins(start + AWAY * 2));
    }
}
