//! What is said to the running agent: orders over its unix socket, and over TCP questions that change nothing.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;

/// What the agent answers, line by line.
pub(crate) type Answer = Lines<BufReader<UnixStream>>;

/// The longest answer to a question: what is longer is none of ours.
const ANSWER_MAX: u64 = 4 << 20;

/// The agent's socket; `None` where nobody listens.
pub(crate) async fn connect(socket: &Path) -> Result<Option<UnixStream>> {
    match UnixStream::connect(socket).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!(
                "cannot ask the agent at {} (admin.socket): run this as the user that the agent runs as",
                socket.display()
            )
        }),
    }
}

/// Sends one order. An answer other than 200 is an error with the agent's reason.
pub(crate) async fn post(stream: UnixStream, path: &str, body: &str) -> Result<Answer> {
    let head = format!("POST {path} HTTP/1.0\r\nContent-Length: {}\r\n", body.len());
    let (status, mut lines) = ask(stream, &head, body).await.context("cannot send the order")?;
    if !status.contains(" 200 ") {
        let reason = lines.next_line().await?.unwrap_or_default();
        bail!("the agent refused the order: {status}: {reason}");
    }
    Ok(lines)
}

/// Asks for a page. Gives the status, 0 where what answers speaks no HTTP, and the body.
pub(crate) async fn get<S: AsyncRead + AsyncWrite + Unpin>(stream: S, host: &str, path: &str) -> Result<(u16, String)> {
    let head = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n");
    let (status, lines) = ask(stream, &head, "").await?;
    let code = status.strip_prefix("HTTP/").and_then(|status| status.split(' ').nth(1)?.parse().ok());
    let mut body = Vec::new();
    lines.into_inner().take(ANSWER_MAX).read_to_end(&mut body).await?;
    Ok((code.unwrap_or(0), String::from_utf8_lossy(&body).into_owned()))
}

/// Sends a request; gives the first line of the answer, and what comes after its head.
async fn ask<S>(stream: S, head: &str, body: &str) -> Result<(String, Lines<BufReader<S>>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // HTTP/1.0: the answer ends where the connection does, and needs no unchunking.
    let mut stream = BufReader::new(stream);
    stream.write_all(format!("{head}\r\n{body}").as_bytes()).await?;
    let mut lines = stream.lines();
    let status = lines.next_line().await?.unwrap_or_default();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    Ok((status, lines))
}
