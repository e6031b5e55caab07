//! What the tasks of one pull together share: where bytes go, who sent them, and how one piece or one span
//! comes. Not here: in which order, and what follows from a failure (`together`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_core::pieces::Layout;
use darter_core::range::Span;
use darter_core::swarm::PeerId;
use darter_core::swarm::attest::Attest;
use tokio::sync::{OnceCell, mpsc, oneshot};
use tracing::debug;

use super::blame;
use super::compare::{Opinion, Ruling, Verdict};
use super::fetch::Job;
use super::{PullError, State, Whence};
use crate::log::chain;
use crate::metrics::Source;
use crate::origin::{Origin, OriginError, Whom};
use crate::store::{Ingest, PieceHere, StoreError};
use crate::swarm::coming::Coming;
use crate::swarm::exchange::FetchError;
use crate::swarm::handle::{Fetcher, SwarmHandle};

/// How often the coordinator hears that a piece is slow to come from the origin.
const SPOKEN_OF_EVERY: Duration = Duration::from_secs(1);

/// What the tasks of one pull share.
pub(super) struct Target {
    pub(super) job: Job,
    pub(super) layout: Layout,
    pub(super) origin: Option<(Origin, Whence)>,
    pub(super) swarm: SwarmHandle,
    /// Made when the first bytes are here: a manifest may lie about the size, and must not be able to
    /// empty the cache with it.
    pub(super) ingest: OnceCell<Ingest>,
    pub(super) coming: std::sync::OnceLock<Arc<Coming>>,
    /// Where the loop gets the notices of the ingest from.
    pub(super) opened: Mutex<Option<oneshot::Sender<mpsc::Receiver<PieceHere>>>>,
    /// Who sent the pieces that are being written: two may send the same.
    pub(super) senders: Mutex<BTreeMap<u32, Vec<(PeerId, Attest)>>>,
    /// Words for pieces that came out otherwise.
    pub(super) disputed: Mutex<Vec<(u32, Attest)>>,
    /// What two that have all of it say of its pieces.
    pub(super) opinion: Arc<Opinion>,
}

impl Target {
    pub(super) fn new(job: &Job, swarm: &SwarmHandle, layout: Layout) -> Self {
        Self {
            job: job.clone(),
            layout,
            // One for all of the blob: where others come to stand before the registry meanwhile, this
            // ends on what it began with.
            origin: job.wanted.whence.clone().map(|whence| {
                let origin = whence.site.origin().of(Whom::Anyone).with_claim(job.pull.claim.clone());
                (origin, whence)
            }),
            swarm: swarm.clone(),
            ingest: OnceCell::new(),
            coming: std::sync::OnceLock::new(),
            opened: Mutex::default(),
            senders: Mutex::default(),
            disputed: Mutex::default(),
            opinion: Arc::default(),
        }
    }

    pub(super) async fn ingest(&self) -> Result<&Ingest, StoreError> {
        let open = async {
            let ingest = self.job.store.ingest(&self.job.wanted.digest, self.layout.size()).await?;
            let reader = ingest.reader();
            if let Some(coming) = self.coming.get() {
                coming.is_in(reader.file().clone());
            }
            let listener = lock(&self.opened).take();
            if let (Some(listener), Some(notices)) = (listener, ingest.pieces()) {
                // Nobody listens where the pull has just ended.
                let _ = listener.send(notices);
            }
            let resumed: Vec<_> = ingest.resumed().iter().map(|piece| self.layout.piece(piece)).collect();
            resumed.into_iter().for_each(|span| self.job.pull.provenance.note(span, Source::Cache));
            self.job.pull.state.send_replace(State::Coming(reader));
            Ok(ingest)
        };
        self.ingest.get_or_try_init(|| open).await
    }

    pub(super) fn disputed(&self) -> Vec<(u32, Attest)> {
        lock(&self.disputed).clone()
    }

    /// Everybody's word for a piece of it.
    pub(super) fn vouched(&self) -> Vec<(u32, Attest)> {
        let pieces = 0..u32::try_from(self.layout.pieces()).unwrap_or(u32::MAX);
        let coming = self.coming.get();
        let attests = pieces.filter_map(|piece| Some((piece, coming?.attest(piece)?)));
        attests.chain(self.disputed()).collect()
    }

    /// Whether somebody who vouched for a piece is found to have lied.
    pub(super) async fn finds_liar(&self) -> bool {
        let Some((origin, whence)) = &self.origin else { return false };
        blame::find_liar(&self.job, &self.swarm, self.layout, (origin, whence), &self.vouched()).await
    }

    /// Reads one piece from the origin, and tells on those who claim that it is otherwise: these.
    pub(super) async fn find_wrong(&self, piece: u32, claims: &[(PeerId, [u8; 32])]) -> Vec<PeerId> {
        let Some((origin, whence)) = &self.origin else { return Vec::new() };
        let span = self.layout.piece(u64::from(piece));
        blame::find_wrong(&self.job, &self.swarm, (origin, whence), span, claims).await
    }

