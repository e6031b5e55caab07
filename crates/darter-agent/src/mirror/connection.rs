//! One client connection from its first byte to its last: read a head, answer, again.
//!
//! How it ends is part of the contract with containerd: a body that cannot be finished ends in a
//! FIN short of its length, after which containerd goes on at the byte reached; an RST would fail
//! the whole pull. Linux sends an RST when a socket is closed with unread bytes, so `close` reads
//! what is left first.

use std::io;
use std::time::Duration;

use rustix::net::Shutdown;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::answer::{Answer, Body};
use super::routes::Routes;
use super::send::{self, Patience, SendError, Sent};
use crate::head::{self, HEAD_MAX, Head, Method, Parsed};
use crate::log::chain;

/// How long a closed connection is read until the client closes too.
const LINGER: Duration = Duration::from_secs(2);

/// How long a connection that was just made may still send its first request once the agent stops:
/// it may be a chunk, and containerd repeats none whose connection ends without an answer.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// The connection is over, and how.
enum End {
    /// The client closed, or asked for the close.
    Done,
    /// Something was wrong with what the client did; the word is for the metrics.
    Rejected(&'static str),
    /// A body was cut short, by us or by a client that left.
    Cut,
}

/// Serves one connection until either side ends it, or `stop` does: between requests at once, before
/// the first after a moment, in a body when `cut` follows.
pub(super) async fn serve(socket: TcpStream, routes: &Routes, stop: &CancellationToken, cut: &CancellationToken) {
    // Heads and short bodies must not wait for the client's ACK of the one before.
    if let Err(error) = socket.set_nodelay(true) {
        debug!(%error, "client connection was gone at once");
        return;
    }
    let mut buffer = Vec::new();
    let mut is_new = true;
    let end = loop {
        let stopped = async {
            stop.cancelled().await;
            if is_new {
                // Boxed for the reason below.
                Box::pin(cut.run_until_cancelled(tokio::time::sleep(FIRST_REQUEST))).await;
            }
        };
        let head = tokio::select! {
            head = read_head(&socket, &mut buffer, routes.patience().client) => head,
            () = stopped => break End::Done,
        };
        is_new = false;
        let head = match head {
            Ok(Some(head)) => head,
            Ok(None) => break End::Done,
            Err(Broken { status, reason }) => {
                refuse(&socket, status, routes.patience()).await;
                break End::Rejected(reason);
            }
        };
        let stopping = stop.is_cancelled();
        let closing = head.close || head.has_body || stopping;
        // Boxed, because a task is as large as the largest thing it may ever wait for, and 10,000 idle
        // connections wait for none of it.
        match Box::pin(answer(&socket, &head, stopping, closing, routes, cut)).await {
            Ok(()) if closing => break End::Done,
            Ok(()) => {}
            Err(end) => break end,
        }
    };
    if let End::Rejected(reason) = end {
        routes.rejected(reason);
    }
    close(socket).await;
}

/// A request that gets no proper answer.
struct Broken {
    status: Option<u16>,
    reason: &'static str,
}

/// Reads until the buffer starts with a whole head. `None`: the client closed, or was idle too long.
async fn read_head(socket: &TcpStream, buffer: &mut Vec<u8>, patience: Duration) -> Result<Option<Head>, Broken> {
    // An idle connection costs no buffer: 10,000 of them must not cost 160 MiB.
    if buffer.is_empty() {
        buffer.shrink_to_fit();
        match timeout(patience, socket.readable()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Ok(None),
        }
    }
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        match head::parse(buffer) {
            Parsed::Whole(head, end) => {
                buffer.drain(..end);
                return Ok(Some(*head));
            }
            Parsed::Broken(status) => return Err(Broken { status: Some(status), reason: "garbage" }),
            Parsed::Partial => {}
        }
        match tokio::time::timeout_at(deadline, socket.readable()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(None),
            // No 408: containerd would repeat it at once.
            Err(_) => return Err(Broken { status: None, reason: "slow_head" }),
        }
        buffer.reserve(1024.min(HEAD_MAX + 1 - buffer.len().min(HEAD_MAX)));
        match socket.try_read_buf(buffer) {
            Ok(0) if buffer.is_empty() => return Ok(None),
            Ok(0) => return Err(Broken { status: None, reason: "half_head" }),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Ok(None),
        }
    }
}

