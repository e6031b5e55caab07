//! The one thread that writes an ingest: bytes to the file, then the prefix to the readers, then
//! the hashes; and at the end the verdict.
//!
//! One thread, so that "the prefix only grows" needs no proof: nobody else touches the file. It
//! blocks on the disk and on the hashes, which async threads must not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::range::Span;
use tokio::sync::{mpsc, oneshot, watch};

use super::Shared;
use super::blob::{Blob, Open};
use super::disk::{Disk, Shelf};
use super::doubt::Standing;
use super::index::{Entry, Handle, Phase, Slot};
use super::ingest::{Ingest, IngestReader, Message, Progress, QUEUE};
use super::pieces::{self, PieceHere};
use super::record::Record;
use super::state::{DiskError, StoreError};
use super::tally::Tally;
use crate::metrics::Source;

/// The right to write one ingest. However the holder ends, the slot is given back.
pub(super) struct Claim {
    shared: Arc<Shared>,
    digest: Digest,
    size: u64,
    held: bool,
}

impl Claim {
    /// Of a slot that `Index::begin` gave.
    pub(super) const fn new(shared: Arc<Shared>, digest: Digest, size: u64) -> Self {
        Self { shared, digest, size, held: true }
    }

    fn park(mut self, known: Option<Box<Tally>>) {
        self.held = false;
        self.shared.change(|index| index.park(&self.digest, known));
    }

    /// Gives up what is there: its files and its slot.
    fn discard(mut self) {
        self.held = false;
        self.shared.remove(Shelf::Ingest, &[self.digest]);
    }

    fn complete(mut self, file: &Arc<File>) -> Blob {
        self.held = false;
        let (digest, size) = (self.digest, self.size);
        let open = Arc::new(Open { digest, size, file: Arc::clone(file), source: Source::Cache });
        let now = SystemTime::now();
        let (open_to, standing) = (Arc::downgrade(&open), Standing::default());
        let entry = Entry { size, used: now, used_on_disk: now, durable: false, open: open_to, standing };
        self.shared.change(|index| index.put(digest, Slot::Blob(entry)));
        self.shared.work.notify_one();
        Blob(open)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.held {
            self.shared.change(|index| index.park(&self.digest, None));
        }
    }
}

/// Opens the files of an ingest and starts its writer. Blocks: on a resume after a restart, for as
/// long as hashing what is there takes.
pub(super) fn start(
    claim: Claim,
    fresh: bool,
    known: Option<Box<Tally>>,
    handle: Arc<Handle>,
) -> Result<Ingest, StoreError> {
    let shared = Arc::clone(&claim.shared);
    let (digest, size) = (claim.digest, claim.size);
    match open(&claim, fresh, known) {
        Ok((file, record, tally)) => Ok(spawn(claim, file, record, tally, handle)),
        Err(error) => {
            if fresh {
                claim.discard()
            } else {
                drop(claim)
            }
            shared.trouble(&error);
            tracing::debug!(%digest, error = error.reason(), "cannot start an ingest");
            Err(if error.is_full() { StoreError::Full { size, source: Some(error) } } else { error.into() })
        }
    }
}

fn open(claim: &Claim, fresh: bool, known: Option<Box<Tally>>) -> Result<(Arc<File>, Record, Box<Tally>), DiskError> {
    let Claim { shared, digest, size, .. } = claim;
    let disk: &Disk = &shared.disk;
    let (file, allocated) = disk.open_ingest(digest, *size, fresh)?;
    if allocated {
        shared.change(|index| index.allocated(digest));
    }
    let path = disk.record(Shelf::Ingest, digest);
    let layout = Layout::new(*size);
    let kept = if fresh { None } else { Record::open(&path, true).ok().filter(|record| record.size() == *size) };
    let (record, tally) = match (kept, known) {
        (Some(record), Some(tally)) => (record, tally),
        (Some(record), None) => {
            let tally = Tally::resume(layout, &file, &record, &shared.stopping);
            (record, Box::new(tally.map_err(DiskError::on("read", &path))?))
        }
        (None, _) => {
            let record = Record::create(&path, *size).map_err(DiskError::on("create", &path))?;
            (record, Box::new(Tally::new(layout)))
        }
    };
    Ok((Arc::new(file), record, tally))
}

fn spawn(claim: Claim, file: Arc<File>, record: Record, tally: Box<Tally>, handle: Arc<Handle>) -> Ingest {
    let (queue, messages) = mpsc::channel(QUEUE);
    // What is found whole is hashed at once; until then nothing says that these are its bytes.
    let readable = if tally.is_full() { 0 } else { tally.readable() };
    let (progress, watching) = watch::channel(Progress::Readable(readable));
    let (outcome, waiting) = oneshot::channel();
    let reader = IngestReader::new(claim.digest, claim.size, Arc::clone(&file), watching);
    let layout = Layout::new(claim.size);
    let (notices, here) = pieces::notices(layout, tally.pieces(), &record);
    let resumed = (tally.pieces().clone(), here);
    let ingest = Ingest::new(layout, tally.written().clone(), queue, reader, waiting, resumed, handle);
    let writer = Writer { claim, file, record, tally, progress, notices, buffer: Vec::new() };
    tokio::task::spawn_blocking(move || writer.run(messages, outcome));
    ingest
}

