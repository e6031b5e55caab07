//! Which span of a blob to ask an origin for next, over several connections at once.
//!
//! Spans go out in the order of the blob, because containerd reads it in order; a span that broke
//! comes back to the front, because somebody waits for it. Not here: the requests themselves.

use std::collections::VecDeque;

use crate::pieces::Layout;
use crate::range::Span;

/// What is still to be asked for.
#[derive(Debug)]
pub struct Plan {
    /// Disjoint, ascending, none empty.
    todo: VecDeque<Span>,
    segment: u64,
    in_flight: usize,
    /// The origin answers ranges with the whole blob: one connection reads it all.
    sequential: bool,
    /// Failures since the last byte that arrived.
    failures: u32,
    failures_max: u32,
}

/// What a worker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Ask for this span.
    Fetch(Span),
    /// Nothing to ask for now; another worker's span may come back.
    Wait,
    /// All spans have arrived.
    Done,
}

impl Plan {
    /// A plan for the `missing` spans of a blob, in ascending order. Gives up after `failures_max`
    /// failures in a row without a byte between them.
    pub fn new(layout: Layout, missing: impl IntoIterator<Item = Span>, failures_max: u32) -> Self {
        Self {
            todo: missing.into_iter().filter(|span| !span.is_empty()).collect(),
            segment: layout.segment_size(),
            in_flight: 0,
            sequential: false,
            failures: 0,
            failures_max,
        }
    }

    /// The next span to ask for.
    pub fn take(&mut self) -> Next {
        if self.sequential && self.in_flight > 0 {
            return Next::Wait;
        }
        match self.todo.pop_front() {
            Some(span) => {
                self.in_flight += 1;
                let end = if self.sequential { span.end } else { self.segment_end(span) };
                if end < span.end {
                    self.todo.push_front(Span { start: end, end: span.end });
                }
                Next::Fetch(Span { start: span.start, end })
            }
            None if self.in_flight > 0 => Next::Wait,
            None => Next::Done,
        }
    }

    /// More of what directly follows `offset`, for a worker whose response goes on past its span.
    /// It keeps the one place in flight that it has.
    pub fn extend(&mut self, offset: u64) -> Option<Span> {
        let span = self.todo.pop_front_if(|span| span.start == offset)?;
        let end = self.segment_end(span);
        if end < span.end {
            self.todo.push_front(Span { start: end, end: span.end });
        }
        Some(Span { start: span.start, end })
    }

    /// Bytes arrived: the origin is alive.
    pub fn progressed(&mut self) {
        self.failures = 0;
    }

    /// A worker's span arrived whole.
    pub fn finished(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// A worker's span broke, and `rest` of it is still missing. False: give the blob up.
    pub fn broke(&mut self, rest: Span) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.failures += 1;
        self.give_back(rest);
        self.failures < self.failures_max
    }

    /// The origin answered the request for `rest` with the whole blob: ask on one connection only,
    /// whose worker skips what is not asked for. False: it was told already, so give the blob up.
    pub fn no_ranges(&mut self, rest: Span) -> bool {
        let again = std::mem::replace(&mut self.sequential, true);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.failures += u32::from(again);
        self.give_back(rest);
        self.failures < self.failures_max
    }

    /// Whether an answer that starts before its span is read up to it rather than refused.
    pub const fn is_sequential(&self) -> bool {
        self.sequential
    }

    fn give_back(&mut self, rest: Span) {
        if rest.is_empty() {
            return;
        }
        let place = self.todo.partition_point(|span| span.start < rest.start);
        self.todo.insert(place, rest);
    }

