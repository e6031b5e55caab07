//! When something was last seen to happen: what tells a slow transfer from a dead one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A clock that whoever gets bytes sets back, and whoever waits for them reads. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    own: Arc<Clock>,
    /// That of everything that this is one of.
    all: Option<Arc<Clock>>,
}

#[derive(Debug)]
struct Clock {
    began: Instant,
    /// Milliseconds after `began`.
    last: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { began: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Clock {
    fn touch(&self, now: Instant) {
        let after = now.saturating_duration_since(self.began).as_millis();
        self.last.fetch_max(u64::try_from(after).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}

impl Activity {
    /// One of several, whose own things come in turn with those of the others.
    pub fn among(all: &Self) -> Self {
        Self { own: Arc::default(), all: Some(all.own.clone()) }
    }

    /// Something came.
    pub fn touch(&self) {
        self.touch_at(Instant::now());
    }

    fn touch_at(&self, now: Instant) {
        self.own.touch(now);
        if let Some(all) = &self.all {
            all.touch(now);
        }
    }

    /// Something of another is on its way, or is said to be.
    pub fn touch_others(&self) {
        if let Some(all) = &self.all {
            all.touch(Instant::now());
        }
    }

    /// When something came last; at first when this was made.
    pub fn last(&self) -> Instant {
        self.own.last()
    }

    /// The same, or when something of the others came last, whose turn it may be: for `most` after its own
    /// last one at most.
    pub fn last_in_turn(&self, most: Duration) -> Instant {
        let own = self.own.last();
        self.all.as_ref().map_or(own, |all| all.last().min(own + most).max(own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_waits_for_its_turn_as_long_as_others_come_and_not_for_ever() {
        let all = Activity::default();
        let (one, other) = (Activity::among(&all), Activity::among(&all));
        let began = one.last();
        let at = |seconds| began + Duration::from_secs(seconds);
        let near = |found: Instant, wanted: Instant| found.max(wanted) - found.min(wanted) < Duration::from_secs(1);
        other.touch_at(at(30));
        assert!(near(one.last(), began) && near(one.last_in_turn(Duration::from_secs(90)), at(30)));
        assert!(near(one.last_in_turn(Duration::from_secs(10)), at(10)), "not for ever");
        one.touch_at(at(40));
        assert!(near(one.last_in_turn(Duration::ZERO), at(40)) && near(all.last(), at(40)));
        assert!(near(other.last(), at(30)) && near(other.last_in_turn(Duration::from_secs(90)), at(40)));
        assert!(near(all.last_in_turn(Duration::from_secs(90)), at(40)), "there are no others");
    }
}
