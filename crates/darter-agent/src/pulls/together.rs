//! Bringing one blob here with the other nodes: does what `darter_core::swarm` orders for it.
//!
//! Pieces come from peers, checked against the value that their importer vouches for, and spans that
//! this node has a lease for from the origin. Where the others are of no help the pull goes on alone
//! with what is here. Not here: which piece from whom (the core), reading all of it alone (`fetch`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::pieces::{Bitfield, Layout};
use darter_core::range::Span;
use darter_core::swarm::{FetchFailure, ImportFailure, PeerId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, warn};

use super::blame::{self, Word};
use super::compare;
use super::fetch::{self, Job, Left};
use super::target::{FetchEnd, ImportEnd, Target, lock};
use super::{PullError, TURN};
use crate::activity::Pulse;
use crate::log::chain;
use crate::metrics::ReasonLabels;
use crate::origin::OriginError;
use crate::store::{Blob, PieceHere, StoreError};
use crate::swarm::handle::{Fetcher, Order, SwarmHandle, Wish};

/// What an origin that throttles without naming a time is left alone for.
const THROTTLED: Duration = Duration::from_secs(1);

/// So long a blob is waited for of which nothing comes, while its coordinator says that it will: a registry
/// that throttles may ask for a minute.
const SAID: Duration = Duration::from_secs(90);

/// Brings the blob here, until `ended`.
pub(super) async fn fetch(job: &Job, swarm: &SwarmHandle, ended: impl Future<Output = ()>) -> Result<Blob, PullError> {
    tokio::pin!(ended);
    // An empty blob has no pieces, and one of unknown size no layout.
    let Some(size) = job.wanted.size.filter(|size| *size > 0) else { return fetch::fetch(job, None, ended).await };
    job.store.may_take(size)?;
    let settled = tokio::select! {
        () = swarm.settled() => Ok(()),
        () = &mut ended => Err(PullError::Abandoned),
    };
    settled?;
    let mut is_first = true;
    let (alone, target) = loop {
        let target = Arc::new(Target::new(job, swarm, Layout::new(size)));
        let reason = match run(job, swarm, &target, ended.as_mut()).await {
            Ok(blob) => {
                // Who vouched for what did not fit has shown itself, though the blob is right.
                let disputed = target.disputed();
                if !disputed.is_empty() {
                    blame::blame(job, swarm, &disputed).await;
                }
                return Ok(blob);
            }
            Err(Ended::Alone(reason)) => reason,
            // Once this returns, what has arrived is put away for the next pull.
            Err(Ended::Pull(error)) => {
                target.put_away().await;
                return Err(error);
            }
        };
        // Without the liar the others are of help again. Once: it may be that nobody is.
        let is_again = reason == WRONG && std::mem::take(&mut is_first);
        if !is_again {
            break (reason, target);
        }
        let is_found = tokio::select! {
            is_found = target.finds_liar() => is_found,
            // What is wrong was thrown away.
            () = &mut ended => return Err(PullError::Abandoned),
        };
        if !is_found {
            break (reason, target);
        }
    };
    if job.wanted.whence.is_none() {
        debug!(digest = %job.wanted.digest, reason = alone, "the other nodes did not give a blob");
        target.put_away().await;
        return Err(PullError::Others);
    }
    warn!(digest = %job.wanted.digest, reason = alone, "the other nodes are of no help with a blob; reading the origin");
    job.metrics.swarm_fallbacks.get_or_create(&ReasonLabels { reason: alone }).inc();
    let vouched = if alone == WRONG { target.vouched() } else { Vec::new() };
    // What is wrong was thrown away.
    let left = Left { ingest: if alone == WRONG { None } else { target.into_ingest() } };
    let fetched = fetch::fetch(job, Some(left), ended).await;
    if alone == WRONG && fetched.is_ok() {
        blame::blame(job, swarm, &vouched).await;
    }
    fetched
}

/// Why the blob did not come this way.
enum Ended {
    /// It may come from the origin alone; the reason is a word for the metrics.
    Alone(&'static str),
    /// It does not come at all.
    Pull(PullError),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Self::Pull(error.into())
    }
}

/// Its pieces were as vouched for, and its sha256 was not.
const WRONG: &str = "wrong_digest";

