//! An HTTP/1.1 server that does to the connection exactly what a test asks for.
//!
//! hyper hides the socket, and rightly so; a fake registry needs it: so many bytes and then FIN, or
//! RST, or silence, and a count of what really went out. Only what a pull sends is understood:
//! a head, and a body with a Content-Length.

use std::future::Future;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::image::Content;
use crate::net::Place;

/// Larger heads and request bodies are not sent by any client of a test.
const HEAD_MAX: usize = 64 * 1024;
const BODY_MAX: usize = 1024 * 1024;

/// One write. Small enough to count and to slow down, large enough to be fast.
const CHUNK: u64 = 64 * 1024;

/// A request, read to its end.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Its path and query, as sent.
    pub target: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Request {
    /// A header as text; empty if absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// All values of a header that may be sent several times, joined.
    pub fn header_list(&self, name: &str) -> String {
        let values: Vec<_> = self.headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
        values.join(", ")
    }

    /// The target without its query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// A value of the query, decoded.
    pub fn query(&self, name: &str) -> Option<String> {
        let pairs = self.target.split_once('?')?.1.split('&').filter_map(|pair| pair.split_once('='));
        let value = pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next()?;
        darter_core::oci::percent_decode(value)
    }
}

/// An answer, and how it is to be sent.
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its headers, but for Content-Length.
    pub headers: HeaderMap,
    /// What its body is a part of.
    pub content: Content,
    /// Which part.
    pub span: Range<u64>,
    /// What goes wrong.
    pub script: Script,
    /// Each grows by every body byte that the kernel took.
    pub sent: Vec<Arc<AtomicU64>>,
    /// Kept until the answer is over, however it ends.
    pub until_sent: Option<Box<dyn Send + Sync>>,
}

impl Reply {
    /// A whole content.
    pub fn new(status: u16, content: Content) -> Self {
        let span = 0..content.len();
        Self {
            status,
            headers: HeaderMap::new(),
            content,
            span,
            script: Script::default(),
            sent: Vec::new(),
            until_sent: None,
        }
    }

    /// A text.
    pub fn text(status: u16, media_type: &str, text: impl Into<Bytes>) -> Self {
        Self::new(status, Content::Bytes(text.into())).header("content-type", media_type)
    }

    /// With one header more.
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        // Values come from this program; one that is no header value is a mistake to be seen.
        let value = HeaderValue::from_str(value).unwrap_or(HeaderValue::from_static("BROKEN VALUE"));
        self.headers.insert(HeaderName::from_static(name), value);
        self
    }
}

/// What goes wrong with an answer. The default is nothing.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Silence before the head. `Duration::MAX` is for ever.
    pub delay: Duration,
    /// After so many body bytes, silence of this length.
    pub stall: Option<(u64, Duration)>,
    /// After so many body bytes (and the silence, if it is at the same place), the end.
    pub end: Option<(u64, Ending)>,
    /// This body byte is sent with all bits turned round.
    pub wrong_byte: Option<u64>,
    /// Content-Length, and the bytes that follow, are so many more (zeros) or fewer.
    pub length_error: i64,
    /// What holds the bytes back, each.
    pub paces: Vec<Arc<Pace>>,
}

/// How a connection ends too early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// As when the server closes it.
    Fin,
    /// As when the server crashes, or closes it with unread input.
    Reset,
}

/// A limit of bytes per second, for one connection or shared by many.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    next: std::sync::Mutex<Instant>,
}

impl Pace {
    /// So many bytes per second from now on.
    pub fn new(bytes_per_second: u64) -> Arc<Self> {
        Arc::new(Self { bytes_per_second: bytes_per_second.max(1), next: std::sync::Mutex::new(Instant::now()) })
    }

    /// The largest write that keeps the flow even: 20 a second at least.
    fn chunk(&self) -> u64 {
        (self.bytes_per_second / 20).clamp(1, CHUNK)
    }

    async fn take(&self, bytes: u64) {
        let now = Instant::now();
        // Timers fire late; what was lost to that, up to this long, may be caught up with.
        let late = now.checked_sub(Duration::from_millis(10)).unwrap_or(now);
        let start = {
            let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let start = (*next).max(late);
            *next = start + Duration::from_nanos(bytes * 1_000_000_000 / self.bytes_per_second);
            start
        };
        tokio::time::sleep_until(start).await;
    }
}