/// Answers one request. `Err`: the body was cut short, and so the connection must end.
async fn answer(
    socket: &TcpStream,
    head: &Head,
    stopping: bool,
    closing: bool,
    routes: &Routes,
    cut: &CancellationToken,
) -> Result<(), End> {
    let (counted, answer) = routes.answer(head, stopping).await;
    let mut answer = if head.method == Method::Head { answer.without_body() } else { answer };
    let patience = routes.patience();
    let mut sent = Sent::default();
    let outcome = tokio::select! {
        outcome = write(socket, &mut answer, closing, patience, &mut sent) => outcome,
        () = cut.cancelled() => Err(SendError::Stopped),
    };
    routes.count(&counted, &answer, &sent);
    match outcome {
        Ok(()) => {
            routes.given(&counted, &answer, &sent);
            Ok(())
        }
        Err(error @ SendError::Client(_)) => {
            // Ordinary: containerd closes each chunk of a parallel fetch early.
            debug!(target = %head.target, sent = sent.bytes, error = %chain(&error), "client went away");
            Err(End::Cut)
        }
        Err(error @ SendError::Slow(_)) => {
            info!(target = %head.target, sent = sent.bytes, of = answer.body.len(), error = %chain(&error),
                "ended the connection of a client that does not read");
            Err(End::Rejected("slow_client"))
        }
        Err(error) => {
            let digest = answer.share.as_ref().map(|share| share.digest);
            info!(?digest, sent = sent.bytes, of = answer.body.len(), error = %chain(&error),
                "cut a body short; containerd goes on at the origin");
            routes.handed_over(answer.share.as_ref(), &error);
            Err(End::Cut)
        }
    }
}

async fn write(
    socket: &TcpStream,
    answer: &mut Answer,
    closing: bool,
    patience: Patience,
    sent: &mut Sent,
) -> Result<(), SendError> {
    let head = answer.head(closing);
    match &mut answer.body {
        Body::Bytes(body) => {
            send::bytes(socket, head.as_bytes(), !body.is_empty(), patience).await?;
            send::bytes(socket, body, false, patience).await?;
            sent.add(body.len() as u64);
            Ok(())
        }
        Body::Absent(_) => send::bytes(socket, head.as_bytes(), false, patience).await,
        Body::File(blob, span, doubt) => {
            send::bytes(socket, head.as_bytes(), true, patience).await?;
            send::file(socket, blob.file(), *span, doubt.as_ref(), patience, |count| sent.add(count)).await
        }
        Body::Trail(reader) => {
            send::bytes(socket, head.as_bytes(), true, patience).await?;
            send::trail(socket, reader, patience, sent).await
        }
    }
}

/// Answers what is not HTTP with a bare status, if it has one.
async fn refuse(socket: &TcpStream, status: Option<u16>, patience: Patience) {
    let Some(status) = status else { return };
    let text = format!("HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    // The connection ends either way; a client that is gone is no news.
    let _ = send::bytes(socket, text.as_bytes(), false, patience).await;
}

/// Ends a connection with a FIN: says that nothing more comes, and reads until the client is done.
async fn close(socket: TcpStream) {
    if rustix::net::shutdown(&socket, Shutdown::Write).is_err() {
        return;
    }
    let drained = async {
        let mut scrap = [0; 4096];
        while socket.readable().await.is_ok() {
            match socket.try_read(&mut scrap) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    // A client that neither closes nor stops sending gets what it asks for.
    let _ = timeout(LINGER, drained).await;
}
