//! The data directory: its paths, its lock, its free space, and files made and removed in it.
//!
//! Layout: `blobs/<hex>` and `ingest/<hex>`, each with `<hex>.pieces` beside it; `containerd/<hex>.hashes`, what
//! is known of blobs that containerd keeps; `journal`; `lock`.
//! What has another name is not ours: it is left alone.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use darter_core::Digest;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock, statvfs};
use rustix::io::{Errno, retry_on_intr};

use super::state::DiskError;

/// How a file beside a blob is named after it.
const RECORD_SUFFIX: &str = ".pieces";

/// The two directories that hold blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shelf {
    /// Complete ones.
    Blobs,
    /// Half written ones.
    Ingest,
}

/// What is written to see whether anything can be; no name of a blob.
const PROBE: &str = "probe";

/// A name in one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    /// The bytes.
    Data(Digest),
    /// The pieces record.
    Record(Digest),
}

impl Name {
    /// Reads a file name; `None` for one that is not ours.
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name.strip_suffix(RECORD_SUFFIX) {
            Some(hex) => Digest::from_hex(hex).ok().map(Self::Record),
            None => Digest::from_hex(name).ok().map(Self::Data),
        }
    }
}

/// Bytes of the file system that the data directory is on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Free {
    pub(super) total: u64,
    pub(super) available: u64,
}

/// The data directory.
#[derive(Debug)]
pub(super) struct Disk {
    dir: PathBuf,
}

impl Disk {
    pub(super) const fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn shelf(&self, shelf: Shelf) -> PathBuf {
        self.dir.join(match shelf {
            Shelf::Blobs => "blobs",
            Shelf::Ingest => "ingest",
        })
    }

    pub(super) fn data(&self, shelf: Shelf, digest: &Digest) -> PathBuf {
        self.shelf(shelf).join(digest.hex())
    }

    pub(super) fn record(&self, shelf: Shelf, digest: &Digest) -> PathBuf {
        self.shelf(shelf).join(digest.hex() + RECORD_SUFFIX)
    }

