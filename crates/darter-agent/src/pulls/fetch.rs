//! Bringing one blob here from its origin: several ranges at once, written to one ingest.
//!
//! `darter_core::fetch::Plan` decides what is asked for; the workers here ask, write what comes,
//! and give back what broke.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use darter_core::Digest;
use darter_core::fetch::{Next, Plan};
use darter_core::pieces::Layout;
use darter_core::range::Span;
use futures_util::future::try_join_all;
use tokio::sync::Notify;
use tracing::debug;

use super::account::Account;
use super::{Pull, PullError, State, Wanted, Whence};
use crate::log::chain;
use crate::metrics::{Metrics, RegistryLabels};
use crate::origin::{BlobStream, Origin, OriginError, Whom};
use crate::store::{Blob, Ingest, Store, StoreError};

/// The operator's choices.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    /// Ranges of one blob in flight.
    pub(super) ranges: usize,
    /// Failures in a row, without a byte between them, after which a blob is given up.
    pub(super) attempts: u32,
    /// Other nodes that bring nothing for so long are of no help: less than readers wait.
    pub(super) patience: Duration,
}

/// What a pull is to do, and with what. Cheap to clone.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) store: Store,
    pub(super) metrics: Arc<Metrics>,
    pub(super) settings: Settings,
    pub(super) wanted: Wanted,
    /// Where this pull stands among all: what was asked for first comes first.
    pub(super) turn: u64,
    /// Its state is told as soon as there is something to read.
    pub(super) pull: Arc<Pull>,
    pub(super) account: Arc<Account>,
}

impl Job {
    /// Bytes that this node read for the whole cluster.
    pub(super) fn read_from_origin(&self, bytes: u64) {
        self.account.read_from_origin(bytes);
        let labels = RegistryLabels { registry: self.wanted.label() };
        self.metrics.origin_unique_bytes.get_or_create(&labels).inc_by(bytes);
    }
}

/// What others left of a blob when they were of no help any more.
pub(super) struct Left {
    /// How far they got; nothing: nowhere, or it was wrong.
    pub(super) ingest: Option<Ingest>,
}

/// Fetches the blob from the origin alone, until `ended`; goes on with what is `left`, if others were asked
/// before: what is read then may have been read for the cluster already.
pub(super) async fn fetch(job: &Job, left: Option<Left>, ended: impl Future<Output = ()>) -> Result<Blob, PullError> {
    tokio::pin!(ended);
    let Job { store, settings, wanted, account, .. } = job;
    // One for all of the blob: where others come to stand before the registry meanwhile, this ends on
    // what it began with.
    let Some(whence) = &wanted.whence else { return Err(PullError::Others) };
    let origin = whence.site.origin().of(Whom::Anyone).with_claim(job.pull.claim.clone());
    let from = From { origin: &origin, whence, digest: &wanted.digest };
    let is_joint = left.is_some();
    let begun = left.and_then(|left| left.ingest);
    let is_new = begun.is_none();
    let begun = match begun {
        Some(ingest) => Ok((ingest, None)),
        None => tokio::select! {
            begun = begin(store, wanted, &from) => begun,
            () = &mut ended => Err(PullError::Abandoned),
        },
    };
    let (ingest, first) = match begun {
        // The pull before this one was abandoned with its last byte written, and came whole after all.
        Err(PullError::Store(error)) if matches!(*error, StoreError::Present(_)) => {
            return store.look_up(&wanted.digest).await.ok_or(PullError::Store(error));
        }
        begun => begun?,
    };
    let size = ingest.layout().size();
    let missing = missing(&ingest);
    if is_new {
        job.pull.provenance.was_here(size, &missing);
        account.resumed(size - missing.iter().map(Span::len).sum::<u64>());
    }
    job.pull.state.send_replace(State::Coming(ingest.reader()));
    let workers = settings.ranges.min(usize::try_from(ingest.layout().segments()).unwrap_or(usize::MAX)).max(1);
    let plan = Plan::new(ingest.layout(), missing, settings.attempts);
    let work = Work { ingest: &ingest, job, is_joint, from: &from, plan: Mutex::new(plan), changed: Notify::new() };
    let mut firsts = std::iter::once(first).chain(std::iter::repeat_with(|| None));
    let workers = try_join_all((0..workers).map(|_| work.worker(firsts.next().flatten())));
    let fetched = tokio::select! {
        fetched = workers => fetched.map(drop),
        () = &mut ended => Err(PullError::Abandoned),
    };
    // Also where it did not come: once this returns, what has arrived is put away for the next pull.
    match (fetched, ingest.finish().await) {
        (_, Ok(blob)) => Ok(blob),
        (Err(error), Err(_)) => Err(error),
        (Ok(()), Err(error)) => Err(error.into()),
    }
}

