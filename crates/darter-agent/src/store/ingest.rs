//! A blob half written: what a pull writes to, and what its readers trail.
//!
//! Any number of tasks write, anywhere; one thread (`writer`) takes their bytes to the disk and
//! hashes them. Readers watch the readable prefix and need no lock: it only grows, the bytes below
//! it never change, and the last of them come only once the sha256 of the whole has matched.

use std::fs::File;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::range::Span;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::blob::Blob;
use super::index::Handle;
use super::lock;
use super::pieces::PieceHere;
use super::ranges::Ranges;
use super::state::StoreError;

/// Bytes that one ingest holds in memory on their way to the disk. Enough to keep the writer busy
/// at 10 GB/s while the network stalls for a moment, and 16 MiB for 8 pulls at once.
const IN_FLIGHT_BYTES: u64 = 2 * 1024 * 1024;
/// A longer write is cut, so that several writers share the budget.
const CHUNK_BYTES: u64 = 512 * 1024;
/// Writes in the queue: the budget in chunks of 8 KiB, the smallest that a registry's body comes in.
pub(super) const QUEUE: usize = 256;
/// Separate ranges of one blob. A pull has a handful; past this a writer is broken.
const RANGES_MAX: usize = 1024;

/// How far readers may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes from the start.
    Readable(u64),
    /// Everything, and it is verified.
    Complete,
    /// No more bytes come. Those that were readable stay right, unless the reason is a wrong digest.
    Failed(Arc<str>),
}

/// What goes to the writer.
pub(super) enum Message {
    Write {
        offset: u64,
        bytes: Bytes,
        /// Gives the bytes back to the budget once they are on disk.
        _budget: Arc<OwnedSemaphorePermit>,
    },
    Finish,
}

/// The writing end of an ingest. Dropping it without `finish` parks the ingest: it stays on disk,
/// and the next `Store::ingest` of the digest goes on where it stopped.
///
/// Once the last byte is written the writer completes the blob by itself; `finish` tells how that went.
pub struct Ingest {
    layout: Layout,
    /// What was written or is in the queue.
    taken: Mutex<Ranges>,
    budget: Arc<Semaphore>,
    queue: mpsc::Sender<Message>,
    reader: IngestReader,
    outcome: tokio::sync::Mutex<Option<oneshot::Receiver<Result<Blob, StoreError>>>>,
    /// Pieces that were here at the start.
    resumed: Bitfield,
    /// A notice of each piece; nothing once somebody took it.
    pieces: Mutex<Option<mpsc::Receiver<PieceHere>>>,
    /// The slot sees by it whether this end is gone.
    _handle: Arc<Handle>,
}

/// What trails an ingest. Cheap to clone.
#[derive(Debug, Clone)]
pub struct IngestReader {
    digest: Digest,
    size: u64,
    file: Arc<File>,
    progress: watch::Receiver<Progress>,
}

impl Ingest {
    pub(super) fn new(
        layout: Layout,
        written: Ranges,
        queue: mpsc::Sender<Message>,
        reader: IngestReader,
        outcome: oneshot::Receiver<Result<Blob, StoreError>>,
        (resumed, pieces): (Bitfield, mpsc::Receiver<PieceHere>),
        handle: Arc<Handle>,
    ) -> Self {
        let budget = usize::try_from(IN_FLIGHT_BYTES).unwrap_or(usize::MAX);
        Self {
            layout,
            taken: Mutex::new(written),
            budget: Arc::new(Semaphore::new(budget)),
            queue,
            reader,
            outcome: tokio::sync::Mutex::new(Some(outcome)),
            resumed,
            pieces: Mutex::new(Some(pieces)),
            _handle: handle,
        }
    }

    /// The cut of the blob.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether the byte at `offset` was written.
    pub fn has(&self, offset: u64) -> bool {
        offset < self.layout.size() && lock(&self.taken).has(offset)
    }

    /// The first run of bytes at or after `from` that was not written. To the byte; after a restart
    /// of the agent it starts and ends at pieces, since only whole pieces survive one.
    pub fn next_missing(&self, from: u64) -> Option<Span> {
        lock(&self.taken).next_missing(from, self.layout.size())
    }

