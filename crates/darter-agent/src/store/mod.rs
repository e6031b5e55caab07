//! Blobs on this node's disk: content addressed, bounded, verified, and none lost to a crash.
//!
//! A blob is an `Ingest` while it is written and a `Blob` once its sha256 matched. Whatever the disk
//! does (full, read-only, gone, torn by a power loss) is a `State` and an error to the caller, who
//! answers 404; the agent goes on, and the store recovers by itself in `run`.
//!
//! Code map: `disk` paths, lock and file calls; `record` what vouches for a piece; `journal` what
//! was complete; `index` and `admit` what is here and who leaves; `pins` who stays; `tally` the hashes of an ingest; `ingest` and
//! `writer` its two ends, `pieces` what other nodes get of it; `scan` the start; `upkeep` the background; `scrub` re-hashing
//! and `doubt` when it is urgent; `holdings` what is here of an image; `checkup` whether the disk answers;
//! `containerd` blobs that containerd keeps, for this node and for others; `warm` the page cache.
//! Not here: who may read a blob, where it comes from.

mod admit;
mod blob;
mod checkup;
mod containerd;
mod disk;
mod doubt;
mod holdings;
mod index;
mod ingest;
mod journal;
mod pieces;
mod pins;
mod ranges;
mod record;
mod scan;
mod scrub;
mod space;
mod state;
mod tally;
#[cfg(test)]
mod tests;
mod upkeep;
mod warm;
mod writer;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use darter_core::Digest;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use blob::Blob;
pub use checkup::{Checkup, Unwell};
pub use doubt::{Doubt, Rotten};
pub use holdings::Holding;
pub use ingest::{Ingest, IngestReader, Progress};
pub use pieces::PieceHere;
pub use pins::{PIN_MAX, PinError};
pub use state::{DiskError, State, StoreError, Usage};
pub use warm::warm;

use self::admit::{Victims, admit};
use self::blob::Open;
use self::containerd::ContentStore;
use self::disk::{Disk, Shelf};
use self::index::{Begin, Handle, Index};
use self::journal::{Contents, Journal, Line};
use self::space::Limits;
use self::writer::Claim;
use crate::config;
use crate::metrics::{Metrics, ReasonLabels, Source};

/// The store of one data directory. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    disk: Disk,
    settings: config::Store,
    metrics: Arc<Metrics>,
    content: ContentStore,
    /// Set once the directory is ours; before that the index is empty and stays so.
    mount: OnceLock<Mount>,
    state: Mutex<State>,
    index: Mutex<Index>,
    /// A slot changed: for those who wait for one.
    changed: Notify,
    /// A blob that others were told of could not be given.
    lost: Notify,
    /// Something for `run` to do.
    work: Notify,
    /// Something for `run` to hash.
    hashing: Notify,
    stopping: AtomicBool,
    gets: AtomicU64,
}

struct Mount {
    _lock: File,
    /// Locked before the index where both are, never after.
    journal: Mutex<Journal>,
}

