//! The control plane: connections to the other agents, and messages on them.
//!
//! libp2p over TCP behind a swarm key. Everybody is connected to everybody: a member is who said
//! hello on a connection that stands, and stops being one with its last connection. A node that
//! exchanges pieces in another way (TLS, or plaintext) is connected, and no member. `addresses` says
//! whom to dial, `peers` who is there, `session` writes and reads, `behaviour` is what libp2p does,
//! `driver` is the loop, and `directory` what the rest of the agent knows of it.
//! Not here: what is said, which the core decides.

mod addresses;
mod behaviour;
mod directory;
mod driver;
mod peers;
mod session;
mod streams;
#[cfg(test)]
mod tests;
mod transport;

/// What a connection is made of, for peers that say on it what they like.
pub mod raw {
    pub use super::streams::{StreamEvent, Streams};
    pub use super::transport::{multiaddr, transport};
}

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::Digest;
use darter_core::stale::{Question, Seen};
use darter_core::swarm::token::Token;
use darter_core::swarm::{Members, Message, PeerId, Zone};
use libp2p::pnet::PreSharedKey;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use self::directory::Directory;
pub use self::driver::Control;
use self::session::Outgoing;
use crate::metrics::{Metrics, ReasonLabels};

/// Events that the rest of the agent did not take yet. Then readers wait, and their peers with them.
const EVENTS: usize = 1024;
/// Orders to the loop: bans, which are rare.
const ORDERS: usize = 64;

/// How the control plane is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The port of the blob exchange, which the others are told.
    pub exchange_port: u16,
    /// Where this node stands.
    pub zone: Zone,
    /// Who has it belongs to the swarm.
    pub key: PreSharedKey,
    /// Peers and addresses, at most.
    pub max_members: usize,
    /// Whether to ask peers for others: a list of some names is not everybody.
    pub wants_peers: bool,
    /// Whether this node keeps a copy of what the others pull.
    pub is_seed: bool,
    /// Whether pieces go in plaintext: then only to and from nodes where they do too.
    pub is_plain: bool,
    /// darter's version.
    pub version: String,
    /// Waits.
    pub limits: Limits,
}

/// The waits of the control plane.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A connection has done all its handshakes by then. Also what a wrong key costs a caller.
    pub handshake: Duration,
    /// And said hello in both directions.
    pub hello: Duration,
    /// A peer that says nothing is asked whether it lives.
    pub ping_every: Duration,
    /// And answers within this.
    pub ping_patience: Duration,
    /// A peer that broke the rules is not spoken to for so long: a bad version should not cost more
    /// than its own node, and be taken back when it is replaced.
    pub ban: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            hello: Duration::from_secs(5),
            ping_every: Duration::from_secs(5),
            ping_patience: Duration::from_secs(5),
            ban: Duration::from_secs(60),
        }
    }
}

