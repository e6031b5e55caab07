//! What a hostile member gives: an exchange that answers every request for a piece with its [`Deed`].

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use darter_agent::swarm::exchange::Identity;
use darter_core::Digest;
use darter_core::pieces::{Layout, chaining_value};
use darter_core::swarm::target::{Path, Target};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::{Deed, Known, lock};

/// The head of a request for a piece has a tenth of this.
const HEAD_MAX: usize = 4096;

#[derive(Clone)]
pub(super) struct Shop {
    pub(super) deed: Deed,
    pub(super) known: Arc<Known>,
    pub(super) identity: Identity,
    pub(super) asked: Arc<AtomicU64>,
}

impl Shop {
    pub(super) async fn run(self, listener: TcpListener) -> anyhow::Result<()> {
        let tls = TlsAcceptor::from(Arc::new(self.identity.server_config()?));
        let mut clients = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (socket, _) = accepted?;
                    let (tls, shop) = (tls.clone(), self.clone());
                    clients.spawn(async move {
                        // Whoever has seen enough hangs up.
                        if let Ok(stream) = tls.accept(socket).await {
                            let _ = shop.serve(stream).await;
                        }
                    });
                }
                Some(_) = clients.join_next() => {}
            }
        }
    }

    async fn serve(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
        let mut head = Vec::new();
        loop {
            head.clear();
            while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_MAX {
                head.push(stream.read_u8().await?);
            }
            let text = String::from_utf8_lossy(&head);
            match text.split(' ').nth(1).and_then(|path| path.parse().ok()) {
                Some(Path::Piece(target)) => {
                    self.asked.fetch_add(1, Ordering::Relaxed);
                    self.answer(&mut stream, target).await?;
                }
                Some(Path::Values(blob)) => self.tell_values(&mut stream, blob).await?,
                None => refuse(&mut stream, "404 Not Here").await?,
            }
            stream.flush().await?;
        }
    }

    fn layout(&self, blob: &Digest) -> Option<Layout> {
        lock(&self.known.blobs).get(blob).copied()
    }

    /// Consistent with the pieces that it gives.
    async fn tell_values(&self, stream: &mut (impl AsyncWrite + Unpin), blob: Digest) -> io::Result<()> {
        let speaks = !matches!(self.deed, Deed::Nothing | Deed::Silence | Deed::LieAndBeSilent);
        let Some(layout) = self.layout(&blob).filter(|_| speaks) else { return refuse(stream, "404 Not Here").await };
        let values: Vec<[u8; 32]> = (0..layout.pieces()).map(|piece| made_up(&layout, piece).1).collect();
        let body = values.as_flattened();
        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes()).await?;
        stream.write_all(body).await
    }

    async fn answer(&self, stream: &mut (impl AsyncWrite + Unpin), target: Target) -> io::Result<()> {
        let Some(layout) = self.layout(&target.blob) else { return refuse(stream, "404 Not Here").await };
        let (mut body, value) = made_up(&layout, u64::from(target.piece));
        let attest = self.identity.attest(&target.blob, &layout, target.piece, value);
        match self.deed {
            Deed::Nothing => return refuse(stream, "404 Not Here").await,
            Deed::Silence => std::future::pending().await,
            Deed::Endless => {
                let head = format!("HTTP/1.1 200 OK\r\ndarter-attest: {attest}\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                loop {
                    stream.write_all(&body).await?;
                }
            }
            Deed::Lie | Deed::LieAndBeSilent => {}
            Deed::Corrupt => body[0] ^= 1,
            Deed::TooLong => body.push(0),
        }
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\ndarter-attest: {attest}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await
    }
}

/// A piece that the registry does not have, and its value.
fn made_up(layout: &Layout, piece: u64) -> (Vec<u8>, [u8; 32]) {
    let span = layout.piece(piece);
    let body = vec![0xd1; usize::try_from(span.len()).unwrap_or(0)];
    let value = chaining_value(span.start, &body);
    (body, value)
}

async fn refuse(stream: &mut (impl AsyncWrite + Unpin), status: &str) -> io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await
}
