//! What hashing containerd's blobs found out, on our disk: hundreds of gigabytes must not be read again at
//! each start of the agent.
//!
//! One file a blob, `containerd/<hex>.hashes` in the data directory, for blobs that are what their names
//! say. It counts only for the very file that was hashed, and as a whole: a torn or wrong one is as good as
//! none, and the blob is hashed anew. Hence nothing is synced.
//!
//! Format, little endian: `DARTCTD1`, digest, device, inode, size, modification time in seconds and
//! nanoseconds (8 bytes each); the BLAKE3 chaining value of each piece; BLAKE3 of all that.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use darter_core::Digest;
use darter_core::pieces::Layout;

use super::super::lock;
use super::file::Identity;

const MAGIC: &[u8; 8] = b"DARTCTD1";
const SUFFIX: &str = ".hashes";
/// Of one that is not whole yet.
const NEW_SUFFIX: &str = ".hashes.new";

/// Blobs whose values are kept in memory: a swarm asks for all pieces of a few blobs, one after the other, and
/// 40 GiB have 1.3 MB of values.
const RECENT: usize = 8;

/// The values of a blob's pieces, in order.
pub(super) type Values = Arc<[[u8; 32]]>;

/// The directory of them.
#[derive(Debug)]
pub(super) struct Hashes {
    dir: PathBuf,
    /// What was asked for lately, the latest last.
    recent: Mutex<VecDeque<(Digest, Identity, Values)>>,
}

impl Hashes {
    pub(super) const fn new(dir: PathBuf) -> Self {
        Self { dir, recent: Mutex::new(VecDeque::new()) }
    }

    /// As `load`, without the disk where they were asked for lately.
    pub(super) fn values(&self, digest: &Digest, identity: &Identity) -> Option<Values> {
        let mut recent = lock(&self.recent);
        let found = recent.iter().position(|(name, of, _)| name == digest && of == identity);
        if let Some(it) = found.and_then(|at| recent.remove(at)) {
            let values = Arc::clone(&it.2);
            recent.push_back(it);
            return Some(values);
        }
        drop(recent);
        let values = Values::from(self.load(digest, identity)?);
        let mut recent = lock(&self.recent);
        recent.retain(|(name, ..)| name != digest);
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back((*digest, *identity, Arc::clone(&values)));
        Some(values)
    }

    /// The values of a blob's pieces, if this very file was hashed.
    pub(super) fn load(&self, digest: &Digest, identity: &Identity) -> Option<Vec<[u8; 32]>> {
        let pieces = Layout::new(identity.size).pieces();
        let head = head(digest, identity);
        let size = u64::try_from(head.len()).ok()? + pieces * 32 + 32;
        let file = File::open(self.path(digest, SUFFIX)).ok()?;
        // Before it is read into memory.
        if file.metadata().ok()?.len() != size {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(size).read_to_end(&mut bytes).ok()?;
        let (body, check) = bytes.split_last_chunk::<32>()?;
        if *blake3::hash(body).as_bytes() != *check {
            return None;
        }
        Some(body.strip_prefix(head.as_slice())?.as_chunks().0.to_vec())
    }

    /// Writes them down, in one step.
    pub(super) fn save(&self, digest: &Digest, identity: &Identity, values: &[[u8; 32]]) -> io::Result<()> {
        let mut bytes = head(digest, identity);
        bytes.extend_from_slice(values.as_flattened());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let new = self.path(digest, NEW_SUFFIX);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&bytes)?;
        fs::rename(new, self.path(digest, SUFFIX))
    }

    /// Forgets what is known of a blob.
    pub(super) fn remove(&self, digest: &Digest) {
        lock(&self.recent).retain(|(name, ..)| name != digest);
        let _ = fs::remove_file(self.path(digest, SUFFIX));
    }

    /// Forgets the blobs that are not there any more. What has another name is not ours.
    pub(super) fn sweep<T>(&self, there: &HashMap<Digest, T>) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if named(&entry.file_name().to_string_lossy()).is_some_and(|digest| !there.contains_key(&digest)) {
                // Where that fails it is found again.
                let _ = fs::remove_file(entry.path());
            }
        }
        lock(&self.recent).retain(|(digest, ..)| there.contains_key(digest));
    }

    fn path(&self, digest: &Digest, suffix: &str) -> PathBuf {
        Path::new(&self.dir).join(digest.hex() + suffix)
    }
}

fn named(name: &str) -> Option<Digest> {
    let hex = name.strip_suffix(SUFFIX).or_else(|| name.strip_suffix(NEW_SUFFIX))?;
    Digest::from_hex(hex).ok()
}

