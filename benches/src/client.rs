//! The one client that peers and darter are measured with: blocking reads into one buffer, nothing
//! in between, so that what is measured is the server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

/// One download.
#[derive(Debug, Clone, Copy)]
pub struct Download {
    /// Body bytes.
    pub bytes: u64,
    /// Until the first body byte.
    pub first_byte: Duration,
    /// Until the last.
    pub took: Duration,
}

/// What the client does with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    /// Nothing.
    Drop,
    /// sha256, as whoever pulls must.
    Hash,
}

/// GETs a path and reads its whole body.
pub fn get(address: SocketAddr, path: &str, headers: &str, sink: Sink) -> Result<Download> {
    let started = Instant::now();
    let mut socket = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: bench\r\n{headers}Connection: close\r\n\r\n")?;
    let mut buffer = vec![0; 1 << 20];
    let (mut filled, body) = loop {
        let count = socket.read(&mut buffer).context("no answer")?;
        ensure!(count > 0, "the server closed before its headers ended");
        // A head of a server on this machine comes in one read.
        if let Some(end) = buffer[..count].windows(4).position(|window| window == b"\r\n\r\n") {
            break (count, end + 4);
        }
    };
    let head = String::from_utf8_lossy(&buffer[..body]).to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{path}: {}", head.lines().next().unwrap_or_default());
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<u64>().ok());
    let length = length.context("no content-length")?;
    if filled == body && length > 0 {
        filled += socket.read(&mut buffer[body..])?;
    }
    let first_byte = started.elapsed();
    let mut hasher = (sink == Sink::Hash).then(Sha256::new);
    let mut bytes = (filled - body) as u64;
    hasher.as_mut().map(|hasher| hasher.update(&buffer[body..filled])).unwrap_or_default();
    while bytes < length {
        let count = socket.read(&mut buffer)?;
        ensure!(count > 0, "short body: {bytes} of {length}");
        bytes += count as u64;
        hasher.as_mut().map(|hasher| hasher.update(&buffer[..count])).unwrap_or_default();
    }
    if let Some(hasher) = hasher {
        let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(path.contains(&hex), "the bytes of {path} are not what they are called");
    }
    Ok(Download { bytes, first_byte, took: started.elapsed() })
}

/// Asks for one piece after the other on one connection, `heads` without their empty lines, and drops
/// the bodies, which must have `len` bytes each.
pub fn pieces(stream: &mut (impl Read + Write), heads: &[String], len: u64) -> Result<Download> {
    let mut buffer = vec![0; 256 * 1024];
    let started = Instant::now();
    let (mut bytes, mut first_byte) = (0, Duration::ZERO);
    for head in heads {
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        let mut filled = 0;
        let body = loop {
            let count = stream.read(&mut buffer[filled..]).context("no answer")?;
            ensure!(count > 0, "the server closed before its headers ended");
            filled += count;
            if let Some(end) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let told = String::from_utf8_lossy(&buffer[..body]).to_ascii_lowercase();
        let first = told.lines().next().unwrap_or_default();
        ensure!(first.starts_with("http/1.1 200") || first.starts_with("http/1.1 206"), "{head}: {first}");
        ensure!(told.contains(&format!("content-length: {len}\r\n")), "{head}: not {len} bytes: {told}");
        let mut left = len - (filled - body) as u64;
        while left > 0 {
            let room = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let count = stream.read(&mut buffer[..room])?;
            ensure!(count > 0, "short body: {left} of {len} missing");
            left -= count as u64;
            if first_byte.is_zero() {
                first_byte = started.elapsed();
            }
        }
        bytes += len;
    }
    Ok(Download { bytes, first_byte, took: started.elapsed() })
}