/// The guard of a mutex. Every critical section here leaves whole data, also where it panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the store in `dir`. Disk trouble is a `State`, and `run` tries again.
    ///
    /// `content_store` is containerd's `…/io.containerd.content.v1.content/blobs/sha256`.
    pub async fn open(
        dir: PathBuf,
        settings: &config::Store,
        content_store: Option<PathBuf>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let shared = Arc::new(Shared {
            disk: Disk::new(dir),
            settings: settings.clone(),
            content: ContentStore::new(content_store, metrics.clone()),
            metrics,
            mount: OnceLock::new(),
            state: Mutex::new(State::Unavailable { reason: "it was not opened yet".to_owned() }),
            index: Mutex::new(Index::default()),
            changed: Notify::new(),
            lost: Notify::new(),
            work: Notify::new(),
            hashing: Notify::new(),
            stopping: AtomicBool::new(false),
            gets: AtomicU64::new(0),
        });
        let opening = Arc::clone(&shared);
        if let Err(error) = tokio::task::spawn_blocking(move || upkeep::pass(&opening)).await {
            warn!(%error, "opening the store ended early");
        }
        Self { shared }
    }

    /// Whether it takes new blobs, and if not, why.
    pub fn state(&self) -> State {
        lock(&self.shared.state).clone()
    }

    /// What it holds.
    pub fn usage(&self) -> Usage {
        let index = lock(&self.shared.index);
        Usage {
            bytes: index.bytes(),
            limit_bytes: index.limit_bytes,
            blobs: index.blobs().count(),
            ingests: index.ingests(),
            pinned_bytes: index.pinned_bytes(),
        }
    }

    /// A complete verified blob. Eviction spares it while the handle lives, and it counts as used
    /// now. One call in `store.verify_one_in` has a piece of it re-hashed in the background.
    pub fn get(&self, digest: &Digest) -> Option<Blob> {
        let blob = self.shared.open_blob(digest)?;
        let mut index = lock(&self.shared.index);
        if let Some(entry) = index.blob(digest) {
            entry.used = SystemTime::now();
        }
        if self.shared.is_sample() && index.ask_scrub(digest) {
            self.shared.hashing.notify_one();
        }
        Some(blob)
    }

    /// A blob in containerd's content store. Its first use waits until it was hashed, which goes on
    /// when the caller gives up; a blob that is not what its name says is never given out.
    pub async fn get_from_containerd(&self, digest: &Digest) -> Option<Blob> {
        self.shared.content.get(digest).await
    }

    /// As `get`, off the async threads: a disk that hangs in an open must not hold them up, or no
    /// deadline of theirs would fire.
    pub async fn look_up(&self, digest: &Digest) -> Option<Blob> {
        // Most that is asked for is not here, which memory knows: a thread for each would be a waste.
        if !self.holds(digest) {
            return None;
        }
        let (store, digest) = (self.clone(), *digest);
        tokio::task::spawn_blocking(move || store.get(&digest)).await.ok().flatten()
    }

    /// Whether an ingest of so many bytes could succeed at all: asked before the origin is.
    pub fn may_take(&self, size: u64) -> Result<(), StoreError> {
        match self.state() {
            State::Ok | State::Full { .. } => {}
            state => return Err(StoreError::Unavailable { reason: state.to_string() }),
        }
        let limit = lock(&self.shared.index).limit_bytes;
        if size > limit { Err(StoreError::TooLarge { size, limit }) } else { Ok(()) }
    }

    /// Whether a complete blob is here, as far as memory knows.
    pub fn holds(&self, digest: &Digest) -> bool {
        lock(&self.shared.index).blob(digest).is_some()
    }

    /// Whether containerd's content store lists a blob: then nobody on this node will ask for it.
    pub async fn contains_in_containerd(&self, digest: &Digest) -> bool {
        self.shared.content.lists(digest).await
    }

    /// Stores small content that is here as a whole. Verified like any other.
    pub async fn put(&self, digest: &Digest, content: Bytes) -> Result<Blob, StoreError> {
        let size = u64::try_from(content.len()).unwrap_or(u64::MAX);
        match self.ingest(digest, size).await {
            Ok(ingest) => {
                ingest.write(0, content).await?;
                ingest.finish().await
            }
            Err(StoreError::Present(digest)) => self.get(&digest).ok_or(StoreError::Present(digest)),
            Err(error) => Err(error),
        }
    }

    /// Starts the only ingest of a digest, or goes on with a parked one. Makes room by eviction.
    ///
    /// One whose `Ingest` was just dropped still writes and hashes what was queued: this waits for it.
    /// After a restart of the agent this waits until what is there was hashed (`run` does it ahead).
    pub async fn ingest(&self, digest: &Digest, size: u64) -> Result<Ingest, StoreError> {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed, also one before the wait below.
            changed.as_mut().enable();
            let (shared, digest) = (Arc::clone(&self.shared), *digest);
            let begun = tokio::task::spawn_blocking(move || shared.begin(&digest, size)).await;
            let stopped = |error: tokio::task::JoinError| StoreError::Unavailable { reason: error.to_string() };
            match begun.map_err(stopped)?? {
                Some(ingest) => return Ok(ingest),
                None => changed.await,
            }
        }
    }

    /// Drops a blob that was found corrupt. Handles that are open stay open.
    pub fn forget(&self, digest: &Digest) {
        self.shared.drop_corrupt(digest, "somebody who read it");
    }

    /// The background: free space, eviction, syncing, re-hashing, and recovery. Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        upkeep::run(&self.shared, stop).await;
    }
}

