//! When containerd asked last, and which containerd it is: the proof that hosts.toml is in use.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::containerd_config::Version;

/// What was seen of containerd. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Seen(Arc<Mutex<Last>>);

#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    /// As the last User-Agent said; the agent's own kind of containerd does not change often.
    version: Option<Version>,
}

impl Seen {
    /// Notes a request, if it is containerd's: by its User-Agent, `containerd/2.2.4`.
    pub(super) fn note(&self, user_agent: Option<&str>) {
        let Some(version) = user_agent.and_then(|agent| agent.strip_prefix("containerd/")) else { return };
        let mut last = self.last();
        last.at = Some(Instant::now());
        last.version = version.parse().ok().or(last.version);
    }

    /// How long ago containerd asked; `None` if never since the start.
    pub fn age(&self) -> Option<Duration> {
        self.last().at.map(|at| at.elapsed())
    }

    /// Which containerd asked, once one has.
    pub fn version(&self) -> Option<Version> {
        self.last().version
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_is_seen_by_its_user_agent_and_nobody_else_is() {
        let seen = Seen::default();
        seen.note(None);
        seen.note(Some("curl/8"));
        assert_eq!((seen.age(), seen.version()), (None, None));
        seen.note(Some("containerd/1.6.20~ds1"));
        assert!(seen.age().is_some());
        assert_eq!(seen.version(), Some(Version { major: 1, minor: 6 }));
        seen.note(Some("containerd/unknown"));
        assert_eq!(seen.version(), Some(Version { major: 1, minor: 6 }));
    }
}
