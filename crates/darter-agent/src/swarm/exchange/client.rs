//! Fetches one piece from one node, and believes no byte of it before it is checked.
//!
//! The other end may be slow, dead, or lie: every wait has an end, a body has the length that this
//! node knows, and the piece is given out only if its BLAKE3 value is the attested one. Dropping the
//! future cancels the request. Not here: what to do instead (`darter_core::swarm`).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use darter_core::Digest;
use darter_core::pieces::{Layout, chaining_value};
use darter_core::swarm::attest::Attest;
use darter_core::swarm::target::{Path, Target};
use darter_core::swarm::token::{self, Token};
use darter_core::swarm::{FetchFailure, PeerId, Refusal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::answer::{Answer, HEAD_MAX, parse};
use super::dial::{Connection, Pool, Stream};
use super::{BLOCK, Buffer, Buffers, Identity, Limits, Peers, ZoneRelation, is_signed};
use crate::activity::Activity;
use crate::metrics::{Metrics, PeerBytesLabels, ReasonLabels};

/// What a busy peer that names no time, or one that is no use, is left alone for.
const BUSY: Duration = Duration::from_millis(50);
const BUSY_MAX: Duration = Duration::from_secs(10);

/// One piece to fetch.
#[derive(Debug, Clone)]
pub struct PieceRequest {
    /// Whom to ask: nobody else is talked to, whoever answers at the address.
    pub peer: PeerId,
    /// Where its exchange listens.
    pub address: SocketAddr,
    /// Which blob.
    pub blob: Digest,
    /// How it is cut.
    pub layout: Layout,
    /// Index of the piece.
    pub piece: u32,
    /// The attest that this node has of the piece already, and has checked: the peer's own is not asked.
    pub known: Option<Attest>,
    /// The right to ask, in the plaintext option.
    pub token: Option<Token>,
    /// How long the head, and then each block of 256 KiB, may take.
    pub patience: Duration,
    /// Told of each block that comes.
    pub activity: Activity,
}

/// A piece whose bytes are what its importer attested.
#[derive(Debug)]
pub struct Piece {
    /// All its bytes, in a pooled buffer: to be dropped soon, others wait for it.
    pub bytes: Buffer,
    /// Who vouches for them.
    pub attest: Attest,
}

/// Why a piece did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// All the peer's slots are taken: ask again after this.
    #[error("the peer is busy for {0:?}")]
    Busy(Duration),
    /// The peer does not have it.
    #[error("the peer does not have the piece")]
    NotHere,
    /// The peer could not be reached, broke off, stalled or does not speak our language.
    #[error("the piece did not come")]
    Broken(#[source] Broken),
    /// What came is not what its importer read from the origin.
    #[error("the piece is wrong")]
    Corrupt(#[source] Corrupt),
}

/// How a fetch broke.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// No connection, or none to this peer.
    #[error("cannot connect to the peer")]
    Dial(#[source] io::Error),
    /// The connection failed.
    #[error("the connection to the peer broke")]
    Io(#[source] io::Error),
    /// Nothing came for too long.
    #[error("nothing came from the peer for {0:?}")]
    Stalled(Duration),
    /// Not an answer to this request.
    #[error("the peer's answer has {0}")]
    Answer(&'static str),
    /// An answer of another length than the piece's.
    #[error("the peer sends {told} bytes for a piece of {expected}")]
    Length {
        /// What it says.
        told: u64,
        /// What the blob's size says.
        expected: u64,
    },
    /// A status that a working peer does not send to us.
    #[error("the peer refuses with status {0}")]
    Refused(u16),
    /// The blob has no such piece, or one that fits no memory.
    #[error("there is no such piece")]
    NoSuchPiece,
    /// The peer gave no right to ask, in the plaintext option.
    #[error("the peer gives no token")]
    NoToken,
    /// The check did not run: the agent stops.
    #[error("the piece could not be checked")]
    Check(#[source] tokio::task::JoinError),
}

/// What is wrong with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Corrupt {
    /// The bytes are not those that the attest is about.
    #[error("its bytes are not the attested ones")]
    Bytes,
    /// The importer did not sign this attest for this piece.
    #[error("its attest is not signed by the importer it names")]
    Signature,
    /// The importer is nobody whose word counts.
    #[error("the importer it names is no member")]
    Importer,
}

impl FetchError {
    /// The peer is not connected.
    pub fn gone() -> Self {
        Self::Broken(Broken::Dial(io::ErrorKind::NotConnected.into()))
    }

    /// The peer gives no token.
    pub const fn no_token() -> Self {
        Self::Broken(Broken::NoToken)
    }

    /// Whether the peer refused the request for who asked, and not for what.
    pub const fn is_denied(&self) -> bool {
        matches!(self, Self::Broken(Broken::Refused(403)))
    }

    /// What the state machine is told.
    pub fn failure(&self) -> FetchFailure {
        match self {
            Self::Busy(after) => FetchFailure::Refused(Refusal::Busy(*after)),
            // It may have met an importer that was gone before this node came: what that one vouched for is
            // of no use here until somebody has proved the blob.
            Self::Corrupt(Corrupt::Importer) => FetchFailure::Unvouched,
            Self::NotHere => FetchFailure::Refused(Refusal::NotHere),
            Self::Broken(Broken::Stalled(_) | Broken::NoToken) => FetchFailure::Stalled,
            Self::Broken(Broken::Dial(error)) if error.kind() == io::ErrorKind::TimedOut => FetchFailure::Stalled,
            Self::Broken(_) => FetchFailure::Broken,
            Self::Corrupt(Corrupt::Bytes | Corrupt::Signature) => FetchFailure::Corrupt,
        }
    }

    /// A short word for the metrics, where the peer did what none should.
    const fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Corrupt(Corrupt::Bytes) => Some("corrupt"),
            Self::Corrupt(Corrupt::Signature) => Some("bad_signature"),
            Self::Corrupt(Corrupt::Importer) => Some("unknown_importer"),
            Self::Broken(Broken::Answer(_) | Broken::Length { .. }) => Some("bad_answer"),
            Self::Broken(Broken::Stalled(_)) => Some("stalled"),
            Self::Busy(_) | Self::NotHere | Self::Broken(_) => None,
        }
    }
}

/// The fetching end of the data plane.
pub struct Client {
    pub(super) pool: Pool,
    peers: Arc<dyn Peers>,
    buffers: Buffers,
    metrics: Arc<Metrics>,
}

impl Client {
    /// One that shows `identity`. Without one it speaks plain HTTP, and its requests need tokens.
    pub fn new(identity: Option<Identity>, peers: Arc<dyn Peers>, limits: Limits, metrics: Arc<Metrics>) -> Self {
        let buffers = Buffers::new(limits.fetch_bytes);
        Self { pool: Pool::new(identity, limits), peers, buffers, metrics }
    }

    /// Fetches one piece. Waits while the memory for pieces, or the connections to this peer, are
    /// all in use. Drop the future to cancel.
    pub async fn fetch(&self, request: &PieceRequest) -> Result<Piece, FetchError> {
        self.counted(self.try_fetch(request).await)
    }

    /// Counts what the peer did that none should.
    pub(super) fn counted<T>(&self, came: Result<T, FetchError>) -> Result<T, FetchError> {
        if let Some(reason) = came.as_ref().err().and_then(FetchError::reason) {
            self.metrics.peer_rejected.get_or_create(&ReasonLabels { reason }).inc();
        }
        came
    }

    /// The bytes of a body from this peer, of which so many have come.
    pub(super) fn received(&self, peer: PeerId, count: usize) -> Received<'_> {
        let zone = self.peers.member(peer).unwrap_or(ZoneRelation::Unknown);
        Received { count: count as u64, zone, metrics: &self.metrics }
    }

    /// Closes idle connections to a peer: it is banned, or gone.
    pub fn forget(&self, peer: PeerId) {
        self.pool.forget(peer);
    }

    /// Bytes that pieces may still take.
    pub fn available(&self) -> usize {
        self.buffers.available()
    }

    async fn try_fetch(&self, request: &PieceRequest) -> Result<Piece, FetchError> {
        let span = request.layout.piece(u64::from(request.piece));
        let len = usize::try_from(span.len()).ok().filter(|len| *len > 0);
        let len = len.ok_or(FetchError::Broken(Broken::NoSuchPiece))?;
        let mut bytes = self.buffers.take(len).await;
        let told = match self.exchange(request, &mut bytes, false).await {
            // An idle connection was closed under us: no sign of anything.
            Err(Failed::Stale) => self.exchange(request, &mut bytes, true).await,
            other => other,
        }?;
        let (blob, layout, piece) = (request.blob, request.layout, request.piece);
        let (known, is_known) = (request.known.unwrap_or(told), request.known.is_some());
        let check = move || {
            if !is_known && !is_signed(&known, &blob, &layout, piece) {
                return Err(Corrupt::Signature);
            }
            if chaining_value(span.start, &bytes) != known.cv { Err(Corrupt::Bytes) } else { Ok(bytes) }
        };
        // 8 MiB of BLAKE3 are milliseconds that other connections of this thread would wait.
        let checked = tokio::task::spawn_blocking(check).await;
        let bytes = checked.map_err(|error| FetchError::Broken(Broken::Check(error)))?.map_err(FetchError::Corrupt)?;
        Ok(Piece { bytes, attest: known })
    }

    /// One request and its answer. The body is in `bytes` then, unchecked.
    async fn exchange(&self, request: &PieceRequest, bytes: &mut [u8], fresh: bool) -> Result<Attest, Failed> {
        let PieceRequest { peer, address, patience, .. } = *request;
        let path = Path::Piece(Target { blob: request.blob, piece: request.piece });
        let (mut connection, answer, early) =
            self.ask((peer, address), &path, request.token.as_ref(), patience, fresh).await?;
        let attest = self.told(request, &answer, bytes.len())?;
        let Some((head, rest)) = bytes.split_at_mut_checked(early.len()) else {
            return Err(Failed::broken(Broken::Answer("more bytes than it says")));
        };
        head.copy_from_slice(&early);
        let mut received = self.received(peer, early.len());
        for block in rest.chunks_mut(BLOCK) {
            let read = timeout(patience, connection.stream.read_exact(block)).await;
            read.map_err(|_| Failed::broken(Broken::Stalled(patience)))?.map_err(Failed::io)?;
            received.count += block.len() as u64;
            request.activity.touch();
        }
        if !answer.close {
            self.pool.keep(connection);
        }
        Ok(attest)
    }

    /// A connection on which this was asked and granted: the head of the answer, and what came of the body with
    /// it.
    pub(super) async fn ask(
        &self,
        (peer, address): (PeerId, SocketAddr),
        path: &Path,
        token: Option<&Token>,
        patience: Duration,
        fresh: bool,
    ) -> Result<(Connection, Answer, Vec<u8>), Failed> {
        let taken = self.pool.take(peer, address, fresh).await;
        let mut connection = taken.map_err(|error| Failed::broken(Broken::Dial(error)))?;
        let asked = timeout(patience, ask(&mut connection, address, path, token)).await;
        let (answer, early) = asked.map_err(|_| Failed::broken(Broken::Stalled(patience)))??;
        if answer.status == 200 {
            return Ok((connection, answer, early));
        }
        let error = match answer.status {
            503 => FetchError::Busy(answer.retry_after.unwrap_or(BUSY).min(BUSY_MAX)),
            404 => FetchError::NotHere,
            status => FetchError::Broken(Broken::Refused(status)),
        };
        if answer.length == Some(0) && early.is_empty() && !answer.close {
            self.pool.keep(connection);
        }
        Err(Failed::For(error))
    }

    /// The attest that the piece is to be checked with, from an answer whose length is right. Before
    /// the body: of what nobody vouches for not a byte is read.
    fn told(&self, request: &PieceRequest, answer: &Answer, len: usize) -> Result<Attest, Failed> {
        has_length(answer, len as u64)?;
        if let Some(known) = request.known {
            return Ok(known);
        }
        let attest = answer.attest.ok_or_else(|| Failed::broken(Broken::Answer("no attest")))?;
        if !self.peers.may_attest(attest.importer) {
            return Err(Failed::For(FetchError::Corrupt(Corrupt::Importer)));
        }
        Ok(attest)
    }
}

/// Why an exchange failed.
pub(super) enum Failed {
    /// The connection had been idle and was closed before it gave an answer.
    Stale,
    For(FetchError),
}

impl Failed {
    pub(super) const fn broken(broken: Broken) -> Self {
        Self::For(FetchError::Broken(broken))
    }

    pub(super) const fn io(error: io::Error) -> Self {
        Self::broken(Broken::Io(error))
    }
}

impl From<Failed> for FetchError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::For(error) => error,
            // Only the first exchange takes an idle connection.
            Failed::Stale => Self::Broken(Broken::Io(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

/// Whether the body of an answer is as long as it has to be.
pub(super) fn has_length(answer: &Answer, expected: u64) -> Result<(), Failed> {
    match answer.length {
        Some(told) if told == expected => Ok(()),
        Some(told) => Err(Failed::broken(Broken::Length { told, expected })),
        None => Err(Failed::broken(Broken::Answer("no length"))),
    }
}

/// Sends the request and reads the answer's head, and what came of the body with it.
async fn ask(
    connection: &mut Connection,
    address: SocketAddr,
    path: &Path,
    token: Option<&Token>,
) -> Result<(Answer, Vec<u8>), Failed> {
    let token = token.map_or_else(String::new, |token| format!("{}: {token}\r\n", token::HEADER));
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{token}\r\n");
    let is_reused = connection.is_reused;
    let stale = |error| if is_reused { Failed::Stale } else { Failed::io(error) };
    connection.stream.write_all(head.as_bytes()).await.map_err(stale)?;
    connection.stream.flush().await.map_err(stale)?;
    let mut buffer = Vec::with_capacity(HEAD_MAX);
    loop {
        match read_some(&mut connection.stream, &mut buffer).await {
            Ok(0) if buffer.is_empty() => return Err(stale(io::ErrorKind::UnexpectedEof.into())),
            Ok(0) => return Err(Failed::broken(Broken::Answer("half a head"))),
            Ok(_) => {}
            Err(error) if buffer.is_empty() => return Err(stale(error)),
            Err(error) => return Err(Failed::io(error)),
        }
        if let Some((answer, end)) = parse(&buffer).map_err(|wrong| Failed::broken(Broken::Answer(wrong.0)))? {
            buffer.drain(..end);
            return Ok((answer, buffer));
        }
    }
}

async fn read_some(stream: &mut Stream, buffer: &mut Vec<u8>) -> io::Result<usize> {
    // No more than a head may have: the rest belongs into the piece's own buffer.
    let room = HEAD_MAX - buffer.len().min(HEAD_MAX - 1);
    stream.take(room as u64).read_buf(buffer).await
}

/// Counts the bytes of a body, also of one that breaks off or is cancelled.
pub(super) struct Received<'a> {
    pub(super) count: u64,
    zone: ZoneRelation,
    metrics: &'a Metrics,
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        let labels = PeerBytesLabels { direction: "received", zone_relation: self.zone.as_str() };
        self.metrics.peer_bytes.get_or_create(&labels).inc_by(self.count);
    }
}
