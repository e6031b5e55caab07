//! The control program: scatter-allgather over bare TCP, the time that a topology allows.
//!
//! The origin cuts F bytes into a share for each node and sends every node its own; a node passes each
//! byte of its share on to all others as it arrives. Every byte leaves the origin once, and every link
//! is full from the start to the end. There is nothing to decide, hash or store, so what this takes
//! longer than the bound is the topology's own, and a swarm cannot be blamed for it.
//! The bytes are zeros, and only counted.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::net::Place;

/// One read or write.
const CHUNK: usize = 64 * 1024;

/// A topology in which nothing moves for so long is broken.
const PATIENCE: Duration = Duration::from_secs(300);

/// Which connection is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// The node that sends, or `None` for the origin.
    pub from: Option<usize>,
    /// The node that receives.
    pub to: usize,
}

/// Gives `bytes` to every node and says how long that took. `route` may put something, such as a
/// [`Proxy`](crate::proxy::Proxy), between two places: it gives back the address to connect to.
pub async fn scatter_allgather(
    origin: &Place,
    nodes: &[Place],
    bytes: u64,
    mut route: impl FnMut(Pair, SocketAddr) -> Result<SocketAddr>,
) -> Result<Duration> {
    // Nobody sends before everybody is connected.
    let mut connections = Vec::new();
    for to in 0..nodes.len() {
        for from in std::iter::once(None).chain((0..nodes.len()).filter(|from| *from != to).map(Some)) {
            let pair = Pair { from, to };
            let place = from.map_or(origin, |from| &nodes[from]);
            let connection = connect(place, &nodes[to], |address| route(pair, address)).await;
            connections.push((pair, connection.with_context(|| format!("no connection for {pair:?}"))?));
        }
    }
    let count = nodes.len() as u64;
    let share = |node: usize| bytes * (node as u64 + 1) / count - bytes * node as u64 / count;
    // How much of its own share each node has so far.
    let progress: Vec<_> = (0..nodes.len()).map(|_| watch::Sender::new(0)).collect();
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (Pair { from, to }, (sender, receiver)) in connections {
        // The origin has everything from the start, and what peers send is not sent on.
        let (whose, have, arrived) = match from {
            None => (to, watch::Sender::new(share(to)).subscribe(), progress[to].clone()),
            Some(from) => (from, progress[from].subscribe(), watch::Sender::new(0)),
        };
        tasks.spawn(send(sender, share(whose), have));
        tasks.spawn(receive(receiver, share(whose), arrived));
    }
    drop(progress);
    let all = async {
        while let Some(task) = tasks.join_next().await {
            task??;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, all).await.context("the control program is stuck")??;
    Ok(start.elapsed())
}

/// Both ends of a connection.
async fn connect(
    from: &Place,
    to: &Place,
    route: impl FnOnce(SocketAddr) -> Result<SocketAddr>,
) -> Result<(TcpStream, TcpStream)> {
    let listener = to.listen(SocketAddr::new(to.address(), 0))?;
    let sender = from.connect(route(listener.local_addr()?)?).await?;
    let (receiver, _) = listener.accept().await?;
    Ok((sender, receiver))
}

/// Sends `bytes`, each when the sender has it.
async fn send(mut stream: TcpStream, bytes: u64, mut have: watch::Receiver<u64>) -> Result<()> {
    let zeros = vec![0; CHUNK];
    let mut sent = 0;
    while sent < bytes {
        // When the node has its whole share, nobody is left to tell of more.
        let there = *have.wait_for(|have| *have > sent).await.context("a node lost its origin")?;
        let count = (there - sent).min(CHUNK as u64);
        stream.write_all(&zeros[..usize::try_from(count)?]).await?;
        sent += count;
    }
    Ok(stream.shutdown().await?)
}

/// Receives `bytes`, and tells how many are there.
async fn receive(mut stream: TcpStream, bytes: u64, arrived: watch::Sender<u64>) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    while received < bytes {
        let count = stream.read(&mut buffer).await?;
        ensure!(count > 0, "a sender left after {received} of {bytes} bytes");
        received += count as u64;
        arrived.send_replace(received);
    }
    Ok(())
}
