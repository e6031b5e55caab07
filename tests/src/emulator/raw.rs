//! One HTTP/1.1 exchange over a socket that is watched: what came, when, and how it ended.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::net::Place;

/// No server of a test sends a larger head.
const HEAD_MAX: usize = 64 * 1024;

/// How an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With the last byte of the body.
    Complete,
    /// The server closed the connection before the last byte.
    Fin,
    /// The server reset the connection.
    Reset,
    /// Nobody listens there.
    Refused,
    /// This client had enough and closed the connection.
    Left,
    /// Nothing came for longer than this client waits.
    Silent,
    /// The body was not asked for (HEAD), or is still being read.
    Open,
}

/// What was asked and what came back.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Where it was asked.
    pub address: SocketAddr,
    /// Method and target.
    pub line: String,
    /// The Range header that was sent; empty if none.
    pub range: String,
    /// The status, if a head came.
    pub status: Option<u16>,
    /// The headers of the answer.
    pub headers: HeaderMap,
    /// Body bytes that came.
    pub bytes: u64,
    /// How it ended.
    pub end: End,
    /// From the start of connecting to the whole head.
    pub head_after: Duration,
}

impl Exchange {
    /// A header of the answer as text; empty if absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Content-Length, if there is one.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length").parse().ok()
    }
}

/// An exchange whose head has come and whose body is read by the caller.
#[derive(Debug)]
pub struct Answer {
    /// What is known so far.
    pub exchange: Exchange,
    stream: Option<TcpStream>,
    early: Vec<u8>,
    patience: Duration,
}

/// Sends a request and reads the head of the answer. That there is none is told by `exchange.end`.
pub async fn send(
    place: &Place,
    address: SocketAddr,
    line: &str,
    headers: &[(String, String)],
    patience: Duration,
) -> Result<Answer> {
    let range = headers.iter().find(|(name, _)| name == "Range").map(|(_, value)| value.clone());
    let exchange = Exchange {
        address,
        line: line.to_owned(),
        range: range.unwrap_or_default(),
        status: None,
        headers: HeaderMap::new(),
        bytes: 0,
        end: End::Open,
        head_after: Duration::ZERO,
    };
    let mut answer = Answer { exchange, stream: None, early: Vec::new(), patience };
    let start = Instant::now();
    match timeout(patience, answer.exchange_heads(place, headers)).await {
        Ok(Ok(stream)) => answer.stream = Some(stream),
        Ok(Err(error)) => answer.exchange.end = end_of(&error)?,
        Err(_) => answer.exchange.end = End::Silent,
    }
    answer.exchange.head_after = start.elapsed();
    Ok(answer)
}

impl Answer {
    async fn exchange_heads(&mut self, place: &Place, headers: &[(String, String)]) -> std::io::Result<TcpStream> {
        let connected = place.connect(self.exchange.address).await;
        // The cause is an IO error where the connection itself failed.
        let mut stream = connected.map_err(|error| error.downcast().unwrap_or_else(Error::other))?;
        let mut head = format!("{} HTTP/1.1\r\nHost: {}\r\n", self.exchange.line, self.exchange.address);
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes()).await?;
        while !self.parse_head()? {
            if self.early.len() > HEAD_MAX || stream.read_buf(&mut self.early).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(stream)
    }

    /// Whether the head is there; if so it is taken out of what was read.
    fn parse_head(&mut self) -> std::io::Result<bool> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&self.early).map_err(Error::other)?;
        let httparse::Status::Complete(length) = parsed else { return Ok(false) };
        self.exchange.status = response.code;
        for header in response.headers {
            let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(Error::other)?;
            self.exchange.headers.append(name, HeaderValue::from_bytes(header.value).map_err(Error::other)?);
        }
        self.early.drain(..length);
        Ok(true)
    }

    /// Reads the body, hands it on, and leaves early after `limit` bytes.
    pub async fn read(&mut self, limit: Option<u64>, mut take: impl FnMut(&[u8])) -> Result<End> {
        let length = self.exchange.length();
        let wanted = limit.unwrap_or(u64::MAX).min(length.unwrap_or(u64::MAX));
        let mut buffer = vec![0; 64 * 1024];
        while self.exchange.bytes < wanted {
            let room = usize::try_from(wanted - self.exchange.bytes).unwrap_or(usize::MAX).min(buffer.len());
            let count = match self.next(&mut buffer[..room]).await {
                // Without a Content-Length the end is the end.
                Ok(0) if length.is_none() => return Ok(self.ended(End::Complete)),
                Ok(0) => return Ok(self.ended(End::Fin)),
                Ok(count) => count,
                Err(error) => {
                    let end = end_of(&error)?;
                    return Ok(self.ended(end));
                }
            };
            take(&buffer[..count]);
            self.exchange.bytes += count as u64;
        }
        let end = if Some(wanted) == length { End::Complete } else { End::Left };
        Ok(self.ended(end))
    }

    async fn next(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if !self.early.is_empty() {
            let count = buffer.len().min(self.early.len());
            buffer[..count].copy_from_slice(&self.early[..count]);
            self.early.drain(..count);
            return Ok(count);
        }
        let Some(stream) = &mut self.stream else { return Ok(0) };
        match timeout(self.patience, stream.read(buffer)).await {
            Ok(read) => read,
            Err(_) => Err(ErrorKind::TimedOut.into()),
        }
    }

    fn ended(&mut self, end: End) -> End {
        self.exchange.end = end;
        self.stream = None;
        end
    }

    /// The whole body, for small ones.
    pub async fn body(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        let end = self.read(None, |bytes| body.extend_from_slice(bytes)).await?;
        ensure!(end == End::Complete, "{}: {end:?}", self.exchange.line);
        Ok(body)
    }
}

/// What an IO error says about the other side. Any other error is the test's own.
fn end_of(error: &Error) -> Result<End> {
    match error.kind() {
        ErrorKind::ConnectionRefused => Ok(End::Refused),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Ok(End::Reset),
        ErrorKind::UnexpectedEof => Ok(End::Fin),
        ErrorKind::TimedOut => Ok(End::Silent),
        _ => anyhow::bail!("unexpected: {error}"),
    }
}
