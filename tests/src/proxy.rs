//! A wire that can be made long, cut, or dead, between two places: for kernels without netem.
//!
//! It takes connections at one address and carries their bytes to another. Late bytes, broken
//! connections and silence are what TCP makes of latency, loss and a partition. Not here: lost
//! packets, which [`Network::lose`](crate::net::Network::lose) makes without a proxy, and rates, which
//! the links have.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::net::Place;

/// One read.
const CHUNK: usize = 64 * 1024;

/// Reads that are on their way at once, in one direction of a connection: 16 MiB, which is 100 ms at
/// more than a gigabit a second.
const ON_THE_WAY_MAX: usize = 256;

/// What the wire does now.
#[derive(Debug, Clone, Copy)]
struct Wire {
    delay: Duration,
    silent: bool,
    break_after: Option<u64>,
    /// Connections made before this count changed are reset.
    breaks: u64,
}

/// A running proxy. Its connections end with it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    wire: watch::Sender<Wire>,
    stop: CancellationToken,
}

impl Proxy {
    /// Listens on a free port at `entry` and connects from `exit` to `target`.
    pub fn start(entry: &Place, exit: &Place, target: SocketAddr) -> anyhow::Result<Self> {
        let listener = entry.listen(SocketAddr::new(entry.address(), 0))?;
        let address = listener.local_addr()?;
        let (wire, seen) = watch::channel(Wire { delay: Duration::ZERO, silent: false, break_after: None, breaks: 0 });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, exit.clone(), target, seen)));
        Ok(Self { address, wire, stop })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every byte takes so long, each way; those on their way already keep their time.
    pub fn set_delay(&self, delay: Duration) {
        self.wire.send_modify(|wire| wire.delay = delay);
    }

    /// Nothing passes from now on, and nobody is told. What was held back passes when this ends, as
    /// TCP would send it again.
    pub fn set_silent(&self, silent: bool) {
        self.wire.send_modify(|wire| wire.silent = silent);
    }

    /// Resets every connection that is open now.
    pub fn break_all(&self) {
        self.wire.send_modify(|wire| wire.breaks += 1);
    }

    /// Resets every connection after so many bytes towards the client.
    pub fn break_after(&self, bytes: Option<u64>) {
        self.wire.send_modify(|wire| wire.break_after = bytes);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, exit: Place, target: SocketAddr, wire: watch::Receiver<Wire>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            Ok((client, _)) = listener.accept() => {
                connections.spawn(carry(client, exit.clone(), target, wire.clone()));
            }
        }
    }
}

/// One connection, until both directions are over or it breaks.
async fn carry(mut client: TcpStream, exit: Place, target: SocketAddr, mut wire: watch::Receiver<Wire>) {
    let breaks = wire.borrow_and_update().breaks;
    let _ = client.set_nodelay(true);
    if passes(&mut wire).await.is_err() {
        return;
    }
    // That nobody is there is told to the client by a reset, the nearest to its kernel's refusal.
    let Ok(mut server) = exit.connect(target).await else { return reset(&client) };
    let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
    let up = direction(from_client, to_server, wire.clone(), false);
    let down = direction(from_server, to_client, wire.clone(), true);
    let is_whole = tokio::select! {
        // The first direction that breaks takes the other along.
        both = async { tokio::try_join!(up, down) } => both.is_ok(),
        _ = wire.wait_for(|wire| wire.breaks != breaks) => false,
    };
    if !is_whole {
        reset(&client);
        reset(&server);
    }
}

/// A connection that was reset, by an end or by the wire.
struct Broken;

/// One direction, until its end.
async fn direction(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut wire: watch::Receiver<Wire>,
    can_break: bool,
) -> Result<(), Broken> {
    let (send, mut receive) = mpsc::channel::<(Instant, Bytes)>(ON_THE_WAY_MAX);
    let mut seen = wire.clone();
    let read = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            if from.read_buf(&mut buffer).await.map_err(|_| Broken)? == 0 {
                return Ok(());
            }
            let due = Instant::now() + seen.borrow_and_update().delay;
            send.send((due, buffer.split().freeze())).await.map_err(|_| Broken)?;
        }
    };
    let write = async move {
        let mut carried = 0;
        while let Some((due, mut bytes)) = receive.recv().await {
            tokio::time::sleep_until(due).await;
            let end = passes(&mut wire).await?.break_after.filter(|_| can_break);
            let left = end.map_or(u64::MAX, |end| end.saturating_sub(carried));
            bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            to.write_all(&bytes).await.map_err(|_| Broken)?;
            carried += bytes.len() as u64;
            if end.is_some_and(|end| carried >= end) {
                return Err(Broken);
            }
        }
        to.shutdown().await.map_err(|_| Broken)
    };
    tokio::try_join!(read, write).map(|((), ())| ())
}

/// Waits until the wire is not silent; breaks when the proxy is gone.
async fn passes(wire: &mut watch::Receiver<Wire>) -> Result<Wire, Broken> {
    Ok(*wire.wait_for(|wire| !wire.silent).await.map_err(|_| Broken)?)
}

/// Makes the close of a socket a reset.
fn reset(stream: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}
