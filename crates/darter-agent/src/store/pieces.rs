//! Pieces as other nodes see them: which of an ingest are here, and what the pieces of a blob are.
//!
//! A piece is told of once it is in the file and its BLAKE3 value in the record: only then may it be
//! announced, and served. Whole blobs are those of this store, and with `offer_containerds_blobs` those of
//! containerd; one that both have is told of once. Not here: who vouches for the value.

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
    /// A blob that is here, and the BLAKE3 value of one of its pieces as it was when the blob was verified.
    /// `None`: it is not here, has no such piece, or its record is lost.
    pub async fn piece(&self, digest: &Digest, piece: u32) -> Option<(Blob, [u8; 32])> {
        let (store, digest) = (self.clone(), *digest);
        let read = move || store.own_piece(&digest, piece).or_else(|| store.containerds_piece(&digest, piece));
        tokio::task::spawn_blocking(read).await.ok().flatten()
    }

    /// The values of all pieces of a blob that is here, in order. `None`: it is not, or its record is lost.
    pub async fn values(&self, digest: &Digest) -> Option<Vec<[u8; 32]>> {
        let (store, digest) = (self.clone(), *digest);
        let read = move || store.own_values(&digest).or_else(|| store.shared.content.values(&digest));
        tokio::task::spawn_blocking(read).await.ok().flatten()
    }

    /// A blob of its own with its record.
    fn recorded(&self, digest: &Digest) -> Option<(Blob, Record)> {
        let blob = self.get(digest)?;
        let record = Record::open(&self.shared.disk.record(Shelf::Blobs, digest), false).ok()?;
        (record.size() == blob.size()).then_some((blob, record))
    }

    fn own_piece(&self, digest: &Digest, piece: u32) -> Option<(Blob, [u8; 32])> {
        let (blob, record) = self.recorded(digest)?;
        Some((blob, value(&record, piece.into())?))
    }

    fn own_values(&self, digest: &Digest) -> Option<Vec<[u8; 32]>> {
        let (_, record) = self.recorded(digest)?;
        (0..Layout::new(record.size()).pieces()).map(|piece| value(&record, piece)).collect()
    }

    fn containerds_piece(&self, digest: &Digest, piece: u32) -> Option<(Blob, [u8; 32])> {
        let (content, index) = (&self.shared.content, u64::from(piece));
        if index >= Layout::new(content.offer(digest)?).pieces() {
            return None;
        }
        let found = content.piece(digest, index, self.shared.is_sample());
        if found.is_none() {
            self.shared.withdraw_offer(digest);
        }
        found
    }

    /// From now on others may have what containerd has too: `run` hashes it ahead.
    pub fn offer_containerds_blobs(&self) {
        self.shared.content.offer_all();
    }

    /// The size of a complete blob that others may have.
    pub fn offers(&self, digest: &Digest) -> Option<u64> {
        super::lock(&self.shared.index).blob_size(digest).or_else(|| self.shared.content.offer(digest))
    }

    /// Every complete blob that others may have, and its size, by ascending digest.
    pub fn blobs(&self) -> Vec<(Digest, u64)> {
        let mut blobs = self.shared.content.offers();
        blobs.extend(super::lock(&self.shared.index).blobs().map(|(digest, entry)| (*digest, entry.size)));
        blobs.sort_unstable();
        blobs.dedup_by_key(|(digest, _)| *digest);
        blobs
    }

    /// The same, what was used last first, and what only containerd has at the end.
    pub fn blobs_by_use(&self) -> Vec<Digest> {
        let offers = self.shared.content.offers();
        let index = super::lock(&self.shared.index);
        let mut blobs: Vec<_> = index.blobs().map(|(digest, entry)| (entry.used, *digest)).collect();
        let others = offers.into_iter().map(|(digest, _)| digest);
        let others: Vec<_> = others.filter(|digest| index.blob_size(digest).is_none()).collect();
        drop(index);
        blobs.sort_unstable_by(|one, other| other.cmp(one));
        blobs.into_iter().map(|(_, digest)| digest).chain(others).collect()
    }

    /// A blob was of use to somebody, though not here. What only containerd has is copied: it is to stay.
    pub fn used(&self, digest: &Digest) {
        match super::lock(&self.shared.index).blob(digest) {
            Some(entry) => entry.used = std::time::SystemTime::now(),
            None if self.shared.content.offer(digest).is_some() => self.shared.content.copies.ask(digest),
            None => {}
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

    /// Resolves once a blob that others were told of could not be given.
    pub async fn lost(&self) {
        self.shared.lost.notified().await;
    }
}