struct Writer {
    claim: Claim,
    file: Arc<File>,
    record: Record,
    tally: Box<Tally>,
    progress: watch::Sender<Progress>,
    notices: mpsc::Sender<PieceHere>,
    /// For reading back; kept, to be allocated once.
    buffer: Vec<u8>,
}

/// How writing came to its end.
enum End {
    /// Everything is written.
    Full,
    /// Asked for, or nobody writes any more.
    Stopped,
    Broken(DiskError),
}

impl Writer {
    fn run(mut self, messages: mpsc::Receiver<Message>, outcome: oneshot::Sender<Result<Blob, StoreError>>) {
        let end = self.write_all(messages);
        let (last, result) = match end {
            End::Full => self.verify(),
            End::Stopped => self.stop(),
            End::Broken(error) => self.broken(error),
        };
        // The slot is free by now: whoever sees the end may start anew.
        last.send();
        let _ = outcome.send(result);
    }

    fn write_all(&mut self, mut messages: mpsc::Receiver<Message>) -> End {
        while !self.tally.is_full() {
            match messages.blocking_recv() {
                Some(Message::Write { offset, bytes, _budget }) => {
                    if let Err(source) = self.write(offset, &bytes) {
                        let path = self.claim.shared.disk.data(Shelf::Ingest, &self.claim.digest);
                        return End::Broken(DiskError::on("write", &path)(source));
                    }
                }
                Some(Message::Finish) | None => return End::Stopped,
            }
        }
        End::Full
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        let end = offset + u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.tally.note(Span { start: offset, end });
        // Readers first: they wait for bytes, nobody waits for hashes before the end.
        let readable = Progress::Readable(self.tally.readable());
        self.progress.send_if_modified(|progress| {
            let grown = *progress != readable;
            if grown {
                progress.clone_from(&readable);
            }
            grown
        });
        self.tally.hash(offset, bytes, &self.file, &self.record, &mut self.buffer)?;
        pieces::tell(&self.notices, self.tally.take_fresh());
        Ok(())
    }

    /// Everything is here; only its sha256 makes it the blob.
    fn verify(self) -> (Last, Result<Blob, StoreError>) {
        let (expected, got) = (self.claim.digest, self.tally.digest());
        if got != expected {
            let error = StoreError::Mismatch { expected, got };
            let last = Last(self.progress, Progress::Failed(error.to_string().into()));
            self.claim.discard();
            return (last, Err(error));
        }
        let settled = self.claim.shared.settle_journal();
        if let Err(error) = settled.and_then(|()| self.claim.shared.disk.promote(&expected)) {
            return self.broken(error);
        }
        let blob = self.claim.complete(&self.file);
        (Last(self.progress, Progress::Complete), Ok(blob))
    }

    fn stop(self) -> (Last, Result<Blob, StoreError>) {
        let Some(missing) = self.tally.first_missing() else { return self.verify() };
        let error = StoreError::Incomplete { missing };
        let last = Last(self.progress, Progress::Failed(error.to_string().into()));
        self.claim.park(Some(self.tally));
        (last, Err(error))
    }

    /// What reached the disk is unknown now: the next ingest of the digest has to hash it.
    fn broken(self, error: DiskError) -> (Last, Result<Blob, StoreError>) {
        let reason = error.reason();
        tracing::warn!(digest = %self.claim.digest, error = reason, "an ingest failed");
        self.claim.shared.trouble(&error);
        let last = Last(self.progress, Progress::Failed(reason.into()));
        let size = self.claim.size;
        drop(self.claim);
        let error = if error.is_full() { StoreError::Full { size, source: Some(error) } } else { error.into() };
        (last, Err(error))
    }
}

/// What readers see last.
struct Last(watch::Sender<Progress>, Progress);

impl Last {
    fn send(self) {
        self.0.send_replace(self.1);
    }
}

/// An ingest of an earlier life of the agent: hash what is there, complete it if that is all, else
/// park it with what is known.
pub(super) fn verify_parked(shared: &Arc<Shared>, digest: &Digest, size: u64) {
    let begun = shared.change(|index| index.begin(digest, size, Phase::Verifying));
    let Ok(super::index::Begin::Resumed(known)) = begun else { return };
    // Dropped at once: its writer completes what is full and parks what is not.
    if let Err(error) = start(Claim::new(Arc::clone(shared), *digest, size), false, known, Arc::new(Handle)) {
        tracing::warn!(%digest, %error, "cannot go on with an ingest");
    }
}

/// A blob's handle that is not alive.
pub(super) const fn closed() -> Weak<Open> {
    Weak::new()
}
