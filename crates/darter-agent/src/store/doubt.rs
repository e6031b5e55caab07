//! Blobs that may have rotted: given out to their end, and wanted again soon after.
//!
//! containerd checks what it pulled. Where the digest is wrong it fails the pull and asks no other
//! host; the kubelet tries again, and comes back here, without end if nothing is done. Nobody tells
//! us, but a blob that was just given to its end and is wanted again is the sign of it.
//!
//! It can also be a second pull that has its reason, of 10 GB perhaps. So the blob is given again, but
//! each piece is hashed before its first byte is sent, which costs a second for some GB. At a piece
//! that is wrong the body ends, and containerd goes on at the origin from a right byte: that very pull
//! succeeds. Then the sha256 of the whole decides whether the blob is dropped. Once every piece was
//! right the blob is in no doubt for an hour.

use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::pieces::{Bitfield, Layout};
use darter_core::range::Span;

use super::blob::Blob;
use super::scrub::check_piece;
use super::{Shared, Store, lock};
use crate::metrics::Source;

/// A try after a failed pull comes within this: the kubelet waits 5 min at most.
const SOON: Duration = Duration::from_secs(10 * 60);
/// A blob whose pieces were all right is not hashed again before: a node that pulls the same thing
/// over and over pays for it once an hour.
const CLEARED_FOR: Duration = Duration::from_secs(3600);

/// How a blob stands with those who read it.
#[derive(Debug, Default)]
pub(super) enum Standing {
    #[default]
    Unknown,
    /// It was given to its end then.
    Given(Instant),
    /// And it was wanted again. These pieces were right.
    Doubted(Bitfield),
    /// All pieces were right then.
    Cleared(Instant),
}

impl Standing {
    /// Somebody wants a blob of so many pieces. Whether it is in doubt.
    fn wanted(&mut self, pieces: u64, now: Instant) -> bool {
        match self {
            Self::Given(at) if now.duration_since(*at) < SOON => *self = Self::Doubted(Bitfield::new(pieces)),
            Self::Cleared(at) if now.duration_since(*at) >= CLEARED_FOR => *self = Self::Unknown,
            _ => {}
        }
        matches!(self, Self::Doubted(_))
    }

    /// Somebody got the last byte of it.
    fn given(&mut self, now: Instant) {
        if let Self::Unknown | Self::Given(_) = self {
            *self = Self::Given(now);
        }
    }

    fn is_right(&self, piece: u64) -> bool {
        match self {
            Self::Doubted(right) => right.has(piece),
            _ => true,
        }
    }

    /// A piece was hashed, and is right.
    fn note_right(&mut self, piece: u64, now: Instant) {
        if let Self::Doubted(right) = self {
            right.set(piece);
            if right.is_full() {
                *self = Self::Cleared(now);
            }
        }
    }
}

/// A piece is not what it was.
#[derive(Debug, thiserror::Error)]
#[error("a piece of the stored blob is not what it was")]
pub struct Rotten;

/// A blob in doubt: none of its bytes goes out before `check`.
pub struct Doubt {
    shared: Arc<Shared>,
    blob: Blob,
}

impl std::fmt::Debug for Doubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Doubt").field(self.blob.digest()).finish()
    }
}

impl Store {
    /// Somebody is to get this blob, or a part of it. What he has to ask first, if it is in doubt.
    pub fn doubt(&self, blob: &Blob, now: Instant) -> Option<Doubt> {
        let pieces = Layout::new(blob.size()).pieces();
        let in_doubt = self.shared.standing(blob, |standing| standing.wanted(pieces, now)).unwrap_or(false);
        in_doubt.then(|| Doubt { shared: Arc::clone(&self.shared), blob: blob.clone() })
    }

    /// Somebody got this blob, or a part of it that ends where the blob does.
    pub fn given(&self, blob: &Blob, now: Instant) {
        self.shared.standing(blob, |standing| standing.given(now));
    }
}

impl Shared {
    /// What happens to the standing of a blob; nothing for one that is not of this store.
    fn standing<T>(&self, blob: &Blob, change: impl FnOnce(&mut Standing) -> T) -> Option<T> {
        let ours = blob.source() == Source::Cache;
        lock(&self.index).blob(blob.digest()).filter(|_| ours).map(|entry| change(&mut entry.standing))
    }
}

impl Doubt {
    /// Hashes the pieces that `span` is in, as far as they were not; off the async threads.
    pub async fn check(&self, span: Span) -> Result<(), Rotten> {
        let size = Layout::new(self.blob.size()).piece_size();
        for piece in span.start / size..span.end.div_ceil(size) {
            let known = self.shared.standing(&self.blob, |standing| standing.is_right(piece));
            // A blob that left meanwhile is read from its open file: what it was, nobody remembers.
            if known != Some(true) {
                let (shared, blob) = (Arc::clone(&self.shared), self.blob.clone());
                let checking = tokio::task::spawn_blocking(move || check_piece(&shared, &blob, piece));
                self.verdict(piece, matches!(checking.await, Ok(Ok(true))))?;
            }
        }
        Ok(())
    }

    fn verdict(&self, piece: u64, right: bool) -> Result<(), Rotten> {
        if right {
            self.shared.standing(&self.blob, |standing| standing.note_right(piece, Instant::now()));
            return Ok(());
        }
        // Its record may be what is wrong: the sha256 of the whole has the last word.
        lock(&self.shared.index).ask_rehash(self.blob.digest());
        self.shared.hashing.notify_one();
        Err(Rotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_in_doubt_only_if_it_is_wanted_soon_after_it_was_given() {
        let t0 = Instant::now();
        let mut standing = Standing::default();
        assert!(!standing.wanted(2, t0));
        assert!(!standing.wanted(2, t0), "two who start at once are no sign of anything");
        standing.given(t0);
        assert!(!standing.wanted(2, t0 + SOON));
        standing.given(t0 + SOON);
        assert!(standing.wanted(2, t0 + 2 * SOON - Duration::from_secs(1)));
        standing.given(t0 + 2 * SOON);
        assert!(standing.wanted(2, t0 + 9 * SOON), "until it was looked at");
    }

    #[test]
    fn a_blob_whose_pieces_were_right_is_in_no_doubt_for_an_hour() {
        let t0 = Instant::now();
        let mut standing = Standing::Given(t0);
        assert!(standing.wanted(2, t0));
        standing.note_right(1, t0);
        assert!(standing.is_right(1) && !standing.is_right(0));
        assert!(standing.wanted(2, t0));
        standing.note_right(0, t0);
        for at in [t0, t0 + CLEARED_FOR - Duration::from_secs(1)] {
            assert!(!standing.wanted(2, at));
            standing.given(at);
        }
        assert!(!standing.wanted(2, t0 + CLEARED_FOR), "it has to be given and wanted again first");
        standing.given(t0 + CLEARED_FOR);
        assert!(standing.wanted(2, t0 + CLEARED_FOR));
    }
}
