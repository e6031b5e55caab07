//! Asking a registry that may be away, where something else can stand in: an older answer of its own,
//! or a host before it.
//!
//! A registry that is down must not cost every request of a pull its full set of attempts and
//! timeouts: whoever has something to fall back on waits a moment, and for a while nobody waits again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::Registry;
use tracing::{info, warn};

use crate::log::chain;
use crate::origin::OriginError;
use crate::sites::Site;

/// How long an answer is waited for when something else can stand in.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long a registry that was away is not asked again by those who have something else.
const PAUSE: Duration = Duration::from_secs(5);
/// It doubles up to this: a site that never reaches its registry waits for it twice a minute.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Which registries were away a moment ago: at most one entry for each configured one.
#[derive(Debug, Default)]
pub(super) struct Away(Mutex<HashMap<Registry, Known>>);

#[derive(Debug, Clone, Copy)]
struct Known {
    until: Instant,
    pause: Duration,
}

impl Away {
    /// Asks. With `fallback` a registry that is away is told from its silence sooner, and from memory.
    pub(super) async fn ask<T>(
        &self,
        site: &Site,
        fallback: bool,
        question: impl Future<Output = Result<T, OriginError>>,
    ) -> Result<T, OriginError> {
        let registry = site.registry();
        let silent = || OriginError::TimedOut { host: registry.to_string(), after: PATIENCE };
        if fallback && !self.may_ask(registry, Instant::now()) {
            return Err(silent());
        }
        let answer = match fallback {
            true => tokio::time::timeout(PATIENCE, question).await.unwrap_or_else(|_| Err(silent())),
            false => question.await,
        };
        match &answer {
            Err(error) if error.is_away() => {
                if fallback && self.begins(registry, Instant::now()) {
                    warn!(%registry, error = %chain(error), "the registry is away: what it proved before and the \
                        hosts before it stand in");
                }
            }
            _ => {
                if self.known().remove(registry).is_some() {
                    info!(%registry, "the registry is back");
                }
            }
        }
        answer
    }

    /// Whether to ask it. When its pause is over, one request finds out for all.
    fn may_ask(&self, registry: &Registry, now: Instant) -> bool {
        match self.known().get_mut(registry) {
            Some(known) if now < known.until => false,
            Some(known) => {
                known.pause = (known.pause * 2).min(PAUSE_MAX);
                known.until = now + known.pause;
                true
            }
            None => true,
        }
    }

    /// It did not answer; whether that is news.
    fn begins(&self, registry: &Registry, now: Instant) -> bool {
        let mut known = self.known();
        let is_news = !known.contains_key(registry);
        // Others who asked at the same time say nothing new, and whoever asked again has its pause.
        known.entry(registry.clone()).or_insert_with(|| Known { until: now + PAUSE, pause: PAUSE });
        is_news
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Registry, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_left_alone_for_longer_each_time_and_one_finds_out_for_all() {
        let (away, start) = (Away::default(), Instant::now());
        let registry: Registry = "reg.example".parse().unwrap();
        assert!(away.may_ask(&registry, start));
        assert!(away.begins(&registry, start));
        let mut now = start;
        for pause in [5, 10, 20, 30, 30].map(Duration::from_secs) {
            assert!(!away.may_ask(&registry, now + pause - Duration::from_millis(1)), "{pause:?}");
            now += pause;
            assert!(away.may_ask(&registry, now), "{pause:?}");
            assert!(!away.may_ask(&registry, now), "another asks already");
            assert!(!away.begins(&registry, now) && !away.begins(&registry, now), "it is still away: no news");
        }
    }
}
