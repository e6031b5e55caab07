//! Who gets a slot of the index, and who has to leave for it.

use std::sync::Arc;

use darter_core::Digest;

use super::disk::Shelf;
use super::index::{Begin, Handle, Index, Phase};
use super::space::Limits;
use super::state::StoreError;

/// Where they are, and which.
pub(super) type Victims = Vec<(Shelf, Digest)>;

/// Gives a slot to an ingest, and marks who has to leave for it. `Full` changes nothing, nor does the wait
/// for room that is being made.
pub(super) fn admit(
    index: &mut Index,
    digest: &Digest,
    size: u64,
    limits: &Limits,
    handle: &Arc<Handle>,
) -> Result<(Begin, Victims), StoreError> {
    let begun = index.begin(digest, size, Phase::Running(Arc::downgrade(handle)))?;
    if !matches!(begun, Begin::Fresh) {
        return Ok((begun, Vec::new()));
    }
    let excess = index.bytes().saturating_sub(limits.capacity(index));
    // What leaves for others already need not be made room for twice.
    let lacking = excess.saturating_sub(index.leaving_bytes());
    if excess > 0 && lacking == 0 {
        index.take(digest);
        return Ok((Begin::Wait, Vec::new()));
    }
    match index.victims(lacking, index.excess_slots()) {
        Ok(victims) => Ok((begun, leave_all(index, victims))),
        Err(_) => {
            index.take(digest);
            Err(StoreError::Full { size, source: None })
        }
    }
}

/// Marks them as leaving; the caller removes their files.
pub(super) fn leave_all(index: &mut Index, victims: Vec<Digest>) -> Victims {
    let leave = |digest: Digest| {
        let shelf = if index.blob(&digest).is_some() { Shelf::Blobs } else { Shelf::Ingest };
        index.leave(&digest);
        (shelf, digest)
    };
    victims.into_iter().map(leave).collect()
}
