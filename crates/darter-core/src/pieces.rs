//! How a blob is cut into pieces, and which of them are here.
//!
//! Sizes are functions of the blob's size alone, so that all nodes agree without a word. A piece is
//! a power of two of at least 1 MiB, hence an aligned BLAKE3 subtree whose chaining value can be
//! computed by itself (`chaining_value`).

use crate::range::Span;

const MIB: u64 = 1024 * 1024;
/// Smaller pieces cost more messages than they save time.
const PIECE_MIN: u64 = MIB;
/// Larger pieces make the last one of a pull a wait of its own.
const PIECE_MAX: u64 = 8 * MIB;
/// More pieces than this add nothing: the distribution overhead is a few piece-times.
const PIECES_WANTED: u64 = 512;

/// The cut of one blob: its size, and the sizes that follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    size: u64,
}

impl Layout {
    /// The cut of a blob of `size` bytes.
    pub const fn new(size: u64) -> Self {
        Self { size }
    }

    /// Size of the blob in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Size in bytes of every piece but the last: `clamp(pow2_floor(size / 512), 1 MiB, 8 MiB)`.
    pub fn piece_size(&self) -> u64 {
        let wanted = (self.size / PIECES_WANTED).max(1);
        (1_u64 << wanted.ilog2()).clamp(PIECE_MIN, PIECE_MAX)
    }

    /// Number of pieces. An empty blob has none.
    pub fn pieces(&self) -> u64 {
        self.size.div_ceil(self.piece_size())
    }

    /// The bytes of piece `index`; empty past the end.
    pub fn piece(&self, index: u64) -> Span {
        let start = index.saturating_mul(self.piece_size()).min(self.size);
        Span { start, end: start.saturating_add(self.piece_size()).min(self.size) }
    }

    /// Size in bytes of what one origin request reads: several pieces, 8 MiB, or 16 MiB above 4 GiB.
    pub const fn segment_size(&self) -> u64 {
        if self.size > 4 * 1024 * MIB { 16 * MIB } else { 8 * MIB }
    }

    /// Number of segments.
    pub const fn segments(&self) -> u64 {
        self.size.div_ceil(self.segment_size())
    }

    /// The bytes of segment `index`; empty past the end.
    pub fn segment(&self, index: u64) -> Span {
        let start = index.saturating_mul(self.segment_size()).min(self.size);
        Span { start, end: start.saturating_add(self.segment_size()).min(self.size) }
    }
}

/// The BLAKE3 chaining value of the piece that starts at `offset`: what vouches for a piece before
/// the whole blob is known. Values of all pieces combine to the blob's BLAKE3 root.
///
/// `offset` must be a multiple of the piece size, which the layout guarantees.
pub fn chaining_value(offset: u64, piece: &[u8]) -> [u8; 32] {
    use blake3::hazmat::HasherExt;
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(piece);
    hasher.finalize_non_root()
}

/// Which pieces of a blob are here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitfield {
    words: Vec<u64>,
    len: u64,
}

impl Bitfield {
    /// A field of `len` pieces, none of them here.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], len }
    }

    /// Whether piece `index` is here; false past the end.
    pub fn has(&self, index: u64) -> bool {
        self.word(index).is_some_and(|word| self.words[word] >> (index % 64) & 1 == 1)
    }

    /// Notes that piece `index` is here. Past the end: nothing.
    pub fn set(&mut self, index: u64) {
        if let Some(word) = self.word(index) {
            self.words[word] |= 1 << (index % 64);
        }
    }

    /// Notes that piece `index` is not here after all.
    pub fn clear(&mut self, index: u64) {
        if let Some(word) = self.word(index) {
            self.words[word] &= !(1 << (index % 64));
        }
    }

    /// Number of pieces that are here.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether all pieces are here.
    pub fn is_full(&self) -> bool {
        self.count() == self.len
    }

    /// Number of pieces of the blob.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether the blob has no piece at all.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A field of `len` pieces, all of them here.
    pub fn full(len: u64) -> Self {
        let mut field = Self::new(len);
        field.words.fill(u64::MAX);
        let spare = u32::try_from((64 - len % 64) % 64).unwrap_or(0);
        if let Some(last) = field.words.last_mut() {
            *last >>= spare;
        }
        field
    }

    /// The pieces as words of 64, the first piece in the lowest bit: for sets of pieces that are
    /// combined many at a time. Bits past the end are zero.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The pieces that are here, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.words.iter().zip(0_u64..).flat_map(|(word, at)| bits(*word).map(move |bit| at * 64 + bit))
    }

    /// The first piece that is not here, or the number of pieces.
    pub fn first_missing(&self) -> u64 {
        let full = self.words.iter().take_while(|word| **word == u64::MAX).count();
        let within = self.words.get(full).map_or(0, |word| word.trailing_ones());
        (u64::try_from(full).unwrap_or(u64::MAX) * 64 + u64::from(within)).min(self.len)
    }

    fn word(&self, index: u64) -> Option<usize> {
        (index < self.len).then(|| usize::try_from(index / 64).ok()).flatten()
    }
}