/// What answers requests.
pub trait Service: Send + Sync + 'static {
    /// The answer to one request.
    fn answer(&self, request: Request) -> impl Future<Output = Reply> + Send;
}

/// A server that can go away and come back at the same address.
pub struct Server<S> {
    service: Arc<S>,
    place: Place,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl<S: Service> Server<S> {
    /// Listens at the address of a place, on a free port.
    pub fn start(place: &Place, tls: Option<Arc<ServerConfig>>, service: Arc<S>) -> Result<Self> {
        Self::start_at(place, SocketAddr::new(place.address(), 0), tls, service)
    }

    /// Listens at an address, such as a node's own 127.0.0.1:4001.
    pub fn start_at(
        place: &Place,
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        service: Arc<S>,
    ) -> Result<Self> {
        let listener = place.listen(address)?;
        let address = listener.local_addr()?;
        let mut server = Self { service, place: place.clone(), address, tls, running: None };
        server.run(listener);
        Ok(server)
    }

    /// Where it listens, or did.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Refuses connections from now on and closes those that are open.
    pub async fn down(&mut self) {
        if let Some((stop, task)) = self.running.take() {
            stop.cancel();
            let _ = task.await;
        }
    }

    /// Listens again.
    pub fn up(&mut self) -> Result<()> {
        if self.running.is_none() {
            let listener = self.place.listen(self.address)?;
            self.run(listener);
        }
        Ok(())
    }

    fn run(&mut self, listener: TcpListener) {
        let stop = CancellationToken::new();
        let accept = accept(listener, self.tls.clone(), self.service.clone(), stop.clone());
        self.running = Some((stop, tokio::spawn(accept)));
    }
}

impl<S> Drop for Server<S> {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.running {
            stop.cancel();
        }
    }
}

