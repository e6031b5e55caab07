//! One fetch per blob per node, whatever the number of readers.
//!
//! A `Pull` brings one blob here once. Whoever asks meanwhile joins it and trails its ingest; when
//! nobody is left it stops, and what has arrived stays on disk for the next one. `fetch` does the
//! fetching alone, `together` with the other nodes; `account` is what it took, and `reader` what a
//! joiner gets; `provenance` tells where its bytes came from, `standing` what is on its way.

mod account;
mod blame;
mod compare;
mod fetch;
mod provenance;
mod reader;
mod standing;
mod target;
mod together;
mod wanted;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use darter_core::Digest;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::activity::Activity;
use crate::log::chain;
use crate::metrics::{Metrics, PullLabels};
use crate::origin::{Claim, OriginError};
use crate::store::{Blob, IngestReader, Store, StoreError};
use crate::swarm::handle::SwarmHandle;

use account::Account;
use fetch::Job;
use provenance::Provenance;
pub use reader::{Progress, Reader};
pub use standing::OnItsWay;
pub use wanted::{Purpose, Wanted, Whence};

// containerd keeps 3 downloads in flight (max_concurrent_downloads) and a node starts few images
// at once. Past this something is wrong: answer 404 and let containerd go around us.
const RUNNING_MAX: usize = 256;

/// How many times its patience a blob is waited for while others of this node come: a node wishes for more
/// layers than it asks for at a time.
const TURN: u32 = 4;

/// Turns from this on come last.
const LAST: u64 = 1 << 63;

/// Why a blob did not come.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The origin refused, failed or lied.
    #[error("the origin did not give the blob")]
    Origin(#[source] Arc<OriginError>),
    /// The store cannot take it.
    #[error("the store did not take the blob")]
    Store(#[source] Arc<StoreError>),
    /// The origin told no length, and no manifest did.
    #[error("the origin tells no length")]
    NoLength,
    /// The origin's length is not the manifest's.
    #[error("the origin tells {told} bytes, its manifest {wanted}")]
    OtherLength {
        /// What the origin says now.
        told: u64,
        /// What the manifest says.
        wanted: u64,
    },
    /// It was to come from other nodes, and they did not give it.
    #[error("the other nodes did not give the blob")]
    Others,
    /// Nobody wants it any more.
    #[error("nobody wants the blob any more")]
    Abandoned,
    /// The store has the blob and cannot open it.
    #[error("the stored blob cannot be opened")]
    Unreadable,
    /// More pulls than `RUNNING_MAX`.
    #[error("too many pulls at once")]
    Busy,
}

impl PullError {
    /// The outcome label of `darter_pulls_total`.
    const fn outcome(&self) -> &'static str {
        match self {
            Self::Origin(_) => "origin_failed",
            Self::Store(_) => "store_failed",
            Self::NoLength | Self::OtherLength { .. } => "bad_length",
            Self::Others => "others_failed",
            Self::Abandoned => "abandoned",
            Self::Unreadable => "unreadable",
            Self::Busy => "busy",
        }
    }
}

impl From<OriginError> for PullError {
    fn from(error: OriginError) -> Self {
        Self::Origin(Arc::new(error))
    }
}

impl From<StoreError> for PullError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// What a joiner gets.
#[derive(Debug)]
pub enum Joined {
    /// The blob was here.
    Complete(Blob),
    /// The blob is on its way, and its first bytes can be read.
    Running(Reader),
}

/// All pulls of this node. Cheap to clone.
#[derive(Clone)]
pub struct Pulls(Arc<Inner>);

