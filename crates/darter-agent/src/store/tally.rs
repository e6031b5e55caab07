//! What is known of the bytes of one ingest: which are here, the sha256 so far, the pieces' values.
//!
//! Two hashes run over the bytes as they come, out of memory while they come in order, and out of
//! the page cache where they did not: sha256 over the prefix, because only it makes a blob
//! complete; BLAKE3 over each piece, because it vouches for a piece alone, after a crash and
//! towards other nodes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use blake3::hazmat::HasherExt;
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::range::Span;
use sha2::{Digest as _, Sha256};

use super::ranges::Ranges;
use super::record::{Claim, Record};

/// One read while catching up: fits a level-2 cache, and all the memory that hashing needs.
const READ_BYTES: usize = 128 * 1024;
/// Bytes that readers get only once the whole blob is verified. One byte would do: without it no
/// reader has the blob. A page, because sendfile moves pages.
const WITHHELD_BYTES: u64 = 4096;

trait Hash {
    fn update(&mut self, bytes: &[u8]);
}

impl Hash for Sha256 {
    fn update(&mut self, bytes: &[u8]) {
        sha2::Digest::update(self, bytes);
    }
}

impl Hash for blake3::Hasher {
    fn update(&mut self, bytes: &[u8]) {
        Self::update(self, bytes);
    }
}

/// A hash that follows the bytes of a file.
#[derive(Debug, Clone)]
struct Trail<H> {
    hash: H,
    /// Offset up to which it has hashed.
    at: u64,
}

impl<H: Hash> Trail<H> {
    /// Takes what comes next out of `bytes`, which are at `offset` in the file.
    fn feed(&mut self, offset: u64, bytes: &[u8]) {
        let skip = self.at.checked_sub(offset).and_then(|skip| usize::try_from(skip).ok());
        if let Some(fresh) = skip.and_then(|skip| bytes.get(skip..)) {
            self.hash.update(fresh);
            self.at += len(fresh);
        }
    }

    /// Reads up to `end` from the file.
    fn catch_up(&mut self, file: &File, end: u64, buffer: &mut [u8]) -> io::Result<()> {
        while self.at < end {
            let count = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..count], self.at)?;
            self.hash.update(&buffer[..count]);
            self.at += len(&buffer[..count]);
        }
        Ok(())
    }
}

impl Trail<Sha256> {
    fn sha256() -> Self {
        Self { hash: Sha256::new(), at: 0 }
    }

    fn digest(&self) -> Digest {
        Digest::from_bytes(self.hash.clone().finalize().into())
    }
}

impl Trail<blake3::Hasher> {
    /// The same as `darter_core::pieces::chaining_value`, for a piece that comes bit by bit.
    fn piece(start: u64) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.set_input_offset(start);
        Self { hash, at: start }
    }

    fn chaining_value(&self) -> [u8; 32] {
        self.hash.finalize_non_root()
    }
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// What is known of the bytes of one ingest.
#[derive(Debug)]
pub(super) struct Tally {
    layout: Layout,
    written: Ranges,
    /// Pieces whose value is in the record.
    pieces: Bitfield,
    /// Values under way, by piece.
    partial: BTreeMap<u64, Trail<blake3::Hasher>>,
    /// Values of pieces that became whole since `take_fresh`.
    fresh: Vec<(u64, [u8; 32])>,
    prefix: Trail<Sha256>,
}

impl Tally {
    /// Nothing is here.
    pub(super) fn new(layout: Layout) -> Self {
        Self {
            layout,
            written: Ranges::default(),
            pieces: Bitfield::new(layout.pieces()),
            partial: BTreeMap::new(),
            fresh: Vec::new(),
            prefix: Trail::sha256(),
        }
    }

    /// Finds out what an earlier life of the agent left: each claim of the record is checked against
    /// the bytes, and taken back where it does not hold. `Interrupted` once `stop` is set.
    pub(super) fn resume(layout: Layout, file: &File, record: &Record, stop: &AtomicBool) -> io::Result<Self> {
        let mut tally = Self::new(layout);
        let mut buffer = vec![0; READ_BYTES];
        let vouched = (0..layout.pieces()).all(|index| record.claim(index) != Claim::Unvouched);
        for index in 0..layout.pieces() {
            if stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match record.claim(index) {
                Claim::Missing => continue,
                claim => tally.check(index, claim, file, record, &mut buffer)?,
            }
        }
        // Pieces without a hash of their own count only as a whole, by its sha256: with a gap between
        // them they could reach a reader before anything has vouched for them.
        if !vouched && !tally.is_full() {
            (0..layout.pieces()).try_for_each(|index| record.set(index, Claim::Missing))?;
            return Ok(Self::new(layout));
        }
        Ok(tally)
    }