impl Shared {
    /// Changes the index, and lets everybody know.
    fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        let mut index = lock(&self.index);
        let result = change(&mut index);
        self.measure(&index);
        drop(index);
        self.changed.notify_waiters();
        result
    }

    /// Brings the gauges up to date.
    fn measure(&self, index: &Index) {
        let gauge = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.metrics.store_bytes.set(gauge(index.bytes()));
        self.metrics.store_pinned_bytes.set(gauge(index.pinned_bytes()));
    }

    /// Makes room and takes the slot. Whoever only has to wait changed nothing, and wakes nobody: not
    /// even itself.
    fn admit(
        &self,
        digest: &Digest,
        size: u64,
        limits: &Limits,
        handle: &Arc<Handle>,
    ) -> Result<(Begin, Victims), StoreError> {
        let mut index = lock(&self.index);
        let admitted = admit(&mut index, digest, size, limits, handle)?;
        self.measure(&index);
        drop(index);
        if !matches!(admitted.0, Begin::Wait) {
            self.changed.notify_waiters();
        }
        Ok(admitted)
    }

    /// The handle of a blob that is here, without counting as a use of it.
    fn open_blob(self: &Arc<Self>, digest: &Digest) -> Option<Blob> {
        let size = {
            let mut index = lock(&self.index);
            let entry = index.blob(digest)?;
            if let Some(open) = entry.open.upgrade() {
                return Some(Blob(open));
            }
            entry.size
        };
        let path = self.disk.data(Shelf::Blobs, digest);
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((len, file)) if len == size => Some(self.share(digest, size, file)),
            Ok(_) => {
                self.drop_corrupt(digest, "its size");
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                warn!(%digest, "a stored blob was deleted by somebody else");
                self.drop_blob(digest);
                None
            }
            Err(error) => {
                warn!(%digest, %error, "cannot open a stored blob");
                None
            }
        }
    }

    /// One handle for all who read a blob at the same time.
    fn share(&self, digest: &Digest, size: u64, file: File) -> Blob {
        let open = Arc::new(Open { digest: *digest, size, file: Arc::new(file), source: Source::Cache });
        match lock(&self.index).blob(digest) {
            Some(entry) => match entry.open.upgrade() {
                Some(other) => Blob(other),
                None => {
                    entry.open = Arc::downgrade(&open);
                    Blob(open)
                }
            },
            // Evicted meanwhile; what was opened is whole all the same.
            None => Blob(open),
        }
    }

    /// Whether this read is one whose blob gets a piece re-hashed.
    fn is_sample(&self) -> bool {
        let every = u64::from(self.settings.verify_one_in);
        every > 0 && self.gets.fetch_add(1, Ordering::Relaxed) % every == every - 1
    }

    /// The blocking part of `Store::ingest`; `None` to be called again after a change.
    fn begin(self: &Arc<Self>, digest: &Digest, size: u64) -> Result<Option<Ingest>, StoreError> {
        match &*lock(&self.state) {
            State::Ok | State::Full { .. } => {}
            state => return Err(StoreError::Unavailable { reason: state.to_string() }),
        }
        let limits = Limits::of(&self.settings, self.disk.free()?);
        if size > limits.most() {
            return Err(StoreError::TooLarge { size, limit: limits.most() });
        }
        if self.mount.get().is_none() {
            let reason = "its directory is not ours yet".to_owned();
            return Err(StoreError::Unavailable { reason });
        }
        let handle = Arc::new(Handle);
        let (begun, victims) = self.admit(digest, size, &limits, &handle)?;
        self.evict(&victims, "ingest");
        let claim = || Claim::new(Arc::clone(self), *digest, size);
        match begun {
            Begin::Fresh => writer::start(claim(), true, None, handle).map(Some),
            Begin::Resumed(known) => writer::start(claim(), false, known, handle).map(Some),
            Begin::Wait => Ok(None),
            Begin::Replace => {
                self.remove(Shelf::Ingest, &[*digest]);
                Ok(None)
            }
        }
    }

    /// Removes what `Index::leave` has marked, wherever it is.
    fn evict(&self, victims: &[(Shelf, Digest)], reason: &'static str) {
        for (shelf, digest) in victims {
            let pinned = *shelf == Shelf::Blobs && lock(&self.index).pins().until(digest).is_some();
            if pinned {
                warn!(%digest, reason, "evicted a pinned blob: others use so much of the disk that pins have to give way");
            } else {
                info!(%digest, reason, ?shelf, "evicted");
            }
            self.remove(*shelf, &[*digest]);
            self.metrics.store_evictions.get_or_create(&ReasonLabels { reason }).inc();
        }
    }

    /// Removes the files of slots that are leaving, then the slots.
    fn remove(&self, shelf: Shelf, digests: &[Digest]) {
        for digest in digests {
            if shelf == Shelf::Blobs {
                self.append(&Line::Gone(*digest));
            }
            if let Err(error) = self.disk.remove(shelf, digest) {
                warn!(%digest, error = error.reason(), "cannot remove a blob");
                self.trouble(&error);
            }
            self.change(|index| index.take(digest));
        }
    }

    /// Drops a blob whose bytes are wrong.
    fn drop_corrupt(self: &Arc<Self>, digest: &Digest, found_by: &str) {
        if self.drop_blob(digest) {
            warn!(%digest, found_by, "dropped a corrupt blob");
            self.metrics.store_corruptions.inc();
        }
    }

    /// Drops a blob: nobody gets it from now on. Its files go off the async threads, since
    /// unlinking gigabytes takes a while. Whether it was here.
    fn drop_blob(self: &Arc<Self>, digest: &Digest) -> bool {
        let was_here = self.change(|index| {
            let was_here = index.blob(digest).is_some();
            if was_here {
                index.leave(digest);
            }
            was_here
        });
        if was_here {
            let (shared, digest) = (Arc::clone(self), *digest);
            let remove = move || shared.remove(Shelf::Blobs, &[digest]);
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(remove)),
                Err(_) => remove(),
            }
        }
        was_here
    }

    /// Adds a line to the journal: one write to the page cache.
    fn append(&self, line: &Line) {
        if let Some(mount) = self.mount.get() {
            lock(&mount.journal).append(line);
        }
    }

    /// See `Journal::settle`. A journal that lost lines is written anew.
    fn settle_journal(&self) -> Result<(), DiskError> {
        let Some(mount) = self.mount.get() else { return Ok(()) };
        let mut journal = lock(&mount.journal);
        journal.settle().or_else(|_| journal.rewrite(&self.contents()))
    }

    /// What the journal should say.
    fn contents(&self) -> Contents {
        let index = lock(&self.index);
        let durable = index.blobs().filter(|(_, entry)| entry.durable);
        Contents {
            blobs: durable.map(|(digest, entry)| (*digest, entry.size)).collect(),
            pins: index.pins().images().clone(),
        }
    }

    /// Takes a failed file operation into the state, and has it looked at soon.
    fn trouble(&self, error: &DiskError) {
        self.trouble_seen(error);
        self.work.notify_one();
    }

    /// The same by `upkeep`, which looks again by itself.
    fn trouble_seen(&self, error: &DiskError) {
        match error.source.kind() {
            // Stopped: nothing is wrong with the disk.
            io::ErrorKind::Interrupted => {}
            _ if error.is_full() => self.set_state(self.full()),
            _ if error.is_read_only() => self.set_state(State::ReadOnly { reason: error.reason() }),
            _ => self.set_state(State::Unavailable { reason: error.reason() }),
        }
    }

    fn full(&self) -> State {
        let limits = self.disk.free().map(|free| Limits::of(&self.settings, free));
        limits.map_or(State::Full { free_bytes: 0, min_free_bytes: 0 }, |limits| limits.full())
    }

    /// Sets the state; a change of kind is logged once.
    fn set_state(&self, new: State) {
        let mut state = lock(&self.state);
        if std::mem::discriminant(&*state) != std::mem::discriminant(&new) {
            match new {
                State::Ok => info!(dir = %self.disk.dir().display(), "the store takes blobs"),
                _ => warn!(dir = %self.disk.dir().display(), state = %new, "the store takes no new blobs"),
            }
        }
        *state = new;
    }
}

/// A number that nobody can foresee, below `bound`.
fn random_below(bound: u64, salt: u64) -> u64 {
    RandomState::new().hash_one(salt) % bound.max(1)
}
