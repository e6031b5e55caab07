//! Blobs in containerd's own content store, given from there without a second copy: to containerd, and to
//! other nodes.
//!
//! containerd renames a blob to its digest and never changes it, and an open file survives its
//! garbage collection. All the same its name is believed only after we hashed it, once.
//!
//! `file` is which files there are, `verdicts` what came of hashing them, `hashes` how that outlives a
//! restart, `ahead` the background that makes `offers` of what others may have, `copies` what a seed takes into
//! the store from there.

mod ahead;
pub(super) mod copies;
mod file;
mod hashes;
mod verdicts;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use darter_core::Digest;
use darter_core::pieces::Layout;
use tracing::warn;

use self::copies::Copies;
use self::file::Identity;
use self::verdicts::{Urgency, Verdicts};
use super::blob::{Blob, Open};
use super::lock;
use super::tally::piece_value;
use crate::metrics::{Metrics, Source};

pub(super) use ahead::Ahead;

/// containerd's content store.
#[derive(Debug)]
pub(super) struct ContentStore {
    dir: Option<PathBuf>,
    verdicts: Arc<Verdicts>,
    /// Verified blobs, which other nodes may have.
    offers: Mutex<BTreeMap<Digest, Identity>>,
    /// Whether there are other nodes.
    is_for_others: AtomicBool,
    pub(super) copies: Copies,
}

impl ContentStore {
    pub(super) fn new(dir: Option<PathBuf>, metrics: Arc<Metrics>) -> Self {
        let verdicts = Arc::new(Verdicts::new(metrics));
        Self {
            dir,
            verdicts,
            offers: Mutex::default(),
            is_for_others: AtomicBool::new(false),
            copies: Copies::default(),
        }
    }

    /// The data directory is ours: what is found out is kept here.
    pub(super) fn keep_in(&self, dir: PathBuf) {
        self.verdicts.keep_in(dir);
    }

    /// Hashing ends soon.
    pub(super) fn stop(&self) {
        self.verdicts.stop();
    }

    /// Whether it has a file of this name, whatever is in it. Looked up off the async threads, as in
    /// `get`: a disk that hangs must not hold them up.
    pub(super) async fn lists(&self, digest: &Digest) -> bool {
        let Some(path) = self.path(digest) else { return false };
        tokio::task::spawn_blocking(move || path.exists()).await.unwrap_or(false)
    }

    pub(super) async fn get(&self, digest: &Digest) -> Option<Blob> {
        let (file, identity) = self.open(digest).await?;
        let is_right = self.verdicts.is_right(digest, &file, identity, Urgency::Now).await;
        (is_right == Some(true)).then(|| blob(digest, file, identity))
    }

    async fn open(&self, digest: &Digest) -> Option<(Arc<File>, Identity)> {
        let path = self.path(digest)?;
        match tokio::task::spawn_blocking(move || file::open(&path)).await.ok()? {
            Ok((file, identity)) => Some((Arc::new(file), identity)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(%digest, %error, "cannot read a blob of containerd");
                None
            }
        }
    }

    fn path(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.join(digest.hex()))
    }

    /// How many blobs were read to be hashed.
    #[cfg(test)]
    pub(super) fn hashed(&self) -> u64 {
        self.verdicts.hashed.load(Ordering::Relaxed)
    }

    /// Somebody waits for the hash of a blob until this is dropped.
    #[cfg(test)]
    pub(super) fn urgent(&self) -> impl Drop + '_ {
        self.verdicts.wait_for_one()
    }

    /// From now on all blobs are hashed ahead, and offered.
    pub(super) fn offer_all(&self) {
        self.is_for_others.store(true, Ordering::Relaxed);
    }

    /// The size of a blob that other nodes may have.
    pub(super) fn offer(&self, digest: &Digest) -> Option<u64> {
        lock(&self.offers).get(digest).map(|identity| identity.size)
    }

    /// All of them with their sizes, by ascending digest.
    pub(super) fn offers(&self) -> Vec<(Digest, u64)> {
        lock(&self.offers).iter().map(|(digest, identity)| (*digest, identity.size)).collect()
    }

    /// A piece of an offered blob with its BLAKE3 value. Blocks. `None`: the blob is gone, or another file has
    pub(super) fn piece(&self, digest: &Digest, index: u64, is_sample: bool) -> Option<(Blob, [u8; 32])> {
        let found = self.verified_piece(digest, index, is_sample);
        if found.is_none() {
            // Whatever has its name now is hashed anew.
            self.verdicts.forget(digest);
        }
        found
    }

    /// The values of all pieces of an offered blob. Blocks.
    pub(super) fn values(&self, digest: &Digest) -> Option<Vec<[u8; 32]>> {
        self.offer(digest)?;
        let (_, identity) = file::open(&self.path(digest)?).ok()?;
        self.verdicts.hashes()?.values(digest, &identity).map(|values| values.to_vec())
    }

    fn verified_piece(&self, digest: &Digest, index: u64, is_sample: bool) -> Option<(Blob, [u8; 32])> {
        let (file, identity) = file::open(&self.path(digest)?).ok()?;
        // Of this very file.
        let values = self.verdicts.hashes()?.values(digest, &identity)?;
        let value = *values.get(usize::try_from(index).ok()?)?;
        if is_sample && piece_value(&file, Layout::new(identity.size).piece(index)).ok() != Some(value) {
            return None;
        }
        Some((blob(digest, Arc::new(file), identity), value))
    }
}

fn blob(digest: &Digest, file: Arc<File>, identity: Identity) -> Blob {
    Blob(Arc::new(Open { digest: *digest, size: identity.size, file, source: Source::Containerd }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(dir: &std::path::Path) -> ContentStore {
        ContentStore::new(Some(dir.to_owned()), Arc::new(Metrics::new("", "")))
    }

    async fn get(store: &ContentStore, digest: &Digest) -> Option<Vec<u8>> {
        Some(store.get(digest).await?.read_all().await.unwrap().to_vec())
    }

    #[tokio::test]
    async fn a_blob_of_containerd_is_hashed_once_and_served_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"layer");
        let store = of(dir.path());
        assert_eq!((get(&store, &digest).await, store.lists(&digest).await), (None, false));
        std::fs::write(dir.path().join(digest.hex()), b"layer").unwrap();
        assert!(
            store.lists(&digest).await && !ContentStore::new(None, Arc::new(Metrics::new("", ""))).lists(&digest).await
        );
        assert_eq!(get(&store, &digest).await.as_deref(), Some(b"layer".as_slice()));
        assert_eq!(store.get(&digest).await.unwrap().source(), Source::Containerd);
        // No hashing is left to do: it works with all turns taken.
        let _turns = store.verdicts.all_turns().await;
        assert!(store.get(&digest).await.is_some());
    }

    #[tokio::test]
    async fn readers_of_one_blob_share_its_hashing_and_giving_up_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"layer");
        std::fs::write(dir.path().join(digest.hex()), b"layer").unwrap();
        let store = of(dir.path());
        let turns = store.verdicts.all_turns().await;
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
        let store = of(dir.path());
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
