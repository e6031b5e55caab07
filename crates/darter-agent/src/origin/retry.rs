//! When a request is repeated, and after which pause.
//!
//! Exponential with full jitter: a thousand nodes that were throttled together must not come back
//! together. What breaks after the response head is not repeated here; a pull resumes it.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, Response, StatusCode};
use tokio::time::Instant;

use super::OriginError;
use super::url::Place;
use crate::metrics::{Metrics, ReasonLabels};

/// The first pause is up to this long, each next one up to twice as long.
const FIRST: Duration = Duration::from_millis(200);
/// No pause of our own is longer: by then containerd has gone to the origin itself.
const LONGEST: Duration = Duration::from_secs(10);
/// A registry that asks for more is not waited for: containerd would not wait for us that long.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(30);
/// Whoever asks for more means for good; past some centuries times have no end any more.
const ASKED_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Nobody leaves a registry alone for longer, as in the swarm: what it said may hold for one credential only.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Hosts that are left alone at once: a registry has one, and a storage or two. Past this the one that may be
/// asked again soonest is forgotten.
const PAUSES_MAX: usize = 64;

/// Until when hosts are left alone: what one asked one request for, all others keep too.
#[derive(Default)]
pub(super) struct Pauses(Mutex<HashMap<Place, Asked>>);

#[derive(Clone, Copy)]
struct Asked {
    until: Instant,
    /// 429 or 503.
    status: u16,
}

impl Pauses {
    /// Hears what a host says to a request.
    pub(super) fn heed<B>(&self, place: &Place, answer: &Response<B>) {
        let status = answer.status();
        if status != StatusCode::TOO_MANY_REQUESTS && status != StatusCode::SERVICE_UNAVAILABLE {
            return;
        }
        let Some(asked) = retry_after(answer.headers(), SystemTime::now()) else { return };
        self.note(place, Asked { until: Instant::now() + asked.min(PAUSE_MAX), status: status.as_u16() });
    }

    fn note(&self, place: &Place, asked: Asked) {
        let mut pauses = self.lock();
        if pauses.get(place).is_some_and(|pause| pause.until >= asked.until) {
            return;
        }
        if !pauses.contains_key(place) && pauses.len() >= PAUSES_MAX {
            let soonest = pauses.iter().min_by_key(|(_, asked)| asked.until).map(|(place, _)| place.clone());
            soonest.map(|place| pauses.remove(&place));
        }
        pauses.insert(place.clone(), asked);
    }

    /// Whether a host is to be left alone now.
    pub(super) fn holds(&self, place: &Place) -> bool {
        self.now(place).is_some()
    }

    /// That a host may be asked now; if not, the error is what it would say.
    pub(super) fn check(&self, place: &Place) -> Result<(), OriginError> {
        self.now(place).map_or(Ok(()), |asked| Err(asked.says(place)))
    }

    /// Waits until a host may be asked, if that is not after `deadline`; if it is, the error is what it would say.
    pub(super) async fn over(&self, place: &Place, deadline: Instant) -> Result<(), OriginError> {
        while let Some(asked) = self.now(place) {
            if asked.until > deadline {
                return Err(asked.says(place));
            }
            // Not all at once.
            tokio::time::sleep_until(asked.until + pause(0, None, dice())).await;
        }
        Ok(())
    }

    fn now(&self, place: &Place) -> Option<Asked> {
        self.lock().get(place).copied().filter(|asked| asked.until > Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Place, Asked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    fn says(self, place: &Place) -> OriginError {
        let retry_after = Some(self.until.saturating_duration_since(Instant::now()));
        OriginError::Status { host: place.to_string(), status: self.status, retry_after }
    }
}

fn dice() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The attempts of one request.
pub(super) struct Attempts<'a> {
    left: u32,
    made: u32,
    metrics: &'a Metrics,
}

impl<'a> Attempts<'a> {
    /// `all` attempts, of which the first is about to be made.
    pub(super) const fn new(all: u32, metrics: &'a Metrics) -> Self {
        Self { left: all.saturating_sub(1), made: 0, metrics }
    }

    /// Waits before the next attempt, or gives the error back where there is none, or none in time.
    pub(super) async fn pause(&mut self, error: OriginError) -> Result<(), OriginError> {
        let Some(reason) = error.retry_reason() else { return Err(error) };
        if self.left == 0 || error.retry_after().is_some_and(|asked| asked > WAIT_MAX) {
            return Err(error);
        }
        self.left -= 1;
        let pause = pause(self.made, error.retry_after(), dice());
        self.made += 1;
        self.metrics.origin_retries.get_or_create(&ReasonLabels { reason }).inc();
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// The pause after attempt number `made` (from 0), where `dice` is any number.
fn pause(made: u32, asked: Option<Duration>, dice: u64) -> Duration {
    let ceiling = FIRST.saturating_mul(1 << made.min(16)).min(LONGEST);
    let millis = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX).max(1);
    let own = Duration::from_millis(dice % millis);
    // Whoever names a time is not asked before it, and not by everybody at once.
    asked.map_or(own, |asked| asked + own.min(FIRST))
}

/// The pause that a Retry-After header asks for: seconds, or a date.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds).min(ASKED_MAX));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default().min(ASKED_MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_told_as_it_is() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", text.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("3600"), Some(Duration::from_secs(3600)));
        assert_eq!(read(&u64::MAX.to_string()), Some(ASKED_MAX));
        assert_eq!(read(&httpdate::fmt_http_date(now + Duration::from_secs(9))), Some(Duration::from_secs(9)));
        assert_eq!(read(&httpdate::fmt_http_date(now - Duration::from_secs(9))), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn the_table_of_pauses_is_bounded_and_keeps_the_longest() {
        let (pauses, now) = (Pauses::default(), Instant::now());
        let place = |number: usize| Place { https: true, host: format!("s{number}.example"), port: 443 };
        let until = |seconds: usize| now + Duration::from_secs(60 + u64::try_from(seconds).unwrap());
        for number in 0..=PAUSES_MAX {
            pauses.note(&place(number), Asked { until: until(number), status: 503 });
        }
        assert!(!pauses.holds(&place(0)) && (1..=PAUSES_MAX).all(|number| pauses.holds(&place(number))));
        // Who says less later does not shorten what was said before.
        pauses.note(&place(9), Asked { until: now, status: 429 });
        assert!(matches!(pauses.check(&place(9)), Err(OriginError::Status { status: 503, .. })));
        assert!(pauses.check(&place(0)).is_ok());
    }

    proptest! {
        #[test]
        fn pauses_are_bounded_and_never_before_the_time_that_was_named(made: u32, dice: u64, asked in 0u64..100) {
            prop_assert!(pause(made, None, dice) <= LONGEST);
            let asked = Duration::from_secs(asked);
            let named = pause(made, Some(asked), dice);
            prop_assert!(named >= asked && named <= asked + FIRST);
        }
    }
}
