//! The store's background: what no reader should wait for.
//!
//! Loops that end together. One looks after the disk: room, recovery, syncing, the journal. One hashes:
//! ingests of an earlier life, and samples of blobs; it may take minutes for one. Two follow what containerd
//! keeps.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use darter_core::Digest;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::admit::leave_all;
use super::containerd::{Ahead, copies};
use super::disk::{Disk, Shelf};
use super::journal::{Journal, Line};
use super::record::Record;
use super::space::Limits;
use super::state::{DiskError, State};
use super::{Mount, Shared, lock, scan, scrub, writer};

/// How often free space is looked at: other programs fill the disk without telling us, and the
/// kubelet looks every 10 s.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often a store in trouble is tried: the agent that holds the lock may be just ending.
const RETRY_EVERY: Duration = Duration::from_secs(2);
/// A burst of completed blobs is synced in one go, and trouble that causes itself does not spin.
const REST: Duration = Duration::from_millis(100);

/// Runs until `stop`.
pub(super) async fn run(shared: &Arc<Shared>, stop: CancellationToken) {
    let ending = async {
        stop.cancelled().await;
        // Hashing threads look at this between two pieces.
        shared.stopping.store(true, Ordering::Relaxed);
        shared.content.stop();
    };
    let follow = async {
        if let Some(ahead) = Ahead::new(shared) {
            ahead.run(&stop).await;
        }
    };
    let copies = copies::run(shared, &stop);
    tokio::join!(ending, look_after(shared, &stop), hash(shared, &stop), follow, copies);
    blocking(shared, pass).await;
}

async fn look_after(shared: &Arc<Shared>, stop: &CancellationToken) {
    loop {
        blocking(shared, pass).await;
        shared.hashing.notify_one();
        let wait = if *lock(&shared.state) == State::Ok { LOOK_EVERY } else { RETRY_EVERY };
        tokio::select! {
            () = stop.cancelled() => return,
            () = shared.work.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(REST) => {}
        }
    }
}

async fn hash(shared: &Arc<Shared>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        if !blocking(shared, hash_one).await.unwrap_or(false) {
            tokio::select! {
                () = stop.cancelled() => return,
                () = shared.hashing.notified() => {}
            }
        }
    }
}

async fn blocking<T: Send + 'static>(shared: &Arc<Shared>, work: fn(&Arc<Shared>) -> T) -> Option<T> {
    let shared = Arc::clone(shared);
    match tokio::task::spawn_blocking(move || work(&shared)).await {
        Ok(done) => Some(done),
        Err(error) => {
            warn!(%error, "a pass of the store's upkeep ended early");
            None
        }
    }
}

/// Hashes one thing that waits for it, if any does.
pub(super) fn hash_one(shared: &Arc<Shared>) -> bool {
    let sample = lock(&shared.index).next_scrub();
    if let Some((digest, extent)) = sample {
        scrub::scrub(shared, &digest, extent);
        return true;
    }
    if *lock(&shared.state) != State::Ok {
        return false;
    }
    let ingest = lock(&shared.index).next_to_verify();
    if let Some((digest, size)) = ingest {
        writer::verify_parked(shared, &digest, size);
    }
    ingest.is_some()
}

/// One look at everything. Blocks on the disk.
pub(super) fn pass(shared: &Arc<Shared>) {
    pass_at(shared, SystemTime::now());
}

/// The same as if it were `now`.
pub(super) fn pass_at(shared: &Arc<Shared>, now: SystemTime) {
    if let Err(error) = try_pass(shared, now) {
        shared.trouble_seen(&error);
    }
}

fn try_pass(shared: &Arc<Shared>, now: SystemTime) -> Result<(), DiskError> {
    if shared.mount.get().is_none() {
        mount(shared)?;
    }
    // Not written down: a restart finds out by the same clock.
    for image in shared.change(|index| index.expire_pins(now)) {
        info!(image, "the pin of an image has ended; it can be evicted");
    }
    if *lock(&shared.state) != State::Ok {
        match shared.disk.probe() {
            Err(error) if !error.is_full() => return Err(error),
            // Eviction below may help.
            _ => {}
        }
    }
    let limits = make_room(shared)?;
    let is_full = limits.is_full(&lock(&shared.index));
    if is_full {
        shared.set_state(limits.full());
    } else if *lock(&shared.state) != State::Ok {
        shared.disk.probe()?;
        shared.set_state(State::Ok);
    }
    persist_uses(shared);
    make_durable(shared);
    keep_journal(shared)
}

