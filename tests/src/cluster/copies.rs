//! How many times the origin gave each byte of an image: the oracle for "read once".

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, ensure};
use darter_core::range::ByteRange;

use crate::fake_ecr::{FakeEcr, Kind, Seen};
use crate::image::{Image, Item};

/// What was read of one blob, or of several together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// How many times the byte that was sent least often was sent.
    pub least: u64,
    /// The same of the byte that was sent most often.
    pub most: u64,
    /// Bytes sent in all.
    pub sent: u64,
    /// Bytes there are.
    pub size: u64,
}

impl Copies {
    /// Of all blobs that a node pulls of an image.
    pub fn of_image(ecr: &FakeEcr, image: &Image) -> Self {
        Self::of_log(&ecr.log(), image)
    }

    /// The same of a part of the registry's log.
    pub fn of_log(log: &[Seen], image: &Image) -> Self {
        let blobs: Vec<_> = image.pulled_blobs().map(|blob| Self::of_blob(log, blob)).collect();
        Self {
            least: blobs.iter().map(|blob| blob.least).min().unwrap_or_default(),
            most: blobs.iter().map(|blob| blob.most).max().unwrap_or_default(),
            sent: blobs.iter().map(|blob| blob.sent).sum(),
            size: blobs.iter().map(|blob| blob.size).sum(),
        }
    }

    /// Of one blob, from the log of the registry.
    pub fn of_blob(log: &[Seen], blob: &Item) -> Self {
        let bodies = log.iter().filter(|seen| {
            matches!(seen.kind, Kind::Object | Kind::Blob)
                && seen.digest == Some(blob.digest())
                && matches!(seen.status, 200 | 206)
        });
        let spans = bodies.map(|seen| {
            let range = ByteRange::parse(&seen.range).filter(|_| seen.status == 206);
            let start = range.and_then(|range| range.resolve(blob.size()).ok()).map_or(0, |span| span.start);
            (start, start + seen.bytes())
        });
        Self::of_spans(spans, blob.size())
    }

    fn of_spans(spans: impl Iterator<Item = (u64, u64)>, size: u64) -> Self {
        // Where the number of copies changes, and by how much.
        let mut steps = BTreeMap::from([(0, 0), (size, 0)]);
        let mut sent = 0;
        for (start, end) in spans.filter(|(start, end)| start < end) {
            sent += end - start;
            *steps.entry(start).or_default() += 1_i64;
            *steps.entry(end).or_default() -= 1;
        }
        let mut copies = 0;
        let mut levels = Vec::new();
        for step in steps.range(..size).map(|(_, step)| step) {
            copies += step;
            levels.push(copies.unsigned_abs());
        }
        let (least, most) = (levels.iter().min().copied(), levels.iter().max().copied());
        Self { least: least.unwrap_or_default(), most: most.unwrap_or_default(), sent, size }
    }

    /// Copies of the whole, on the average.
    pub fn average(self) -> f64 {
        crate::stage::bytes(self.sent) / crate::stage::bytes(self.size.max(1))
    }

    /// Every byte was sent so many times, none more and none less.
    pub fn ensure_exactly(self, copies: u64) -> Result<()> {
        ensure!(self.least == copies && self.most == copies, "not {copies} copies of each byte, but {self}");
        Ok(())
    }
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} copies (of each byte {} to {})", self.average(), self.least, self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(spans: &[(u64, u64)]) -> (u64, u64, u64) {
        let Copies { least, most, sent, .. } = Copies::of_spans(spans.iter().copied(), 10);
        (least, most, sent)
    }

    #[test]
    fn bytes_that_make_up_for_each_other_in_the_sum_are_told_apart() {
        assert_eq!(copies(&[(0, 4), (4, 10)]), (1, 1, 10));
        assert_eq!(copies(&[(0, 5), (0, 5)]), (0, 2, 10));
        assert_eq!(copies(&[(0, 10), (5, 10), (5, 6)]), (1, 3, 16));
        assert_eq!(copies(&[]), (0, 0, 0));
        assert_eq!(copies(&[(3, 3), (0, 10)]), (1, 1, 10));
    }
}
