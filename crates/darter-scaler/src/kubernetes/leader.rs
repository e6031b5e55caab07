//! Who acts: one scaler of several, by a Lease, and only while its own clock says that the lease is its own.
//!
//! Pure: moments and what the API server said come in, what to do comes out; `lease` does it. A leader that was
//! stopped for a while, or cut off, must not act when it wakes up and before it has heard anything. So
//! [`Lead::holds`] asks nobody but the clock, and counts from when the last renewal was *sent*, which is before
//! anybody else can have seen it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::moment::Moment;

/// How long each thing takes. As client-go has them, so that an operator knows what to expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Others take over when a lease was not renewed for so long.
    pub lease: Duration,
    /// The holder stops acting when it could not renew for so long. What it sent before has until the end of
    /// the lease to arrive.
    pub renew_within: Duration,
    /// Between two tries, to renew or to take.
    pub retry: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { lease: seconds(15), renew_within: seconds(10), retry: seconds(2) }
    }
}

/// An API server that has not answered by then does not.
const ANSWER_MOST: Duration = Duration::from_secs(10);

/// Times that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a lease of {lease:?} that is renewed within {renew_within:?}, every {retry:?}, cannot work: each has to be \
     longer than the next, and a lease is whole seconds"
)]
pub struct TimesError {
    lease: Duration,
    renew_within: Duration,
    retry: Duration,
}

impl Times {
    /// Whether they can work.
    pub fn check(&self) -> Result<(), TimesError> {
        let Self { lease, renew_within, retry } = *self;
        match lease > renew_within && renew_within > retry && !retry.is_zero() && lease.subsec_nanos() == 0 {
            true => Ok(()),
            false => Err(TimesError { lease, renew_within, retry }),
        }
    }

    /// A write that takes longer than this is given up: it is over before anybody else acts.
    pub fn write_within(&self) -> Duration {
        self.lease.saturating_sub(self.renew_within).min(ANSWER_MOST)
    }
}

/// A lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose it is; nobody's if empty.
    pub holder: String,
    /// For how long after a renewal.
    pub lease: Duration,
    /// When it was renewed, by the holder's clock: only compared with itself.
    pub renewed: String,
    /// How often it went from one to another.
    pub transitions: u32,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read the lease now.
    Read,
    /// There is none: make it ours.
    Create,
    /// Write it as ours, over what was read or written last and over nothing else.
    Take {
        /// How often it has gone from one to another then.
        transitions: u32,
        /// Whether it was somebody else's before, or nobody's.
        is_new: bool,
    },
    /// Nothing for so long, then ask again.
    Wait(Duration),
}

/// One that wants to lead.
#[derive(Debug)]
pub struct Elector {
    identity: String,
    times: Times,
    next: Next,
    /// Somebody else's lease, and when it was first seen like this.
    seen: Option<(Record, Moment)>,
    lead: Lead,
}

/// What is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It was not read yet, or somebody else wrote it since.
    Unread,
    /// It is not there.
    Absent,
    /// It is as it was read or written last, and may be made ours.
    Ours { transitions: u32, is_new: bool },
    /// It is somebody else's.
    Theirs,
}

impl Elector {
    /// One that has not asked yet. `identity` has to be nobody else's, and no earlier life's.
    pub fn new(identity: &str, times: Times) -> Self {
        Self { identity: identity.to_owned(), times, next: Next::Unread, seen: None, lead: Lead::default() }
    }

    /// What acts are asked by.
    pub fn lead(&self) -> Lead {
        self.lead.clone()
    }

    /// Its name.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Who leads, as far as this one knows.
    pub fn leader(&self) -> Option<&str> {
        match self.next {
            Next::Ours { is_new: false, .. } => Some(&self.identity),
            _ => self.seen.as_ref().map(|(record, _)| record.holder.as_str()).filter(|holder| !holder.is_empty()),
        }
    }

    /// What to do now.
    pub fn step(&self) -> Step {
        match self.next {
            Next::Unread | Next::Theirs => Step::Read,
            Next::Absent => Step::Create,
            Next::Ours { transitions, is_new } => Step::Take { transitions, is_new },
        }
    }

