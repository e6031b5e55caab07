//! Which bytes a Range header names, and what an origin's Content-Range says.

#![no_main]

use darter_core::range::{ByteRange, Unsatisfiable, parse_content_range};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for header in [text.to_owned(), format!("bytes={text}")] {
        if let Some(range) = ByteRange::parse(&header) {
            [0, 1, 2048, u64::MAX].into_iter().for_each(|size| resolves(range, size));
            assert_eq!(ByteRange::parse(&written(range)), Some(range), "{header:?}");
        }
    }
    for header in [text.to_owned(), format!("bytes {text}")] {
        let Some((span, whole)) = parse_content_range(&header) else { continue };
        assert!(span.start < span.end && whole.is_none_or(|whole| span.end <= whole), "{header:?}");
        let size = whole.map_or_else(|| "*".to_owned(), |whole| whole.to_string());
        let again = format!("bytes {}-{}/{size}", span.start, span.end - 1);
        assert_eq!(parse_content_range(&again), Some((span, whole)), "{header:?}");
    }
});

/// Byte by byte at the ends of the blob and of the span: inside is what the range names, outside is not.
fn resolves(range: ByteRange, size: u64) {
    let span = range.resolve(size);
    if let Ok(span) = span {
        assert!(span.start < span.end && span.end <= size, "{range:?} of {size}: {span:?}");
        assert_eq!(span.len(), span.end - span.start);
    }
    let edges = span.map_or([0, size / 2, size, size], |span| [0, span.start, span.end, size]);
    for offset in edges.into_iter().flat_map(|edge| [edge.saturating_sub(1), edge]).filter(|offset| *offset < size) {
        let is_inside = span.is_ok_and(|span| (span.start..span.end).contains(&offset));
        assert_eq!(is_inside, names(range, offset, size), "{range:?} of {size} at {offset}: {span:?}");
    }
    assert!(size > 0 || span == Err(Unsatisfiable), "an empty blob has no byte to give");
    assert!(range.is_everything() == (range == ByteRange::From(0)));
}

fn names(range: ByteRange, offset: u64, size: u64) -> bool {
    match range {
        ByteRange::From(first) => offset >= first,
        ByteRange::Between(first, last) => (first..=last).contains(&offset),
        ByteRange::Last(count) => size - offset <= count,
        ByteRange::Backwards => false,
    }
}

fn written(range: ByteRange) -> String {
    match range {
        ByteRange::From(first) => format!("bytes={first}-"),
        ByteRange::Between(first, last) => format!("bytes={first}-{last}"),
        ByteRange::Last(count) => format!("bytes=-{count}"),
        ByteRange::Backwards => "bytes=1-0".to_owned(),
    }
}