async fn accept<S: Service>(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    service: Arc<S>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            Ok((stream, _)) = listener.accept() => {
                let (tls, service) = (tls.clone(), service.clone());
                connections.spawn(async move {
                    let _ = stream.set_nodelay(true);
                    // What a client does wrong is seen by the client; there is nobody else to tell.
                    let _ = match tls {
                        Some(config) => match TlsAcceptor::from(config).accept(stream).await {
                            Ok(stream) => serve(stream, &*service).await,
                            Err(error) => Err(error.into()),
                        },
                        None => serve(stream, &*service).await,
                    };
                });
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// A connection that lets its socket be reached.
trait Wire: AsyncRead + AsyncWrite + Unpin + Send {
    fn tcp(&self) -> &TcpStream;
}

impl Wire for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Wire for tokio_rustls::server::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

async fn serve<S: Service>(mut stream: impl Wire, service: &S) -> Result<()> {
    let mut input = BytesMut::new();
    while let Some(request) = read_request(&mut stream, &mut input).await? {
        let head_only = request.method == Method::HEAD;
        let close = request.header("connection").eq_ignore_ascii_case("close");
        let reply = service.answer(request).await;
        match send(&mut stream, &reply, head_only).await? {
            Sent::Whole if !close => {}
            Sent::Whole | Sent::Short(Ending::Fin) => {
                stream.shutdown().await?;
                break;
            }
            Sent::Short(Ending::Reset) => {
                // Let what was written arrive: a reset takes along what still waits to be sent.
                tokio::time::sleep(Duration::from_millis(50)).await;
                rustix::net::sockopt::set_socket_linger(stream.tcp(), Some(Duration::ZERO))?;
                break;
            }
        }
    }
    Ok(())
}

async fn read_request(stream: &mut impl Wire, input: &mut BytesMut) -> Result<Option<Request>> {
    loop {
        if let Some((mut request, head, body)) = parse(input)? {
            while input.len() < head + body {
                ensure!(stream.read_buf(input).await? > 0, "the client left in its body");
            }
            input.advance(head);
            request.body = input.split_to(body).freeze();
            return Ok(Some(request));
        }
        ensure!(input.len() < HEAD_MAX, "the head is too large");
        if stream.read_buf(input).await? == 0 {
            return Ok(None);
        }
    }
}

/// A request without its body, the length of its head, and the length of its body.
fn parse(input: &[u8]) -> Result<Option<(Request, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = parsed.parse(input)? else { return Ok(None) };
    let mut request = Request {
        method: parsed.method.unwrap_or_default().parse()?,
        target: parsed.path.unwrap_or_default().to_owned(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
    };
    for header in parsed.headers {
        request.headers.append(HeaderName::from_bytes(header.name.as_bytes())?, HeaderValue::from_bytes(header.value)?);
    }
    let body = match request.header("content-length") {
        "" => 0,
        length => length.parse().context("content-length")?,
    };
    ensure!(body <= BODY_MAX, "the body is too large");
    Ok(Some((request, head, body)))
}

enum Sent {
    Whole,
    Short(Ending),
}

async fn send(stream: &mut impl Wire, reply: &Reply, head_only: bool) -> Result<Sent> {
    let script = &reply.script;
    silence(stream, script.delay).await?;
    let whole = reply.span.end - reply.span.start;
    let length = whole.saturating_add_signed(script.length_error);
    stream.write_all(head(reply, length).as_bytes()).await?;
    if !head_only {
        let mut offset = 0;
        let mut stall = script.stall;
        loop {
            if let Some((_, time)) = stall.take_if(|(at, _)| offset >= (*at).min(length)) {
                stream.flush().await?;
                silence(stream, time).await?;
            }
            if let Some((at, ending)) = script.end
                && offset >= at.min(length)
            {
                stream.flush().await?;
                return Ok(Sent::Short(ending));
            }
            if offset == length {
                break;
            }
            offset += send_chunk(stream, reply, offset, length).await?;
        }
    }
    stream.flush().await?;
    Ok(Sent::Whole)
}

/// Sends up to the next point where something happens, and says how many bytes that were.
async fn send_chunk(stream: &mut impl Wire, reply: &Reply, offset: u64, length: u64) -> Result<u64> {
    let script = &reply.script;
    let points = [script.stall.map(|(at, _)| at), script.end.map(|(at, _)| at), Some(length)];
    let next = points.into_iter().flatten().filter(|at| *at > offset).min().unwrap_or(length);
    let paced = script.paces.iter().map(|pace| pace.chunk()).min().unwrap_or(CHUNK);
    let size = (next - offset).min(paced).min(CHUNK);
    let mut buffer = vec![0; usize::try_from(size)?];
    // Past the end of the content, where the length is wrong, zeros stay.
    let real = usize::try_from((reply.span.end - reply.span.start).saturating_sub(offset))?.min(buffer.len());
    reply.content.read_at(reply.span.start + offset, &mut buffer[..real]);
    if let Some(wrong) = script.wrong_byte
        && (offset..offset + size).contains(&wrong)
    {
        let at = usize::try_from(wrong - offset)?;
        buffer[at] = !buffer[at];
    }
    for pace in &script.paces {
        pace.take(size).await;
    }
    stream.write_all(&buffer).await?;
    for counter in &reply.sent {
        counter.fetch_add(size, Ordering::Relaxed);
    }
    Ok(size)
}

fn head(reply: &Reply, length: u64) -> String {
    let reason = StatusCode::from_u16(reply.status).ok().and_then(|status| status.canonical_reason());
    let mut text = format!("HTTP/1.1 {} {}\r\n", reply.status, reason.unwrap_or_default());
    for (name, value) in &reply.headers {
        text += &format!("{name}: {}\r\n", value.to_str().unwrap_or_default());
    }
    text + &format!("content-length: {length}\r\n\r\n")
}

/// Waits, unless the client leaves first.
async fn silence(stream: &mut impl Wire, time: Duration) -> Result<()> {
    if time.is_zero() {
        return Ok(());
    }
    // tokio's timers reach 2 years: as good as for ever.
    let time = time.min(Duration::from_secs(60 * 60 * 24 * 365));
    let left = tokio::time::timeout(time, stream.read_u8()).await;
    ensure!(left.is_err(), "the client left, or sent a second request before the first was answered");
    Ok(())
}
