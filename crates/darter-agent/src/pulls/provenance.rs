//! Where the bytes of a pull came from, span by span: what a reader's share is told by.
//!
//! They came from the origin unless something else was noted here. So the way from the origin costs
//! nothing, and whoever brings bytes from elsewhere notes a whole piece at a time. Readers ask once, at
//! the end of a body.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use darter_core::range::Span;

use crate::metrics::Source;

/// Spans noted: the pieces of a blob of 64 GiB that all have another source than the one before them.
/// What is past it counts as from the origin.
const SPANS_MAX: usize = 8192;

/// Start of each span to its end and source; they do not overlap.
type Spans = BTreeMap<u64, (u64, Source)>;

/// The sources of one pull.
#[derive(Debug, Default)]
pub(super) struct Provenance(Mutex<Spans>);

impl Provenance {
    /// Notes that a span comes from `source`, before it is written: nobody may read it and not know.
    /// What was noted of it before stays, as the bytes that come first do.
    pub(super) fn note(&self, span: Span, source: Source) {
        let mut spans = self.spans();
        let mut at = span.start;
        while let Some(gap) = next_gap(&spans, Span { start: at, end: span.end }) {
            at = gap.end;
            let before = spans.range(..gap.start).next_back().map(|(start, known)| (*start, *known));
            match before {
                Some((start, known)) if known == (gap.start, source) => spans.insert(start, (gap.end, source)),
                _ if spans.len() >= SPANS_MAX => return,
                _ => spans.insert(gap.start, (gap.end, source)),
            };
        }
    }

    /// Notes that all but what is missing was on disk before the pull began.
    pub(super) fn was_here(&self, size: u64, missing: &[Span]) {
        let mut at = 0;
        for gap in missing.iter().copied().chain([Span { start: size, end: size }]) {
            self.note(Span { start: at, end: gap.start }, Source::Cache);
            at = gap.end;
        }
    }

    /// Where the byte at an offset came from.
    pub(super) fn source_of(&self, offset: u64) -> Source {
        let spans = self.spans();
        let known = spans.range(..=offset).next_back().filter(|(_, (end, _))| *end > offset);
        known.map_or(Source::Origin, |(_, (_, source))| *source)
    }

    /// How many of the first `sent` bytes came from where. Each source once, and together all of them.
    pub(super) fn shares(&self, sent: u64) -> Vec<(Source, u64)> {
        let mut shares: Vec<(Source, u64)> = Vec::new();
        let mut origin = sent;
        for (start, (end, source)) in self.spans().range(..sent) {
            let bytes = end.min(&sent) - start;
            origin -= bytes;
            match shares.iter_mut().find(|(known, _)| known == source) {
                Some((_, sum)) => *sum += bytes,
                None => shares.push((*source, bytes)),
            }
        }
        shares.push((Source::Origin, origin));
        shares.retain(|(_, bytes)| *bytes > 0);
        shares
    }

    fn spans(&self) -> MutexGuard<'_, Spans> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first run of bytes in `within` of which nothing was noted.
fn next_gap(spans: &Spans, within: Span) -> Option<Span> {
    let mut start = within.start;
    // Neighbours of different sources touch.
    while let Some((_, (end, _))) = spans.range(..=start).next_back().filter(|(_, (end, _))| *end > start) {
        start = *end;
    }
    let end = spans.range(start..).next().map_or(within.end, |(next, _)| within.end.min(*next));
    (start < end).then_some(Span { start, end })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The reference: one source a byte.
        #[test]
        fn every_byte_has_the_source_that_was_noted_of_it_first(
            notes in prop::collection::vec((0u64..60, 0u64..20, any::<bool>()), 0..30),
            sent in 0u64..80,
        ) {
            let provenance = Provenance::default();
            let mut bytes = [None; 80];
            for (start, len, peer) in notes {
                let source = if peer { Source::Peer } else { Source::Cache };
                provenance.note(Span { start, end: start + len }, source);
                for byte in &mut bytes[usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap()] {
                    byte.get_or_insert(source);
                }
            }
            let sources = bytes.map(|byte| byte.unwrap_or(Source::Origin));
            for (offset, source) in sources.iter().enumerate() {
                prop_assert_eq!(provenance.source_of(offset as u64), *source, "{}", offset);
            }
            let mut shares = provenance.shares(sent);
            for source in [Source::Cache, Source::Peer, Source::Origin] {
                let told = shares.iter().position(|(known, _)| *known == source).map_or(0, |at| shares.remove(at).1);
                let there = sources.iter().take(usize::try_from(sent).unwrap()).filter(|known| **known == source);
                prop_assert_eq!(told, there.count() as u64);
            }
            prop_assert_eq!(shares, [], "each once, and no others");
        }
    }

    #[test]
    fn what_is_not_missing_was_here() {
        let provenance = Provenance::default();
        provenance.was_here(100, &[Span { start: 10, end: 30 }, Span { start: 90, end: 100 }]);
        assert_eq!(provenance.shares(100), [(Source::Cache, 70), (Source::Origin, 30)]);
        assert_eq!(provenance.shares(20), [(Source::Cache, 10), (Source::Origin, 10)]);
        assert_eq!((provenance.source_of(9), provenance.source_of(10)), (Source::Cache, Source::Origin));
    }

    #[test]
    fn its_size_has_a_bound_and_neighbours_of_one_source_are_one_span() {
        let provenance = Provenance::default();
        let spans = || provenance.spans().len();
        (0..100).for_each(|at| provenance.note(Span { start: at, end: at + 1 }, Source::Peer));
        assert_eq!(spans(), 1);
        let scattered = |at: u64| Span { start: 1000 + 2 * at, end: 1001 + 2 * at };
        let twice = 2 * SPANS_MAX as u64;
        (0..twice).for_each(|at| provenance.note(scattered(at), Source::Peer));
        assert_eq!(spans(), SPANS_MAX);
        assert_eq!(provenance.source_of(scattered(twice - 1).start), Source::Origin);
    }
}
