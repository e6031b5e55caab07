//! The registry mirror that containerd asks, on the node's loopback.
//!
//! It never fails a pull: before headers any failure is a quick 404, after them the connection
//! ends in a FIN short of the length, and containerd goes on at the origin. Here is the listener;
//! `connection` serves one client, `routes` decides what it gets, `send` moves the bytes, `chunks`
//! knows what a stop waits for.

mod answer;
mod chunks;
mod connection;
mod routes;
mod seen;
pub(crate) mod send;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Config;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::sites::Sites;

use routes::Routes;
pub use seen::Seen;

/// containerd opens a new connection for each blob, and a node starts many pods at once: a full
/// queue would cost each of them a dial timeout.
const BACKLOG: u32 = 4096;

/// How often it is said that there is no place left: every connection that waits is counted.
const FULL_TOLD_EVERY: Duration = Duration::from_secs(60);

/// After an error of accept (out of file descriptors, mostly) there is nothing to do but wait.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the mirror cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (mirror.listen){}", hint(.source))]
pub struct BindError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        // Dragonfly's dfdaemon listens on 4001 too.
        io::ErrorKind::AddrInUse => {
            "; another program has it, such as another darter agent or Dragonfly's dfdaemon: `ss -ltnp` shows which"
        }
        _ => "",
    }
}

/// The mirror, listening.
pub struct Mirror {
    listener: TcpListener,
    routes: Arc<Routes>,
    metrics: Arc<Metrics>,
    max_connections: usize,
    drain: Duration,
}

impl Mirror {
    /// Listens where the configuration says. Nothing is answered before `run`.
    pub fn bind(config: &Config, sites: Arc<Sites>, images: Images, metrics: Arc<Metrics>) -> Result<Self, BindError> {
        let address = config.mirror.listen;
        let listener = listen(address).map_err(|source| BindError { address, source })?;
        let routes = Arc::new(Routes::new(config, sites, images, metrics.clone()));
        Ok(Self {
            listener,
            routes,
            metrics,
            max_connections: config.mirror.max_connections,
            drain: config.agent.drain.0,
        })
    }

    /// Where it listens: the port is the real one where 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// When containerd asked last.
    pub fn seen(&self) -> Seen {
        self.routes.seen()
    }

    /// Serves until `stop`. Then idle connections end, bodies get a while to finish, and what is
    /// asked for in that while gets 404, but for the chunks of pulls that no other host can finish.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, routes, metrics, max_connections, drain } = self;
        let places = Arc::new(Semaphore::new(max_connections));
        let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
        let mut crowd = Crowd { metrics: metrics.clone(), told: None };
        let serve = |(place, socket): (OwnedSemaphorePermit, TcpStream)| {
            let (routes, stop, cut, metrics) = (routes.clone(), stop.clone(), cut.clone(), metrics.clone());
            metrics.mirror_connections.inc();
            connections.spawn(async move {
                connection::serve(socket, &routes, &stop, &cut).await;
                metrics.mirror_connections.dec();
                drop(place);
            });
        };
        while let Some(accepted) = stop.run_until_cancelled(accept(&listener, &places, &mut crowd)).await {
            serve(accepted);
        }
        connections.close();
        if !routes.chunks().is_quiet() {
            info!(at_most = ?drain, "containerd reads a blob in chunks; answering them until it has all");
        }
        let grace = tokio::time::sleep(drain);
        tokio::pin!(grace);
        loop {
            let over = async {
                connections.wait().await;
                routes.chunks().quiet().await;
            };
            tokio::select! {
                accepted = accept(&listener, &places, &mut crowd) => serve(accepted),
                () = over => return,
                () = &mut grace => break,
            }
        }
        drop(listener);
        if !connections.is_empty() {
            info!(bodies = connections.len(), "cutting bodies short; containerd goes on at the origin");
        }
        cut.cancel();
        connections.wait().await;
    }
}

/// Says that there is no place left, and counts it.
struct Crowd {
    metrics: Arc<Metrics>,
    told: Option<Instant>,
}

impl Crowd {
    fn is_full(&mut self) {
        self.metrics.mirror_full.inc();
        if self.told.is_none_or(|at| at.elapsed() >= FULL_TOLD_EVERY) {
            self.told = Some(Instant::now());
            warn!("as many connections as there may be (mirror.max_connections): new ones wait until one ends");
        }
    }
}

/// The next connection, with its place among them.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    crowd: &mut Crowd,
) -> (OwnedSemaphorePermit, TcpStream) {
    if places.available_permits() == 0 {
        crowd.is_full();
    }
    loop {
        // Without a place a connection waits in the kernel's queue, where containerd waits for it at
        // most as long as for a dial.
        let Ok(place) = places.clone().acquire_owned().await else {
            // Nobody closes it.
            std::future::pending().await
        };
        match listener.accept().await {
            Ok((socket, _)) => return (place, socket),
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for connections of the run before to time out.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Whether the mirror answers as containerd needs it: what hosts.toml depends on.
pub async fn self_test(address: SocketAddr) -> Result<(), SelfTestError> {
    let answered = tokio::time::timeout(SELF_TEST, ask(address)).await;
    let head = answered.map_err(|_| SelfTestError::Silent)?.map_err(SelfTestError::Io)?;
    if head.starts_with(b"HTTP/1.1 200 ") { Ok(()) } else { Err(SelfTestError::Answer) }
}

/// A mirror that needs longer for `/v2/` would delay every request of a pull.
const SELF_TEST: Duration = Duration::from_secs(2);

/// Why the self-test failed.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// No answer in time.
    #[error("the mirror gives no answer within {SELF_TEST:?}")]
    Silent,
    /// No connection.
    #[error("the mirror cannot be reached")]
    Io(#[source] io::Error),
    /// An answer, but not 200.
    #[error("the mirror does not answer /v2/ with 200")]
    Answer,
}

async fn ask(address: SocketAddr) -> io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let address = match address.ip() {
        ip if ip.is_unspecified() && ip.is_ipv4() => SocketAddr::from(([127, 0, 0, 1], address.port())),
        ip if ip.is_unspecified() => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port())),
        _ => address,
    };
    let mut socket = TcpStream::connect(address).await?;
    socket.write_all(b"GET /v2/ HTTP/1.1\r\nHost: self-test\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    socket.take(4096).read_to_end(&mut answer).await?;
    Ok(answer)
}