/// Takes the directory and reads what is in it.
fn mount(shared: &Shared) -> Result<(), DiskError> {
    shared.disk.prepare()?;
    let lock = shared.disk.lock()?;
    let (mut journal, contents) = Journal::open(shared.disk.journal());
    scan::scan(shared, &contents)?;
    // Lines about blobs that are gone must not outlive this start: their digests may come back.
    if let Err(error) = journal.rewrite(&shared.contents()) {
        warn!(error = error.reason(), "cannot write the journal; trying again");
    }
    let index = super::lock(&shared.index);
    info!(dir = %shared.disk.dir().display(), blobs = index.blobs().count(), ingests = index.ingests(),
        bytes = index.bytes(), "opened the store");
    drop(index);
    shared.content.keep_in(shared.disk.containerd());
    let _ = shared.mount.set(Mount { _lock: lock, journal: std::sync::Mutex::new(journal) });
    Ok(())
}

/// Evicts down to the limits.
fn make_room(shared: &Shared) -> Result<Limits, DiskError> {
    let limits = Limits::of(&shared.settings, shared.disk.free()?);
    let (over_limit, over_free) = shared.change(|index| {
        index.pin_limit_bytes = shared.settings.pin_share.of(limits.capacity(index));
        let bound = |cap: u64, index: &mut super::Index| {
            let victims = index
                .victims(index.bytes().saturating_sub(index.leaving_bytes()).saturating_sub(cap), 0)
                .unwrap_or_else(|all| all);
            leave_all(index, victims)
        };
        let by_free = limits.by_free(index);
        (bound(limits.limit, index), bound(by_free, index))
    });
    shared.evict(&over_limit, "limit");
    shared.evict(&over_free, "free_space");
    let limits = Limits::of(&shared.settings, shared.disk.free()?);
    let capacity = shared.change(|index| {
        index.limit_bytes = limits.capacity(index);
        index.pin_limit_bytes = shared.settings.pin_share.of(index.limit_bytes);
        index.limit_bytes
    });
    shared.metrics.store_limit_bytes.set(i64::try_from(capacity).unwrap_or(i64::MAX));
    Ok(limits)
}

/// Writes the last use of each blob to its file, for the order of eviction after a restart.
fn persist_uses(shared: &Shared) {
    let used: Vec<(Digest, SystemTime)> = lock(&shared.index)
        .blobs()
        .filter(|(_, entry)| entry.used != entry.used_on_disk)
        .map(|(digest, entry)| (*digest, entry.used))
        .collect();
    for (digest, used) in used {
        // Best effort: without it the order of eviction is a little wrong after a restart.
        if set_modified(&shared.disk.data(Shelf::Blobs, &digest), used).is_ok()
            && let Some(entry) = lock(&shared.index).blob(&digest)
        {
            entry.used_on_disk = used;
        }
    }
}

fn set_modified(path: &Path, time: SystemTime) -> rustix::io::Result<()> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let modified =
        Timespec { tv_sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), tv_nsec: since.subsec_nanos().into() };
    let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: modified };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

/// Syncs blobs that are complete, and then says so in the journal.
fn make_durable(shared: &Arc<Shared>) {
    let waiting: Vec<Digest> =
        lock(&shared.index).blobs().filter(|(_, entry)| !entry.durable).map(|(digest, _)| *digest).collect();
    for digest in waiting {
        // The handle keeps it from eviction meanwhile, and tells it from one that came after it.
        let Some(blob) = shared.open_blob(&digest) else { continue };
        if let Err(error) = sync(shared, &blob) {
            warn!(%digest, error = error.reason(), "cannot sync a blob");
            shared.trouble_seen(&error);
            // The kernel tells a lost page once, and calls it clean afterwards: there is no second try.
            if !error.is_full() && !error.is_read_only() {
                shared.drop_corrupt(&digest, "a failed sync");
            }
            return;
        }
        let marked = lock(&shared.index).blob(&digest).is_some_and(|entry| {
            let same = std::ptr::eq(entry.open.as_ptr(), Arc::as_ptr(&blob.0));
            entry.durable |= same;
            same
        });
        if marked {
            shared.append(&Line::Blob(digest, blob.size()));
        }
    }
}

fn sync(shared: &Shared, blob: &super::Blob) -> Result<(), DiskError> {
    let disk = &shared.disk;
    let data = disk.data(Shelf::Blobs, blob.digest());
    blob.file().sync_all().map_err(DiskError::on("sync", &data))?;
    // A record is checked before it is believed; without one the whole blob is hashed.
    if let Ok(record) = Record::open(&disk.record(Shelf::Blobs, blob.digest()), false) {
        record.sync().map_err(DiskError::on("sync", &data))?;
    }
    Disk::sync_dir(&disk.shelf(Shelf::Blobs))
}

fn keep_journal(shared: &Shared) -> Result<(), DiskError> {
    let Some(mount) = shared.mount.get() else { return Ok(()) };
    let mut journal = lock(&mount.journal);
    let contents = shared.contents();
    if journal.wants_rewrite(contents.blobs.len() + contents.pins.len()) {
        return journal.rewrite(&contents);
    }
    Ok(())
}
