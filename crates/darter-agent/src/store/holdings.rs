//! What the store has of an image: how much, whether it stays, when it was of use last.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use darter_core::Digest;

use super::{Store, lock};

/// What is here of some blobs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Holding {
    /// Bytes of those that are complete here.
    pub bytes: u64,
    /// Whether all of them are.
    pub is_complete: bool,
    /// Whether eviction spares all of them.
    pub is_pinned: bool,
    /// Since one of them was used.
    pub unused: Option<Duration>,
}

impl Store {
    /// What is here of these blobs, by what memory knows.
    pub fn holding<'a>(&self, blobs: impl IntoIterator<Item = &'a Digest>) -> Holding {
        let mut index = lock(&self.shared.index);
        let (mut bytes, mut used) = (0_u64, None::<SystemTime>);
        let (mut is_complete, mut is_pinned) = (true, true);
        // A manifest may name the same layer twice.
        let blobs: BTreeSet<_> = blobs.into_iter().collect();
        for digest in &blobs {
            is_pinned &= index.pins().until(digest).is_some();
            match index.blob(digest) {
                Some(entry) => {
                    bytes = bytes.saturating_add(entry.size);
                    used = used.max(Some(entry.used));
                }
                None => is_complete = false,
            }
        }
        let unused = used.map(|used| SystemTime::now().duration_since(used).unwrap_or_default());
        let is_any = !blobs.is_empty();
        Holding { bytes, is_complete: is_complete && is_any, is_pinned: is_pinned && is_any, unused }
    }

    /// So many of the blobs that are no larger than this, those first that were used last.
    pub fn small_blobs(&self, size_max: u64, count_max: usize) -> Vec<Digest> {
        let index = lock(&self.shared.index);
        let small = index.blobs().filter(|(_, entry)| entry.size <= size_max);
        let mut small: Vec<_> = small.map(|(digest, entry)| (entry.used, *digest)).collect();
        drop(index);
        small.sort_unstable_by(|one, other| other.cmp(one));
        small.into_iter().take(count_max).map(|(_, digest)| digest).collect()
    }

    /// The content of a small blob, without counting as a use of it. Blocks.
    pub fn peek(&self, digest: &Digest) -> Option<Vec<u8>> {
        use std::os::unix::fs::FileExt as _;
        let blob = self.shared.open_blob(digest)?;
        let mut content = vec![0; usize::try_from(blob.size()).ok()?];
        blob.file().read_exact_at(&mut content, 0).ok()?;
        Some(content)
    }
}
