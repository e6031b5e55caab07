//! Asking an origin that may be away, where an older answer can stand in.
//!
//! A registry that is down must not cost every request of a pull its full set of attempts and
//! timeouts: whoever has something to fall back on waits a moment, and for a while nobody waits again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::Registry;

use crate::origin::OriginError;
use crate::sites::Site;

/// How long an answer is waited for when there is an older one.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long an origin that was away is not asked again by those who have an older answer.
const PAUSE: Duration = Duration::from_secs(5);

/// Which origins were away a moment ago: at most one entry for each configured registry.
#[derive(Debug, Default)]
pub(super) struct Away(Mutex<HashMap<Registry, Instant>>);

impl Away {
    /// Asks. With `fallback` an origin that is away is told from its silence sooner, and from memory.
    pub(super) async fn ask<T>(
        &self,
        site: &Site,
        fallback: bool,
        question: impl Future<Output = Result<T, OriginError>>,
    ) -> Result<T, OriginError> {
        if !fallback {
            return question.await;
        }
        let silent = || OriginError::TimedOut { host: site.registry().to_string(), after: PATIENCE };
        if self.known().get(site.registry()).is_some_and(|since| since.elapsed() < PAUSE) {
            return Err(silent());
        }
        let answer = tokio::time::timeout(PATIENCE, question).await.unwrap_or_else(|_| Err(silent()));
        match &answer {
            Err(error) if error.is_away() => self.known().insert(site.registry().clone(), Instant::now()),
            _ => self.known().remove(site.registry()),
        };
        answer
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Registry, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
