//! A complete verified blob, open for reading.
//!
//! The open file is the guarantee: whatever happens to the name, its bytes stay. Eviction also
//! spares a blob while a handle lives, because unlinking it would free nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use darter_core::Digest;
use darter_core::range::Span;

use crate::metrics::Source;

/// What all handles of one blob share, so that a blob costs one file descriptor.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) file: Arc<File>,
    pub(super) source: Source,
}

/// A handle of a blob. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blob(pub(super) Arc<Open>);

impl Blob {
    /// The file, to be read with offsets: its position is shared.
    pub fn file(&self) -> &Arc<File> {
        &self.0.file
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Its name.
    pub fn digest(&self) -> &Digest {
        &self.0.digest
    }

    /// `Cache`, or `Containerd` for one in containerd's content store.
    pub fn source(&self) -> Source {
        self.0.source
    }

    /// The whole content: for manifests and other small things, whose size the caller has checked.
    pub async fn read_all(&self) -> io::Result<Bytes> {
        self.read(Span { start: 0, end: self.0.size }).await
    }

    /// A part of the content, of a size that the caller has chosen.
    pub async fn read(&self, span: Span) -> io::Result<Bytes> {
        let open = Arc::clone(&self.0);
        let read = move || {
            let size = usize::try_from(span.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
            let mut content = vec![0; size];
            open.file.read_exact_at(&mut content, span.start)?;
            Ok(content.into())
        };
        tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
    }
}
