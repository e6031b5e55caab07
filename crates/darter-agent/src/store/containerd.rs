//! Blobs in containerd's own content store, served from there without a second copy.
//!
//! containerd renames a blob to its digest and never changes it, and an open file survives its
//! garbage collection. All the same its name is believed only after we hashed it, once.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use darter_core::Digest;
use tokio::sync::{Semaphore, watch};
use tracing::warn;

use super::blob::{Blob, Open};
use super::lock;
use super::tally::file_digest;
use crate::metrics::Source;

/// Verdicts kept: some 100 bytes each. Past it all are forgotten and found again.
const VERDICTS_MAX: usize = 65_536;
/// Hashed at once: each takes a core, and the workload was promised the rest.
const HASHING_MAX: usize = 2;

/// A file as it was when it was hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

#[derive(Debug, Clone)]
enum Verdict {
    /// Being hashed; the receiver ends with it.
    Hashing(watch::Receiver<()>),
    /// Whether the file with this identity is what its name says.
    Known(Identity, bool),
}

/// containerd's content store.
#[derive(Debug)]
pub(super) struct ContentStore {
    dir: Option<PathBuf>,
    known: Arc<Known>,
}

#[derive(Debug)]
struct Known {
    verdicts: Mutex<HashMap<Digest, Verdict>>,
    hashing: Semaphore,
    stopping: AtomicBool,
}

impl ContentStore {
    pub(super) fn new(dir: Option<PathBuf>) -> Self {
        let known = Known {
            verdicts: Mutex::default(),
            hashing: Semaphore::new(HASHING_MAX),
            stopping: AtomicBool::new(false),
        };
        Self { dir, known: Arc::new(known) }
    }

    /// Hashing ends soon.
    pub(super) fn stop(&self) {
        self.known.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether it has a file of this name, whatever is in it. Looked up off the async threads, as in
    /// `get`: a disk that hangs must not hold them up.
    pub(super) async fn lists(&self, digest: &Digest) -> bool {
        let Some(path) = self.dir.as_ref().map(|dir| dir.join(digest.hex())) else { return false };
        tokio::task::spawn_blocking(move || path.exists()).await.unwrap_or(false)
    }

    pub(super) async fn get(&self, digest: &Digest) -> Option<Blob> {
        let path = self.dir.as_ref()?.join(digest.hex());
        let opened = tokio::task::spawn_blocking(move || open(&path)).await.ok()?;
        let (file, identity) = match opened {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(%digest, %error, "cannot read a blob of containerd");
                return None;
            }
        };
        let file = Arc::new(file);
        let is_right = self.is_right(digest, &file, identity).await;
        let open = Open { digest: *digest, size: identity.size, file, source: Source::Containerd };
        is_right.then(|| Blob(Arc::new(open)))
    }

    async fn is_right(&self, digest: &Digest, file: &Arc<File>, identity: Identity) -> bool {
        let mut waiting = {
            let mut verdicts = lock(&self.known.verdicts);
            match verdicts.get(digest) {
                Some(Verdict::Known(known, is_right)) if *known == identity => return *is_right,
                Some(Verdict::Hashing(waiting)) => waiting.clone(),
                _ => self.start(&mut verdicts, digest, file, identity),
            }
        };
        // An error is the end: the sender sends nothing.
        while waiting.changed().await.is_ok() {}
        match lock(&self.known.verdicts).get(digest) {
            Some(Verdict::Known(known, is_right)) => *known == identity && *is_right,
            _ => false,
        }
    }

    /// Has the file hashed in a task of its own: a reader that gives up must not throw away the
    /// seconds that were spent.
    fn start(
        &self,
        verdicts: &mut HashMap<Digest, Verdict>,
        digest: &Digest,
        file: &Arc<File>,
        identity: Identity,
    ) -> watch::Receiver<()> {
        if verdicts.len() >= VERDICTS_MAX {
            verdicts.retain(|_, verdict| matches!(verdict, Verdict::Hashing(_)));
        }
        let (done, waiting) = watch::channel(());
        verdicts.insert(*digest, Verdict::Hashing(waiting.clone()));
        let (known, digest, file) = (Arc::clone(&self.known), *digest, Arc::clone(file));
        tokio::spawn(async move {
            known.hash(digest, file, identity).await;
            drop(done);
        });
        waiting
    }
}

impl Known {
    async fn hash(self: Arc<Self>, digest: Digest, file: Arc<File>, identity: Identity) {
        let _turn = self.hashing.acquire().await;
        let hasher = Arc::clone(&self);
        let hashing = tokio::task::spawn_blocking(move || file_digest(&file, identity.size, &hasher.stopping)).await;
        let verdict = match hashing {
            Ok(Ok(got)) => Some(got == digest),
            // A short file is a wrong one; any other failure says nothing about it.
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Some(false),
            _ => None,
        };
        if verdict == Some(false) {
            warn!(%digest, "a blob in containerd's content store is not what its name says; it is not used");
        }
        let mut verdicts = lock(&self.verdicts);
        match verdict {
            Some(is_right) => verdicts.insert(digest, Verdict::Known(identity, is_right)),
            None => verdicts.remove(&digest),
        };
    }
}

fn open(path: &std::path::Path) -> io::Result<(File, Identity)> {
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(no_follow).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let identity = Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    };
    Ok((file, identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(store: &ContentStore, digest: &Digest) -> Option<Vec<u8>> {
        Some(store.get(digest).await?.read_all().await.unwrap().to_vec())
    }

    #[tokio::test]
    async fn a_blob_of_containerd_is_hashed_once_and_served_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"layer");
        let store = ContentStore::new(Some(dir.path().to_owned()));
        assert_eq!((get(&store, &digest).await, store.lists(&digest).await), (None, false));
        std::fs::write(dir.path().join(digest.hex()), b"layer").unwrap();
        assert!(store.lists(&digest).await && !ContentStore::new(None).lists(&digest).await);
        assert_eq!(get(&store, &digest).await.as_deref(), Some(b"layer".as_slice()));
        assert_eq!(store.get(&digest).await.unwrap().source(), Source::Containerd);
        // No hashing is left to do: it works with all turns taken.
        let _turns = store.known.hashing.acquire_many(2).await.unwrap();
        assert!(store.get(&digest).await.is_some());
    }

    #[tokio::test]
    async fn readers_of_one_blob_share_its_hashing_and_giving_up_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"layer");
        std::fs::write(dir.path().join(digest.hex()), b"layer").unwrap();
        let store = ContentStore::new(Some(dir.path().to_owned()));
        let turns = store.known.hashing.acquire_many(2).await.unwrap();
        let given_up = tokio::time::timeout(std::time::Duration::from_millis(30), store.get(&digest)).await;
        assert!(given_up.is_err());
        drop(turns);
        let (one, two) = tokio::join!(store.get(&digest), store.get(&digest));
        assert!(one.is_some() && two.is_some());
    }

    #[tokio::test]
    async fn a_blob_of_containerd_that_is_not_what_its_name_says_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"layer");
        let path = dir.path().join(digest.hex());
        std::fs::write(&path, b"liar!").unwrap();
        let store = ContentStore::new(Some(dir.path().to_owned()));
        assert_eq!(get(&store, &digest).await, None);
        assert_eq!(get(&store, &digest).await, None);
        // Another file under the name is another question.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"layer").unwrap();
        assert_eq!(get(&store, &digest).await.as_deref(), Some(b"layer".as_slice()));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert_eq!(get(&store, &digest).await, None);
    }
}
