//! Re-hashing what is stored: disks lie, and a wrong blob must not be served for ever.
//!
//! One piece of a blob now and then is cheap and finds rot sooner or later; `doubt` asks where there is
//! a sign of it. A piece that does not match its record may be the record's fault, so the sha256 of
//! the whole has the last word.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use darter_core::Digest;
use darter_core::pieces::Layout;
use tracing::debug;

use super::blob::Blob;
use super::disk::Shelf;
use super::index::Extent;
use super::record::{Claim, Record};
use super::tally::{file_digest, piece_value};
use super::{Shared, random_below};

/// Re-hashes a blob or one piece of it, and drops the blob if it is wrong. Blocks.
pub(super) fn scrub(shared: &Arc<Shared>, digest: &Digest, extent: Extent) {
    let Some(blob) = shared.open_blob(digest) else { return };
    if extent == Extent::Whole {
        return check_all(shared, &blob);
    }
    let pieces = Layout::new(blob.size()).pieces();
    let index = random_below(pieces, shared.gets.load(Ordering::Relaxed));
    match check_piece(shared, &blob, index) {
        Ok(true) => {}
        Ok(false) => check_all(shared, &blob),
        Err(error) => {
            debug!(%digest, %error, "cannot read a piece of a blob");
            shared.drop_corrupt(digest, "an unreadable piece");
        }
    }
}

/// Whether a piece is what its record says.
pub(super) fn check_piece(shared: &Shared, blob: &Blob, index: u64) -> io::Result<bool> {
    let layout = Layout::new(blob.size());
    if index >= layout.pieces() {
        return Ok(true);
    }
    let value = piece_value(blob.file(), layout.piece(index))?;
    let record = Record::open(&shared.disk.record(Shelf::Blobs, blob.digest()), false);
    let claimed = record.ok().filter(|record| record.size() == blob.size()).map(|record| record.claim(index));
    Ok(claimed == Some(Claim::Here(value)))
}

fn check_all(shared: &Arc<Shared>, blob: &Blob) {
    match file_digest(blob.file(), blob.size(), &shared.stopping) {
        Ok(digest) if digest == *blob.digest() => {
            debug!(%digest, "a pieces record was wrong; it is written anew");
            if let Err(error) = rebuild(shared, blob) {
                debug!(%digest, %error, "cannot write a pieces record");
            }
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
        _ => shared.drop_corrupt(blob.digest(), "a re-hash"),
    }
}

fn rebuild(shared: &Shared, blob: &Blob) -> io::Result<()> {
    let record = Record::create(&shared.disk.record(Shelf::Blobs, blob.digest()), blob.size())?;
    let layout = Layout::new(blob.size());
    let file: &File = blob.file();
    (0..layout.pieces()).try_for_each(|index| record.set(index, Claim::Here(piece_value(file, layout.piece(index))?)))
}
