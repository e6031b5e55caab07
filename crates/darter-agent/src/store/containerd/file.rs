//! The files of containerd's blobs: which there are, and whether one is still what it was.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use darter_core::Digest;

/// Blobs that are listed at most: a node with thousands of images has fewer. The rest is not offered.
const BLOBS_MAX: usize = 65_536;

/// A file as it was when it was hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    /// Seconds and nanoseconds.
    pub(super) modified: (i64, i64),
}

impl Identity {
    /// Of a plain file; a directory or a symlink has none.
    pub(super) fn of(metadata: &Metadata) -> Option<Self> {
        metadata.is_file().then(|| Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// Opens the plain file of this name, and no other that a symlink leads to.
pub(super) fn open(path: &Path) -> io::Result<(File, Identity)> {
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(no_follow).open(path)?;
    let identity = Identity::of(&file.metadata()?).ok_or(io::ErrorKind::InvalidInput)?;
    Ok((file, identity))
}

/// The plain files in `dir` that are named like blobs.
pub(super) fn list(dir: &Path) -> io::Result<HashMap<Digest, Identity>> {
    let blob = |entry: fs::DirEntry| {
        let digest = Digest::from_hex(entry.file_name().to_str()?).ok()?;
        // Of the entry itself: a symlink is not followed. One that went meanwhile is not there.
        Some((digest, Identity::of(&entry.metadata().ok()?)?))
    };
    let entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    Ok(entries.into_iter().filter_map(blob).take(BLOBS_MAX).collect())
}
