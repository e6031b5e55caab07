//! One client of the data plane from its first request to its last: read a head, ask, answer, again.
//!
//! What is not exactly a request for a piece, or for the values of all pieces, ends the connection: the
//! other end is this same program.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_core::Digest;
use darter_core::range::Span;
use darter_core::swarm::PeerId;
use darter_core::swarm::target::{Path, Target};
use darter_core::swarm::token::Token;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::answer::Answer;
use super::server::{Client, Shared};
use super::{BLOCK, Decision, Gate, Limits, Source, Upload, ZoneRelation};
use crate::head::{self, Head, Method, Parsed};
use crate::log::chain;
use crate::metrics::PeerBytesLabels;
use crate::mirror::send::{self, Patience, SendError};
use crate::store;

/// What one deadline covers where the kernel sends the file: more, because there is nothing to do in
/// between.
const PLAIN_BLOCK: u64 = 1024 * 1024;

/// How long the end of a connection may take that is of no use any more.
const GOODBYE: Duration = Duration::from_secs(1);

/// What bytes go over.
pub(super) enum Wire {
    Tls(Box<TlsStream<TcpStream>>),
    Plain(TcpStream),
}

/// The connection is over, and how.
enum End {
    /// The client closed or went away, or we stop.
    Done,
    /// Something was wrong with what the client did: a word for the metrics, and the last answer.
    Rejected(&'static str, Option<u16>),
}

/// Serves one connection until either side ends it, or `stop` does: between requests at once, in a
/// body when `cut` follows.
pub(super) async fn serve<S: Source>(
    mut wire: Wire,
    client: Client,
    shared: &Shared<S>,
    stop: &CancellationToken,
    cut: &CancellationToken,
) {
    let mut buffer = Vec::new();
    let mut patience = shared.limits.handshake;
    let end = loop {
        // Who connects has something to ask: a place is not held by somebody who only looks in.
        let head = match stop.run_until_cancelled(wire.read_head(&mut buffer, patience, shared)).await {
            Some(Ok(head)) => head,
            Some(Err(end)) => break end,
            None => break End::Done,
        };
        match cut.run_until_cancelled(answer(&mut wire, client, &head, shared)).await {
            Some(Ok(())) if !head.close => patience = shared.limits.idle,
            Some(Err(end)) => break end,
            Some(Ok(())) | None => break End::Done,
        }
    };
    if let End::Rejected(reason, status) = end {
        debug!(?client, reason, "ending a connection for what its client did");
        shared.rejected(reason);
        if let Some(status) = status {
            let last = Answer { close: true, ..Answer::empty(status) };
            // The connection ends either way; a client that is gone is no news.
            let _ = timeout(GOODBYE, wire.write(last.to_string().as_bytes())).await;
        }
    }
    let _ = timeout(GOODBYE, wire.shutdown()).await;
}

impl Wire {
    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        match self {
            Self::Tls(stream) => stream.read_buf(buffer).await,
            Self::Plain(socket) => socket.read_buf(buffer).await,
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tls(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
            Self::Plain(socket) => socket.write_all(bytes).await,
        }
    }