    /// See `containerd::hashes`.
    pub(super) fn containerd(&self) -> PathBuf {
        self.dir.join("containerd")
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// Makes the directories that are not there. They hold private images: nobody else may look.
    pub(super) fn prepare(&self) -> Result<(), DiskError> {
        for dir in [self.dir.clone(), self.shelf(Shelf::Blobs), self.shelf(Shelf::Ingest)] {
            if !dir.is_dir() {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
                made.map_err(DiskError::on("create", &dir))?;
            }
        }
        for shelf in [Shelf::Blobs, Shelf::Ingest] {
            // Best effort: on a read-only disk the mode stays what it is.
            let _ = fs::set_permissions(self.shelf(shelf), Permissions::from_mode(0o700));
        }
        Ok(())
    }

    /// Takes the lock that keeps a second agent out; held until the file is closed, however this
    /// process ends.
    pub(super) fn lock(&self) -> Result<File, DiskError> {
        let path = self.dir.join("lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        // A read-only disk can still be locked, if it was ever used.
        let opened = options.open(&path).or_else(|error| File::open(&path).map_err(|_| error));
        let mut file = opened.map_err(DiskError::on("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(self.used_by_another(&file)),
            Err(errno) => return Err(DiskError::on("lock", &path)(errno.into())),
        }
        // The number is for people; the lock holds without it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(file)
    }

    fn used_by_another(&self, lock: &File) -> DiskError {
        let mut pid = String::new();
        let _ = lock.take(32).read_to_string(&mut pid);
        let text = format!("it is used by another darter agent, pid {}", pid.trim());
        DiskError::on("use", &self.dir)(io::Error::new(io::ErrorKind::ResourceBusy, text))
    }

    pub(super) fn free(&self) -> Result<Free, DiskError> {
        let stat = statvfs(&self.dir).map_err(|errno| DiskError::on("look at", &self.dir)(errno.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(Free { total: bytes(stat.f_blocks), available: bytes(stat.f_bavail) })
    }

    /// Whether a file can be made, written and kept where blobs are: the answer a full, read-only or dying disk
    /// gives, and a directory that is not ours.
    pub(super) fn probe(&self) -> Result<(), DiskError> {
        self.prepare()?;
        let [made, kept] = [Shelf::Ingest, Shelf::Blobs].map(|shelf| self.shelf(shelf).join(PROBE));
        let write = || {
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&made)?;
            file.write_all_at(&[0; 4096], 0)
        };
        let probed = write().map_err(DiskError::on("write", &made)).and_then(|()| match fs::rename(&made, &kept) {
            // Another look was at it at the same time, and came first.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed.map_err(DiskError::on("create", &kept)),
        });
        for path in [&made, &kept] {
            let _ = fs::remove_file(path);
        }
        probed
    }

    /// Opens the data file of an ingest, with room for `size` bytes taken from the disk now: a pull
    /// that does not fit must fail before its first byte. Tells whether the room is really taken.
    pub(super) fn open_ingest(&self, digest: &Digest, size: u64, fresh: bool) -> Result<(File, bool), DiskError> {
        let path = self.data(Shelf::Ingest, digest);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(fresh).mode(0o600);
        let file = options.open(&path).map_err(DiskError::on("create", &path))?;
        file.set_len(size).map_err(DiskError::on("resize", &path))?;
        if size == 0 {
            return Ok((file, true));
        }
        match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, size)) {
            Ok(()) => Ok((file, true)),
            // zfs and network file systems cannot; there the file grows as it is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok((file, false)),
            Err(errno) => Err(DiskError::on("reserve room for", &path)(errno.into())),
        }
    }

    /// Turns an ingest into a blob. The record goes first: data without its record would have to be
    /// hashed as a whole to be believed, and a record without data is just put back.
    pub(super) fn promote(&self, digest: &Digest) -> Result<(), DiskError> {
        let (record, placed) = (self.record(Shelf::Ingest, digest), self.record(Shelf::Blobs, digest));
        self.rename(record.clone(), placed.clone())?;
        let renamed = self.rename(self.data(Shelf::Ingest, digest), self.data(Shelf::Blobs, digest));
        if renamed.is_err() {
            let _ = fs::rename(placed, record);
        }
        renamed
    }

    /// Turns a blob back into an ingest: one that nothing vouches for yet.
    pub(super) fn demote(&self, digest: &Digest) -> Result<(), DiskError> {
        let record = self.record(Shelf::Blobs, digest);
        if record.exists() {
            self.rename(record, self.record(Shelf::Ingest, digest))?;
        }
        self.rename(self.data(Shelf::Blobs, digest), self.data(Shelf::Ingest, digest))
    }

    fn rename(&self, from: PathBuf, to: PathBuf) -> Result<(), DiskError> {
        fs::rename(&from, to).map_err(DiskError::on("rename", &from))
    }

    /// Removes data and record. What is gone already is as good.
    pub(super) fn remove(&self, shelf: Shelf, digest: &Digest) -> Result<(), DiskError> {
        for path in [self.data(shelf, digest), self.record(shelf, digest)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(DiskError::on("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Flushes a directory: what makes its renames survive a power loss.
    pub(super) fn sync_dir(path: &Path) -> Result<(), DiskError> {
        File::open(path).and_then(|dir| dir.sync_all()).map_err(DiskError::on("sync", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_are_read() {
        let digest = Digest::of(b"x");
        assert_eq!(Name::parse(&digest.hex()), Some(Name::Data(digest)));
        assert_eq!(Name::parse(&format!("{}.pieces", digest.hex())), Some(Name::Record(digest)));
        for foreign in ["", ".pieces", "README", "lost+found", "..", &digest.hex()[1..], &format!("{}.x", digest.hex())]
        {
            assert_eq!(Name::parse(foreign), None, "{foreign}");
        }
    }
}