    /// It was read: `now`, or just before. What to do about it at once.
    pub fn read(&mut self, now: Moment, found: Option<Record>) -> Step {
        let Some(record) = found else {
            // Somebody deleted it. Whoever holds it learns of that at its next renewal, and counts on it until then.
            return match &self.seen {
                Some((seen, since)) if !seen.holder.is_empty() && now < since.plus(self.patience(seen)) => {
                    self.next = Next::Theirs;
                    Step::Wait(self.times.retry)
                }
                _ => self.go(Next::Absent),
            };
        };
        if record.holder == self.identity {
            let next = Next::Ours { transitions: record.transitions, is_new: false };
            self.seen = None;
            return self.go(next);
        }
        self.lead.drop_it();
        let transitions = record.transitions.saturating_add(1);
        if record.holder.is_empty() {
            self.seen = None;
            return self.go(Next::Ours { transitions, is_new: true });
        }
        let since = match &self.seen {
            Some((seen, since)) if *seen == record => *since,
            _ => now,
        };
        let patience = self.patience(&record);
        self.seen = Some((record, since));
        // By our own clock since it was last seen to change: theirs may be wrong by hours.
        if now < since.plus(patience) {
            self.next = Next::Theirs;
            return Step::Wait(self.times.retry);
        }
        self.go(Next::Ours { transitions, is_new: true })
    }

    /// For how long its holder may count on it.
    fn patience(&self, record: &Record) -> Duration {
        record.lease.max(self.times.lease)
    }

    fn go(&mut self, next: Next) -> Step {
        self.next = next;
        self.step()
    }

    /// The write that was sent at `sent` was taken: it is ours.
    pub fn written(&mut self, sent: Moment, transitions: u32) -> Step {
        self.seen = None;
        self.next = Next::Ours { transitions, is_new: false };
        self.lead.hold(sent.plus(self.times.renew_within), transitions);
        Step::Wait(self.times.retry)
    }

    /// Somebody else wrote it meanwhile, or removed it: it is not ours, as long as nothing else was read.
    pub fn conflicted(&mut self) -> Step {
        self.lead.drop_it();
        self.go(Next::Unread)
    }

    /// Nothing was learned: whether a write arrived is not known either.
    pub fn failed(&mut self) -> Step {
        self.next = Next::Unread;
        Step::Wait(self.times.retry)
    }

    /// No act from here on. Whether there is something to give back.
    pub fn leave(&mut self) -> bool {
        self.lead.drop_it();
        matches!(self.next, Next::Ours { is_new: false, .. })
    }
}

/// Whether this one leads, for whoever is about to act. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Lead(Arc<Mutex<Option<Held>>>);

#[derive(Debug, Clone, Copy)]
struct Held {
    until: Moment,
    term: u32,
}

impl Lead {
    /// Whether what is sent at `now` is sent by the leader. Ask right before each act.
    pub fn holds(&self, now: Moment) -> bool {
        self.term(now).is_some()
    }

    /// The same, now.
    pub fn holds_now(&self) -> bool {
        self.holds(Moment::now())
    }

    /// In which term this one leads. The next leader has a higher one.
    pub fn term(&self, now: Moment) -> Option<u32> {
        self.held().filter(|held| now < held.until).map(|held| held.term)
    }

    /// Until when this one leads, if nothing is heard any more.
    pub(super) fn until(&self) -> Option<Moment> {
        self.held().map(|held| held.until)
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, until: Moment, term: u32) {
        *self.held() = Some(Held { until, term });
    }

