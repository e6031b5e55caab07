//! How many reads of one blob the origin is asked for at a time, by the whole cluster.
//!
//! Too few leave an origin idle that limits each connection, or whose readers are busy with each
//! other; too many make all first pieces, and all last ones, come late together where its link is
//! what limits. So the rate is climbed: twice as many as long as that pays. Throttling halves.

use std::time::Duration;

use super::peer::PeerId;
use super::time::Time;

/// More reads must bring this much more, in percent of the rate before.
const PAYS: u64 = 125;
/// Arrivals measured for each read that is allowed: enough that segment borders even out.
const SAMPLES_PER_READ: u32 = 2;
/// An origin that breaks is left alone for this long.
const BROKEN_PAUSE: Duration = Duration::from_millis(250);
/// Throttling does not stop everybody for longer.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Nor, on the word of one owner, who may be wrong or lie, for longer than this: then another asks.
const ONE_WORD: Duration = Duration::from_secs(10);
/// After throttling one read more is tried this often.
const RECOVERY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Budget {
    limit: u32,
    max: u32,
    phase: Phase,
    /// The limit and the rate, in bytes per second, of the step before.
    before: (u32, u64),
    /// What arrived since the limit changed; the first arrivals after a change belong to the old one.
    skip: u32,
    arrivals: u32,
    bytes: u64,
    since: Time,
    paused_until: Time,
    /// The same, as far as the origin asked for it.
    throttled_until: Time,
    /// Who said so first since anything came.
    throttled_by: Option<PeerId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The rate at the first limit is measured.
    First,
    Up,
    Hold,
    /// It was throttled, and gains one read at a time since this time.
    Recovering(Time),
}

impl Budget {
    pub(super) const fn new(start: u32, max: u32) -> Self {
        Self {
            limit: start,
            max,
            phase: Phase::First,
            before: (start, 0),
            skip: start,
            arrivals: 0,
            bytes: 0,
            since: Time::ZERO,
            paused_until: Time::ZERO,
            throttled_until: Time::ZERO,
            throttled_by: None,
        }
    }

    /// Reads that may run now.
    pub(super) fn limit(&self, now: Time) -> u32 {
        if now < self.paused_until { 0 } else { self.limit }
    }

    /// When reads that wait may start, if the origin asked for a pause.
    pub(super) const fn deadline(&self) -> Time {
        self.paused_until
    }

    /// Who said that it throttles: another asks next, who may be let in, or it is not true.
    pub(super) fn is_throttled_by(&self, owner: &PeerId) -> bool {
        self.throttled_by.as_ref() == Some(owner)
    }

    /// An owner got nothing and said nothing.
    pub(super) const fn lapsed(&mut self) {
        self.throttled_by = None;
    }

    /// Until when the origin asked to be left alone.
    pub(super) const fn throttled_until(&self) -> Time {
        self.throttled_until
    }

    /// Bytes came from the origin. `is_full`: as many reads ran as may, so the rate says something.
    pub(super) fn arrived(&mut self, now: Time, bytes: u64, is_full: bool) {
        self.throttled_by = None;
        if let Phase::Recovering(since) = self.phase {
            if now.since(since) >= RECOVERY && self.limit < self.max {
                self.limit += 1;
                self.phase = Phase::Recovering(now);
            }
            return;
        }
        if self.phase == Phase::Hold || !is_full {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            self.since = now;
            return;
        }
        self.arrivals += 1;
        self.bytes += bytes;
        if self.arrivals < (self.limit * SAMPLES_PER_READ).max(8) {
            return;
        }
        let micros = u64::try_from(now.since(self.since).as_micros()).unwrap_or(u64::MAX).max(1);
        self.measured(self.bytes.saturating_mul(1_000_000) / micros);
    }

    fn measured(&mut self, rate: u64) {
        let (limit, before) = self.before;
        let pays = rate.saturating_mul(100) / before.max(1) >= PAYS;
        self.before = (self.limit, rate);
        (self.limit, self.phase) = match self.phase {
            Phase::First | Phase::Up if self.phase == Phase::First || pays => {
                let more = (self.limit * 2).min(self.max);
                (more, if more == self.limit { Phase::Hold } else { Phase::Up })
            }
            _ => (limit, Phase::Hold),
        };
        self.skip = self.limit;
        self.arrivals = 0;
        self.bytes = 0;
    }

