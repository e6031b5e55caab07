//! The two tasks of a connection: one writes what is queued for the peer, one reads what it says.
//!
//! A reader that is ahead of the rest of the agent waits, and so does its peer: TCP and yamux hold
//! it back, until at the far end messages are dropped before they are queued.

use std::net::SocketAddr;
use std::sync::Arc;

use darter_api::v1;
use darter_core::Digest;
use darter_core::stale::{Question, Seen};
use darter_core::swarm::token::Token;
use darter_core::swarm::{Message, PeerId};
use futures_util::{AsyncRead, AsyncWrite, AsyncWriteExt};
use libp2p::swarm::ConnectionId;
use tokio::sync::{Semaphore, mpsc};

use super::{ControlEvent, Turn};
use crate::swarm::frame::{self, FrameError};
use crate::swarm::wire::{self, Hello, WireError};

/// Messages to one peer that were not written yet. A busy blob has some dozens in a round trip.
pub(super) const QUEUE: usize = 256;
/// Words of one peer, of whatever kind, that were read and not handled yet. Whoever says much fast waits for
/// itself, and the others with it for these at most: past it their words would be late, and their patience over.
pub(super) const TURNS: usize = 32;
/// Lists of addresses of one peer that were read and not handled yet. An agent sends one as it says hello, and
/// the hellos of others wait in the same queue.
const LISTS: usize = 1;
/// Frames that are ready are written together up to here: one write, one record of noise.
const WRITE_BYTES: usize = 64 * 1024;

/// What is written to a peer.
#[derive(Debug)]
pub(super) enum Outgoing {
    Message(Digest, Message),
    Peers(Vec<SocketAddr>),
    /// Asks for the right to read a blob.
    TokenWanted(Digest),
    /// Gives it.
    Token(Digest, Token),
    /// Asks what the peer saw at a registry.
    SeenWanted(Question),
    /// Answers such a question.
    Seen(u64, Option<Seen>),
}

/// What a task tells the loop.
#[derive(Debug)]
pub(super) enum Report {
    Hello(Hello),
    Peers(Vec<SocketAddr>, Turn),
    /// The peer sent what no agent sends.
    Bad(WireError),
    Ended,
}

/// Where the tasks of a connection report to.
#[derive(Clone)]
pub(super) struct Reports {
    pub(super) connection: ConnectionId,
    pub(super) to: mpsc::Sender<(ConnectionId, Report)>,
}

impl Reports {
    async fn tell(&self, report: Report) {
        // The loop is gone only with the whole agent.
        let _ = self.to.send((self.connection, report)).await;
    }
}

/// Writes the hello and then what is queued, until the stream breaks.
pub(super) async fn write(
    mut stream: impl AsyncWrite + Unpin,
    hello: Hello,
    mut queue: mpsc::Receiver<Outgoing>,
    reports: Reports,
) {
    let mut buffer = Vec::new();
    frame::append(&mut buffer, &hello.encode());
    loop {
        if stream.write_all(&buffer).await.is_err() || stream.flush().await.is_err() {
            break;
        }
        buffer.clear();
        let Some(first) = queue.recv().await else { return };
        append(&mut buffer, first);
        while buffer.len() < WRITE_BYTES
            && let Ok(next) = queue.try_recv()
        {
            append(&mut buffer, next);
        }
    }
    reports.tell(Report::Ended).await;
}

fn append(buffer: &mut Vec<u8>, outgoing: Outgoing) {
    let frame = match outgoing {
        Outgoing::Message(blob, message) => {
            wire::encode(&blob, &message).map(|message| v1::Frame { kind: Some(v1::frame::Kind::Message(message)) })
        }
        Outgoing::Peers(addresses) => Ok(wire::encode_peers(addresses)),
        Outgoing::TokenWanted(blob) => Ok(wire::encode_wanted(&blob)),
        Outgoing::Token(blob, token) => Ok(wire::encode_token(&blob, &token)),
        Outgoing::SeenWanted(question) => Ok(wire::encode_question(&question)),
        Outgoing::Seen(number, seen) => wire::encode_seen(number, seen),
    };
    // What is within the bounds of `wire` fits a frame; a test of it says so.
    let is_sent = frame.is_ok_and(|frame| frame::append(buffer, &frame));
    if !is_sent {
        tracing::error!("a message of this node is past its own bounds and was not sent");
    }
}

/// Reads what the peer says, until the stream breaks or the peer breaks the rules. `is_plain`: how this
/// node exchanges pieces.
pub(super) async fn read(
    mut stream: impl AsyncRead + Unpin,
    from: PeerId,
    is_plain: bool,
    events: mpsc::Sender<ControlEvent>,
    reports: Reports,
) {
    let error = match converse(&mut stream, from, is_plain, &events, &reports).await {
        Ok(()) => return,
        Err(FrameError::Bad(error)) => Report::Bad(error),
        Err(FrameError::Stream(_)) => Report::Ended,
    };
    reports.tell(error).await;
}

/// Ends well only with the agent itself.
async fn converse(
    stream: &mut (impl AsyncRead + Unpin),
    from: PeerId,
    is_plain: bool,
    events: &mpsc::Sender<ControlEvent>,
    reports: &Reports,
) -> Result<(), FrameError> {
    use v1::frame::Kind;
    let Kind::Hello(hello) = frame::read(stream).await? else {
        return Err(WireError::Absent("hello before the first message").into());
    };
    let hello = Hello::decode(hello)?;
    let is_apart = hello.is_plain != is_plain;
    reports.tell(Report::Hello(hello)).await;
    let (turns, lists) = (Arc::new(Semaphore::new(TURNS)), Arc::new(Semaphore::new(LISTS)));
    loop {
        match frame::read(stream).await? {
            Kind::Peers(peers) => {
                let list = wire::decode_peers(peers)?;
                let Some(turn) = turn_of(&lists).await else { return Ok(()) };
                reports.tell(Report::Peers(list, turn)).await;
            }
            Kind::Hello(_) => return Err(WireError::Unknown("a second hello").into()),
            // An older version takes this node for a member and speaks to it: no piece could follow.
            _ if is_apart => {}
            kind => {
                let Some(turn) = turn_of(&turns).await else { return Ok(()) };
                if events.send(event(from, kind, turn)?).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// Waits until fewer than all were read and not handled. Nobody closes it.
async fn turn_of(turns: &Arc<Semaphore>) -> Option<Turn> {
    turns.clone().acquire_owned().await.ok().map(|turn| Turn(Arc::new(turn)))
}

/// What a peer that said hello says to the rest of the agent.
fn event(from: PeerId, kind: v1::frame::Kind, turn: Turn) -> Result<ControlEvent, WireError> {
    use v1::frame::Kind;
    Ok(match kind {
        Kind::Message(message) => {
            let (blob, message) = wire::decode(message)?;
            ControlEvent::Message { from, blob, message, turn }
        }
        Kind::SeenWanted(wanted) => ControlEvent::SeenWanted { from, question: wire::decode_question(&wanted)?, turn },
        Kind::Seen(told) => {
            let (number, seen) = wire::decode_seen(&told)?;
            ControlEvent::Seen { from, number, seen, turn }
        }
        Kind::TokenWanted(wanted) => ControlEvent::TokenWanted { from, blob: wire::decode_wanted(&wanted)?, turn },
        Kind::Token(given) => {
            let (blob, token) = wire::decode_token(&given)?;
            ControlEvent::Token { from, blob, token, turn }
        }
        Kind::Hello(_) | Kind::Peers(_) => return Err(WireError::Unknown("not for the rest of the agent")),
    })
}
