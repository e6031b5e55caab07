//! What hashing containerd's blobs found out, on our disk: hundreds of gigabytes must not be read again at
//! each start of the agent.
//!
//! One file a blob, `containerd/<hex>.hashes` in the data directory, for blobs that are what their names
//! say. It counts only for the very file that was hashed, and as a whole: a torn or wrong one is as good as
//! none, and the blob is hashed anew. Hence nothing is synced.
//!
//! Format, little endian: `DARTCTD1`, digest, device, inode, size, modification time in seconds and
//! nanoseconds (8 bytes each); the BLAKE3 chaining value of each piece; BLAKE3 of all that.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use darter_core::Digest;
use darter_core::pieces::Layout;

use super::file::Identity;

const MAGIC: &[u8; 8] = b"DARTCTD1";
const SUFFIX: &str = ".hashes";
/// Of one that is not whole yet.
const NEW_SUFFIX: &str = ".hashes.new";

/// The directory of them.
#[derive(Debug)]
pub(super) struct Hashes {
    dir: PathBuf,
}

impl Hashes {
    pub(super) const fn new(dir: PathBuf) -> Self {
        Self { dir }
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
