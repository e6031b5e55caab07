//! What an earlier life of the agent left on the disk, read at start without hashing any of it.
//!
//! A blob that the journal names was synced: its size is enough. Any other becomes an ingest again,
//! whose record is then checked against its bytes in the background. Files that do not have our
//! names are not ours and stay.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use darter_core::Digest;
use darter_core::pieces::Layout;
use tracing::{info, warn};

use super::Shared;
use super::disk::{Name, Shelf};
use super::doubt::Standing;
use super::index::{Entry, Phase, SLOTS_MAX, Slot};
use super::journal::Contents;
use super::record::{Claim, Record};
use super::state::DiskError;
use super::writer::closed;

/// Fills the empty index from the disk.
pub(super) fn scan(shared: &Shared, known: &Contents) -> Result<(), DiskError> {
    shared.change(|index| index.load_pins(known.pins.iter().map(|(image, pin)| (image.clone(), pin.clone()))));
    let blobs = list(shared, Shelf::Blobs)?;
    for digest in &blobs.data {
        look_at_blob(shared, digest, known.blobs.get(digest).copied());
    }
    let ingests = list(shared, Shelf::Ingest)?;
    for digest in &blobs.records {
        if !blobs.data.contains(digest) {
            reunite(shared, digest, &ingests);
        }
    }
    // Listed again: some came back from the blobs.
    let ingests = list(shared, Shelf::Ingest)?;
    for digest in ingests.data.union(&ingests.records) {
        look_at_ingest(shared, digest);
    }
    Ok(())
}

#[derive(Default)]
struct Listing {
    data: HashSet<Digest>,
    records: HashSet<Digest>,
}

fn list(shared: &Shared, shelf: Shelf) -> Result<Listing, DiskError> {
    let path = shared.disk.shelf(shelf);
    let mut listing = Listing::default();
    let mut foreign = 0_u32;
    for entry in fs::read_dir(&path).map_err(DiskError::on("list", &path))? {
        let entry = entry.map_err(DiskError::on("list", &path))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        let full = listing.data.len() >= SLOTS_MAX;
        match entry.file_name().to_str().and_then(Name::parse) {
            Some(Name::Data(digest)) if is_file && !full => drop(listing.data.insert(digest)),
            Some(Name::Record(digest)) if is_file && !full => drop(listing.records.insert(digest)),
            _ => foreign += 1,
        }
    }
    if foreign > 0 {
        warn!(dir = %path.display(), foreign, "ignored files that are not of the store");
    }
    Ok(listing)
}

fn look_at_blob(shared: &Shared, digest: &Digest, size: Option<u64>) {
    let path = shared.disk.data(Shelf::Blobs, digest);
    let metadata = match fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) => return warn!(%digest, %error, "cannot look at a stored blob"),
    };
    match size {
        Some(size) if size == metadata.len() => {
            let used = used(&metadata);
            let entry =
                Entry { size, used, used_on_disk: used, durable: true, open: closed(), standing: Standing::default() };
            shared.change(|index| index.put(*digest, Slot::Blob(entry)));
        }
        Some(size) => {
            warn!(%digest, size, found = metadata.len(), "dropped a blob of the wrong size");
            shared.metrics.store_corruptions.inc();
            remove(shared, Shelf::Blobs, digest);
        }
        None => demote(shared, digest, metadata.len()),
    }
}

/// A blob that nothing vouches for: an ingest whose record claims every piece.
fn demote(shared: &Shared, digest: &Digest, size: u64) {
    info!(%digest, "a blob was not synced before the agent ended; it will be hashed");
    let demoted = shared.disk.demote(digest).and_then(|()| {
        let path = shared.disk.record(Shelf::Ingest, digest);
        match Record::open(&path, true) {
            Ok(record) if record.size() == size => Ok(()),
            _ => claim_all(&path, size).map_err(DiskError::on("write", &path)),
        }
    });
    if let Err(error) = demoted {
        warn!(%digest, error = error.reason(), "cannot take a blob back");
    }
}

fn claim_all(path: &std::path::Path, size: u64) -> std::io::Result<()> {
    let record = Record::create(path, size)?;
    (0..Layout::new(size).pieces()).try_for_each(|index| record.set(index, Claim::Unvouched))
}

/// A record whose blob is not beside it: the agent ended between the two renames of a promotion.
fn reunite(shared: &Shared, digest: &Digest, ingests: &Listing) {
    let record = shared.disk.record(Shelf::Blobs, digest);
    if ingests.data.contains(digest) && !ingests.records.contains(digest) {
        if let Err(error) = fs::rename(&record, shared.disk.record(Shelf::Ingest, digest)) {
            warn!(%digest, %error, "cannot put a record back");
        }
    } else {
        remove(shared, Shelf::Blobs, digest);
    }
}

fn look_at_ingest(shared: &Shared, digest: &Digest) {
    let record = Record::open(&shared.disk.record(Shelf::Ingest, digest), false);
    let metadata = fs::symlink_metadata(shared.disk.data(Shelf::Ingest, digest));
    let free = shared.disk.free().map_or(u64::MAX, |free| free.total);
    match (record, metadata) {
        (Ok(record), Ok(metadata)) if record.size() <= free && !is_blob(shared, digest) => {
            let size = record.size();
            // In blocks of 512 bytes, whatever the file system has.
            let allocated = metadata.blocks().saturating_mul(512) >= size;
            let phase = Phase::Parked(None);
            let slot = Slot::Ingest { size, touched: used(&metadata), allocated, phase };
            shared.change(|index| {
                index.put(*digest, slot);
                index.to_verify.push_back(*digest);
            });
        }
        _ => {
            info!(%digest, "removed an ingest that cannot be resumed");
            remove(shared, Shelf::Ingest, digest);
        }
    }
}

fn is_blob(shared: &Shared, digest: &Digest) -> bool {
    super::lock(&shared.index).blob(digest).is_some()
}

fn remove(shared: &Shared, shelf: Shelf, digest: &Digest) {
    if let Err(error) = shared.disk.remove(shelf, digest) {
        warn!(%digest, error = error.reason(), "cannot remove a file of the store");
    }
}

/// When a file was last used: `upkeep` writes it to the modification time.
fn used(metadata: &Metadata) -> SystemTime {
    metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)
}
