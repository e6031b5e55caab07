//! The client against small servers on real sockets, each of which misbehaves in one way.

mod bodies;
mod credentials;
mod ecr;
mod foreign;
mod places;
mod retries;
mod signed;
mod tokens;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use darter_core::units::Seconds;
use darter_core::{Digest, Reference, Repository};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// One request as a server saw it.
#[derive(Clone)]
struct Seen {
    method: String,
    /// Path and query.
    target: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }
}

/// One answer. The connection is closed after it.
#[derive(Clone)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Content-Length, if it is not that of the body.
    length: Option<usize>,
    /// Before the head.
    delay: Duration,
    /// After the body, before the connection is closed.
    linger: Duration,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let (headers, delay, linger) = (Vec::new(), Duration::ZERO, Duration::ZERO);
        Self { status, headers, body: body.into(), length: None, delay, linger }
    }

    fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn redirect(to: impl Into<String>) -> Self {
        Self::new(307, "").header("location", to)
    }

    /// The range of `content` that was asked for.
    fn ranged(seen: &Seen, content: &[u8]) -> Self {
        let range = seen.header("range").and_then(darter_core::range::ByteRange::parse);
        let Some(span) = range.map(|range| range.resolve(content.len() as u64).unwrap()) else {
            return Self::new(200, content);
        };
        let part = &content[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()];
        let range = format!("bytes {}-{}/{}", span.start, span.end - 1, content.len());
        Self::new(206, part).header("content-range", range)
    }
}

struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1", answer).await
    }

    async fn start_at(host: &str, answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (seen.clone(), Arc::new(answer));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, log.clone(), answer.clone()));
            }
        });
        Self { address, seen, task }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// How many requests came for a path that starts like this.
    fn count(&self, path: &str) -> usize {
        self.seen().iter().filter(|seen| seen.path().starts_with(path)).count()
    }
}

async fn serve(mut stream: TcpStream, log: Arc<Mutex<Vec<Seen>>>, answer: Arc<impl Fn(&Seen) -> Reply>) {
    let Some(seen) = read(&mut stream).await else { return };
    let reply = answer(&seen);
    let is_head = seen.method == "HEAD";
    log.lock().unwrap().push(seen);
    tokio::time::sleep(reply.delay).await;
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", reply.length.unwrap_or(reply.body.len())));
    let _ = stream.write_all(head.as_bytes()).await;
    if !is_head {
        let _ = stream.write_all(&reply.body).await;
    }
    tokio::time::sleep(reply.linger).await;
}

async fn read(stream: &mut TcpStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers: Vec<_> = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    let mut seen = Seen { method, target, headers, body: String::new() };
    // The body is read, or closing would reset the connection.
    let length: usize = seen.header("content-length").map_or(0, |length| length.parse().unwrap());
    while bytes.len() < end + 4 + length {
        stream.read_buf(&mut bytes).await.ok()?;
    }
    seen.body = String::from_utf8_lossy(&bytes[end + 4..]).into_owned();
    Some(seen)
}

/// Settings for tests: short waits, and storages at 127.0.0.2 are allowed.
fn config() -> Config {
    let mut config = Config::embedded();
    config.origin.stall = Seconds(Duration::from_millis(300));
    config.origin.header_timeout = Seconds(Duration::from_secs(3));
    config.origin.attempts = 1;
    config.origin.allow_local = vec!["127.0.0.2".to_owned()];
    config
}

fn registry(server: &Server) -> RegistryConfig {
    let mut registry = RegistryConfig::named("reg.example".parse().unwrap());
    registry.endpoint = Some(server.url());
    registry.plain_http = true;
    registry
}

async fn origin_with(config: &Config, registry: &RegistryConfig) -> Origin {
    let shared = Shared::new(config).await.unwrap();
    Origin::new(config, registry, &[], &shared, metrics()).unwrap()
}

async fn origin(server: &Server) -> Origin {
    origin_with(&config(), &registry(server)).await
}

fn foreign(url: &str, resolve: bool) -> ForeignOrigin {
    ForeignOrigin { url: url.to_owned(), resolve }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("0", "0"))
}

fn repository() -> Repository {
    "team/app".parse().unwrap()
}

fn tag() -> Reference {
    "latest".parse().unwrap()
}

const CONTENT: &[u8] = b"0123456789abcdefghij";

fn blob_digest() -> Digest {
    Digest::of(CONTENT)
}

fn caller() -> Credential {
    Credential::Caller(Basic::of("user", "hunter2"))
}

async fn blob(origin: &Origin, span: Option<(u64, u64)>, who: &Credential) -> Result<Vec<u8>, OriginError> {
    let span = span.map(|(start, end)| Span { start, end });
    let mut stream = origin.blob(&repository(), &blob_digest(), span, who).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

/// An error and its causes, as they are logged, and as they are debugged.
fn printed(error: &OriginError) -> String {
    format!("{} {error:?}", crate::log::chain(error))
}