async fn begin(store: &Store, wanted: &Wanted, from: &From<'_>) -> Result<(Ingest, Option<BlobStream>), PullError> {
    if let Some(size) = wanted.size {
        store.may_take(size)?;
    }
    // The origin is asked before the store makes room: a manifest may lie about the size, and whoever
    // can push one must not be able to empty this node's cache with it.
    let span = wanted.size.filter(|size| *size > 0).map(|size| Layout::new(size).segment(0));
    let stream = from.open(span).await?;
    let size = match (wanted.size, stream.size) {
        (Some(wanted), Some(told)) if told != wanted => return Err(PullError::OtherLength { told, wanted }),
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) => return Err(PullError::NoLength),
    };
    let ingest = store.ingest(&wanted.digest, size).await?;
    // A resumed ingest begins elsewhere.
    let is_first = ingest.next_missing(0).is_some_and(|missing| missing.start == stream.start);
    Ok((ingest, is_first.then_some(stream)))
}

fn missing(ingest: &Ingest) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut from = 0;
    while let Some(span) = ingest.next_missing(from) {
        spans.push(span);
        from = span.end;
    }
    spans
}

/// Where the bytes come from.
struct From<'a> {
    origin: &'a Origin,
    whence: &'a Whence,
    digest: &'a Digest,
}

impl From<'_> {
    async fn open(&self, span: Option<Span>) -> Result<BlobStream, OriginError> {
        let Whence { repository, credential, .. } = self.whence;
        self.origin.blob(repository, self.digest, span, credential).await
    }
}

/// What the workers of one pull share.
struct Work<'a> {
    ingest: &'a Ingest,
    job: &'a Job,
    /// Other nodes want the blob too, so that this is not the cluster's one read of it.
    is_joint: bool,
    from: &'a From<'a>,
    plan: Mutex<Plan>,
    /// The plan has something to take again, or nothing for ever.
    changed: Notify,
}

/// Why a span did not arrive whole.
enum Broken {
    /// The origin sends the whole blob whatever is asked.
    NoRanges,
    /// The origin failed, and this much is still missing.
    Origin(Span, OriginError),
    /// The blob is lost for good.
    Fatal(PullError),
}

impl Work<'_> {
    async fn worker(&self, mut first: Option<BlobStream>) -> Result<(), PullError> {
        loop {
            // Registered before the look at the plan: a change in between must not be missed.
            let changed = self.changed.notified();
            let next = self.plan().take();
            let span = match next {
                Next::Fetch(span) => span,
                Next::Wait => {
                    changed.await;
                    continue;
                }
                Next::Done => return Ok(()),
            };
            let outcome = self.span(span, first.take()).await;
            self.settle(span, outcome)?;
            self.changed.notify_waiters();
        }
    }

    /// Tells the plan how a span ended. `Err`: give the blob up.
    fn settle(&self, span: Span, outcome: Result<(), Broken>) -> Result<(), PullError> {
        match outcome {
            Ok(()) => self.plan().finished(),
            Err(Broken::NoRanges) => {
                if !self.plan().no_ranges(span) {
                    return Err(OriginError::Lied("it never sends the range that is asked for").into());
                }
            }
            Err(Broken::Origin(rest, error)) => {
                self.job.account.retry();
                debug!(digest = %self.job.wanted.digest, ?rest, error = %chain(&error), "a range broke off");
                let go_on = self.plan().broke(rest);
                if !go_on || !error.is_retryable() {
                    return Err(error.into());
                }
            }
            Err(Broken::Fatal(error)) => return Err(error),
        }
        Ok(())
    }

    /// Fetches one span, and what follows it while the response goes on.
    async fn span(&self, mut span: Span, first: Option<BlobStream>) -> Result<(), Broken> {
        let mut stream = match first {
            Some(stream) => stream,
            None => self.from.open(Some(span)).await.map_err(|error| Broken::Origin(span, error))?,
        };
        self.check(&stream, span)?;
        let mut skip = span.start - stream.start;
        let mut at = span.start;
        while let Some(chunk) = stream.next().await {
            let mut chunk = chunk.map_err(|error| Broken::Origin(Span { start: at, end: span.end }, error))?;
            let skipped = chunk.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
            chunk.advance(skipped);
            skip -= skipped as u64;
            while !chunk.is_empty() {
                if at == span.end {
                    match self.plan().extend(at) {
                        Some(more) => span = more,
                        // Another worker has what follows.
                        None => return Ok(()),
                    }
                }
                let part = usize::try_from(span.end - at).unwrap_or(usize::MAX).min(chunk.len());
                at += self.write(at, chunk.split_to(part)).await?;
            }
        }
        if at == span.end {
            return Ok(());
        }
        let short = OriginError::Truncated { got: at, wanted: span.end };
        Err(Broken::Origin(Span { start: at, end: span.end }, short))
    }

    fn check(&self, stream: &BlobStream, span: Span) -> Result<(), Broken> {
        let wanted = self.ingest.layout().size();
        match stream.size {
            Some(told) if told != wanted => return Err(Broken::Fatal(PullError::OtherLength { told, wanted })),
            _ => {}
        }
        let skips = stream.start < span.start && self.plan().is_sequential();
        if stream.start == span.start || skips { Ok(()) } else { Err(Broken::NoRanges) }
    }

    async fn write(&self, at: u64, bytes: Bytes) -> Result<u64, Broken> {
        let len = bytes.len() as u64;
        self.ingest.write(at, bytes).await.map_err(|error| Broken::Fatal(error.into()))?;
        if self.is_joint {
            self.job.account.read_from_origin(len);
        } else {
            self.job.read_from_origin(len);
        }
        self.plan().progressed();
        Ok(len)
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