async fn run(
    job: &Job,
    swarm: &SwarmHandle,
    target: &Arc<Target>,
    ended: impl Future<Output = ()>,
) -> Result<Blob, Ended> {
    let (listener, opened) = oneshot::channel();
    *lock(&target.opened) = Some(listener);
    let have = if job.store.is_begun(&job.wanted.digest, target.layout.size()) {
        // Its room is its own already.
        let ingest = match target.ingest().await {
            // The pull before this one was abandoned with its last byte written, and came whole after all.
            Err(error @ StoreError::Present(_)) => {
                let blob = job.store.look_up(&job.wanted.digest).await;
                return blob.ok_or_else(|| Ended::Pull(error.into()));
            }
            ingest => ingest?,
        };
        ingest.resumed().clone()
    } else {
        Bitfield::new(target.layout.pieces())
    };
    let resumed: u64 = have.iter().map(|piece| target.layout.piece(piece).len()).sum();
    job.account.resumed(resumed);
    let wish = swarm.want(job.wanted.digest, target.layout, have, (job.turn, target.origin.is_some())).await;
    target.coming.get_or_init(|| wish.coming().clone());
    if let Some(ingest) = target.ingest.get() {
        wish.coming().is_in(ingest.reader().file().clone());
    }
    let (slow, slowly) = mpsc::channel(8);
    let mut pull = Together {
        target,
        slow,
        fetcher: wish.fetcher(),
        wish,
        missing: Bitfield::full(target.layout.pieces()),
        tasks: JoinSet::new(),
        fetches: HashMap::new(),
        failures: 0,
    };
    let outcome = tokio::select! {
        outcome = pull.run(opened, slowly) => outcome,
        () = ended => Err(Ended::Pull(PullError::Abandoned)),
    };
    // None of them may write any more, or hold the ingest: the next pull would find it in use.
    pull.tasks.shutdown().await;
    outcome?;
    let finished = match target.ingest.get() {
        Some(ingest) => ingest.finish().await,
        None => return Err(Ended::Alone("nothing_came")),
    };
    match finished {
        Ok(blob) => {
            pull.wish.proven();
            Ok(blob)
        }
        Err(StoreError::Mismatch { .. }) => Err(Ended::Alone(WRONG)),
        Err(error) => Err(error.into()),
    }
}

/// One pull at work.
struct Together<'a> {
    target: &'a Arc<Target>,
    fetcher: Fetcher,
    wish: Wish,
    missing: Bitfield,
    tasks: JoinSet<Done>,
    /// Where imports name pieces that are slow to come.
    slow: mpsc::Sender<u32>,
    /// To cancel a request.
    fetches: HashMap<(u32, PeerId), AbortHandle>,
    /// Imports that failed since anything came.
    failures: u32,
}

/// How a task ended.
enum Done {
    Fetched {
        piece: u32,
        peer: PeerId,
        result: Result<(), FetchEnd>,
    },
    Imported {
        segment: u32,
        result: Result<(), ImportEnd>,
    },
    /// Two were asked what the pieces are: whether those that were here already may be that, and who of the two
    /// does not say.
    Compared {
        is_right: bool,
        silent: [Option<PeerId>; 2],
    },
}

