//! How the store is, and why it refused: what /readyz shows and what a pull decides by.
//!
//! Disk trouble is a state and an answer, never a crash: the mirror turns every error here into a
//! 404, and containerd reads from the origin itself.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use darter_core::Digest;
use darter_core::range::Span;
use rustix::io::Errno;

/// Whether the store can take new blobs. Blobs that are here are served in every state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It can.
    Ok,
    /// Not even a small blob fits, with everything evicted that may be.
    Full {
        /// Bytes free on the file system.
        free_bytes: u64,
        /// Bytes that `store.min_free` leaves alone.
        min_free_bytes: u64,
    },
    /// The file system refuses writes.
    ReadOnly {
        /// What was tried, and the answer.
        reason: String,
    },
    /// The directory cannot be used.
    Unavailable {
        /// What was tried, and the answer.
        reason: String,
    },
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Full { free_bytes, min_free_bytes } => write!(
                f,
                "full: {free_bytes} bytes free, {min_free_bytes} are left alone (store.min_free), and nothing more can be evicted"
            ),
            Self::ReadOnly { reason } => write!(f, "read-only: {reason}"),
            Self::Unavailable { reason } => write!(f, "unavailable: {reason}"),
        }
    }
}

/// What the store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of blobs and ingests; an ingest counts with the size it will have.
    pub bytes: u64,
    /// Bytes that blobs and ingests may use now.
    pub limit_bytes: u64,
    /// Complete blobs.
    pub blobs: usize,
    /// Ingests, running and parked.
    pub ingests: usize,
    /// Bytes of complete blobs that are pinned.
    pub pinned_bytes: u64,
}

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", .path.display())]
pub struct DiskError {
    /// The verb: `create`, `write`.
    pub operation: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The answer of the system.
    #[source]
    pub source: io::Error,
}

impl DiskError {
    /// For `map_err`: names the operation and the path.
    pub(super) fn on(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { operation, path: path.to_owned(), source }
    }

    /// Whether the disk or the quota has no room.
    pub(super) fn is_full(&self) -> bool {
        let errno = Errno::from_io_error(&self.source);
        matches!(errno, Some(Errno::NOSPC | Errno::DQUOT))
    }

    /// Whether the file system is mounted read-only.
    pub(super) fn is_read_only(&self) -> bool {
        Errno::from_io_error(&self.source) == Some(Errno::ROFS)
    }

    /// One line, cause included.
    pub(super) fn reason(&self) -> String {
        format!("{self}: {}", self.source)
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another ingest of this digest is running.
    #[error("{0} is being ingested already")]
    Busy(Digest),
    /// The blob is complete: `Store::get` has it.
    #[error("{0} is in the store already")]
    Present(Digest),
    /// As many ingests are running as may.
    #[error("too many ingests at once")]
    Crowded,
    /// It would not fit into an empty store.
    #[error("a blob of {size} bytes does not fit into a store of {limit}")]
    TooLarge {
        /// Size of the blob in bytes.
        size: u64,
        /// Bytes that the store may hold.
        limit: u64,
    },
    /// It does not fit now.
    #[error("no room for {size} bytes")]
    Full {
        /// Size of the blob in bytes.
        size: u64,
        /// The refusal of the disk, where it was the disk that refused.
        #[source]
        source: Option<DiskError>,
    },
    /// The store takes no blobs; see `State`.
    #[error("the store takes no blobs: {reason}")]
    Unavailable {
        /// As in `State`.
        reason: String,
    },
    /// A write outside of the blob.
    #[error("bytes {offset}+{len} are outside of a blob of {size}")]
    OutOfRange {
        /// Offset of the write.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Size of the blob in bytes.
        size: u64,
    },
    /// More separate ranges of one blob than any pull has.
    #[error("too many separate ranges of one blob")]
    Scattered,
    /// The whole blob arrived, and it is another one.
    #[error("what came as {expected} is {got}")]
    Mismatch {
        /// The name it came under.
        expected: Digest,
        /// What its bytes hash to.
        got: Digest,
    },
    /// `finish` before everything was written.
    #[error("bytes {} to {} are missing", .missing.start, .missing.end)]
    Incomplete {
        /// The first run of bytes that is missing.
        missing: Span,
    },
    /// The ingest ended before, and this says how.
    #[error("the ingest has ended: {0}")]
    Ended(Arc<str>),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
