//! When something was last seen to happen: what tells a slow transfer from a dead one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A clock that whoever gets bytes sets back, and whoever waits for them reads. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    own: Arc<Clock>,
    /// When somebody last said that something comes. It may be wrong.
    said: Arc<Clock>,
    /// When its turn came last: whoever waits begins to wait then.
    turn: Arc<Clock>,
    /// That of everything that this is one of.
    all: Option<Arc<Clock>>,
    /// That of those that it waits behind now.
    behind: Arc<Mutex<Option<Arc<Clock>>>>,
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
    /// One that began to wait at another time.
    #[cfg(test)]
    pub(crate) fn begun(began: Instant) -> Self {
        let clock = || Arc::new(Clock { began, last: AtomicU64::new(0) });
        Self { own: clock(), said: clock(), turn: clock(), all: None, behind: Arc::default() }
    }

    /// One of several, whose own things come in turn with those of the others.
    pub fn among(all: &Self) -> Self {
        Self { all: Some(all.own.clone()), ..Self::default() }
    }

    /// Something came.
    pub fn touch(&self) {
        self.touch_at(Instant::now());
    }

    pub(crate) fn touch_at(&self, now: Instant) {
        self.own.touch(now);
        if let Some(all) = &self.all {
            all.touch(now);
        }
    }

    /// Somebody says that something comes.
    pub fn is_said_to_come(&self) {
        self.said.touch(Instant::now());
    }

    /// Its turn has come, after something came of those before it.
    pub fn has_its_turn(&self) {
        self.turn.touch(Instant::now());
    }

    /// It waits behind `others` until this is said otherwise, so that what comes of them brings it nearer.
    pub fn waits_behind(&self, others: Option<&Self>) {
        *self.behind() = others.map(|others| others.own.clone());
    }

    /// When something came last; at first when this was made.
    pub fn last(&self) -> Instant {
        self.own.last()
    }

    /// When something was said to come, or came: for `most` after its own last one at most.
    pub fn last_said(&self, most: Duration) -> Instant {
        let own = self.own.last();
        self.said.last().min(own + most).max(own)
    }

    /// When something came last, or when something of the others came last, whose turn it may be or that it waits
    /// behind, or its turn came, or something was said to come: for `most` after its own last one at most.
    pub fn last_in_turn(&self, most: Duration) -> Instant {
        let own = self.own.last();
        let (all, behind) = (self.all.as_ref().map(|all| all.last()), self.behind().as_ref().map(|it| it.last()));
        let others = all.into_iter().chain(behind).chain([self.turn.last()]).fold(self.said.last(), Instant::max);
        others.min(own + most).max(own)
    }

    fn behind(&self) -> MutexGuard<'_, Option<Arc<Clock>>> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever waits looks this often whether the time it waited was its own.
const BEAT: Duration = Duration::from_secs(1);
/// Later than a busy machine wakes whoever sleeps.
const STOOD_STILL: Duration = Duration::from_secs(1);
/// All waiting has an end, on a machine too that is always late.
const EXCUSES: u8 = 3;

/// Tells waiting from standing still with the whole node: a virtual machine that was paused, or moved. Nobody
/// was silent then, and what came meanwhile is still to be heard.
#[derive(Debug)]
pub struct Pulse {
    looked: Instant,
    excuses: u8,
}

impl Pulse {
    /// Of whoever begins to wait now.
    pub fn start() -> Self {
        Self { looked: Instant::now(), excuses: EXCUSES }
    }

    /// When to look again, on the way to `due`.
    pub fn next(&self, due: Instant) -> Instant {
        due.min(self.looked + BEAT)
    }

    /// Whether this node stood still since the last look.
    pub fn stood_still(&mut self) -> bool {
        self.stood_still_at(Instant::now())
    }

    fn stood_still_at(&mut self, now: Instant) -> bool {
        let gap = now.saturating_duration_since(std::mem::replace(&mut self.looked, now));
        let is_excused = gap >= BEAT + STOOD_STILL && self.excuses > 0;
        self.excuses -= u8::from(is_excused);
        is_excused
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

    #[test]
    fn what_is_said_to_come_makes_its_own_blob_wait_and_no_other() {
        let all = Activity::default();
        let (one, other) = (Activity::among(&all), Activity::among(&all));
        let began = one.last();
        one.said.touch(began + Duration::from_secs(20));
        let most = Duration::from_secs(10);
        assert_eq!(one.last_in_turn(most).duration_since(began).as_secs(), 10);
        assert_eq!(other.last_in_turn(most).duration_since(began).as_secs(), 0);
    }

    #[test]
    fn who_waits_behind_others_counts_what_comes_of_them_as_long_as_it_waits() {
        let (one, others) = (Activity::default(), Activity::default());
        let waited = || one.last_in_turn(Duration::from_secs(30)).duration_since(one.last()).as_secs();
        others.touch_at(one.last() + Duration::from_secs(20));
        assert_eq!(waited(), 0, "it has nothing to do with them");
        one.waits_behind(Some(&others));
        assert!(matches!(waited(), 19 | 20));
        others.touch_at(one.last() + Duration::from_secs(50));
        assert_eq!(waited(), 30, "not for ever");
        one.waits_behind(None);
        assert_eq!(waited(), 0, "it has its turn");
    }

    #[test]
    fn a_gap_between_two_looks_is_a_node_that_stood_still_and_not_for_ever() {
        let mut pulse = Pulse::start();
        let mut now = pulse.looked;
        let mut after = |millis| {
            now += Duration::from_millis(millis);
            let next = pulse.next(now + Duration::from_secs(60));
            (pulse.stood_still_at(now), next < now + Duration::from_secs(60))
        };
        assert_eq!([after(1000), after(1900), after(2000)], [(false, true), (false, true), (true, true)]);
        assert_eq!(
            [after(9000), after(10), after(9000), after(9000)].map(|(stood, _)| stood),
            [true, false, true, false]
        );
    }
}
