//! The background of what other nodes may have of containerd's blobs: found, hashed before anybody asks, and
//! taken back when they go.
//!
//! Two loops that end together: one looks which blobs there are, the other hashes, for hours perhaps, those
//! that only containerd has. inotify says at once that containerd commits or collects one; the timer is for
//! what it misses, such as a disk that is mounted later. Not here: who is told of it (`swarm`).

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use darter_core::Digest;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::super::{Shared, State, lock};
use super::file::{self, Identity};
use super::verdicts::Urgency;
use crate::watch::Watch;

/// How often it is looked at without a sign.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// containerd makes its content store with the first blob: from its root directory on it is seen to come.
const DIRS: usize = 4;
/// After a sign: containerd sets the times of a blob just after it gave it its name, and commits several.
const REST: Duration = Duration::from_millis(250);
/// A blob that could not be read, or whose hashes could not be kept, is tried again after this: what is
/// wrong with a disk must not cost a read of all of it every ten seconds.
const AGAIN: Duration = Duration::from_secs(3600);

/// Both loops, for one store.
pub(in crate::store) struct Ahead {
    shared: Arc<Shared>,
    dir: PathBuf,
    /// What is to be hashed, the next one last.
    queue: Mutex<Vec<(Digest, Identity)>>,
    more: Notify,
    /// What was tried in vain, and when.
    failed: Mutex<HashMap<Digest, (Identity, Instant)>>,
}

impl Ahead {
    /// `None`: there is no content store.
    pub(in crate::store) fn new(shared: &Arc<Shared>) -> Option<Self> {
        let dir = shared.content.dir.clone()?;
        Some(Self {
            shared: Arc::clone(shared),
            dir,
            queue: Mutex::default(),
            more: Notify::new(),
            failed: Mutex::default(),
        })
    }

    /// Until `stop`.
    pub(in crate::store) async fn run(&self, stop: &CancellationToken) {
        tokio::join!(self.look_after(stop), self.hash(stop));
    }

    async fn look_after(&self, stop: &CancellationToken) {
        let mut watch = Watch::new().inspect_err(|error| debug!(%error, "no inotify: the timer does")).ok();
        let dirs: Vec<PathBuf> = self.dir.ancestors().take(DIRS).map(Path::to_owned).collect();
        loop {
            if let Some(watch) = &mut watch {
                watch.cover(&dirs);
            }
            self.look().await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = changed(&mut watch) => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(REST) => {}
            }
        }
    }

    async fn hash(&self, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            if !self.hash_one().await {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.more.notified() => {}
                }
            }
        }
    }

    /// One look at which blobs there are: what is gone is no offer any more, and what is new is queued.
    pub(in crate::store) async fn look(&self) {
        let content = &self.shared.content;
        let (dir, verdicts) = (self.dir.clone(), Arc::clone(&content.verdicts));
        let listing = move || {
            let listed = file::list(&dir);
            if let (Ok(there), Some(hashes)) = (&listed, verdicts.hashes()) {
                hashes.sweep(there);
            }
            listed
        };
        let there = match tokio::task::spawn_blocking(listing).await {
            Ok(Ok(there)) => there,
            // containerd makes it with the first blob; or its disk is not mounted yet, and what is known of
            // its blobs is still of use.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => HashMap::new(),
            Ok(Err(error)) => {
                return warn!(dir = %self.dir.display(), %error, "cannot list containerd's content store");
            }
            // The agent ends.
            Err(_) => return,
        };
        self.shared.change_offers(|offers| offers.retain(|digest, identity| there.get(digest) == Some(identity)));
        if content.is_for_others.load(Ordering::Relaxed) && self.can_keep_hashes() {
            self.queue_what_is_new(&there);
        }
    }

    /// Without them nothing can be offered. The directory is not ours before the store is open.
    fn can_keep_hashes(&self) -> bool {
        let can_write = matches!(*lock(&self.shared.state), State::Ok | State::Full { .. });
        can_write && self.shared.content.verdicts.hashes().is_some()
    }

    fn queue_what_is_new(&self, there: &HashMap<Digest, Identity>) {
        let mut failed = lock(&self.failed);
        failed.retain(|digest, (identity, at)| there.get(digest) == Some(identity) && at.elapsed() < AGAIN);
        let offers = lock(&self.shared.content.offers);
        let is_new = |digest: &Digest| !offers.contains_key(digest) && !failed.contains_key(digest);
        // An empty one has no pieces.
        let new = there.iter().filter(|(digest, identity)| identity.size > 0 && is_new(digest));
        let mut queue: Vec<_> = new.map(|(digest, identity)| (*digest, *identity)).collect();
        // What was pulled last is what others pull next.
        queue.sort_unstable_by_key(|(digest, identity)| (identity.modified, *digest));
        *lock(&self.queue) = queue;
        self.more.notify_one();
    }

    /// Hashes one blob that only containerd has, one at a time. Whether there was one to look at.
    pub(in crate::store) async fn hash_one(&self) -> bool {
        let Some((digest, identity)) = lock(&self.queue).pop() else { return false };
        if lock(&self.shared.index).blob(&digest).is_some() {
            return true;
        }
        match self.may_be_offered(&digest, identity).await {
            Some(true) => self.shared.change_offers(|offers| _ = offers.insert(digest, identity)),
            Some(false) => _ = lock(&self.failed).insert(digest, (identity, Instant::now())),
            None => {}
        }
        true
    }

    /// As if what failed had failed long ago.
    #[cfg(test)]
    pub(in crate::store) fn later(&self) {
        lock(&self.failed).clear();
    }

    /// Whether it is what its name says, and the values of its pieces are kept. `None`: it is gone, or another
    /// file now, which the next look sees.
    async fn may_be_offered(&self, digest: &Digest, identity: Identity) -> Option<bool> {
        let content = &self.shared.content;
        let (file, _) = content.open(digest).await.filter(|(_, opened)| *opened == identity)?;
        let is_right = content.verdicts.is_right(digest, &file, identity, Urgency::Ahead).await;
        if is_right != Some(true) {
            return Some(false);
        }
        let (verdicts, name) = (Arc::clone(&content.verdicts), *digest);
        let is_kept = move || {
            let is_kept = verdicts.hashes().is_some_and(|hashes| hashes.load(&name, &identity).is_some());
            if !is_kept {
                verdicts.forget(&name);
            }
            is_kept
        };
        tokio::task::spawn_blocking(is_kept).await.ok()
    }
}

/// Waits for a sign; without inotify there is none.
async fn changed(watch: &mut Option<Watch>) {
    let Some(some) = watch else { return pending().await };
    if let Err(error) = some.changed().await {
        info!(%error, "inotify ended; the timer does");
        *watch = None;
    }
}

impl Shared {
    /// Changes what other nodes may have of containerd's blobs, and lets everybody know.
    fn change_offers(&self, change: impl FnOnce(&mut std::collections::BTreeMap<Digest, Identity>)) {
        let mut offers = lock(&self.content.offers);
        let before = offers.len();
        change(&mut offers);
        let bytes = offers.values().map(|identity| identity.size).sum::<u64>();
        self.metrics.containerd_offered_blobs.set(i64::try_from(offers.len()).unwrap_or(i64::MAX));
        self.metrics.containerd_offered_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        let is_other = offers.len() != before;
        drop(offers);
        if is_other {
            self.changed.notify_waiters();
        }
    }

    /// What was offered could not be given: nobody shall ask for it any more.
    pub(in crate::store) fn withdraw_offer(&self, digest: &Digest) {
        self.change_offers(|offers| _ = offers.remove(digest));
        self.lost.notify_one();
    }
}