fn head(digest: &Digest, identity: &Identity) -> Vec<u8> {
    let Identity { device, inode, size, modified: (seconds, nanoseconds) } = identity;
    let mut head = [MAGIC.as_slice(), digest.as_bytes()].concat();
    for number in [device, inode, size] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    for number in [seconds, nanoseconds] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    head
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const IDENTITY: Identity = Identity { device: 1, inode: 2, size: (3 << 20) - 5, modified: (4, 5) };

    #[test]
    fn what_was_saved_counts_for_the_very_same_file_and_only_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let hashes = Hashes::new(dir.path().join("containerd"));
        let (digest, values) = (Digest::of(b"x"), vec![[1; 32], [2; 32], [3; 32]]);
        assert_eq!(hashes.load(&digest, &IDENTITY), None);
        hashes.save(&digest, &IDENTITY, &values).unwrap();
        assert_eq!(hashes.load(&digest, &IDENTITY), Some(values));
        let others = [
            Identity { device: 9, ..IDENTITY },
            Identity { inode: 9, ..IDENTITY },
            Identity { size: (3 << 20) - 6, ..IDENTITY },
            Identity { modified: (4, 6), ..IDENTITY },
            Identity { modified: (5, 5), ..IDENTITY },
        ];
        for other in others {
            assert_eq!(hashes.load(&digest, &other), None, "{other:?}");
        }
        let path = hashes.path(&digest, SUFFIX);
        let whole = fs::read(&path).unwrap();
        for at in [0, 9, 45, 81, whole.len() - 1] {
            let mut wrong = whole.clone();
            wrong[at] ^= 1;
            fs::write(&path, wrong).unwrap();
            assert_eq!(hashes.load(&digest, &IDENTITY), None, "{at}");
        }
        fs::write(&path, &whole[..whole.len() - 7]).unwrap();
        assert_eq!(hashes.load(&digest, &IDENTITY), None);
        // Under another name it says nothing.
        fs::write(hashes.path(&Digest::of(b"y"), SUFFIX), &whole).unwrap();
        assert_eq!(hashes.load(&Digest::of(b"y"), &IDENTITY), None);
    }

    #[test]
    fn what_is_asked_for_again_and_again_is_read_once_and_forgotten_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let hashes = Hashes::new(dir.path().to_owned());
        let blobs: Vec<_> = (0..=u8::try_from(RECENT).unwrap()).map(|n| (Digest::of(&[n]), [[n; 32]; 3])).collect();
        for (digest, values) in &blobs {
            hashes.save(digest, &IDENTITY, values).unwrap();
        }
        let ask = |n: usize, identity| hashes.values(&blobs[n].0, identity).map(|values| values[0][0]);
        assert_eq!(ask(0, &IDENTITY), Some(0));
        fs::remove_file(hashes.path(&blobs[0].0, SUFFIX)).unwrap();
        for n in 1..RECENT {
            assert_eq!(
                (ask(n, &IDENTITY).map(usize::from), ask(0, &IDENTITY)),
                (Some(n), Some(0)),
                "it stays the latest"
            );
        }
        assert_eq!(ask(0, &Identity { inode: 9, ..IDENTITY }), None, "of another file nothing is known");
        assert_eq!((ask(RECENT, &IDENTITY), ask(0, &IDENTITY)), (Some(8), Some(0)));
        fs::remove_file(hashes.path(&blobs[1].0, SUFFIX)).unwrap();
        assert_eq!(ask(1, &IDENTITY), None, "the one that was asked for least lately gave way");
        hashes.remove(&blobs[0].0);
        assert_eq!(ask(0, &IDENTITY), None);
    }

    #[test]
    fn what_is_known_of_blobs_that_are_gone_is_forgotten_and_files_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let hashes = Hashes::new(dir.path().to_owned());
        let [here, gone] = [b"x", b"y"].map(|name| Digest::of(name));
        hashes.save(&here, &IDENTITY, &[[0; 32]; 3]).unwrap();
        hashes.save(&gone, &IDENTITY, &[[0; 32]; 3]).unwrap();
        fs::write(hashes.path(&gone, NEW_SUFFIX), b"torn").unwrap();
        fs::write(dir.path().join("README"), b"").unwrap();
        hashes.sweep(&HashMap::from([(here, ())]));
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let left: BTreeSet<String> = fs::read_dir(dir.path()).unwrap().map(name).collect();
        assert_eq!(left, BTreeSet::from([here.hex() + SUFFIX, "README".to_owned()]));
    }
}