    fn check(&mut self, index: u64, claim: Claim, file: &File, record: &Record, buffer: &mut [u8]) -> io::Result<()> {
        let span = self.layout.piece(index);
        let mut piece = Trail::piece(span.start);
        let mut prefix = (self.prefix.at == span.start).then(|| self.prefix.clone());
        if read_both(file, span, buffer, &mut piece, prefix.as_mut()).is_err() {
            return record.set(index, Claim::Missing);
        }
        let value = piece.chaining_value();
        match claim {
            Claim::Unvouched => record.set(index, Claim::Here(value))?,
            claim if claim == Claim::Here(value) => {}
            _ => return record.set(index, Claim::Missing),
        }
        self.pieces.set(index);
        self.written.insert(span);
        if let Some(prefix) = prefix {
            self.prefix = prefix;
        }
        Ok(())
    }

    pub(super) const fn written(&self) -> &Ranges {
        &self.written
    }

    /// Pieces that are here whole, and whose value is in the record.
    pub(super) const fn pieces(&self) -> &Bitfield {
        &self.pieces
    }

    /// The pieces that became whole since this was called last, and their values.
    pub(super) fn take_fresh(&mut self) -> impl Iterator<Item = (u64, [u8; 32])> {
        self.fresh.drain(..)
    }

    /// Bytes from the start that readers may have before the blob is verified.
    pub(super) fn readable(&self) -> u64 {
        self.written.prefix().min(self.layout.size().saturating_sub(WITHHELD_BYTES))
    }

    pub(super) fn is_full(&self) -> bool {
        self.written.prefix() >= self.layout.size()
    }

    /// Notes that `span` is in the file.
    pub(super) fn note(&mut self, span: Span) {
        self.written.insert(span);
    }

    /// Hashes what `note` told, out of `bytes` where they come in order.
    pub(super) fn hash(
        &mut self,
        offset: u64,
        bytes: &[u8],
        file: &File,
        record: &Record,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        buffer.resize(READ_BYTES, 0);
        self.prefix.feed(offset, bytes);
        self.prefix.catch_up(file, self.written.prefix(), buffer)?;
        let end = offset + len(bytes);
        let piece_size = self.layout.piece_size();
        for index in offset / piece_size..end.div_ceil(piece_size) {
            let span = self.layout.piece(index);
            let part = Span { start: offset.max(span.start), end: end.min(span.end) };
            self.hash_piece(index, span, part, &bytes[within(part, offset)], file, record, buffer)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "one piece of `hash`, which has them all")]
    fn hash_piece(
        &mut self,
        index: u64,
        span: Span,
        part: Span,
        bytes: &[u8],
        file: &File,
        record: &Record,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let trail = self.partial.entry(index).or_insert_with(|| Trail::piece(span.start));
        trail.feed(part.start, bytes);
        if !self.pieces.has(index) && self.written.covers(span) {
            trail.catch_up(file, span.end, buffer)?;
            let value = trail.chaining_value();
            record.set(index, Claim::Here(value))?;
            self.pieces.set(index);
            self.partial.remove(&index);
            self.fresh.push((index, value));
        }
        Ok(())
    }

    /// The sha256 of the whole, once it is full.
    pub(super) fn digest(&self) -> Digest {
        self.prefix.digest()
    }

    /// The first run of bytes that is missing.
    pub(super) fn first_missing(&self) -> Option<Span> {
        self.written.next_missing(0, self.layout.size())
    }
}

/// Where `part` of a file is in a buffer that starts at `offset` of it.
fn within(part: Span, offset: u64) -> std::ops::Range<usize> {
    let at = |o: u64| usize::try_from(o - offset).unwrap_or(usize::MAX);
    at(part.start)..at(part.end)
}

fn read_both(
    file: &File,
    span: Span,
    buffer: &mut [u8],
    piece: &mut Trail<blake3::Hasher>,
    mut prefix: Option<&mut Trail<Sha256>>,
) -> io::Result<()> {
    let mut at = span.start;
    while at < span.end {
        let count = usize::try_from(span.end - at).unwrap_or(usize::MAX).min(buffer.len());
        let bytes = &mut buffer[..count];
        file.read_exact_at(bytes, at)?;
        piece.feed(at, bytes);
        if let Some(prefix) = &mut prefix {
            prefix.feed(at, bytes);
        }
        at += len(bytes);
    }
    Ok(())
}

/// The chaining value of one piece as the file has it now.
pub(super) fn piece_value(file: &File, span: Span) -> io::Result<[u8; 32]> {
    let mut piece = Trail::piece(span.start);
    piece.catch_up(file, span.end, &mut vec![0; READ_BYTES])?;
    Ok(piece.chaining_value())
}

