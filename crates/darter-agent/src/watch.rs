//! Hearing at once that someone changed a directory, instead of at the next look.
//!
//! inotify tells that something happened; what to do is decided from the files themselves, so a lost
//! event costs only the time until the timer.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// Where events come from: changes of names and finished writes, not reads.
const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// Directories whose changes are heard.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: AsyncFd<OwnedFd>,
    /// Which watch each directory has: a directory that was replaced gets another.
    covered: Vec<(PathBuf, i32)>,
}

impl Watch {
    #[expect(deprecated, reason = "unsound for types that do not own their descriptor; an OwnedFd does")]
    pub(crate) fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { inotify: AsyncFd::new(inotify)?, covered: Vec::new() })
    }

    /// Listens to these directories, those that exist; `true` if one of them was not listened to
    /// before, so that a change of it may have been missed.
    pub(crate) fn cover(&mut self, dirs: &[PathBuf]) -> bool {
        let covered: Vec<(PathBuf, i32)> =
            dirs.iter().filter_map(|dir| Some((dir.clone(), self.listen(dir)?))).collect();
        let is_new = covered.iter().any(|watch| !self.covered.contains(watch));
        self.covered = covered;
        is_new
    }

    /// The same directory gets the same number again.
    fn listen(&self, dir: &Path) -> Option<i32> {
        inotify::add_watch(&self.inotify, dir, EVENTS).ok()
    }

    /// Waits until something changed, and forgets what it was.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match drain(ready.get_inner()) {
                Ok(()) => return Ok(()),
                Err(Errno::WOULDBLOCK) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Reads all events that are there; would block if there was none.
fn drain(inotify: &OwnedFd) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(inotify, &mut buffer);
    reader.next()?;
    loop {
        match reader.next() {
            Ok(_) => (),
            Err(Errno::WOULDBLOCK) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
