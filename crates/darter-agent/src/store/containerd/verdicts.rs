//! Whether blobs of containerd are what their names say: each is hashed once, whoever asks.
//!
//! Not here: which are hashed before anybody asks (`ahead`).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use darter_core::Digest;
use darter_core::pieces::Layout;
use rustix::fs::{Advice, fadvise};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot, watch};
use tracing::{debug, warn};

use super::super::lock;
use super::super::tally::Whole;
use super::super::warm::is_warm;
use super::file::Identity;
use super::hashes::Hashes;
use crate::metrics::Metrics;

/// Verdicts kept: some 100 bytes each. Past it all are forgotten and found again.
const VERDICTS_MAX: usize = 65_536;
/// Hashed at once for somebody who waits: each takes a core, and the workload was promised the rest.
const HASHING_MAX: usize = 2;
/// The lowest priority that there is.
const LOWEST: i32 = 19;

#[derive(Debug, Clone)]
enum Verdict {
    /// Being hashed; the receiver ends with it.
    Hashing(watch::Receiver<()>),
    /// Whether the file with this identity is what its name says.
    Known(Identity, bool),
}

/// Why a blob is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Somebody on this node waits for it.
    Now,
    /// Others may ask for it: one at a time, while nobody waits, by a thread that gets what is left of the
    /// processors; and the page cache is left as it was.
    Ahead,
}

#[derive(Debug)]
pub(super) struct Verdicts {
    known: Mutex<HashMap<Digest, Verdict>>,
    /// What an earlier life of the agent found out, once the data directory is ours.
    hashes: OnceLock<Hashes>,
    turns: Semaphore,
    /// Blobs that are hashed for somebody who waits.
    urgent: watch::Sender<usize>,
    stopping: AtomicBool,
    metrics: Arc<Metrics>,
    #[cfg(test)]
    pub(super) hashed: std::sync::atomic::AtomicU64,
}

