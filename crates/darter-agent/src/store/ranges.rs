//! Which bytes of a blob are here, to the byte: the pieces tell what survives a crash, this tells
//! what several writers at once have brought so far.

use std::collections::BTreeMap;

use darter_core::range::Span;

/// Disjoint spans, those that touch merged. The number of spans is about the number of writers.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges {
    /// Start of each span to its end.
    spans: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Number of separate spans.
    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// Adds a span; what is in it already stays.
    pub(super) fn insert(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        let (mut start, mut end) = (span.start, span.end);
        while let Some((&s, &e)) = self.spans.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            start = start.min(s);
            end = end.max(e);
            self.spans.remove(&s);
        }
        self.spans.insert(start, end);
    }

    /// The first run of bytes at or after `from` and before `size` that is not here.
    pub(super) fn next_missing(&self, from: u64, size: u64) -> Option<Span> {
        let start = self.end_of(from);
        if start >= size {
            return None;
        }
        let end = self.spans.range(start..).next().map_or(size, |(&s, _)| s.min(size));
        Some(Span { start, end })
    }

    /// Whether all of `span` is here.
    pub(super) fn covers(&self, span: Span) -> bool {
        self.end_of(span.start) >= span.end
    }

    /// Whether the byte at `offset` is here.
    pub(super) fn has(&self, offset: u64) -> bool {
        self.end_of(offset) > offset
    }

    /// How far the bytes reach without a gap from the first one.
    pub(super) fn prefix(&self) -> u64 {
        self.end_of(0)
    }

    /// The end of the span that holds `offset`, or `offset` where none does.
    fn end_of(&self, offset: u64) -> u64 {
        self.spans.range(..=offset).next_back().map_or(offset, |(_, &end)| end.max(offset))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The reference: one flag a byte.
        #[test]
        fn ranges_are_a_set_of_offsets(spans in prop::collection::vec((0u64..60, 0u64..20), 0..40), probe in 0u64..80) {
            let mut ranges = Ranges::default();
            let mut flags = [false; 80];
            for (start, len) in spans {
                let span = Span { start, end: start + len };
                let covered = (start..start + len).all(|o| flags[usize::try_from(o).unwrap()]);
                prop_assert_eq!(ranges.covers(span), covered);
                ranges.insert(span);
                for offset in start..start + len {
                    flags[usize::try_from(offset).unwrap()] = true;
                }
            }
            let at = |o: u64| flags[usize::try_from(o).unwrap()];
            prop_assert!((0..80).all(|o| ranges.has(o) == at(o)));
            prop_assert_eq!(ranges.prefix(), (0..80).find(|o| !at(*o)).unwrap_or(80));
            let start = (probe..80).find(|o| !at(*o));
            let run = start.map(|start| Span { start, end: (start..80).find(|o| at(*o)).unwrap_or(80) });
            prop_assert_eq!(ranges.next_missing(probe, 80), run);
            let runs = (0..80).filter(|o| at(*o) && (*o == 0 || !at(o - 1))).count();
            prop_assert_eq!(ranges.len(), runs);
        }
    }
}
