//! Whether the disk answers: what has to be so before containerd is sent here.
//!
//! A disk that is full or read-only says so at once: blobs that are here are given, all others are a
//! quick 404. One that hangs costs every blob of a pull our own deadlines, and one that cannot be used
//! at all makes us no mirror; from both containerd is better kept away.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::timeout;

use super::state::DiskError;
use super::{Blob, Shared, Store, lock};

/// What is read of a blob: a page.
const PAGE: u64 = 4096;

/// Why the store is of no use to containerd now.
#[derive(Debug, thiserror::Error)]
pub enum Unwell {
    /// An operation on the disk goes on and on.
    #[error("the store's disk does not answer within {0:?} (mirror.answer_within)")]
    Hung(Duration),
    /// It was never opened.
    #[error("the store is {0}")]
    NotOpen(super::State),
    /// Not even a small file can be kept.
    #[error("the store can keep nothing")]
    Disk(#[from] DiskError),
    /// A bug, or the end of the agent.
    #[error("the store's disk could not be looked at")]
    Ended(#[from] JoinError),
}

/// Looks at the disk again and again, one look at a time: a disk that hangs holds one thread of these,
/// not one more every ten seconds.
#[derive(Default)]
pub struct Checkup {
    pub(super) running: Option<JoinHandle<Result<(), Unwell>>>,
}

impl Checkup {
    /// Writes a small file, and reads a page of some blob from the disk itself.
    pub async fn look(&mut self, store: &Store, within: Duration) -> Result<(), Unwell> {
        let looked = async {
            if let Some(late) = &mut self.running {
                // What it found is how the disk was then.
                let _ = late.await;
                self.running = None;
            }
            let shared = Arc::clone(&store.shared);
            let found = self.running.insert(tokio::task::spawn_blocking(move || look(&shared))).await;
            self.running = None;
            found?
        };
        timeout(within, looked).await.unwrap_or(Err(Unwell::Hung(within)))
    }
}

fn look(shared: &Arc<Shared>) -> Result<(), Unwell> {
    if shared.mount.get().is_none() {
        return Err(Unwell::NotOpen(lock(&shared.state).clone()));
    }
    match shared.disk.probe() {
        Err(error) if !error.is_full() && !error.is_read_only() => {
            // Not begun with, a blob is a quick 404; begun with, it could not be kept, and its client be cut off.
            shared.trouble(&error);
            return Err(error.into());
        }
        _ => {}
    }
    let dice = RandomState::new().build_hasher().finish();
    if let Some(blob) = some_blob(shared, dice)
        && let Err(error) = read_a_page(&blob, dice)
    {
        // Of one blob, and the disk answered: nobody else gets it.
        shared.drop_corrupt(blob.digest(), &format!("the self-test: {error}"));
    }
    Ok(())
}

/// Any of the complete blobs, as a hit would find it, but not counted as a use of it.
fn some_blob(shared: &Arc<Shared>, dice: u64) -> Option<Blob> {
    let digest = {
        let index = lock(&shared.index);
        let count = index.blobs().count();
        let nth = usize::try_from(dice % u64::try_from(count.max(1)).ok()?).ok()?;
        *index.blobs().nth(nth)?.0
    };
    shared.open_blob(&digest)
}

/// Reads a page that the page cache does not have, unless somebody reads it just now.
fn read_a_page(blob: &Blob, dice: u64) -> std::io::Result<()> {
    let pages = blob.size().div_ceil(PAGE);
    if pages == 0 {
        return Ok(());
    }
    let start = dice % pages * PAGE;
    let len = usize::try_from(PAGE.min(blob.size() - start)).unwrap_or_default();
    let page = std::num::NonZeroU64::new(PAGE);
    // A file system that cannot forget is read from memory: then that is what a hit is read from too.
    let _ = fadvise(&**blob.file(), start, page, Advice::DontNeed);
    blob.file().read_exact_at(&mut vec![0; len], start)
}
