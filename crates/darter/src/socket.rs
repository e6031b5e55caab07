//! Orders to the running agent, over its unix socket.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;

/// What the agent answers, line by line.
pub(crate) type Answer = Lines<BufReader<UnixStream>>;

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
    // HTTP/1.0: the answer ends where the connection does, and needs no unchunking.
    let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut stream = BufReader::new(stream);
    stream.write_all(request.as_bytes()).await.context("cannot send the order")?;
    let mut lines = stream.lines();
    let status = lines.next_line().await?.unwrap_or_default();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    if !status.contains(" 200 ") {
        let reason = lines.next_line().await?.unwrap_or_default();
        bail!("the agent refused the order: {status}: {reason}");
    }
    Ok(lines)
}