    async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(stream) => stream.shutdown().await,
            Self::Plain(socket) => socket.shutdown().await,
        }
    }

    /// Reads until the buffer starts with a whole head. Its first byte has to come within `patience`.
    async fn read_head<S>(
        &mut self,
        buffer: &mut Vec<u8>,
        patience: Duration,
        shared: &Shared<S>,
    ) -> Result<Head, End> {
        let mut deadline = None;
        loop {
            if !buffer.is_empty() {
                match head::parse(buffer) {
                    Parsed::Whole(head, end) => {
                        buffer.drain(..end);
                        return Ok(*head);
                    }
                    Parsed::Broken(_) => return Err(End::Rejected("garbage", Some(400))),
                    Parsed::Partial => _ = deadline.get_or_insert_with(|| Instant::now() + shared.limits.head),
                }
            }
            let until = deadline.unwrap_or_else(|| Instant::now() + patience);
            buffer.reserve(1024);
            match timeout_at(until, self.read(buffer)).await {
                Err(_) if deadline.is_some() => return Err(End::Rejected("slow_head", None)),
                Err(_) | Ok(Ok(0) | Err(_)) => return Err(End::Done),
                Ok(Ok(_)) => {}
            }
        }
    }

    /// Sends a head and the bytes that an upload names. Adds to `sent` the body's as they go.
    async fn send<S>(
        &mut self,
        head: &[u8],
        upload: &Upload,
        shared: &Shared<S>,
        sent: &mut u64,
    ) -> Result<(), SendError> {
        let patience = shared.limits.block;
        let Upload { file, span, .. } = upload;
        match self {
            Self::Tls(stream) => {
                let mut buffer = shared.buffers.take(BLOCK).await;
                let (mut at, mut filled) = (span.start, head.len());
                buffer[..filled].copy_from_slice(head);
                while at < span.end {
                    let room = BLOCK - filled;
                    let count = usize::try_from(span.end - at).map_or(room, |left| left.min(room));
                    let end = at + count as u64;
                    let warm = async {
                        store::warm(file, Span { start: at, end }).await;
                        Ok(())
                    };
                    send::from_disk(patience, warm).await?;
                    let block = filled + count;
                    file.read_exact_at(&mut buffer[filled..block], at).map_err(SendError::Store)?;
                    write_within(stream, &buffer[..block], patience).await?;
                    (at, filled) = (end, 0);
                    *sent += count as u64;
                }
                let flushed = timeout(patience, stream.flush()).await;
                flushed.map_err(|_| SendError::Slow(patience))?.map_err(SendError::Client)
            }
            Self::Plain(socket) => {
                let both = Patience { client: patience, pull: patience };
                send::bytes(socket, head, true, both).await?;
                let mut at = span.start;
                while at < span.end {
                    let block = Span { start: at, end: span.end.min(at + PLAIN_BLOCK) };
                    let moved =
                        timeout(patience, send::file(socket, file, block, None, both, |count| *sent += count)).await;
                    moved.map_err(|_| SendError::Slow(patience))??;
                    at = block.end;
                }
                Ok(())
            }
        }
    }
}

/// One block, all of it within `patience`: that is also the least rate that keeps a slot.
async fn write_within(stream: &mut TlsStream<TcpStream>, bytes: &[u8], patience: Duration) -> Result<(), SendError> {
    let written = timeout(patience, stream.write_all(bytes)).await;
    written.map_err(|_| SendError::Slow(patience))?.map_err(SendError::Client)
}

/// Who asks: TLS has proved it, or the token does.
fn who<S>(client: Client, head: &Head, blob: &Digest, shared: &Shared<S>) -> Result<PeerId, End> {
    let address: IpAddr = match client {
        Client::Peer(peer) => return Ok(peer),
        Client::Address(address) => address,
    };
    let denied = || End::Rejected("token", Some(403));
    let Gate::Token(secret) = &shared.gate else { return Err(denied()) };
    let token: Token = head.token.as_deref().and_then(|text| text.parse().ok()).ok_or_else(denied)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    token.check(secret, blob, address, now).map_err(|error| {
        debug!(%address, ?token, %error, "token refused");
        denied()
    })
}

/// Answers one request. `Err`: the connection ends.
async fn answer<S: Source>(wire: &mut Wire, client: Client, head: &Head, shared: &Shared<S>) -> Result<(), End> {
    let garbage = || End::Rejected("garbage", Some(400));
    if head.method != Method::Get || head.has_body {
        return Err(garbage());
    }
    let path: Path = head.target.parse().map_err(|_| garbage())?;
    let peer = who(client, head, path.blob(), shared)?;
    let Some(zone) = shared.source.member(peer) else {
        return Err(End::Rejected("not_member", Some(403)));
    };
    match path {
        Path::Piece(target) => give_piece(wire, (peer, zone), target, shared).await,
        Path::Values(blob) => give_values(wire, zone, blob, shared).await,
    }
}

