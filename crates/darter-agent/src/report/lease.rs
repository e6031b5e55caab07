//! How long the agent's own pod is protected: decided here, written by `pod`.
//!
//! A scaler renews a lease with each heartbeat, and a write to the API server is not worth a heartbeat: what is
//! written is a little longer than asked for, and written anew when that is used up. It lapses by itself, and
//! no scaler can make it last for ever: what is written says when its row began, for the next life of the agent.

use std::fmt;
use std::time::{Duration, Instant};

/// Added to what is asked for: a quarter of it, so that it is written four times in its time, and no longer.
const SLACK_MAX: Duration = Duration::from_secs(300);
/// A pause that ends a row of leases: Karpenter looks every 10 s, and again 15 s later, under budgets.
pub(super) const PAUSE: Duration = Duration::from_secs(600);
/// Less is over before it is written.
pub(super) const SHORTEST: Duration = Duration::from_secs(1);

/// The lease of one pod.
#[derive(Debug)]
pub(super) struct Lease {
    /// Of a row of leases, see `PAUSE`.
    most: Duration,
    /// When the row began.
    began: Option<Instant>,
    /// Until when the pod is protected, or was.
    until: Option<Instant>,
}

/// What follows from a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// It is to be written that the pod is protected until then.
    Write(Instant),
    /// What is written will do.
    Holds,
    /// The row is as long as it may be.
    Spent,
}

impl Lease {
    /// None yet. A row of them may be this long.
    pub(super) const fn new(most: Duration) -> Self {
        Self { most, began: None, until: None }
    }

    /// Until when the pod is protected, if it is.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }

    /// How much longer it may be protected in this row.
    pub(super) fn most(&self, now: Instant) -> Duration {
        self.most.saturating_sub(now.saturating_duration_since(self.row(now)))
    }

    /// It is to be protected from now on for so long at least.
    pub(super) fn wish(&self, now: Instant, length: Duration) -> Wish {
        let most = self.most(now);
        if most < SHORTEST {
            return Wish::Spent;
        }
        let length = length.min(most);
        let longest = (length + (length / 4).min(SLACK_MAX)).min(most);
        match self.until(now) {
            Some(until) if (now + length..=now + longest).contains(&until) => Wish::Holds,
            _ => Wish::Write(now + longest),
        }
    }

    /// It was written that it is protected until then.
    pub(super) fn written(&mut self, now: Instant, until: Instant) {
        self.began = Some(self.row(now));
        self.until = Some(until);
    }

    /// An earlier life of the agent wrote that it is protected until then, in a row that began there.
    pub(super) fn resume(&mut self, began: Instant, until: Instant) {
        // A row may be shorter now than it was when that was written.
        let until = began.checked_add(self.most).map_or(until, |end| until.min(end));
        (self.began, self.until) = (Some(began), Some(until));
    }

    /// It is protected no more.
    pub(super) fn ended(&mut self, now: Instant) {
        self.until = self.until.map(|until| until.min(now));
    }

    /// When the row began to which a lease from now on belongs.
    pub(super) fn row(&self, now: Instant) -> Instant {
        let in_row = self.until.is_some_and(|until| now.saturating_duration_since(until) < PAUSE);
        self.began.filter(|_| in_row).unwrap_or(now)
    }
}

/// A lease as it is written, from the pod's start on: until its row began, and from there until its end.
///
/// Go reads a duration that has two parts as their sum (`time.ParseDuration`), which is all that Karpenter has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) began: Duration,
    pub(super) length: Duration,
}

impl Written {
    /// Of lengths from the pod's start on.
    pub(super) fn new(began: Duration, until: Duration) -> Self {
        // Whole seconds: a row is not made younger, and a part of a second protects for the whole of it.
        let began = began.as_secs();
        let until = until.as_secs() + u64::from(until.subsec_nanos() > 0);
        Self { began: Duration::from_secs(began), length: Duration::from_secs(until.saturating_sub(began)) }
    }