/// Both hashes of a whole file that is read once, piece after piece.
pub(super) struct Whole {
    sha256: Trail<Sha256>,
    values: Vec<[u8; 32]>,
    buffer: Vec<u8>,
}

impl Whole {
    pub(super) fn new() -> Self {
        Self { sha256: Trail::sha256(), values: Vec::new(), buffer: vec![0; READ_BYTES] }
    }

    /// The next piece.
    pub(super) fn read(&mut self, file: &File, span: Span) -> io::Result<()> {
        let mut piece = Trail::piece(span.start);
        read_both(file, span, &mut self.buffer, &mut piece, Some(&mut self.sha256))?;
        self.values.push(piece.chaining_value());
        Ok(())
    }

    /// The sha256 of all that was read, and the value of each piece.
    pub(super) fn finish(self) -> (Digest, Vec<[u8; 32]>) {
        (self.sha256.digest(), self.values)
    }
}

/// The sha256 of the first `size` bytes of a file. `Interrupted` once `stop` is set.
pub(super) fn file_digest(file: &File, size: u64, stop: &AtomicBool) -> io::Result<Digest> {
    const STEP: u64 = 64 * 1024 * 1024;
    let (mut trail, mut buffer) = (Trail::sha256(), vec![0; READ_BYTES]);
    while trail.at < size {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        trail.catch_up(file, size.min(trail.at + STEP), &mut buffer)?;
    }
    Ok(trail.digest())
}

#[cfg(test)]
mod tests {
    use darter_core::pieces::chaining_value;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_that_nothing_vouches_for_reach_no_reader_where_one_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(2 << 20);
        let path = dir.path().join("d");
        std::fs::write(&path, vec![7; 2 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        let record = Record::create(&dir.path().join("r"), layout.size()).unwrap();
        let resume = || Tally::resume(layout, &file, &record, &AtomicBool::new(false)).unwrap();
        record.set(0, Claim::Unvouched).unwrap();
        assert_eq!(resume().readable(), 0, "torn bytes could be among them");
        record.set(0, Claim::Unvouched).unwrap();
        record.set(1, Claim::Unvouched).unwrap();
        assert!(resume().is_full(), "the sha256 of the whole will tell");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The reference: the hashes of the whole, computed at once.
        #[test]
        fn writes_in_any_order_give_the_hashes_of_the_whole(
            size in (1u64 << 20) - 3000..(2 << 20) + 5000,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            order in any::<u64>(),
        ) {
            let bytes: Vec<u8> = (0..size).map(|i| u8::try_from((i * 31 + i / 509) % 251).unwrap()).collect();
            let dir = tempfile::tempdir().unwrap();
            let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true)
                .open(dir.path().join("d")).unwrap();
            let record = Record::create(&dir.path().join("r"), size).unwrap();
            let layout = Layout::new(size);
            let mut tally = Tally::new(layout);
            let mut edges: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
            edges.extend([0, bytes.len()]);
            edges.sort_unstable();
            let mut parts: Vec<_> = edges.windows(2).map(|w| (w[0], w[1])).filter(|(a, b)| a < b).collect();
            parts.sort_by_key(|(start, _)| (u64::try_from(*start).unwrap() + 1).wrapping_mul(order | 1));
            let mut buffer = Vec::new();
            for (start, end) in parts {
                let offset = u64::try_from(start).unwrap();
                file.write_all_at(&bytes[start..end], offset).unwrap();
                tally.note(Span { start: offset, end: u64::try_from(end).unwrap() });
                tally.hash(offset, &bytes[start..end], &file, &record, &mut buffer).unwrap();
            }
            prop_assert!(tally.is_full() && tally.pieces.is_full() && tally.partial.is_empty());
            prop_assert_eq!(tally.digest(), Digest::of(&bytes));
            for index in 0..layout.pieces() {
                let span = layout.piece(index);
                let value = chaining_value(span.start, &bytes[within(span, 0)]);
                prop_assert_eq!(record.claim(index), Claim::Here(value));
                prop_assert_eq!(piece_value(&file, span).unwrap(), value);
            }
            prop_assert_eq!(file_digest(&file, size, &AtomicBool::new(false)).unwrap(), Digest::of(&bytes));
            let mut whole = Whole::new();
            (0..layout.pieces()).for_each(|index| whole.read(&file, layout.piece(index)).unwrap());
            let values = (0..layout.pieces()).map(|index| piece_value(&file, layout.piece(index)).unwrap()).collect();
            prop_assert_eq!(whole.finish(), (Digest::of(&bytes), values));
        }
    }
}
