//! Own copies of what only containerd has. A seed keeps what others pulled, and containerd collects its
//! garbage without a word to it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use darter_core::Digest;
use darter_core::range::Span;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::super::{Shared, Store, StoreError, lock};
use crate::log::chain;

/// Blobs that wait. Past it the next word about a blob asks for it again.
const QUEUE_MAX: usize = 1024;
/// One read: what the writer takes at a time.
const STEP: u64 = 512 * 1024;

/// What is to be copied, one after the other.
#[derive(Debug, Default)]
pub(in crate::store) struct Copies {
    queue: Mutex<VecDeque<Digest>>,
    more: Notify,
}

impl Copies {
    pub(in crate::store) fn ask(&self, digest: &Digest) {
        let mut queue = lock(&self.queue);
        if queue.len() < QUEUE_MAX && !queue.contains(digest) {
            queue.push_back(*digest);
            self.more.notify_one();
        }
    }

    fn next(&self) -> Option<Digest> {
        lock(&self.queue).pop_front()
    }
}

/// Makes the copies that are asked for, until `stop`.
pub(in crate::store) async fn run(shared: &Arc<Shared>, stop: &CancellationToken) {
    let (store, copies) = (Store { shared: Arc::clone(shared) }, &shared.content.copies);
    let all = async {
        loop {
            match copies.next() {
                Some(digest) => copy_one(&store, &digest).await,
                None => copies.more.notified().await,
            }
        }
    };
    stop.run_until_cancelled(all).await;
}

async fn copy_one(store: &Store, digest: &Digest) {
    match copy(store, digest).await {
        Ok(Some(bytes)) => info!(%digest, bytes, "made a copy of a blob of containerd that others pulled"),
        Ok(None) => {}
        Err(error) => debug!(%digest, error = %chain(&error), "cannot copy a blob of containerd"),
    }
}

/// Its size. `None`: there is nothing to copy any more.
async fn copy(store: &Store, digest: &Digest) -> Result<Option<u64>, StoreError> {
    if store.holds(digest) {
        return Ok(None);
    }
    let Some(blob) = store.get_from_containerd(digest).await else { return Ok(None) };
    let ingest = store.ingest(digest, blob.size()).await?;
    while let Some(missing) = ingest.next_missing(0) {
        let part = Span { start: missing.start, end: missing.end.min(missing.start + STEP) };
        // It ends where it cannot be read, and is parked.
        let Ok(bytes) = blob.read(part).await else { return Ok(None) };
        ingest.write(part.start, bytes).await?;
    }
    ingest.finish().await.map(|copied| Some(copied.size()))
}