    /// None: no agent of this kind wrote that.
    pub(super) fn read(text: &str) -> Option<Self> {
        let (began, length) = text.strip_suffix('s')?.split_once('s')?;
        let seconds = |part: &str| {
            let is_number = part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse().ok().filter(|_| is_number).map(Duration::from_secs)
        };
        Some(Self { began: seconds(began)?, length: seconds(length)? })
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s{}s", self.began.as_secs(), self.length.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_heartbeat_writes_only_what_is_used_up_or_much_too_long() {
        let t0 = Instant::now();
        let mut lease = Lease::new(secs(6 * 3600));
        let mut writes = Vec::new();
        for beat in 0..120 {
            let now = t0 + secs(beat * 5);
            match lease.wish(now, secs(600)) {
                Wish::Write(until) => {
                    writes.push(beat * 5);
                    lease.written(now, until);
                }
                Wish::Holds => {}
                Wish::Spent => panic!("spent after {beat}"),
            }
            assert!(lease.until(now).unwrap() >= now + secs(600), "never less than asked for");
        }
        assert_eq!(writes, [0, 155, 310, 465]);
        // Who asks for less gets less.
        let now = t0 + secs(600);
        assert_eq!(lease.wish(now, secs(60)), Wish::Write(now + secs(75)));
        lease.written(now, now + secs(75));
        assert_eq!(lease.until(now + secs(75)), None, "it lapses by itself");
    }

    #[test]
    fn a_row_of_leases_ends_however_often_it_is_renewed_and_short_pauses_are_none() {
        let t0 = Instant::now();
        let mut lease = Lease::new(secs(3600));
        assert_eq!(lease.wish(t0, secs(3600)), Wish::Write(t0 + secs(3600)), "no slack past the most");
        lease.written(t0, t0 + secs(1800));
        // Released, and asked for again a moment later.
        lease.ended(t0 + secs(1000));
        assert_eq!(lease.until(t0 + secs(1001)), None);
        let now = t0 + secs(1300);
        assert_eq!(lease.wish(now, secs(3600)), Wish::Write(t0 + secs(3600)));
        lease.written(now, t0 + secs(3600));
        assert_eq!(lease.wish(t0 + secs(3600), secs(60)), Wish::Spent);
        assert_eq!(lease.wish(t0 + secs(3600) + PAUSE - secs(1), secs(60)), Wish::Spent);
        let later = t0 + secs(3600) + PAUSE;
        assert_eq!(lease.wish(later, secs(60)), Wish::Write(later + secs(75)));
        assert_eq!(lease.most(later), secs(3600));
    }

    #[test]
    fn a_lease_of_an_earlier_life_is_the_same_lease_and_its_row_goes_on() {
        let t0 = Instant::now();
        let mut lease = Lease::new(secs(3600));
        lease.resume(t0, t0 + secs(1200));
        let now = t0 + secs(1000);
        assert_eq!((lease.until(now), lease.most(now)), (Some(t0 + secs(1200)), secs(2600)));
        assert_eq!(lease.wish(now, secs(180)), Wish::Holds);
        assert_eq!(lease.wish(now, secs(3600)), Wish::Write(t0 + secs(3600)));
        assert_eq!(lease.row(t0 + secs(1200) + PAUSE - secs(1)), t0, "a short pause is none");
        let later = t0 + secs(1200) + PAUSE;
        assert_eq!((lease.until(later), lease.most(later)), (None, secs(3600)));
        // Where report.protect_max was made less, it is over earlier.
        let mut lease = Lease::new(secs(600));
        lease.resume(t0, t0 + secs(1200));
        assert_eq!(lease.until(t0), Some(t0 + secs(600)));
        assert_eq!(lease.wish(t0 + secs(700), secs(60)), Wish::Spent);
    }

    #[test]
    fn what_is_written_is_a_duration_of_go_that_says_when_its_row_began() {
        for (began, until, text) in [
            (secs(0), secs(5), "0s5s"),
            (Duration::from_millis(3_600_900), Duration::from_millis(4_200_001), "3600s601s"),
            (secs(7), secs(7), "7s0s"),
            (secs(7), secs(3), "7s0s"),
        ] {
            let written = Written::new(began, until);
            assert_eq!((written.to_string().as_str(), Written::read(text)), (text, Some(written)));
        }
        for text in [
            "",
            "true",
            "s",
            "1s",
            "ss",
            "1h2s",
            "1s2m",
            "+1s2s",
            "1s-2s",
            "1s2s3s",
            "1.5s2s",
            "99999999999999999999s1s",
        ] {
            assert_eq!(Written::read(text), None, "{text}");
        }
    }
}