    /// Pieces that an interrupted ingest left here, whole and hashed again.
    pub const fn resumed(&self) -> &Bitfield {
        &self.resumed
    }

    /// A notice of each piece once it can be read from the file and its value is known, those first
    /// that an interrupted ingest left. The first caller gets it.
    pub fn pieces(&self) -> Option<mpsc::Receiver<PieceHere>> {
        lock(&self.pieces).take()
    }

    /// For readers.
    pub fn reader(&self) -> IngestReader {
        self.reader.clone()
    }

    /// Writes bytes at an offset; several tasks may at once. Waits while too much is in flight.
    /// Bytes that were written before are skipped: the first to come stay.
    ///
    /// Returns once they are queued; a failure to write them fails the ingest, which the next
    /// `write`, `finish` and every reader see.
    pub async fn write(&self, offset: u64, mut bytes: Bytes) -> Result<(), StoreError> {
        let (len, size) = (len(&bytes), self.layout.size());
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(StoreError::OutOfRange { offset, len, size });
        }
        let mut at = offset;
        while !bytes.is_empty() {
            let count = bytes.len().min(usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX));
            let chunk = bytes.split_to(count);
            at = self.write_chunk(at, chunk).await?;
        }
        Ok(())
    }

    async fn write_chunk(&self, offset: u64, chunk: Bytes) -> Result<u64, StoreError> {
        let end = offset + len(&chunk);
        let span = Span { start: offset, end };
        let is_taken = || lock(&self.taken).covers(span);
        if is_taken() {
            return Ok(end);
        }
        let bytes = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        let budget = Arc::clone(&self.budget).acquire_many_owned(bytes).await.map_err(|_| self.ended())?;
        let budget = Arc::new(budget);
        // The queue may have less room than there are gaps to fill: one at a time, until none is left.
        while !is_taken() {
            let slot = match self.queue.reserve().await {
                Ok(slot) => slot,
                // Others wrote the rest, and the writer is done.
                Err(_) if is_taken() => break,
                Err(_) => return Err(self.ended()),
            };
            // From taking a span to queueing it nothing waits: a caller that is dropped in between
            // would leave a hole that nobody fills.
            let Some(part) = self.take(span)? else { break };
            let at = |o: u64| usize::try_from(o - offset).unwrap_or(usize::MAX);
            let bytes = chunk.slice(at(part.start)..at(part.end));
            slot.send(Message::Write { offset: part.start, bytes, _budget: Arc::clone(&budget) });
        }
        Ok(end)
    }

    /// Takes the first part of `span` that nobody has taken.
    fn take(&self, span: Span) -> Result<Option<Span>, StoreError> {
        let mut taken = lock(&self.taken);
        let Some(part) = taken.next_missing(span.start, span.end) else { return Ok(None) };
        if taken.len() >= RANGES_MAX {
            return Err(StoreError::Scattered);
        }
        taken.insert(part);
        Ok(Some(part))
    }

    /// Waits until everything is on disk and verified. The blob, or why there is none:
    /// `Incomplete` parks the ingest, `Mismatch` deletes it.
    pub async fn finish(&self) -> Result<Blob, StoreError> {
        // A closed queue is a writer that has ended by itself: its outcome is there.
        let _ = self.queue.send(Message::Finish).await;
        let mut outcome = self.outcome.lock().await;
        let Some(waiting) = outcome.as_mut() else { return Err(self.ended()) };
        let result = waiting.await;
        *outcome = None;
        result.unwrap_or_else(|_| Err(self.ended()))
    }

    fn ended(&self) -> StoreError {
        match &*self.reader.progress.borrow() {
            Progress::Failed(reason) => StoreError::Ended(Arc::clone(reason)),
            Progress::Complete => StoreError::Present(self.reader.digest),
            Progress::Readable(_) => StoreError::Ended("its writer is gone".into()),
        }
    }
}

impl IngestReader {
    pub(super) const fn new(digest: Digest, size: u64, file: Arc<File>, progress: watch::Receiver<Progress>) -> Self {
        Self { digest, size, file, progress }
    }

    /// The file, to be read with offsets below the readable prefix.
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Size of the whole blob in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The name the bytes come under.
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// How far may be read, and a notice of each change.
    pub fn readable(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

fn len(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