struct Inner {
    store: Store,
    swarm: Option<SwarmHandle>,
    metrics: Arc<Metrics>,
    settings: fetch::Settings,
    linger: Duration,
    running: Mutex<HashMap<Digest, Arc<Pull>>>,
    /// When anything of any pull came last.
    activity: Activity,
    /// Pulls that were ever begun.
    begun: AtomicU64,
    /// One began or ended.
    changes: watch::Sender<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// One pull, as its task and its readers share it.
#[derive(Debug)]
struct Pull {
    state: watch::Sender<State>,
    provenance: Provenance,
    readers: AtomicUsize,
    left: Notify,
    /// When anything of it came last.
    activity: Activity,
    /// Its place at the connections of its registry.
    claim: Claim,
    account: Arc<Account>,
    /// Its size in bytes, where a manifest told it.
    size: Option<u64>,
    /// Nobody came back: it is putting away what has arrived. Set under the lock of `running`.
    ending: AtomicBool,
}

impl Pull {
    /// What it comes by, once it does.
    fn ingest(&self) -> Option<IngestReader> {
        match &*self.state.borrow() {
            State::Coming(ingest) => Some(ingest.clone()),
            _ => None,
        }
    }
}

#[derive(Debug, Clone)]
enum State {
    /// The origin is being asked.
    Asking,
    /// Bytes come.
    Coming(IngestReader),
    /// The whole blob is in the store. What it came by, if it came in this pull: a small one comes before
    /// whoever waits for it has looked.
    Done(Blob, Option<IngestReader>),
    /// It did not come.
    Failed(PullError),
}

impl Pulls {
    /// No pulls yet. They all end when `stop` does.
    pub fn new(
        config: &crate::config::Config,
        store: Store,
        swarm: Option<SwarmHandle>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            store,
            swarm,
            metrics,
            settings: fetch::Settings {
                ranges: config.origin.ranges,
                attempts: config.origin.attempts,
                // A reader that waits in vain for `stall` gives up; before that this node reads alone.
                patience: config.mirror.stall.0 * 3 / 4,
            },
            linger: config.mirror.linger.0,
            running: Mutex::default(),
            activity: Activity::default(),
            begun: AtomicU64::new(0),
            changes: watch::Sender::new(()),
            tasks: TaskTracker::new(),
            stop,
        }))
    }

    /// The other nodes, if there may be any.
    pub fn swarm(&self) -> Option<&SwarmHandle> {
        self.0.swarm.as_ref()
    }

    /// The blob if it is here, else the running pull of it, else a new one. Waits for the first
    /// bytes, so that a failure before them is still an error and not a broken body.
    pub async fn join(&self, wanted: Wanted) -> Result<Joined, PullError> {
        loop {
            match self.join_once(&wanted).await {
                // It ran for another node that goes, without a registry; this one has it.
                Err(PullError::Others) if wanted.whence.is_some() => {}
                joined => return joined,
            }
        }
    }

    async fn join_once(&self, wanted: &Wanted) -> Result<Joined, PullError> {
        let pull = loop {
            match self.enter(wanted)? {
                // It came just now; if it cannot be opened, asking again would not help either.
                Entered::Here => {
                    let blob = self.0.store.look_up(&wanted.digest).await;
                    return blob.map(Joined::Complete).ok_or(PullError::Unreadable);
                }
                Entered::Pull(pull) => break pull,
                // Its ingest is not free before it is put away; then the next pull goes on with it.
                Entered::Ending(mut state) => drop(state.wait_for(State::is_last).await),
            }
        };
        let mut state = pull.0.state.subscribe();
        let ingest = loop {
            match &*state.borrow_and_update() {
                State::Asking => {}
                State::Coming(ingest) | State::Done(_, Some(ingest)) => break ingest.clone(),
                State::Done(blob, None) => return Ok(Joined::Complete(blob.clone())),
                State::Failed(error) => return Err(error.clone()),
            }
            if state.changed().await.is_err() {
                return Err(PullError::Abandoned);
            }
        };
        Reader::wait_for_first_byte(ingest, pull, state).await
    }

    /// Brings a blob here that nobody on this node asks for, from other nodes alone, if there is room for
    /// it that nothing else uses: who has it goes.
    pub async fn take(&self, digest: Digest, size: u64) -> Result<(), PullError> {
        self.0.store.has_room(size)?;
        self.bring(digest, size).await
    }

    /// The same for a copy that is kept for others: what this node used least leaves for it.
    pub async fn keep(&self, digest: Digest, size: u64) -> Result<(), PullError> {
        self.bring(digest, size).await
    }

    async fn bring(&self, digest: Digest, size: u64) -> Result<(), PullError> {
        match self.join(Wanted { digest, size: Some(size), whence: None, purpose: Purpose::Ahead }).await? {
            Joined::Complete(_) => Ok(()),
            Joined::Running(reader) => reader.to_end(self.0.settings.patience).await,
        }
    }

    /// Whether blobs come from other nodes too.
    pub fn have_company(&self) -> bool {
        self.0.swarm.as_ref().is_some_and(|swarm| !swarm.is_alone())
    }

    /// When something of a running pull came last, or of another, whose turn it may be or behind which it
    /// waits for its own, for `most` after its own; at first when it began.
    pub fn came_last(&self, digest: &Digest, most: Duration) -> Option<Instant> {
        lock(&self.0.running).get(digest).map(|pull| pull.activity.last_in_turn(most))
    }

    /// Waits until all pulls have ended after `stop`.
    pub async fn drained(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    fn enter(&self, wanted: &Wanted) -> Result<Entered, PullError> {
        let digest = wanted.digest;
        let mut running = lock(&self.0.running);
        if let Some(pull) = running.get(&digest) {
            let is_ending = pull.ending.load(Ordering::Relaxed);
            let ending = || Entered::Ending(pull.state.subscribe());
            return Ok(if is_ending { ending() } else { Entered::Pull(Interest::new(pull, wanted.purpose)) });
        }
        // Looked up under the lock: a pull that just ended has left the map only after the store
        // had its blob.
        if self.0.store.holds(&digest) {
            return Ok(Entered::Here);
        }
        if running.len() >= RUNNING_MAX {
            return Err(PullError::Busy);
        }
        let begun = self.0.begun.fetch_add(1, Ordering::Relaxed) + 1;
        // What nobody here waits for comes after everything that somebody waits for.
        let turn = if wanted.whence.is_some() { begun } else { begun | LAST };
        let (activity, claim) = self.place(turn);
        let pull = Arc::new(Pull {
            state: watch::Sender::new(State::Asking),
            provenance: Provenance::default(),
            readers: AtomicUsize::new(0),
            left: Notify::new(),
            account: Arc::new(Account::new(activity.clone())),
            size: wanted.size,
            activity,
            claim,
            ending: AtomicBool::new(false),
        });
        let interest = Interest::new(&pull, wanted.purpose);
        running.insert(digest, pull.clone());
        self.0.changes.send_replace(());
        self.0.tasks.spawn(self.clone().run(pull, wanted.clone(), turn));
        Ok(Entered::Pull(interest))
    }

    /// What a pull of this turn waits by, and for which slots.
    fn place(&self, turn: u64) -> (Activity, Claim) {
        // By itself a node asks for each blob at once, which then waits for its turn at its registry alone.
        if self.0.swarm.is_none() {
            let activity = Activity::default();
            return (activity.clone(), Claim::new(turn, activity));
        }
        let activity = Activity::among(&self.0.activity);
        let claim = Claim::new(turn, activity.clone());
        // Other nodes may wait for what this one is to read for all of them.
        claim.begin_to_read();
        (activity, claim)
    }

    async fn run(self, pull: Arc<Pull>, wanted: Wanted, turn: u64) {
        let started = Instant::now();
        let account = pull.account.clone();
        let mut leave = Leave { pulls: &self, pull: &pull, digest: wanted.digest, last: None };
        let ended = async {
            tokio::select! {
                () = self.abandoned(&pull) => {}
                () = self.0.stop.cancelled() => {}
            }
        };
        let job = Job {
            store: self.0.store.clone(),
            metrics: self.0.metrics.clone(),
            settings: self.0.settings,
            wanted: wanted.clone(),
            turn,
            pull: pull.clone(),
            account: account.clone(),
        };
        let outcome = match &self.0.swarm {
            Some(swarm) => together::fetch(&job, swarm, ended).await,
            None => fetch::fetch(&job, None, ended).await,
        };
        self.log(&wanted, &outcome, &account, started.elapsed());
        leave.last = Some(match outcome {
            Ok(blob) => State::Done(blob, pull.ingest()),
            Err(error) => State::Failed(error),
        });
    }

    /// Resolves when nobody has waited for this pull for `mirror.linger`; nobody can join it from then on.
    async fn abandoned(&self, pull: &Pull) {
        loop {
            pull.left.notified().await;
            // Whoever leaves later starts the wait again.
            while tokio::time::timeout(self.0.linger, pull.left.notified()).await.is_ok() {}
            // Who joins does so under this lock.
            let _running = lock(&self.0.running);
            if pull.readers.load(Ordering::Acquire) == 0 {
                pull.ending.store(true, Ordering::Relaxed);
                return;
            }
        }
    }

    /// The one line of a pull: what came, from where, how fast.
    fn log(&self, wanted: &Wanted, outcome: &Result<Blob, PullError>, account: &Account, took: Duration) {
        let label = outcome.as_ref().map_or_else(PullError::outcome, |_| "complete");
        self.0.metrics.pulls.get_or_create(&PullLabels { registry: wanted.label(), outcome: label }).inc();
        let seconds = took.as_secs_f64();
        let (origin_bytes, peer_bytes) = (account.origin_bytes(), account.peer_bytes());
        let resumed_bytes = account.resumed_bytes();
        let first_byte_seconds = account.first_byte().map(|first| first.as_secs_f64());
        let digest = wanted.digest;
        let (registry, repository) = match &wanted.whence {
            Some(Whence { site, repository, .. }) => (site.registry().to_string(), repository.to_string()),
            None => ("none".to_owned(), "none".to_owned()),
        };
        match outcome {
            Ok(blob) => {
                info!(%registry, %repository, %digest, bytes = blob.size(), origin_bytes, peer_bytes, resumed_bytes, seconds,
                first_byte_seconds, "pulled a blob");
            }
            Err(PullError::Abandoned) => {
                info!(%registry, %repository, %digest, origin_bytes, peer_bytes, resumed_bytes, seconds,
                "stopped a pull that nobody waits for; what has arrived is kept");
            }
            Err(error) => {
                warn!(%registry, %repository, %digest, origin_bytes, peer_bytes, resumed_bytes, seconds, first_byte_seconds,
                outcome = label, error = %chain(error), "a pull failed");
            }
        }
        debug!(%digest, retries = account.retries(), "pull ended");
    }
}

