//! Which blobs are on their way here, for whoever tells others how this node is.

use std::sync::atomic::Ordering;

use darter_core::Digest;
use tokio::sync::watch;

use super::{Pull, Pulls, State, lock};

/// A blob on its way here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnItsWay {
    /// Which.
    pub digest: Digest,
    /// Bytes of it that are here, from wherever.
    pub done: u64,
    /// Its size, once that is known.
    pub size: Option<u64>,
    /// Nobody on this node waits for it.
    pub is_ahead: bool,
}

impl Pulls {
    /// All that are on their way, by digest.
    pub fn on_their_way(&self) -> Vec<OnItsWay> {
        let running = lock(&self.0.running);
        let mut pulls: Vec<_> = running.iter().map(|(digest, pull)| pull.standing(*digest)).collect();
        drop(running);
        pulls.sort_unstable_by_key(|pull| pull.digest);
        pulls
    }

    /// Hears when one begins or ends.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changes.subscribe()
    }
}

impl Pull {
    fn standing(&self, digest: Digest) -> OnItsWay {
        let size = match &*self.state.borrow() {
            State::Coming(ingest) => Some(ingest.size()),
            State::Done(blob, _) => Some(blob.size()),
            State::Asking | State::Failed(_) => self.size,
        };
        let account = &self.account;
        let came = account.resumed_bytes().saturating_add(account.origin_bytes());
        // What came twice counts once at the most.
        let done = came.saturating_add(account.peer_bytes()).min(size.unwrap_or(u64::MAX));
        let is_ahead = !self.claim.is_read() || self.readers.load(Ordering::Relaxed) == 0;
        OnItsWay { digest, done, size, is_ahead }
    }
}
