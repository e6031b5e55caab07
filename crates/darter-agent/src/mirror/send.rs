//! Bodies on their way out: bytes from memory, and files handed to the kernel.
//!
//! sendfile moves a file to a socket without a copy through this process: that is the difference
//! between 1.2 and 3 GB/s for a local hit. It would wait for the disk where a page is not in
//! memory, so each part is first made sure of off the async threads (`store::warm`).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::range::Span;
use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::pulls::{Progress, Reader};
use crate::store::{self, Doubt, Rotten};

/// Bytes that one turn on an async thread may send: large enough that system calls do not count,
/// small enough that 64 readers on two threads wait for each other for milliseconds only.
const TURN: u64 = 512 * 1024;

/// The first turn of a body is shorter: everybody's first byte comes before anybody's second turn.
const FIRST_TURN: u64 = 64 * 1024;

/// Why a body ended before its length.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The client is gone, or reads nothing any more.
    #[error("the client is gone")]
    Client(#[source] io::Error),
    /// The client took nothing for too long.
    #[error("the client took nothing for {0:?}")]
    Slow(Duration),
    /// The file is shorter than it was, or cannot be read.
    #[error("the stored blob cannot be read")]
    Store(#[source] io::Error),
    /// The stored bytes are wrong; none of them was sent.
    #[error(transparent)]
    Rotten(#[from] Rotten),
    /// What is fetched stopped coming.
    #[error("{0}")]
    Pull(String),
    /// The agent stops.
    #[error("the agent stops")]
    Stopped,
    /// What is fetched did not grow for too long.
    #[error("nothing came for {0:?}")]
    Stalled(Duration),
}

/// How long each side may do nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) client: Duration,
    pub(crate) pull: Duration,
}

/// What of a body the socket took.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub(crate) bytes: u64,
    /// When it took the first of them.
    first: Option<Instant>,
}

impl Sent {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.add_at(Instant::now(), bytes);
    }

    fn add_at(&mut self, now: Instant, bytes: u64) {
        self.first.get_or_insert(now);
        self.bytes += bytes;
    }

    /// How long after `started` it took the first of them, if it took any.
    pub(crate) fn first_after(&self, started: Instant) -> Option<Duration> {
        self.first.map(|first| first.duration_since(started))
    }
}

impl SendError {
    /// Whether the stored file is broken. A disk that is slow says nothing about what is on it.
    pub(crate) fn is_of_the_file(&self) -> bool {
        matches!(self, Self::Store(error) if error.kind() != io::ErrorKind::TimedOut)
    }
}