/// Takes a pull out of the map, also when its task panics: a digest must not stay blocked by it.
struct Leave<'a> {
    pulls: &'a Pulls,
    pull: &'a Pull,
    digest: Digest,
    /// How the pull ended; nothing if its task panics.
    last: Option<State>,
}

impl Drop for Leave<'_> {
    /// Once: whoever was woken may have put the next pull of the digest into the map.
    fn drop(&mut self) {
        lock(&self.pulls.0.running).remove(&self.digest);
        self.pulls.0.changes.send_replace(());
        self.pull.state.send_replace(self.last.take().unwrap_or(State::Failed(PullError::Abandoned)));
    }
}

enum Entered {
    /// The store has it.
    Here,
    Pull(Interest),
    /// A pull that ends now, and nobody can join.
    Ending(watch::Receiver<State>),
}

impl State {
    const fn is_last(&self) -> bool {
        matches!(self, Self::Done(..) | Self::Failed(_))
    }
}

/// Somebody waits for this pull. When the last of them is gone the pull stops after `mirror.linger`.
#[derive(Debug)]
struct Interest(Arc<Pull>, Purpose);

impl Interest {
    fn new(pull: &Arc<Pull>, purpose: Purpose) -> Self {
        pull.readers.fetch_add(1, Ordering::AcqRel);
        if purpose == Purpose::Read {
            pull.claim.begin_to_read();
        }
        Self(pull.clone(), purpose)
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        if self.1 == Purpose::Read {
            self.0.claim.end_reading();
        }
        if self.0.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.left.notify_one();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics under these locks; if something does, the maps are still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
