//! Bytes into the page cache before an async thread sends them: sendfile on a cold page would block
//! every connection of that thread for a disk read.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use darter_core::range::Span;
use rustix::io::{Errno, ReadWriteFlags};

/// One read of the disk; large enough for sequential speed, small enough for many at once.
const STEP: usize = 128 * 1024;

/// Makes sure that `span` of `file` is in the page cache. Returns at once if its last byte is.
///
/// A read error is not told: whoever sends the span meets it again and knows what to do.
pub async fn warm(file: &Arc<File>, span: Span) {
    if span.is_empty() || is_warm(file, span.end - 1) {
        return;
    }
    let file = Arc::clone(file);
    let _ = tokio::task::spawn_blocking(move || read_through(&file, span)).await;
}

/// Whether a read of the byte at `offset` would not wait. Past the end nothing waits.
pub(super) fn is_warm(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    let probe = rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT);
    // A file system that cannot tell (EOPNOTSUPP) is read, to be sure.
    !matches!(probe, Err(Errno::AGAIN | Errno::OPNOTSUPP))
}

fn read_through(file: &File, span: Span) {
    let mut buffer = vec![0; STEP];
    let mut at = span.start;
    while at < span.end {
        match file.read_at(&mut buffer, at) {
            Ok(0) | Err(_) => return,
            Ok(count) => at += u64::try_from(count).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Advice, fadvise};

    use super::*;

    #[tokio::test]
    async fn a_cold_span_is_in_the_page_cache_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let file = Arc::new(File::open(&path).unwrap());
        file.sync_all().unwrap();
        fadvise(&*file, 0, None, Advice::DontNeed).unwrap();
        warm(&file, Span { start: 1 << 20, end: 3 << 20 }).await;
        assert!(is_warm(&file, (3 << 20) - 1));
        // Past the end, and empty: nothing to wait for.
        warm(&file, Span { start: 5 << 20, end: 6 << 20 }).await;
        warm(&file, Span { start: 1, end: 1 }).await;
    }
}
