//! The other way to send pieces: over a stream of libp2p, TCP with noise and yamux, as the control
//! plane has it. The server answers the requests of a node's data plane, plainly written.
//!
//! Without a libp2p swarm: a connection is driven by a task of its own, as a swarm would, and nothing
//! else is on it. So this is the best that such a stream can do here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use anyhow::{Context as _, Result, bail};
use darter_core::pieces::Layout;
use darter_core::swarm::target::Target;
use futures_util::future::poll_fn;
use futures_util::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt as _, SubstreamBox};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, PortUse, TransportEvent};
use libp2p::core::upgrade::Version;
use libp2p::core::{Endpoint, Transport as _};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, noise, tcp, yamux};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// One read of the file and one write: yamux cuts smaller frames itself.
const CHUNK: usize = 256 * 1024;

type Transport = Boxed<(PeerId, StreamMuxerBox)>;

/// A node that answers on streams, until it is dropped.
pub struct StreamServer {
    address: Multiaddr,
    _accept: AbortOnDropHandle<()>,
}

impl StreamServer {
    /// Serves the pieces of a file.
    pub async fn start(file: Arc<File>, layout: Layout) -> Result<Self> {
        let mut transport = transport()?;
        let any = Multiaddr::empty().with(Protocol::Ip4([127, 0, 0, 1].into())).with(Protocol::Tcp(0));
        transport.listen_on(ListenerId::next(), any)?;
        let address = match next(&mut transport).await {
            TransportEvent::NewAddress { listen_addr, .. } => listen_addr,
            other => bail!("libp2p does not listen: {other:?}"),
        };
        let accept = tokio::spawn(async move {
            loop {
                if let TransportEvent::Incoming { upgrade, .. } = next(&mut transport).await
                    && let Ok((_, muxer)) = upgrade.await
                {
                    // A connection at a time is all that the client makes, and it waits for its end.
                    let served = serve(muxer, &file, layout).await;
                    if let Err(error) = served {
                        eprintln!("libp2p stream: {error:#}");
                    }
                }
            }
        });
        Ok(Self { address, _accept: AbortOnDropHandle::new(accept) })
    }

    /// A stream to it, for a thread that may block.
    pub async fn connect(&self) -> Result<Blocking> {
        let mut transport = transport()?;
        let options = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
        let (_, mut muxer) = transport.dial(self.address.clone(), options)?.await.context("cannot dial")?;
        let stream = poll_fn(|context| {
            // The stream is made by the connection, which must be driven for it.
            let _ = muxer.poll_unpin(context)?;
            muxer.poll_outbound_unpin(context)
        })
        .await?;
        let (streams, _none) = mpsc::channel(1);
        let driver = AbortOnDropHandle::new(tokio::spawn(drive(muxer, streams)));
        Ok(Blocking { stream, runtime: Handle::current(), _driver: driver })
    }
}

/// A stream, read and written by a thread that blocks meanwhile.
pub struct Blocking {
    stream: SubstreamBox,
    runtime: Handle,
    _driver: AbortOnDropHandle<()>,
}

impl io::Read for Blocking {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.runtime.block_on(self.stream.read(buffer))
    }
}

impl io::Write for Blocking {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.runtime.block_on(async {
            let count = self.stream.write(buffer).await?;
            self.stream.flush().await?;
            Ok(count)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.runtime.block_on(self.stream.flush())
    }
}

fn transport() -> Result<Transport> {
    let keys = Keypair::generate_ed25519();
    Ok(tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(&keys)?)
        .multiplex(yamux::Config::default())
        .boxed())
}

type Event = TransportEvent<<Transport as libp2p::Transport>::ListenerUpgrade, io::Error>;

async fn next(transport: &mut Transport) -> Event {
    poll_fn(|context| Pin::new(&mut *transport).poll(context)).await
}

/// Drives a connection to its end, and hands over the streams that the other side opens.
async fn drive(mut muxer: StreamMuxerBox, streams: mpsc::Sender<SubstreamBox>) {
    poll_fn(|context| {
        loop {
            match muxer.poll_inbound_unpin(context) {
                // Nobody waits for a second one.
                Poll::Ready(Ok(stream)) => drop(streams.try_send(stream)),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        match muxer.poll_unpin(context) {
            Poll::Ready(Err(_)) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    })
    .await;
}

async fn serve(muxer: StreamMuxerBox, file: &File, layout: Layout) -> Result<()> {
    // The one stream of the client.
    let (streams, mut opened) = mpsc::channel(1);
    let _driver = AbortOnDropHandle::new(tokio::spawn(drive(muxer, streams)));
    let Some(mut stream) = opened.recv().await else { return Ok(()) };
    let (mut head, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Ok(());
        }
        head.extend_from_slice(&chunk[..count]);
        if head.ends_with(b"\r\n\r\n") {
            answer(&mut stream, &head, file, layout, &mut chunk).await?;
            head.clear();
        }
    }
}

async fn answer(stream: &mut SubstreamBox, head: &[u8], file: &File, layout: Layout, chunk: &mut [u8]) -> Result<()> {
    let head = String::from_utf8_lossy(head);
    let path = head.split(' ').nth(1).context("a request without a path")?;
    let Target { piece, .. } = path.parse::<Target>().context("not the path of a piece")?;
    let span = layout.piece(u64::from(piece));
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", span.end - span.start);
    stream.write_all(head.as_bytes()).await?;
    let mut at = span.start;
    while at < span.end {
        let count = usize::try_from(span.end - at)?.min(chunk.len());
        file.read_exact_at(&mut chunk[..count], at)?;
        stream.write_all(&chunk[..count]).await?;
        at += count as u64;
    }
    Ok(stream.flush().await?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use darter_core::Digest;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn pieces_come_whole_and_in_order_on_one_stream() -> Result<()> {
        // Two pieces of a blob of 1 MiB and a bit.
        let layout = Layout::new((1 << 20) + 5);
        let content: Vec<u8> = (0..layout.size()).map(|n| (n % 251) as u8).collect();
        let mut file = tempfile::tempfile()?;
        file.write_all(&content)?;
        let server = StreamServer::start(Arc::new(file), layout).await?;
        let mut stream = server.connect().await?;
        let read = move || -> Result<Vec<u8>> {
            let mut found = Vec::new();
            for piece in [1, 0] {
                let target = Target { blob: Digest::of(b"blob"), piece };
                stream.write_all(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes())?;
                let span = layout.piece(u64::from(piece));
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", span.end - span.start);
                let mut answer = vec![0; head.len() + usize::try_from(span.end - span.start)?];
                stream.read_exact(&mut answer)?;
                assert!(answer.starts_with(head.as_bytes()));
                found.extend_from_slice(&answer[head.len()..]);
            }
            Ok(found)
        };
        let found =
            tokio::time::timeout(std::time::Duration::from_secs(60), tokio::task::spawn_blocking(read)).await???;
        let (first, second) = content.split_at(1 << 20);
        assert!(found == [second, first].concat(), "other bytes came");
        Ok(())
    }
}
