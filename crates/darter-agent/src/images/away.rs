//! Asking a registry that may be away, where something else can stand in: an older answer of its own,
//! or a host before it.
//!
//! A registry that is down must not cost every request of a pull its full set of attempts and
//! timeouts: whoever has something to fall back on waits a moment, and for a while nobody waits again.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::log::chain;
use crate::origin::OriginError;
use crate::sites::Site;

/// How long an answer is waited for when something else can stand in.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Asks. With `fallback` a registry that is away is told from its silence sooner, and from memory.
pub(super) async fn ask<T>(
    site: &Site,
    fallback: bool,
    question: impl Future<Output = Result<T, OriginError>>,
) -> Result<T, OriginError> {
    let registry = site.registry();
    let silent = || OriginError::TimedOut { host: registry.to_string(), after: PATIENCE };
    if fallback && !site.away.may_ask(Instant::now()) {
        return Err(silent());
    }
    let answer = match fallback {
        true => timeout(PATIENCE, question).await.unwrap_or_else(|_| Err(silent())),
        false => question.await,
    };
    match &answer {
        Err(error) if error.is_away() => {
            if fallback && site.away.begins(Instant::now()) {
                warn!(%registry, error = %chain(error), "the registry is away: what it proved before and the hosts \
                    before it stand in");
            }
        }
        _ => {
            if site.away.ends() {
                info!(%registry, "the registry is back");
            }
        }
    }
    answer
}