/// Sends all of `bytes`. `more` keeps the packet open for what follows.
pub(crate) async fn bytes(
    socket: &TcpStream,
    mut bytes: &[u8],
    more: bool,
    patience: Patience,
) -> Result<(), SendError> {
    let flags = SendFlags::NOSIGNAL | if more { SendFlags::MORE } else { SendFlags::empty() };
    while !bytes.is_empty() {
        let sent = writable(socket, patience, || Ok(rustix::net::send(socket.as_fd(), bytes, flags)?)).await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Sends `span` of `file`, each part once no `doubt` about it is left. Tells `moved` how many bytes more
/// the socket has, as they go.
pub(crate) async fn file(
    socket: &TcpStream,
    file: &Arc<File>,
    span: Span,
    doubt: Option<&Doubt>,
    patience: Patience,
    mut moved: impl FnMut(u64),
) -> Result<(), SendError> {
    let mut offset = span.start;
    while offset < span.end {
        let turn = if offset == span.start { FIRST_TURN } else { TURN };
        let turn = Span { start: offset, end: span.end.min(offset + turn) };
        from_disk(patience.pull, async {
            if let Some(doubt) = doubt {
                doubt.check(turn).await?;
            }
            store::warm(file, turn).await;
            Ok(())
        })
        .await?;
        while offset < turn.end {
            let count = usize::try_from(turn.end - offset).unwrap_or(usize::MAX);
            let before = offset;
            let took = writable(socket, patience, || {
                Ok(rustix::fs::sendfile(socket.as_fd(), file.as_fd(), Some(&mut offset), count)?)
            })
            .await
            .map_err(whose)?;
            if took == 0 {
                let gone = io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than the blob");
                return Err(SendError::Store(gone));
            }
            moved(offset - before);
        }
        // A socket that is always writable would keep this thread from all other connections.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// What is read ahead from the disk, if it comes in time. A file system that hangs must not hold a body
/// that containerd waits for: the thread that reads hangs on, of which tokio has a bounded number.
pub(crate) async fn from_disk(
    within: Duration,
    read: impl Future<Output = Result<(), SendError>>,
) -> Result<(), SendError> {
    let late = || SendError::Store(io::Error::new(io::ErrorKind::TimedOut, "the disk does not answer"));
    timeout(within, read).await.unwrap_or_else(|_| Err(late()))
}

/// sendfile fails for either end. A disk that cannot be read is not a client that left: taken for
/// one, containerd would come back to it until it gives the pull up.
fn whose(error: SendError) -> SendError {
    match error {
        SendError::Client(error) if !is_of_the_socket(&error) => SendError::Store(error),
        error => error,
    }
}

/// Whatever is not one of these came from the file: EIO, or what a damaged file system makes up.
fn is_of_the_socket(error: &io::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, HostUnreachable, NetworkUnreachable, NotConnected, TimedOut,
    };
    let kinds =
        [BrokenPipe, ConnectionAborted, ConnectionReset, HostUnreachable, NetworkUnreachable, NotConnected, TimedOut];
    kinds.contains(&error.kind())
}

/// Sends a blob while it is fetched, in order, as it becomes readable.
pub(super) async fn trail(
    socket: &TcpStream,
    reader: &mut Reader,
    patience: Patience,
    sent: &mut Sent,
) -> Result<(), SendError> {
    let size = reader.size();
    while sent.bytes < size {
        let end = match reader.progress_past(sent.bytes, patience.pull).await {
            Progress::Readable(end) => end,
            Progress::Failed(reason) => return Err(SendError::Pull(reason)),
            Progress::Stalled => return Err(SendError::Stalled(patience.pull)),
        };
        let span = Span { start: sent.bytes, end };
        file(socket, reader.file(), span, None, patience, |count| sent.add(count)).await?;
    }
    Ok(())
}

/// Waits until the socket takes bytes and runs `send`, again if it would block after all.
async fn writable(
    socket: &TcpStream,
    patience: Patience,
    send: impl FnMut() -> io::Result<usize>,
) -> Result<usize, SendError> {
    let sent = timeout(patience.client, socket.async_io(Interest::WRITABLE, send)).await;
    sent.map_err(|_| SendError::Slow(patience.client))?.map_err(SendError::Client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_is_timed_when_it_goes_out_and_once() {
        let (mut sent, started) = (Sent::default(), Instant::now());
        assert_eq!(sent.first_after(started), None);
        let first = Duration::from_millis(20);
        sent.add_at(started + first, 10);
        assert_eq!(sent.first_after(started), Some(first));
        sent.add(5);
        assert_eq!((sent.bytes, sent.first_after(started)), (15, Some(first)));
    }

    #[tokio::test]
    async fn a_disk_that_hangs_ends_the_body_and_one_that_answers_does_not() {
        let within = Duration::from_millis(20);
        let hung = from_disk(within, std::future::pending()).await;
        let Err(hung) = hung else { panic!("a read that never ends ended") };
        assert!(matches!(&hung, SendError::Store(error) if error.kind() == io::ErrorKind::TimedOut));
        assert!(!hung.is_of_the_file(), "the blob stays: it may be read again when the disk answers");
        assert!(SendError::Store(io::Error::from(io::ErrorKind::UnexpectedEof)).is_of_the_file());
        assert!(from_disk(within, async { Ok(()) }).await.is_ok());
    }
}
