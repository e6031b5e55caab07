//! How long the agent's own pod is protected: decided here, written by `pod`.
//!
//! A scaler renews a lease with each heartbeat, and a write to the API server is not worth a heartbeat: what is
//! written is a little longer than asked for, and written anew when that is used up. It lapses by itself, and
//! no scaler can make it last for ever.

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

    /// It is protected no more.
    pub(super) fn ended(&mut self, now: Instant) {
        self.until = self.until.map(|until| until.min(now));
    }

    /// When the row began to which a lease from now on belongs.
    fn row(&self, now: Instant) -> Instant {
        let in_row = self.until.is_some_and(|until| now.saturating_duration_since(until) < PAUSE);
        self.began.filter(|_| in_row).unwrap_or(now)
    }
}

/// As Go reads it: `5h3m20s`.
pub(super) fn go_duration(length: Duration) -> String {
    // A part of a second protects for the whole of it.
    let seconds = length.as_secs() + u64::from(length.subsec_nanos() > 0);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
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
    fn durations_are_as_go_reads_them() {
        for (length, text) in [
            (secs(5), "5s"),
            (Duration::from_millis(4001), "5s"),
            (secs(60), "1m0s"),
            (secs(3 * 3600 + 1), "3h0m1s"),
            (secs(30 * 24 * 3600), "720h0m0s"),
        ] {
            assert_eq!(go_duration(length), text);
        }
    }
}
