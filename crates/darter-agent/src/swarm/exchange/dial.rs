//! Connections to other nodes: dialled, proved to be theirs, and kept for the next request.
//!
//! Two per neighbour, as many as pieces are asked from it at once. A dropped connection is closed,
//! which is also how a request is cancelled.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use darter_core::swarm::PeerId;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::{Identity, Limits, identity};

/// What bytes go over.
pub(super) type Stream = Either<Box<TlsStream<TcpStream>>, TcpStream>;

/// A connection that nobody else uses now.
pub(super) struct Connection {
    pub(super) stream: Stream,
    /// It has carried a request before: the other end may have closed it meanwhile.
    pub(super) is_reused: bool,
    peer: PeerId,
    address: SocketAddr,
    _place: OwnedSemaphorePermit,
}

/// Connections to all neighbours.
pub(super) struct Pool {
    identity: Option<Identity>,
    limits: Limits,
    neighbours: Mutex<BTreeMap<PeerId, Neighbour>>,
}

struct Neighbour {
    places: Arc<Semaphore>,
    idle: Vec<Idle>,
}

struct Idle {
    stream: Stream,
    address: SocketAddr,
    since: Instant,
}

impl Pool {
    /// No connection yet. Without an identity they are plain TCP.
    pub(super) fn new(identity: Option<Identity>, limits: Limits) -> Self {
        Self { identity, limits, neighbours: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerId, Neighbour>> {
        self.neighbours.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to `peer` at `address`: an idle one, unless it must be `fresh`. Waits while all
    /// connections that it may have are in use.
    pub(super) async fn take(&self, peer: PeerId, address: SocketAddr, fresh: bool) -> io::Result<Connection> {
        let places = self.places(peer);
        let Ok(place) = places.acquire_owned().await else {
            // Nobody closes it.
            std::future::pending().await
        };
        let idle = if fresh { None } else { self.idle(peer, address) };
        let is_reused = idle.is_some();
        let stream = match idle {
            Some(stream) => stream,
            None => timeout(self.limits.dial, self.dial(peer, address)).await??,
        };
        Ok(Connection { stream, is_reused, peer, address, _place: place })
    }

    /// Keeps a connection whose last answer was read to its end.
    pub(super) fn keep(&self, connection: Connection) {
        let Connection { stream, peer, address, .. } = connection;
        if let Some(neighbour) = self.lock().get_mut(&peer) {
            neighbour.idle.push(Idle { stream, address, since: Instant::now() });
        }
    }

    /// Closes what is idle of a peer: it is banned, or gone.
    pub(super) fn forget(&self, peer: PeerId) {
        if let Some(neighbour) = self.lock().get_mut(&peer) {
            neighbour.idle.clear();
        }
    }

    /// Who may have a connection to `peer`. Forgets idle connections that are too old on the way, and
    /// peers without any: the table is as long as the list of neighbours.
    fn places(&self, peer: PeerId) -> Arc<Semaphore> {
        let mut neighbours = self.lock();
        neighbours.retain(|other, neighbour| {
            neighbour.idle.retain(|idle| idle.since.elapsed() < self.limits.reuse);
            let is_used = Arc::strong_count(&neighbour.places) > 1;
            other == &peer || is_used || !neighbour.idle.is_empty()
        });
        let places = self.limits.pool_per_peer;
        let new = || Neighbour { places: Arc::new(Semaphore::new(places)), idle: Vec::new() };
        neighbours.entry(peer).or_insert_with(new).places.clone()
    }

    /// The idle connection that was used last. One to an address where the peer is no more is closed.
    fn idle(&self, peer: PeerId, address: SocketAddr) -> Option<Stream> {
        let mut neighbours = self.lock();
        let neighbour = neighbours.get_mut(&peer)?;
        neighbour.idle.retain(|idle| idle.address == address);
        neighbour.idle.pop().map(|idle| idle.stream)
    }

    async fn dial(&self, peer: PeerId, address: SocketAddr) -> io::Result<Stream> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let Some(identity) = &self.identity else { return Ok(Either::Right(socket)) };
        let config = identity.client_config(peer).map_err(io::Error::other)?;
        let name = ServerName::IpAddress(address.ip().into());
        let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
        if stream.get_ref().1.alpn_protocol() != Some(identity::ALPN) {
            return Err(io::Error::other("the peer speaks another protocol"));
        }
        Ok(Either::Left(Box::new(stream)))
    }
}
