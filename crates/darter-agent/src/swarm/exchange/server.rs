//! The listener of the data plane: who gets a connection, and how many there are.
//!
//! Strangers can reach this port. Until its handshake is over a connection costs one of a few
//! places, for seconds at most; after it, a place among all and among those of its peer.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_core::swarm::PeerId;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::connection::{self, Wire};
use super::{Buffers, Gate, Limits, Source, identity};
use crate::log::chain;
use crate::metrics::{Metrics, ReasonLabels};

/// A node that boots with a hundred others is asked by all its neighbours at once.
const BACKLOG: u32 = 1024;

/// After an error of accept (out of file descriptors, mostly) there is nothing to do but wait.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the exchange cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The port is taken, or the address is not ours.
    #[error("cannot listen on {address} for other nodes")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The identity does not do for TLS.
    #[error("cannot serve other nodes over TLS with this node's identity")]
    Tls(#[source] rustls::Error),
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Client {
    /// TLS proved it.
    Peer(PeerId),
    /// Each request will tell.
    Address(IpAddr),
}

/// What all connections share.
pub(super) struct Shared<S> {
    pub(super) source: Arc<S>,
    pub(super) gate: Gate,
    pub(super) limits: Limits,
    pub(super) buffers: Buffers,
    /// Places for answers about all pieces of a blob.
    pub(super) values: Semaphore,
    pub(super) metrics: Arc<Metrics>,
    /// Connections by who is at their other end; none of zero.
    clients: Mutex<BTreeMap<Client, usize>>,
}

impl<S> Shared<S> {
    pub(super) fn rejected(&self, reason: &'static str) {
        self.metrics.peer_rejected.get_or_create(&ReasonLabels { reason }).inc();
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, BTreeMap<Client, usize>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection of `client`, unless it has too many.
    fn enter(self: &Arc<Self>, client: Client) -> Option<Place<S>> {
        let mut clients = self.clients();
        let total: usize = clients.values().sum();
        let count = clients.get(&client).copied().unwrap_or(0);
        if total >= self.limits.connections || count >= self.limits.connections_per_peer {
            return None;
        }
        clients.insert(client, count + 1);
        drop(clients);
        Some(Place { shared: self.clone(), client })
    }
}

/// A connection's place among those that are served.
struct Place<S> {
    shared: Arc<Shared<S>>,
    client: Client,
}

impl<S> Drop for Place<S> {
    fn drop(&mut self) {
        let mut clients = self.shared.clients();
        match clients.get_mut(&self.client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => _ = clients.remove(&self.client),
        }
    }
}

/// The data plane's server, listening.
pub struct Server<S> {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared<S>>,
}

impl<S: Source> Server<S> {
    /// Listens. Nothing is answered before `run`.
    pub fn bind(
        address: SocketAddr,
        gate: Gate,
        source: Arc<S>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BindError> {
        let tls = match &gate {
            Gate::Tls(identity) => Some(TlsAcceptor::from(Arc::new(identity.server_config().map_err(BindError::Tls)?))),
            Gate::Token(_) => None,
        };
        let listener = listen(address).map_err(|source| BindError::Listen { address, source })?;
        let buffers = Buffers::new(limits.upload_bytes);
        let values = Semaphore::new(limits.values);
        let shared = Shared { source, gate, limits, buffers, values, metrics, clients: Mutex::default() };
        Ok(Self { listener, tls, shared: Arc::new(shared) })
    }

    /// Where it listens: the port is the real one where 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`. Then idle connections end, and uploads get a while to finish.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, tls, shared } = self;
        let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
        let handshakes = Arc::new(Semaphore::new(shared.limits.handshakes));
        while let Some((place, socket, address)) = stop.run_until_cancelled(accept(&listener, &handshakes)).await {
            let (shared, tls, stop, cut) = (shared.clone(), tls.clone(), stop.clone(), cut.clone());
            connections.spawn(async move {
                let Some((wire, client)) =
                    stop.run_until_cancelled(greet(socket, address, tls, &shared)).await.flatten()
                else {
                    return;
                };
                drop(place);
                // A key alone must not hold a place: everybody can make one.
                if let Client::Peer(peer) = client
                    && shared.source.member(peer).is_none()
                {
                    return shared.rejected("not_member");
                }
                let Some(_place) = shared.enter(client) else {
                    debug!(?client, "too many connections of other nodes, or of this one; closing the newest");
                    return shared.rejected("too_many");
                };
                connection::serve(wire, client, &shared, &stop, &cut).await;
            });
        }
        drop(listener);
        connections.close();
        if timeout(shared.limits.drain, connections.wait()).await.is_err() {
            info!(uploads = connections.len(), "cutting uploads to other nodes short; they ask somebody else");
            cut.cancel();
            connections.wait().await;
        }
    }
}

/// The next connection, with its place among those whose handshake is not over.
async fn accept(listener: &TcpListener, handshakes: &Arc<Semaphore>) -> (OwnedSemaphorePermit, TcpStream, SocketAddr) {
    loop {
        let Ok(place) = handshakes.clone().acquire_owned().await else {
            // Nobody closes it.
            std::future::pending().await
        };
        match listener.accept().await {
            Ok((socket, address)) => return (place, socket, address),
            Err(error) => {
                warn!(%error, "cannot accept a connection of another node");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Finds out who is there. `None`: nobody that can be served.
async fn greet<S: Source>(
    socket: TcpStream,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    shared: &Shared<S>,
) -> Option<(Wire, Client)> {
    // Heads must not wait for the client's ACK of the body before.
    if let Err(error) = socket.set_nodelay(true) {
        debug!(%error, %address, "connection of another node was gone at once");
        return None;
    }
    let Some(tls) = tls else {
        return Some((Wire::Plain(socket), Client::Address(address.ip().to_canonical())));
    };
    let greeted = timeout(shared.limits.handshake, tls.accept(socket)).await;
    let error = match greeted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => {
            let (_, connection) = stream.get_ref();
            let peer = identity::shown(connection.peer_certificates());
            if let (Some(peer), Some(identity::ALPN)) = (peer, connection.alpn_protocol()) {
                return Some((Wire::Tls(Box::new(stream)), Client::Peer(peer)));
            }
            io::Error::other("it speaks another protocol")
        }
        Err(error) => error,
    };
    debug!(%address, error = %chain(&error), "not another node, or one without an identity");
    // A member that got the piece elsewhere meanwhile hangs up in the middle.
    let is_gone = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    );
    if !is_gone {
        shared.rejected("handshake");
    }
    None
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for connections of the run before to time out.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