async fn give_values<S: Source>(
    wire: &mut Wire,
    zone: ZoneRelation,
    blob: Digest,
    shared: &Shared<S>,
) -> Result<(), End> {
    let Limits { decision, block, .. } = shared.limits;
    let found = async {
        // Kept until the answer is written: it is in memory until then. Nobody closes it.
        let place = shared.values.acquire().await.ok()?;
        Some((place, shared.source.values(blob).await))
    };
    let Ok(Some((_place, values))) = timeout(decision, found).await else {
        return refuse(wire, 503, Some(decision), shared).await;
    };
    let Some(values) = values else { return refuse(wire, 404, None, shared).await };
    let body = values.as_flattened();
    let head = Answer::with_body(body.len() as u64).to_string();
    let mut sent = Sent { count: 0, zone, shared };
    let written = async {
        wire.write(head.as_bytes()).await?;
        for part in body.chunks(BLOCK) {
            wire.write(part).await?;
            sent.count += part.len() as u64;
        }
        Ok::<_, io::Error>(())
    };
    match timeout(block, written).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Done),
        Err(_) => Err(End::Rejected("slow_client", None)),
    }
}

async fn give_piece<S: Source>(
    wire: &mut Wire,
    (peer, zone): (PeerId, ZoneRelation),
    target: Target,
    shared: &Shared<S>,
) -> Result<(), End> {
    let asked = timeout(shared.limits.decision, shared.source.ask(peer, target.blob, target.piece)).await;
    let decision = asked.unwrap_or_else(|_| {
        warn!(%peer, blob = %target.blob, piece = target.piece, "no decision about a piece in time");
        Decision::Busy(shared.limits.decision)
    });
    let upload = match decision {
        // No blob has an empty piece.
        Decision::Serve(upload) if upload.span.is_empty() => return refuse(wire, 404, None, shared).await,
        Decision::Serve(upload) => upload,
        Decision::Busy(after) => return refuse(wire, 503, Some(after), shared).await,
        Decision::NotHere => return refuse(wire, 404, None, shared).await,
        Decision::Forbidden => return refuse(wire, 403, None, shared).await,
    };
    let text = Answer { attest: upload.attest, ..Answer::with_body(upload.span.len()) }.to_string();
    let mut sent = Sent { count: 0, zone, shared };
    match wire.send(text.as_bytes(), &upload, shared, &mut sent.count).await {
        Ok(()) => Ok(()),
        Err(error @ SendError::Slow(_)) => {
            debug!(%peer, blob = %target.blob, piece = target.piece, sent = sent.count, %error, "dropping a slow client");
            Err(End::Rejected("slow_client", None))
        }
        Err(error @ SendError::Client(_)) => {
            // Ordinary: the piece came from somebody else, and the request was cancelled.
            debug!(%peer, blob = %target.blob, piece = target.piece, error = %chain(&error), "client went away");
            Err(End::Done)
        }
        Err(error) => {
            warn!(%peer, blob = %target.blob, piece = target.piece, error = %chain(&error), "cut an upload short");
            Err(End::Done)
        }
    }
}

/// Counts the bytes of a body, also of one that is cut.
struct Sent<'a, S> {
    count: u64,
    zone: ZoneRelation,
    shared: &'a Shared<S>,
}

impl<S> Drop for Sent<'_, S> {
    fn drop(&mut self) {
        let labels = PeerBytesLabels { direction: "sent", zone_relation: self.zone.as_str() };
        self.shared.metrics.peer_bytes.get_or_create(&labels).inc_by(self.count);
    }
}

/// An answer without a body, after which the client may ask again.
async fn refuse<S>(wire: &mut Wire, status: u16, after: Option<Duration>, shared: &Shared<S>) -> Result<(), End> {
    let text = Answer { retry_after: after, ..Answer::empty(status) }.to_string();
    match timeout(shared.limits.block, wire.write(text.as_bytes())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(End::Done),
    }
}