    fn drop_it(&self) {
        *self.held() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times =
        Times { lease: Duration::from_secs(15), renew_within: Duration::from_secs(10), retry: Duration::from_secs(2) };
    const WAIT: Step = Step::Wait(Duration::from_secs(2));

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(1000 + seconds))
    }

    fn record(holder: &str, renewed: &str) -> Record {
        Record { holder: holder.to_owned(), lease: TIMES.lease, renewed: renewed.to_owned(), transitions: 3 }
    }

    /// One that has taken the lease at 0.
    fn leader() -> Elector {
        let mut elector = Elector::new("a", TIMES);
        assert_eq!(elector.step(), Step::Read);
        assert_eq!(elector.read(at(0), None), Step::Create);
        assert_eq!(elector.written(at(0), 0), WAIT);
        elector
    }

    #[test]
    fn who_renews_holds_and_who_does_not_stops_before_the_lease_is_over_whatever_the_network_says() {
        let mut elector = leader();
        let lead = elector.lead();
        assert_eq!(elector.step(), Step::Take { transitions: 0, is_new: false });
        elector.written(at(2), 0);
        assert_eq!(elector.leader(), Some("a"));
        assert!(lead.holds(at(11)) && !lead.holds(at(12)), "10 s after the last renewal was sent");
        assert_eq!((lead.term(at(11)), lead.term(at(12))), (Some(0), None));
        // Others wait 15 s: what was sent in the last moment has 5 s to arrive.
        assert_eq!(TIMES.write_within(), Duration::from_secs(5));
        // It was stopped for an hour, and wakes up: nothing was heard, and nothing is held.
        assert!(!lead.holds(at(3600)));
    }

    #[test]
    fn a_renewal_counts_from_when_it_was_sent_and_not_from_when_its_answer_came() {
        let mut elector = leader();
        // Sent at 4, answered at 9.
        elector.written(at(4), 0);
        assert!(elector.lead().holds(at(13)) && !elector.lead().holds(at(14)));
    }

    #[test]
    fn another_waits_a_whole_lease_by_its_own_clock_since_it_last_saw_a_renewal() {
        let mut elector = Elector::new("b", TIMES);
        assert_eq!(elector.read(at(0), Some(record("a", "1"))), WAIT);
        assert_eq!(elector.read(at(14), Some(record("a", "2"))), WAIT, "renewed: the wait begins anew");
        assert_eq!(elector.read(at(28), Some(record("a", "2"))), WAIT);
        assert_eq!((elector.leader(), elector.lead().holds(at(28))), (Some("a"), false));
        assert_eq!(elector.read(at(29), Some(record("a", "2"))), Step::Take { transitions: 4, is_new: true });
        assert!(!elector.lead().holds(at(29)), "not before it is written");
        elector.written(at(29), 4);
        assert_eq!(elector.lead().term(at(30)), Some(4));
    }

    #[test]
    fn a_lease_that_says_it_is_longer_is_waited_for_longer() {
        let mut elector = Elector::new("b", TIMES);
        let long = Record { lease: Duration::from_secs(60), ..record("a", "1") };
        assert_eq!(elector.read(at(0), Some(long.clone())), WAIT);
        assert_eq!(elector.read(at(59), Some(long.clone())), WAIT);
        assert!(matches!(elector.read(at(60), Some(long)), Step::Take { .. }));
        let short = Record { lease: Duration::from_secs(1), ..record("a", "1") };
        let mut elector = Elector::new("b", TIMES);
        assert_eq!(elector.read(at(0), Some(short.clone())), WAIT);
        assert_eq!(elector.read(at(14), Some(short)), WAIT, "nor for a shorter time than ours");
    }

    #[test]
    fn a_conflict_means_that_it_is_not_ours_until_it_was_read_again() {
        let mut elector = leader();
        assert_eq!(elector.conflicted(), Step::Read);
        assert!(!elector.lead().holds(at(1)));
        // It was only an annotation.
        assert_eq!(elector.read(at(1), Some(record("a", "1"))), Step::Take { transitions: 3, is_new: false });
        elector.written(at(1), 3);
        assert!(elector.lead().holds(at(2)));
        // It was somebody.
        elector.conflicted();
        assert_eq!(elector.read(at(3), Some(record("b", "1"))), WAIT);
        assert!(!elector.lead().holds(at(3)));
    }

    #[test]
    fn a_lease_that_is_somebody_elses_by_now_is_not_held_though_its_time_is_not_over() {
        let mut elector = leader();
        elector.failed();
        assert!(elector.lead().holds(at(3)), "an error says nothing of whose it is");
        assert_eq!(elector.read(at(3), Some(record("b", "1"))), WAIT);
        assert!(!elector.lead().holds(at(3)));
    }

    #[test]
    fn what_was_given_back_is_taken_at_once_and_what_was_deleted_only_when_its_holder_cannot_count_on_it() {
        let mut elector = Elector::new("b", TIMES);
        assert_eq!(elector.read(at(0), Some(record("a", "1"))), WAIT);
        assert_eq!(elector.read(at(1), Some(record("", "1"))), Step::Take { transitions: 4, is_new: true });
        let mut elector = Elector::new("b", TIMES);
        elector.read(at(0), Some(record("a", "1")));
        assert_eq!(elector.read(at(14), None), WAIT);
        assert_eq!(elector.read(at(15), None), Step::Create);
    }

    #[test]
    fn who_leaves_holds_nothing_before_it_gives_back_and_gives_back_only_what_is_its_own() {
        let mut elector = leader();
        assert!(elector.leave());
        assert!(!elector.lead().holds(at(0)));
        let mut elector = Elector::new("b", TIMES);
        elector.read(at(0), Some(record("a", "1")));
        assert!(!elector.leave());
    }

    #[test]
    fn times_that_cannot_work_are_refused() {
        let seconds = Duration::from_secs;
        assert_eq!(Times::default().check(), Ok(()));
        for (lease, renew_within, retry) in [(10, 10, 2), (15, 2, 2), (15, 10, 0)] {
            let times = Times { lease: seconds(lease), renew_within: seconds(renew_within), retry: seconds(retry) };
            assert!(times.check().is_err(), "{times:?}");
        }
        assert!(Times { lease: Duration::from_millis(15_500), ..Times::default() }.check().is_err());
    }
}
