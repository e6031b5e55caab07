//! The data plane between nodes: pieces of blobs over HTTP/1.1, keep-alive, on connections of their own.
//!
//! `GET /p/<sha256 of the blob, hex>/<index of the piece>`, and `GET /v/<sha256>` for what all pieces of a
//! blob are (32 bytes of BLAKE3 each). Over TLS 1.3 both ends are known by their
//! libp2p identity (`identity`); with `tls` off a token from the control plane is the gate, and the
//! kernel sends the file (`Gate`). `server` listens, `connection` answers one client, `client`
//! fetches and believes no byte before its attest is checked, `values` asks what the pieces are, `answer` is
//! the head of what comes back, `buffers` bounds the memory of both.
//! Not here: who has what, whom to ask, whom to serve: `darter_core::swarm` decides that.

pub mod answer;
mod buffers;
mod client;
mod connection;
mod dial;
mod identity;
mod server;
#[cfg(test)]
mod tests;
mod values;

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use darter_core::Digest;
use darter_core::range::Span;
use darter_core::swarm::PeerId;
use darter_core::swarm::attest::Attest;
use darter_core::swarm::token::Secret;

pub use buffers::{Buffer, Buffers};
pub use client::{Client, FetchError, Piece, PieceRequest};
pub use identity::{Identity, IdentityError, is_signed};
pub use server::{BindError, Server};
pub use values::ValuesRequest;

/// Bytes of one read, one write and one turn. Encryption in larger steps gains nothing, smaller ones
/// cost: 16 KiB a step is a third slower on one connection.
const BLOCK: usize = 256 * 1024;

/// Where another node stands, for the metrics: bytes between zones cost money.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZoneRelation {
    /// In ours.
    Same,
    /// In another.
    Other,
    /// One of the two zones is not known.
    Unknown,
}

impl ZoneRelation {
    /// The label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Other => "other",
            Self::Unknown => "unknown",
        }
    }
}

/// What the data plane asks the control plane about others.
pub trait Peers: Send + Sync + 'static {
    /// Whether `peer` is connected on the control plane as a member now, and where it stands. Nobody
    /// else is served.
    fn member(&self, peer: PeerId) -> Option<ZoneRelation>;

    /// Whether an attest by `importer` counts: it is a member, or was one that is not banned. An
    /// identity that anybody can make up must not vouch for anything.
    fn may_attest(&self, importer: PeerId) -> bool;
}

/// Where the pieces are that others ask for.
pub trait Source: Peers {
    /// Whether `peer` gets piece `piece` of `blob` now. The future is dropped when this takes longer
    /// than `Limits::decision`, or the agent stops.
    fn ask(&self, peer: PeerId, blob: Digest, piece: u32) -> impl Future<Output = Decision> + Send;

    /// The BLAKE3 chaining values of all pieces of a blob that is here whole. `None`: it is not. Bounded as
    /// `ask` is, and `Limits::values` at once.
    fn values(&self, blob: Digest) -> impl Future<Output = Option<Vec<[u8; 32]>>> + Send;
}

/// What a request gets.
#[derive(Debug)]
pub enum Decision {
    /// The piece.
    Serve(Upload),
    /// All slots are taken: ask again after this.
    Busy(Duration),
    /// The piece is not here.
    NotHere,
    /// This peer gets nothing.
    Forbidden,
}

/// A piece on its way out.
pub struct Upload {
    /// The file that holds it. Its name may go meanwhile; the bytes stay.
    pub file: Arc<File>,
    /// Where the piece is in the file.
    pub span: Span,
    /// Who vouches for it.
    pub attest: Option<Attest>,
    /// Dropped when the upload is over, well or badly: gives the slot back.
    pub slot: Box<dyn Send + Sync>,
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upload({:?}, {:?})", self.span, self.attest)
    }
}

/// How a server knows who asks.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "a node has one")]
pub enum Gate {
    /// TLS 1.3 with this node's identity; the client's is demanded.
    Tls(Identity),
    /// Plain TCP, for networks that encrypt already: a token made with this secret.
    Token(Secret),
}

/// How long each end may take, and how much there may be at once.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections that are served: two of each of up to 48 neighbours, and as many again that are
    /// being replaced or come from peers that name us as theirs.
    pub connections: usize,
    /// Connections of one peer: two, and two more while those are found to be dead.
    pub connections_per_peer: usize,
    /// Handshakes at once, of clients that nobody knows yet: later ones wait in the kernel's queue.
    pub handshakes: usize,
    /// From a connection to the end of its handshake.
    pub handshake: Duration,
    /// From the first byte of a request head to its last.
    pub head: Duration,
    /// A connection without a request is closed after this.
    pub idle: Duration,
    /// A block that a client does not take within this ends its connection: a slow one holds a slot.
    pub block: Duration,
    /// What a decision may take: far more than any does.
    pub decision: Duration,
    /// Uploads that may still end after the stop.
    pub drain: Duration,
    /// Memory of uploads.
    pub upload_bytes: usize,
    /// Answers about all pieces of a blob at once, each of 2 MiB at most. Later ones wait, as long as a decision
    /// may take.
    pub values: usize,
    /// Memory of pieces that are fetched, checked, and not yet given back by whoever asked.
    pub fetch_bytes: usize,
    /// Connections that a client opens to one peer.
    pub pool_per_peer: usize,
    /// From a dial to the end of its handshake.
    pub dial: Duration,
    /// A connection that was not used for this long is not used again: less than `idle`, so that a
    /// request does not meet the close of its connection.
    pub reuse: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_peer: 4,
            handshakes: 64,
            handshake: Duration::from_secs(5),
            head: Duration::from_secs(5),
            idle: Duration::from_secs(60),
            block: Duration::from_secs(5),
            decision: Duration::from_secs(5),
            drain: Duration::from_secs(5),
            upload_bytes: 8 * 1024 * 1024,
            values: 8,
            fetch_bytes: 64 * 1024 * 1024,
            pool_per_peer: 2,
            dial: Duration::from_secs(2),
            reuse: Duration::from_secs(45),
        }
    }
}
