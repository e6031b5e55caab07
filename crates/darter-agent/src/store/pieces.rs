//! Pieces as other nodes see them: which of an ingest are here, and what the pieces of a blob are.
//!
//! A piece is told of once it is in the file and its BLAKE3 value in the record: only then may it be
//! announced, and served. Not here: who vouches for the value.

use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use tokio::sync::mpsc;

use super::blob::Blob;
use super::disk::Shelf;
use super::record::{Claim, Record};
use super::{Store, StoreError};

/// A piece of an ingest that can be read from its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceHere {
    /// Index of the piece.
    pub piece: u32,
    /// Its BLAKE3 chaining value.
    pub value: [u8; 32],
}

/// Where the pieces of an ingest are told, and where they are heard; `here` have been told already.
///
/// There is room for all of them, since each is told once: the writer never waits for a listener.
pub(super) fn notices(
    layout: Layout,
    here: &Bitfield,
    record: &Record,
) -> (mpsc::Sender<PieceHere>, mpsc::Receiver<PieceHere>) {
    let (notices, heard) = mpsc::channel(usize::try_from(layout.pieces()).unwrap_or(usize::MAX).max(1));
    tell(
        &notices,
        here.iter().filter_map(|index| match record.claim(index) {
            Claim::Here(value) => Some((index, value)),
            Claim::Missing | Claim::Unvouched => None,
        }),
    );
    (notices, heard)
}

/// Tells of pieces, if anybody listens.
pub(super) fn tell(notices: &mpsc::Sender<PieceHere>, pieces: impl Iterator<Item = (u64, [u8; 32])>) {
    for (index, value) in pieces {
        let Ok(piece) = u32::try_from(index) else { continue };
        // There is room; an error is that nobody listens.
        let _ = notices.try_send(PieceHere { piece, value });
    }
}

/// The value of a piece, if there is such a piece and it was verified.
fn value(record: &Record, piece: u64) -> Option<[u8; 32]> {
    match record.claim(piece) {
        Claim::Here(value) if piece < Layout::new(record.size()).pieces() => Some(value),
        _ => None,
    }
}

impl Store {
    /// A stored blob, and the BLAKE3 value of one of its pieces as it was when the blob was verified.
    /// `None`: it is not here, has no such piece, or its record is lost.
    pub async fn piece(&self, digest: &Digest, piece: u32) -> Option<(Blob, [u8; 32])> {
        self.recorded(digest, move |blob, record| Some((blob, value(&record, piece.into())?))).await
    }

    /// The values of all its pieces, in order. `None`: it is not here, or its record is lost.
    pub async fn values(&self, digest: &Digest) -> Option<Vec<[u8; 32]>> {
        let all = |_, record: Record| {
            let pieces = Layout::new(record.size()).pieces();
            (0..pieces).map(|piece| value(&record, piece)).collect()
        };
        self.recorded(digest, all).await
    }

    /// Looks a stored blob up with its record, off the async threads.
    async fn recorded<T: Send + 'static>(
        &self,
        digest: &Digest,
        read: impl FnOnce(Blob, Record) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let (store, digest) = (self.clone(), *digest);
        let look_up = move || {
            let blob = store.get(&digest)?;
            let record = Record::open(&store.shared.disk.record(Shelf::Blobs, &digest), false).ok()?;
            if record.size() == blob.size() { read(blob, record) } else { None }
        };
        tokio::task::spawn_blocking(look_up).await.ok().flatten()
    }

    /// Every complete blob and its size, by ascending digest.
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        let index = super::lock(&self.shared.index);
        let mut blobs: Vec<_> = index.blobs().map(|(digest, entry)| (*digest, entry.size)).collect();
        drop(index);
        blobs.sort_unstable();
        blobs
    }

    /// The same, what was used last first.
    pub fn blobs_by_use(&self) -> Vec<Digest> {
        let index = super::lock(&self.shared.index);
        let mut blobs: Vec<_> = index.blobs().map(|(digest, entry)| (entry.used, *digest)).collect();
        drop(index);
        blobs.sort_unstable_by(|one, other| other.cmp(one));
        blobs.into_iter().map(|(_, digest)| digest).collect()
    }

    /// A blob was of use to somebody, though not here.
    pub fn used(&self, digest: &Digest) {
        if let Some(entry) = super::lock(&self.shared.index).blob(digest) {
            entry.used = std::time::SystemTime::now();
        }
    }

    /// Whether so many bytes fit without anything leaving for them.
    pub fn has_room(&self, size: u64) -> Result<(), StoreError> {
        self.may_take(size)?;
        if size <= self.room() { Ok(()) } else { Err(StoreError::Full { size, source: None }) }
    }

    /// Bytes that fit without anything leaving for them.
    pub fn room(&self) -> u64 {
        if self.may_take(0).is_err() {
            return 0;
        }
        let index = super::lock(&self.shared.index);
        index.limit_bytes.saturating_sub(index.bytes())
    }

    /// Whether an interrupted ingest of a blob is here, which then needs no room made for it.
    pub fn is_begun(&self, digest: &Digest, size: u64) -> bool {
        super::lock(&self.shared.index).ingest_size(digest) == Some(size)
    }

    /// Resolves when a blob or an ingest comes or goes after this was called.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.shared.changed.notified()
    }
}