/// Why the control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The keys for noise.
    #[error("cannot set up encryption for the swarm")]
    Noise(#[from] libp2p::noise::Error),
    /// The address.
    #[error("cannot listen for the swarm on {address} (swarm.listen)")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the control plane tells the rest of the agent.
#[derive(Debug, Clone)]
pub enum ControlEvent {
    /// Who is alive, this node included.
    Members(Members),
    /// The last connection to a peer is gone.
    Lost(PeerId),
    /// A peer said something.
    Message {
        /// Who.
        from: PeerId,
        /// About which blob.
        blob: Digest,
        /// What.
        message: Message,
        /// Dropped when it was handled: then the peer may say more.
        turn: Turn,
    },
    /// A peer wants the right to read a blob here.
    TokenWanted {
        /// Who.
        from: PeerId,
        /// Which blob.
        blob: Digest,
        /// As with a message.
        turn: Turn,
    },
    /// A peer gives this node the right to read a blob there.
    Token {
        /// Who.
        from: PeerId,
        /// Which blob.
        blob: Digest,
        /// The right.
        token: Token,
        /// As with a message.
        turn: Turn,
    },
    /// A peer wants to know what this node saw at a registry.
    SeenWanted {
        /// Who.
        from: PeerId,
        /// What.
        question: Question,
        /// As with a message.
        turn: Turn,
    },
    /// A peer tells what it saw.
    Seen {
        /// Who.
        from: PeerId,
        /// Of the question.
        number: u64,
        /// Nothing: it does not know.
        seen: Option<Seen>,
        /// As with a message.
        turn: Turn,
    },
}

/// The place of a word among those of its peer that were not handled yet.
#[derive(Debug, Clone)]
pub struct Turn(#[expect(dead_code, reason = "it is held, and never looked at")] Arc<OwnedSemaphorePermit>);

/// How the swarm stands, for `/readyz`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Other members.
    pub peers: usize,
    /// Connections, those included that have not said hello.
    pub connections: usize,
    /// Addresses of others that are known.
    pub addresses: usize,
    /// Dials since the start at which somebody answered that has another key, or is no agent.
    pub strangers: u64,
    /// Nodes that are connected and no members: one of the two exchanges pieces over TLS, the other in
    /// plaintext.
    pub apart: usize,
}

enum Order {
    Ban(PeerId, Duration),
}

/// What the rest of the agent does with the control plane. Cheap to clone.
#[derive(Clone)]
pub struct ControlHandle {
    directory: Arc<Directory>,
    orders: mpsc::Sender<Order>,
    metrics: Arc<Metrics>,
    standing: watch::Receiver<Standing>,
    me: PeerId,
    address: SocketAddr,
}

impl ControlHandle {
    /// Tells a peer something. Never waits: a message to nobody, or to a peer that does not keep up,
    /// is dropped and counted, which the protocol expects of a wire.
    pub fn send(&self, to: PeerId, blob: Digest, message: Message) {
        self.queue(to, Outgoing::Message(blob, message));
    }

    /// Asks a peer for the right to read a blob there. Like a message, it may get lost.
    pub fn want_token(&self, to: PeerId, blob: Digest) {
        self.queue(to, Outgoing::TokenWanted(blob));
    }

    /// Gives a peer the right to read a blob here. Like a message, it may get lost.
    pub fn give_token(&self, to: PeerId, blob: Digest, token: Token) {
        self.queue(to, Outgoing::Token(blob, token));
    }

    /// Asks a peer that [`can`](Self::can) answer what it saw at a registry. Like a message, it may get lost.
    pub fn want_seen(&self, to: PeerId, question: Question) {
        self.queue(to, Outgoing::SeenWanted(question));
    }

    /// Tells a peer what this node saw. Like a message, it may get lost.
    pub fn tell_seen(&self, to: PeerId, number: u64, seen: Option<Seen>) {
        self.queue(to, Outgoing::Seen(number, seen));
    }

    fn queue(&self, to: PeerId, outgoing: Outgoing) {
        let route = self.directory.route(&to);
        let reason = match route.as_ref().map(|route| route.queue.try_reserve()) {
            Some(Ok(place)) => return place.send(outgoing),
            Some(Err(mpsc::error::TrySendError::Full(()))) => "full",
            Some(Err(mpsc::error::TrySendError::Closed(()))) | None => "gone",
        };
        self.metrics.swarm_dropped.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Ends every connection to a peer and makes none for a while.
    pub fn ban(&self, peer: PeerId, period: Duration) {
        self.directory.ban(peer, Instant::now() + period);
        if self.orders.try_send(Order::Ban(peer, period)).is_err() {
            tracing::warn!(%peer, "too many bans at once; this peer stays");
        }
    }

    /// Where a member's blob exchange listens, at the address of its control connection, and its zone.
    /// `None`: it is not connected.
    pub fn member(&self, peer: PeerId) -> Option<(SocketAddr, Zone)> {
        self.directory.route(&peer).map(|route| (route.exchange, route.zone))
    }

    /// Whether a member can do something that not every version can.
    pub fn can(&self, peer: PeerId, feature: u64) -> bool {
        self.directory.route(&peer).is_some_and(|route| route.features & feature == feature)
    }

    /// All members that can do something, and the address that each speaks from.
    pub fn all_that_can(&self, feature: u64) -> Vec<(PeerId, IpAddr)> {
        self.directory.all_that_can(feature)
    }

    /// Whether what a peer attests counts: it is a member or was one, and is not banned.
    pub fn is_trusted(&self, peer: PeerId) -> bool {
        self.directory.is_trusted(&peer)
    }

    /// This node's name.
    pub const fn me(&self) -> PeerId {
        self.me
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How the swarm stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }
}