    /// 429 or 503: half as many, after a pause. `is_sure`: nobody else could be asked about it.
    pub(super) fn throttled(&mut self, now: Time, wait: Duration, by: PeerId, is_sure: bool) {
        // Reads that were on their way get the same answer: one onset halves once.
        if now >= self.paused_until {
            self.limit = (self.limit / 2).max(1);
        }
        let is_sure = is_sure || self.throttled_by.is_some_and(|first| first != by);
        self.throttled_by.get_or_insert(by);
        self.throttled_until = self.throttled_until.max(now + wait.min(if is_sure { PAUSE_MAX } else { ONE_WORD }));
        self.paused_until = self.paused_until.max(self.throttled_until);
        self.phase = Phase::Recovering(self.paused_until);
    }

    /// A read broke off for another reason.
    pub(super) fn broke(&mut self, now: Time) {
        self.paused_until = self.paused_until.max(now + BROKEN_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    /// Runs a budget against an origin whose rate at a number of reads is given, in MiB/s.
    fn settle(rate: impl Fn(u32) -> u64) -> u32 {
        let mut budget = Budget::new(8, 32);
        let mut now = Time::ZERO;
        for _ in 0..2000 {
            now = now + Duration::from_micros(1_000_000 / rate(budget.limit));
            budget.arrived(now, MIB, true);
        }
        budget.limit
    }

    #[test]
    fn an_origin_that_limits_each_connection_is_read_on_many() {
        assert_eq!(settle(|reads| u64::from(reads) * 80), 32);
        assert_eq!(settle(|reads| u64::from(reads.min(17)) * 80), 16);
    }

    #[test]
    fn an_origin_whose_link_limits_is_read_on_as_many_as_at_the_start() {
        assert_eq!(settle(|_| 100), 8);
        assert_eq!(settle(|reads| u64::from(reads.min(10)) * 100), 16, "ten would do, and eight do not");
        assert_eq!(settle(|reads| u64::from(reads.min(9)) * 100), 8);
    }

    #[test]
    fn throttling_halves_once_and_pauses_and_recovers_slowly() {
        let mut budget = Budget::new(8, 32);
        let t0 = Time::from_micros(1_000_000);
        for _ in 0..5 {
            budget.throttled(t0, Duration::from_secs(3), peer(1), false);
        }
        assert_eq!(budget.limit(t0), 0);
        let later = t0 + Duration::from_secs(3);
        assert_eq!(budget.limit(later), 4);
        for second in 0..5 {
            budget.arrived(later + Duration::from_secs(second), MIB, true);
        }
        assert_eq!(budget.limit(later + Duration::from_secs(5)), 6);
    }

    #[test]
    fn one_alone_stops_everybody_for_a_while_and_two_for_as_long_as_the_origin_asks() {
        let (t0, hour) = (Time::from_micros(1_000_000), Duration::from_secs(3600));
        let after = |says: &[(u8, bool)]| {
            let mut budget = Budget::new(8, 32);
            says.iter().for_each(|(by, is_sure)| budget.throttled(t0, hour, peer(*by), *is_sure));
            budget.throttled_until().since(t0)
        };
        assert_eq!(after(&[(1, false), (1, false)]), ONE_WORD);
        assert_eq!(after(&[(1, false), (2, false)]), PAUSE_MAX);
        assert_eq!(after(&[(1, true)]), PAUSE_MAX, "it is the only one");
        let mut budget = Budget::new(8, 32);
        budget.throttled(t0, hour, peer(1), false);
        budget.arrived(t0 + ONE_WORD, MIB, true);
        budget.throttled(t0 + ONE_WORD, hour, peer(2), false);
        assert_eq!(budget.throttled_until().since(t0), ONE_WORD * 2, "something came between the two words");
        budget.broke(t0 + hour);
        assert_eq!(budget.throttled_until().since(t0), ONE_WORD * 2);
    }
}
