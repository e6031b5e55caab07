//! What the mirror would cost with hyper's body instead of its own sendfile: a server of one file,
//! written the plain way. A thread reads ahead, frame by frame, and hyper sends.
//!
//! It is a process of its own, because its processor time is measured.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::{Bytes, BytesMut};
use darter_tests::net::{Place, Port};
use darter_tests::process::Process;
use darter_tests::scratch::Scratch;
use futures_util::stream;
use http::{Response, header};
use http_body_util::StreamBody;
use hyper::body::{Body, Frame};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// The first argument of a program that calls [`serve_if_asked`].
const SERVE: &str = "serve-with-hyper";
/// Frames read ahead: while one is sent the next is read.
const AHEAD: usize = 2;

/// A running server.
pub struct HyperFile {
    address: SocketAddr,
    process: Process,
    _port: Port,
    // Last: the directory goes when the process is gone.
    _dir: Scratch,
}

impl HyperFile {
    /// Starts this very program once more, to serve `file` in frames of so many bytes.
    pub async fn start(file: &Path, frame_bytes: usize) -> Result<Self> {
        let dir = Scratch::new()?;
        let port = Place::Host.port()?;
        let address = SocketAddr::new(Place::Host.address(), port.number());
        let mut command = Place::Host.command(std::env::current_exe()?);
        command.arg(SERVE).arg(address.to_string()).arg(file).arg(frame_bytes.to_string());
        let process = Process::start("hyper", command, &dir.join("log"))?;
        Place::Host.wait_for(address, Duration::from_secs(10)).await.with_context(|| process.log())?;
        Ok(Self { address, process, _port: port, _dir: dir })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Processor time used so far.
    pub fn cpu(&self) -> Result<Duration> {
        Ok(self.process.usage()?.cpu)
    }
}

/// Serves until the end of the process, if the arguments say so. Whether they did.
pub async fn serve_if_asked() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [verb, address, file, frame_bytes] = arguments.as_slice() else { return Ok(false) };
    if verb != SERVE {
        return Ok(false);
    }
    serve(address.parse()?, file.into(), frame_bytes.parse()?).await?;
    Ok(true)
}

async fn serve(address: SocketAddr, file: PathBuf, frame_bytes: usize) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let file = Arc::new(File::open(&file).with_context(|| format!("cannot open {}", file.display()))?);
    let size = file.metadata()?.len();
    if frame_bytes == 0 {
        bail!("frames of nothing");
    }
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let file = file.clone();
        tokio::spawn(async move {
            let service = service_fn(move |_| {
                let body = body(file.clone(), size, frame_bytes);
                let response = Response::builder().header(header::CONTENT_LENGTH, size).body(body);
                async move { response }
            });
            // A client that goes away is no news.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

fn body(file: Arc<File>, size: u64, frame_bytes: usize) -> impl Body<Data = Bytes, Error = io::Error> {
    let (frames, read) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut at = 0;
        while at < size {
            let count = usize::try_from(size - at).unwrap_or(usize::MAX).min(frame_bytes);
            let mut frame = BytesMut::zeroed(count);
            let outcome = file.read_exact_at(&mut frame, at).map(|()| frame.freeze());
            if frames.blocking_send(outcome).is_err() {
                return;
            }
            at += count as u64;
        }
    });
    StreamBody::new(stream::unfold(read, |mut read| async {
        let frame: io::Result<Bytes> = read.recv().await?;
        Some((frame.map(Frame::data), read))
    }))
}