    /// Where the segment that holds the start of `span` ends, so that requests are aligned however
    /// a resume left the blob.
    fn segment_end(&self, span: Span) -> u64 {
        span.end.min((span.start / self.segment + 1).saturating_mul(self.segment))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn span(start: u64, end: u64) -> Span {
        Span { start: start * MIB, end: end * MIB }
    }

    fn plan(size: u64) -> Plan {
        Plan::new(Layout::new(size * MIB), [span(0, size)], 3)
    }

    #[test]
    fn spans_go_out_in_order_and_a_broken_one_comes_back_first() {
        let mut plan = plan(20);
        assert_eq!(plan.take(), Next::Fetch(span(0, 8)));
        assert_eq!(plan.take(), Next::Fetch(span(8, 16)));
        assert!(plan.broke(span(3, 8)));
        assert_eq!(plan.take(), Next::Fetch(span(3, 8)));
        assert_eq!(plan.take(), Next::Fetch(span(16, 20)));
        assert_eq!(plan.take(), Next::Wait);
        for _ in 0..3 {
            plan.finished();
        }
        assert_eq!(plan.take(), Next::Done);
    }

    #[test]
    fn a_response_that_goes_on_takes_what_follows() {
        let mut plan = plan(20);
        assert_eq!(plan.take(), Next::Fetch(span(0, 8)));
        assert_eq!(plan.extend(8 * MIB), Some(span(8, 16)));
        assert_eq!(plan.take(), Next::Fetch(span(16, 20)));
        assert_eq!(plan.extend(16 * MIB), None, "another worker has it");
    }

    #[test]
    fn an_origin_without_ranges_is_read_on_one_connection() {
        let mut plan = plan(20);
        assert_eq!(plan.take(), Next::Fetch(span(0, 8)));
        assert_eq!(plan.take(), Next::Fetch(span(8, 16)));
        assert!(plan.no_ranges(span(8, 16)) && plan.is_sequential());
        assert_eq!(plan.take(), Next::Wait);
        assert_eq!(plan.extend(8 * MIB), Some(span(8, 16)), "the first worker reads on");
    }

    #[test]
    fn an_origin_that_never_sends_what_is_asked_is_given_up() {
        let mut plan = plan(20);
        for go_on in [true, true, true, false] {
            assert!(matches!(plan.take(), Next::Fetch(_)));
            assert_eq!(plan.no_ranges(span(0, 8)), go_on);
        }
    }

    #[test]
    fn a_dead_origin_is_given_up_and_a_slow_one_is_not() {
        let mut dead = plan(20);
        for tries in [true, true, false] {
            assert_eq!(dead.take(), Next::Fetch(span(0, 8)));
            assert_eq!(dead.broke(span(0, 8)), tries);
        }
        let mut slow = plan(20);
        for _ in 0..50 {
            assert!(matches!(slow.take(), Next::Fetch(_)));
            slow.progressed();
            assert!(slow.broke(span(0, 8)));
        }
    }

    proptest! {
        /// Whatever breaks where: every missing byte is asked for, and arrives once.
        #[test]
        fn every_missing_byte_arrives_exactly_once(
            holes in prop::collection::vec((0u64..40, 1u64..12), 1..5),
            events in prop::collection::vec((0usize..4, 0u64..8), 0..60),
        ) {
            let mut missing = Vec::new();
            let mut end = 0;
            for (gap, len) in holes {
                missing.push(span(end + gap, end + gap + len));
                end += gap + len;
            }
            let mut plan = Plan::new(Layout::new(end * MIB), missing.clone(), u32::MAX);
            let mut arrived = vec![0; usize::try_from(end).unwrap()];
            let mut flying: Vec<Span> = Vec::new();
            let mut events = events.into_iter();
            loop {
                let next = if flying.len() < 4 { plan.take() } else { Next::Wait };
                match next {
                    Next::Fetch(span) => flying.push(span),
                    Next::Done => break,
                    Next::Wait => {
                        let (which, reached) = events.next().unwrap_or((0, 100));
                        let span = flying.remove(which % flying.len());
                        let stop = span.end.min(span.start + reached * MIB);
                        for mib in span.start / MIB..stop / MIB {
                            arrived[usize::try_from(mib).unwrap()] += 1;
                        }
                        if stop == span.end { plan.finished() } else { plan.broke(Span { start: stop, end: span.end }); }
                    }
                }
            }
            for (mib, times) in arrived.iter().enumerate() {
                let at = u64::try_from(mib).unwrap() * MIB;
                let wanted = missing.iter().any(|span| (span.start..span.end).contains(&at));
                prop_assert_eq!(*times, u32::from(wanted), "MiB {}", mib);
            }
        }
    }
}
