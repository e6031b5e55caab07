//! Pulls by chunks: what a stop waits for, because containerd cannot take them anywhere else.
//!
//! With `concurrent_layer_fetch_buffer` containerd 2.1 and later reads a complete blob by requests
//! for `bytes=N-`, a new connection each, and takes what it needs of each body. It asks no other host
//! for a chunk that is refused or breaks off, but gives the whole pull up. A stream it resumes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use darter_core::range::ByteRange;
use tokio::time::sleep;

/// How long after a chunk the next one may still come. containerd asks for it as soon as one of its
/// downloads is over; what can be in between is a busy disk, or other layers that have their turn.
const QUIET: Duration = Duration::from_secs(3);

/// When the last chunk was given. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Chunks(Arc<Mutex<Option<Instant>>>);

impl Chunks {
    /// Notes that one was given.
    pub(super) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether none was given for `QUIET`.
    pub(super) fn is_quiet(&self) -> bool {
        rest(self.last(), Instant::now()).is_none()
    }

    /// Resolves when none was given for `QUIET`: at once, on a node that pulls by streams.
    pub(super) async fn quiet(&self) {
        while let Some(rest) = rest(self.last(), Instant::now()) {
            sleep(rest).await;
        }
    }

    fn last(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is left of the wait for quiet.
fn rest(last: Option<Instant>, now: Instant) -> Option<Duration> {
    let rest = QUIET.saturating_sub(now.duration_since(last?));
    (!rest.is_zero()).then_some(rest)
}

/// Whether a range is one that containerd's parallel fetch asks for after the first.
pub(super) const fn is_later(range: Option<ByteRange>) -> bool {
    matches!(range, Some(ByteRange::From(1..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_quiet_at_once_without_chunks_and_a_while_after_the_last_of_them() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(rest(None, start), None);
        assert_eq!(rest(Some(start), start), Some(QUIET));
        assert_eq!(rest(Some(start), at(2999)), Some(Duration::from_millis(1)));
        assert_eq!(rest(Some(at(2000)), at(2999)), Some(Duration::from_millis(2001)), "another came");
        assert_eq!(rest(Some(start), at(3000)), None);
        assert_eq!(rest(Some(start), at(60_000)), None);
    }

    #[test]
    fn a_later_chunk_starts_after_the_first_byte_and_has_no_end() {
        let later = |header: &str| is_later(ByteRange::parse(header));
        assert!(later("bytes=1-") && later("bytes=1048576-"));
        assert!(!later("bytes=0-") && !later("bytes=0-5") && !later("bytes=5-9") && !later("bytes=-5"));
        assert!(!later("bytes=5-4") && !later("items=5-") && !is_later(None));
    }
}