/// The positions of the set bits of a word, in ascending order.
pub(crate) fn bits(word: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(word), |word| Some(word & word.wrapping_sub(1)))
        .take_while(|word| *word != 0)
        .map(|word| u64::from(word.trailing_zeros()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn piece_sizes_follow_the_rule() {
        const GIB: u64 = 1024 * MIB;
        for (size, piece, pieces) in [
            (0, MIB, 0),
            (1, MIB, 1),
            (MIB, MIB, 1),
            (MIB + 1, MIB, 2),
            (512 * MIB, MIB, 512),
            (GIB, 2 * MIB, 512),
            (3 * GIB, 4 * MIB, 768),
            (10 * GIB, 8 * MIB, 1280),
            (100 * GIB, 8 * MIB, 12800),
        ] {
            let layout = Layout::new(size);
            assert_eq!((layout.piece_size(), layout.pieces()), (piece, pieces), "{size}");
        }
        assert_eq!(Layout::new(4 * GIB).segment_size(), 8 * MIB);
        assert_eq!(Layout::new(4 * GIB + 1).segment_size(), 16 * MIB);
    }

    #[test]
    fn chaining_values_of_pieces_combine_to_the_blobs_root() {
        use blake3::hazmat::{Mode, merge_subtrees_root};
        let size = usize::try_from(2 * MIB).unwrap();
        let blob: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (left, right) = blob.split_at(size / 2);
        let root = merge_subtrees_root(&chaining_value(0, left), &chaining_value(MIB, right), Mode::Hash);
        assert_eq!(root, blake3::hash(&blob));
    }

    proptest! {
        #[test]
        fn pieces_and_segments_cover_a_blob_without_gap(size in 0..20_000 * MIB) {
            let layout = Layout::new(size);
            prop_assert!(layout.piece_size().is_power_of_two());
            prop_assert_eq!(layout.segment_size() % layout.piece_size(), 0);
            for (count, part) in [
                (layout.pieces(), &(|i| layout.piece(i)) as &dyn Fn(u64) -> Span),
                (layout.segments(), &|i| layout.segment(i)),
            ] {
                let mut end = 0;
                for index in 0..count {
                    prop_assert_eq!(part(index).start, end);
                    prop_assert!(!part(index).is_empty());
                    end = part(index).end;
                }
                prop_assert_eq!(end, size);
                prop_assert!(part(count).is_empty());
            }
        }

        #[test]
        fn a_bitfield_is_a_set_of_small_numbers(len in 0u64..200, marks in prop::collection::vec((0u64..220, any::<bool>()), 0..300)) {
            let mut field = Bitfield::new(len);
            let mut set = BTreeSet::new();
            for (index, here) in marks {
                if here { field.set(index) } else { field.clear(index) }
                if here && index < len { set.insert(index); } else { set.remove(&index); }
            }
            prop_assert_eq!(field.count(), u64::try_from(set.len()).unwrap());
            prop_assert_eq!(field.first_missing(), (0..len).find(|i| !set.contains(i)).unwrap_or(len));
            prop_assert_eq!(field.is_full(), field.first_missing() == len);
            prop_assert!((0..230).all(|i| field.has(i) == set.contains(&i)));
            prop_assert!(field.iter().eq(set.iter().copied()));
            prop_assert!(Bitfield::full(len).iter().eq(0..len));
            prop_assert!(Bitfield::full(len).is_full());
        }
    }
}