    /// What is here goes on in another way.
    pub(super) fn into_ingest(self: Arc<Self>) -> Option<Ingest> {
        // The tasks that shared it have ended.
        Arc::into_inner(self).and_then(|target| target.ingest.into_inner())
    }

    /// What is here waits for the next pull.
    pub(super) async fn put_away(self: Arc<Self>) {
        if let Some(ingest) = self.into_ingest()
            && let Err(error) = ingest.finish().await
        {
            debug!(error = %chain(&error), "put an unfinished blob away");
        }
    }

    /// One piece from one peer, into the ingest.
    pub(super) async fn fetch(&self, fetcher: &Fetcher, piece: u32, peer: PeerId) -> Result<(), FetchEnd> {
        let activity = self.job.account.activity().clone();
        let got = fetcher.fetch(piece, peer, activity).await.map_err(FetchEnd::Peer)?;
        if !self.is_taken(piece, &got.attest).await {
            return Err(FetchEnd::Disputed { importer: got.attest.importer });
        }
        let ingest = self.ingest().await.map_err(FetchEnd::Store)?;
        let span = self.layout.piece(u64::from(piece));
        // Before a byte of it is written: its notice must find who sent it.
        lock(&self.senders).entry(piece).or_default().push((peer, got.attest));
        self.job.pull.provenance.note(span, Source::Peer);
        ingest.write(span.start, Bytes::from_owner(got.bytes)).await.map_err(FetchEnd::Store)?;
        self.job.account.got_from_peer(span.len());
        Ok(())
    }

    /// From now on pieces are to be what this says. Whether those are that came before, on the word of one.
    pub(super) async fn takes(&self, verdict: Option<Verdict>) -> bool {
        let Some(verdict) = verdict else { return true };
        self.opinion.is(verdict.clone());
        let vouched = self.vouched();
        let other = vouched.iter().find(|(piece, attest)| verdict.on(*piece, attest) != Ruling::Take);
        match other {
            Some((piece, attest)) => self.is_taken(*piece, attest).await,
            None => true,
        }
    }

    /// Whether a piece is what others say that have the whole blob: where one alone says otherwise, the origin
    /// decides.
    pub(super) async fn is_taken(&self, piece: u32, attest: &Attest) -> bool {
        let (peer, value) = match self.opinion.on(piece, attest).await {
            Ruling::Take => return true,
            Ruling::Refuse => return false,
            Ruling::Contradicts(peer, value) => (peer, value),
        };
        let wrong = self.find_wrong(piece, &[(peer, value), (attest.importer, attest.cv)]).await;
        let is_right = !wrong.contains(&attest.importer);
        if wrong.contains(&peer) {
            self.opinion.is(Verdict::Wrong(wrong));
        }
        is_right
    }

    /// A span from the origin, into the ingest. Pieces of it that are slow to come go to `slow`.
    pub(super) async fn import(&self, span: Span, slow: &mpsc::Sender<u32>) -> Result<(), ImportEnd> {
        let Some((origin, Whence { repository, credential, .. })) = &self.origin else {
            return Err(ImportEnd::Pull(PullError::Others));
        };
        let digest = &self.job.wanted.digest;
        // Whoever waits here holds a lease that shows nothing, and another node would read the same.
        let opened = origin.telling_throttles().blob(repository, digest, Some(span), credential).await;
        let mut stream = opened.map_err(ImportEnd::Origin)?;
        let size = self.layout.size();
        if let Some(told) = stream.size.filter(|told| *told != size) {
            return Err(ImportEnd::Pull(PullError::OtherLength { told, wanted: size }));
        }
        if stream.start != span.start {
            return Err(ImportEnd::NoRanges);
        }
        let ingest = self.ingest().await?;
        let (mut at, mut spoken_of) = (span.start, Instant::now());
        while at < span.end {
            let Some(chunk) = stream.next().await else {
                return Err(ImportEnd::Origin(OriginError::Truncated { got: at, wanted: span.end }));
            };
            let mut chunk = chunk.map_err(ImportEnd::Origin)?;
            chunk.truncate(usize::try_from(span.end - at).unwrap_or(usize::MAX));
            let len = chunk.len() as u64;
            ingest.write(at, chunk).await?;
            at += len;
            self.job.read_from_origin(len);
            if spoken_of.elapsed() >= SPOKEN_OF_EVERY {
                spoken_of = Instant::now();
                // Where nobody could take it in yet, the next one will do.
                let piece = (at - 1) / self.layout.piece_size();
                let _ = slow.try_send(u32::try_from(piece).unwrap_or(u32::MAX));
            }
        }
        Ok(())
    }
}

pub(super) enum FetchEnd {
    Peer(FetchError),
    /// It is as its importer vouches for, and that is not what it is by what others say.
    Disputed {
        importer: PeerId,
    },
    Store(StoreError),
}

pub(super) enum ImportEnd {
    /// The origin failed.
    Origin(OriginError),
    /// It sends the whole blob whatever is asked.
    NoRanges,
    Pull(PullError),
}

impl From<StoreError> for ImportEnd {
    fn from(error: StoreError) -> Self {
        Self::Pull(error.into())
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