impl Together<'_> {
    /// Until every piece is here.
    async fn run(
        &mut self,
        mut opened: oneshot::Receiver<mpsc::Receiver<PieceHere>>,
        mut slowly: mpsc::Receiver<u32>,
    ) -> Result<(), Ended> {
        let mut notices = None;
        let patience = self.target.job.settings.patience;
        let mut pulse = Pulse::start();
        while self.missing.count() > 0 {
            let quiet_until = || {
                let activity = self.target.job.account.activity();
                activity.last_in_turn(patience * TURN).max(activity.last_said(SAID)) + patience
            };
            if pulse.stood_still() {
                self.target.job.account.activity().touch();
            }
            tokio::select! {
                order = self.wish.order() => match order {
                    Some(order) => self.carry_out(order),
                    // The store had its last byte before this heard of it, and has told the swarm.
                    None if self.target.job.store.holds(&self.target.job.wanted.digest) => return Ok(()),
                    None => return Err(Ended::Alone("no_orders")),
                },
                Ok(opened) = &mut opened, if notices.is_none() => notices = Some(opened),
                here = next(&mut notices) => match here {
                    Some(here) => self.here(here).await,
                    // Its writer is gone: the disk failed, and `finish` says how.
                    None => return Ok(()),
                },
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.done(done).await?,
                    Err(error) if error.is_cancelled() => {}
                    Err(_) => return Err(Ended::Alone("panic")),
                },
                Some(piece) = slowly.recv() => self.wish.importing(piece).await,
                // Bytes that came meanwhile woke nobody here.
                () = tokio::time::sleep_until(pulse.next(quiet_until()).into()) => {
                    if pulse.stood_still() {
                        self.target.job.account.activity().touch();
                    } else if quiet_until() <= Instant::now() {
                        return Err(Ended::Alone("stalled"));
                    }
                }
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, order: Order) {
        let target = self.target.clone();
        match order {
            Order::Fetch { piece, peer } => {
                let fetcher = self.fetcher.clone();
                let task = async move {
                    let result = target.fetch(&fetcher, piece, peer).await;
                    Done::Fetched { piece, peer, result }
                };
                self.fetches.insert((piece, peer), self.tasks.spawn(task));
            }
            Order::Compare(holders) => {
                // From now on, so that the first piece waits.
                let (fetcher, asking) = (self.fetcher.clone(), target.opinion.ask(compare::WAIT));
                self.tasks.spawn(async move {
                    let compared = compare::compare(&target, &fetcher, holders).await;
                    let is_right = target.takes(compared.verdict).await;
                    drop(asking);
                    Done::Compared { is_right, silent: compared.silent }
                });
            }
            Order::Wait => target.job.account.activity().is_said_to_come(),
            Order::Cancel { piece, peer } => {
                if let Some(task) = self.fetches.remove(&(piece, peer)) {
                    task.abort();
                }
            }
            Order::Import { segment, first, end } => {
                let start = target.layout.piece(u64::from(first)).start;
                let end = target.layout.piece(u64::from(end).saturating_sub(1)).end;
                let slow = self.slow.clone();
                self.tasks.spawn(async move {
                    Done::Imported { segment, result: target.import(Span { start, end }, &slow).await }
                });
            }
        }
    }

    /// A piece is in the file and hashed.
    async fn here(&mut self, PieceHere { piece, value }: PieceHere) {
        let index = u64::from(piece);
        if !self.missing.has(index) {
            return;
        }
        self.missing.clear(index);
        self.failures = 0;
        let target = self.target;
        target.job.account.activity().touch();
        let sent = lock(&target.senders).remove(&piece).unwrap_or_default();
        let (attest, peer) = match blame::word(&sent, value) {
            Word::Ours => (target.swarm.attest(&target.job.wanted.digest, &target.layout, piece, value), None),
            Word::Theirs(peer, attest) => (attest, Some(peer)),
            Word::Nobodys => {
                return lock(&target.disputed).extend(sent.iter().map(|(_, attest)| (piece, *attest)));
            }
        };
        self.wish.coming().vouch(piece, attest);
        self.wish.arrived(piece, peer).await;
    }

    async fn done(&mut self, done: Done) -> Result<(), Ended> {
        match done {
            Done::Fetched { piece, peer, result } => {
                self.fetches.remove(&(piece, peer));
                match result {
                    // Its notice says the rest.
                    Ok(()) => {}
                    Err(FetchEnd::Store(error)) => return Err(error.into()),
                    Err(FetchEnd::Disputed { importer }) => self.disputed(piece, peer, importer).await,
                    Err(FetchEnd::Peer(error)) => {
                        debug!(piece, %peer, error = %chain(&error), "a piece did not come");
                        self.wish.fetch_failed(piece, peer, error.failure()).await;
                    }
                }
            }
            Done::Imported { segment, result } => match result {
                Ok(()) => {}
                Err(ImportEnd::NoRanges) => return Err(Ended::Alone("no_ranges")),
                Err(ImportEnd::Pull(error)) => return Err(Ended::Pull(error)),
                Err(ImportEnd::Origin(error)) => return self.import_failed(segment, error).await,
            },
            Done::Compared { is_right: false, .. } => return Err(Ended::Alone(WRONG)),
            Done::Compared { silent, .. } => {
                for peer in silent.into_iter().flatten() {
                    self.wish.not_compared(peer).await;
                }
            }
        }
        Ok(())
    }

    /// A piece came that is another at others. Who passed it on may know no better than its importer.
    async fn disputed(&mut self, piece: u32, peer: PeerId, importer: PeerId) {
        let job = &self.target.job;
        warn!(digest = %job.wanted.digest, piece, %peer, %importer, "a piece is not what other nodes that have the blob say");
        job.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "disputed" }).inc();
        let reason = if importer == peer { FetchFailure::Corrupt } else { FetchFailure::Unvouched };
        self.wish.fetch_failed(piece, peer, reason).await;
    }

    async fn import_failed(&mut self, segment: u32, error: OriginError) -> Result<(), Ended> {
        let job = &self.target.job;
        job.account.retry();
        debug!(digest = %job.wanted.digest, segment, error = %chain(&error), "an import broke off");
        let reason = match &error {
            OriginError::Status { status: 429 | 503, retry_after, .. } => {
                ImportFailure::Throttled(retry_after.unwrap_or(THROTTLED))
            }
            OriginError::Denied { .. } | OriginError::NotFound => ImportFailure::Forbidden,
            _ => ImportFailure::Broken,
        };
        // A registry that is to be asked later has not failed; who waits for it too long is stalled.
        self.failures += u32::from(!matches!(reason, ImportFailure::Throttled(_)));
        // Others may have it, or be let in where this node is not.
        self.wish.import_failed(segment, reason).await;
        let is_over = self.failures >= job.settings.attempts && self.fetches.is_empty();
        if is_over { Err(Ended::Pull(error.into())) } else { Ok(()) }
    }
}

/// The next notice, once there is somebody who tells.
async fn next(notices: &mut Option<mpsc::Receiver<PieceHere>>) -> Option<PieceHere> {
    match notices {
        Some(notices) => notices.recv().await,
        None => std::future::pending().await,
    }
}