impl Verdicts {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            known: Mutex::default(),
            hashes: OnceLock::new(),
            turns: Semaphore::new(HASHING_MAX),
            urgent: watch::Sender::new(0),
            stopping: AtomicBool::new(false),
            metrics,
            #[cfg(test)]
            hashed: std::sync::atomic::AtomicU64::new(0),
        }
    }

    /// From now on what is found out is kept in this directory.
    pub(super) fn keep_in(&self, dir: PathBuf) {
        self.hashes.get_or_init(|| Hashes::new(dir));
    }

    pub(super) fn hashes(&self) -> Option<&Hashes> {
        self.hashes.get()
    }

    #[cfg(test)]
    pub(super) fn wait_for_one(&self) -> impl Drop + '_ {
        Urgent::begin(&self.urgent)
    }

    #[cfg(test)]
    pub(super) async fn all_turns(&self) -> tokio::sync::SemaphorePermit<'_> {
        self.turns.acquire_many(2).await.unwrap()
    }

    /// Hashing ends soon.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Wakes who waits because somebody waits.
        self.urgent.send_modify(|_| ());
    }

    /// What is known of a blob is not to be believed: it is hashed anew.
    pub(super) fn forget(&self, digest: &Digest) {
        if let Some(hashes) = self.hashes() {
            hashes.remove(digest);
        }
        let mut known = lock(&self.known);
        if let Some(Verdict::Known(..)) = known.get(digest) {
            known.remove(digest);
        }
    }

    /// Whether the open file is what its name says. `None`: that could not be found out.
    pub(super) async fn is_right(
        self: &Arc<Self>,
        digest: &Digest,
        file: &Arc<File>,
        identity: Identity,
        urgency: Urgency,
    ) -> Option<bool> {
        let mut waiting = {
            let mut known = lock(&self.known);
            match known.get(digest) {
                Some(Verdict::Known(seen, is_right)) if *seen == identity => return Some(*is_right),
                Some(Verdict::Hashing(waiting)) => waiting.clone(),
                _ => self.start(&mut known, digest, file, identity, urgency),
            }
        };
        // An error is the end: the sender sends nothing.
        while waiting.changed().await.is_ok() {}
        match lock(&self.known).get(digest) {
            Some(Verdict::Known(seen, is_right)) if *seen == identity => Some(*is_right),
            _ => None,
        }
    }

    /// Has the file hashed in a task of its own: a reader that gives up must not throw away the
    /// seconds that were spent.
    fn start(
        self: &Arc<Self>,
        known: &mut HashMap<Digest, Verdict>,
        digest: &Digest,
        file: &Arc<File>,
        identity: Identity,
        urgency: Urgency,
    ) -> watch::Receiver<()> {
        if known.len() >= VERDICTS_MAX {
            known.retain(|_, verdict| matches!(verdict, Verdict::Hashing(_)));
        }
        let (done, waiting) = watch::channel(());
        known.insert(*digest, Verdict::Hashing(waiting.clone()));
        let (verdicts, digest, file) = (Arc::clone(self), *digest, Arc::clone(file));
        tokio::spawn(async move {
            verdicts.hash(digest, file, identity, urgency).await;
            drop(done);
        });
        waiting
    }

    async fn hash(self: Arc<Self>, digest: Digest, file: Arc<File>, identity: Identity, urgency: Urgency) {
        let (verdicts, runtime) = (Arc::clone(&self), Handle::current());
        let work = move || verdicts.find_out(&digest, &file, identity, urgency, &runtime);
        let found = match urgency {
            Urgency::Now => {
                let _urgent = Urgent::begin(&self.urgent);
                let _turn = self.turns.acquire().await;
                tokio::task::spawn_blocking(work).await.ok()
            }
            Urgency::Ahead => in_background(work).await,
        };
        let verdict = match found {
            Some(Ok(is_right)) => Some(is_right),
            // A short file is a wrong one; any other failure says nothing about it.
            Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Some(false),
            Some(Err(error)) => {
                debug!(%digest, %error, "a blob of containerd was not hashed");
                None
            }
            None => None,
        };
        if verdict == Some(false) {
            warn!(%digest, "a blob in containerd's content store is not what its name says; it is not used");
            self.metrics.containerd_corruptions.inc();
        }
        let mut known = lock(&self.known);
        match verdict {
            Some(is_right) => known.insert(digest, Verdict::Known(identity, is_right)),
            None => known.remove(&digest),
        };
    }

    /// Remembers whether the file is right, or hashes it. Blocks.
    fn find_out(
        &self,
        digest: &Digest,
        file: &File,
        identity: Identity,
        urgency: Urgency,
        runtime: &Handle,
    ) -> io::Result<bool> {
        if self.hashes().is_some_and(|hashes| hashes.load(digest, &identity).is_some()) {
            return Ok(true);
        }
        #[cfg(test)]
        self.hashed.fetch_add(1, Ordering::Relaxed);
        if urgency == Urgency::Ahead {
            // Nothing but what is asked for is to come into the page cache: what follows may not be there yet.
            let _ = fadvise(file, 0, None, Advice::Random);
        }
        let layout = Layout::new(identity.size);
        let mut whole = Whole::new();
        for span in (0..layout.pieces()).map(|index| layout.piece(index)) {
            self.go_on(urgency, runtime)?;
            let was_cached = urgency == Urgency::Now || is_warm(file, span.end - 1);
            whole.read(file, span)?;
            if !was_cached {
                // Best effort, as above.
                let _ = fadvise(file, span.start, NonZeroU64::new(span.len()), Advice::DontNeed);
            }
        }
        // Some of it was read before it was written to, and some after.
        if Identity::of(&file.metadata()?) != Some(identity) {
            return Err(io::Error::other("it changed while it was read"));
        }
        let (found, values) = whole.finish();
        if found != *digest {
            return Ok(false);
        }
        if let Some(Err(error)) = self.hashes().map(|hashes| hashes.save(digest, &identity, &values)) {
            debug!(%digest, %error, "cannot keep the hashes of a blob of containerd");
        }
        Ok(true)
    }

    /// Between two pieces: `Interrupted` once the agent stops, and a wait while others are waited for.
    fn go_on(&self, urgency: Urgency, runtime: &Handle) -> io::Result<()> {
        if urgency == Urgency::Ahead {
            // An error is the end of the agent.
            let may_go_on = |urgent: &usize| *urgent == 0 || self.is_stopping();
            let _ = runtime.block_on(self.urgent.subscribe().wait_for(may_go_on));
        }
        if self.is_stopping() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// One that somebody waits for.
struct Urgent<'a>(&'a watch::Sender<usize>);

impl<'a> Urgent<'a> {
    fn begin(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Does it in a thread of its own, of the lowest priority. A thread of the pool would keep that for
/// whoever has it next.
async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, done) = oneshot::channel();
    let background = move || {
        // Of this thread alone. Where it fails, the work is done all the same.
        let _ = rustix::process::setpriority_process(None, LOWEST);
        let _ = sender.send(work());
    };
    std::thread::Builder::new().name("hash-ahead".to_owned()).spawn(background).ok()?;
    done.await.ok()
}
