//! The Range header of a blob request.
//!
//! Not here: whether a range may be answered now; an incomplete blob has its own rules
//! (`darter_agent::mirror`).

/// One byte range as a client asks for it, before the size of the blob is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteRange {
    /// `bytes=a-`: from this offset to the end.
    From(u64),
    /// `bytes=a-b`: from the first offset to the second, both included.
    Between(u64, u64),
    /// `bytes=-n`: the last n bytes.
    Last(u64),
    /// `bytes=b-a` with a < b: RFC 9110 calls it invalid; the OCI conformance suite wants 416.
    Backwards,
}

/// A range inside a blob of known size: `start..end`, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset after the last byte.
    pub end: u64,
}

impl Span {
    /// Number of bytes.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Always false for a span that came from `ByteRange::resolve`.
    pub const fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// The blob has no byte of the range: 416.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("range not satisfiable")]
pub struct Unsatisfiable;

impl ByteRange {
    /// Reads a Range header. `None` means that the header is to be ignored, as RFC 9110 §14.2 asks
    /// for other units, for syntax it does not know and (allowed) for several ranges at once.
    pub fn parse(header: &str) -> Option<Self> {
        let ranges = header.trim().strip_prefix("bytes=")?.trim();
        let (first, last) = ranges.split_once('-')?;
        let (first, last) = (first.trim(), last.trim());
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Some(Self::Between(first, last)),
            (Some(_), Some(_)) => Some(Self::Backwards),
            (Some(first), None) if last.is_empty() => Some(Self::From(first)),
            (None, Some(last)) if first.is_empty() => Some(Self::Last(last)),
            _ => None,
        }
    }

    /// The part of a blob of `size` bytes that this range names.
    pub fn resolve(self, size: u64) -> Result<Span, Unsatisfiable> {
        let span = match self {
            Self::From(start) => Span { start, end: size },
            Self::Between(start, last) => Span { start, end: size.min(last.saturating_add(1)) },
            Self::Last(count) => Span { start: size.saturating_sub(count), end: size },
            Self::Backwards => return Err(Unsatisfiable),
        };
        if span.start < span.end { Ok(span) } else { Err(Unsatisfiable) }
    }

    /// Whether the range starts at the first byte and has no end: `bytes=0-`, which containerd's
    /// parallel fetch sends first and which a 200 answers as well.
    pub const fn is_everything(self) -> bool {
        matches!(self, Self::From(0))
    }
}

/// Digits only: `str::parse` would also take a sign.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // A number past u64 is a well-formed offset past every blob.
    Some(text.parse().unwrap_or(u64::MAX))
}

/// Reads `Content-Range: bytes a-b/size` of a 206: the span and the whole size, if the origin told it.
pub fn parse_content_range(header: &str) -> Option<(Span, Option<u64>)> {
    let (range, size) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last) = (number(first.trim())?, number(last.trim())?);
    let size = match size.trim() {
        "*" => None,
        size => Some(number(size)?),
    };
    let end = last.checked_add(1)?;
    (first < end && size.is_none_or(|size| end <= size)).then_some((Span { start: first, end }, size))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_cases_of_the_conformance_suite() {
        let answer = |header: &str| ByteRange::parse(header).map(|range| range.resolve(2048));
        let span = |start, end| Some(Ok(Span { start, end }));
        assert_eq!(answer("bytes=500-1499"), span(500, 1500));
        assert_eq!(answer("bytes=500-"), span(500, 2048));
        assert_eq!(answer("bytes=-500"), span(1548, 2048));
        assert_eq!(answer("bytes=2000-5000"), span(2000, 2048));
        assert_eq!(answer("bytes=500-0"), Some(Err(Unsatisfiable)));
        assert_eq!(answer("bytes=5000-10000"), Some(Err(Unsatisfiable)));
        assert_eq!(answer("bytes=-0"), Some(Err(Unsatisfiable)));
    }

    #[test]
    fn what_is_not_one_byte_range_is_ignored() {
        for header in
            ["", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=1-2,4-5", "items=0-1", "bytes=+1-2", "bytes=0x1-"]
        {
            assert_eq!(ByteRange::parse(header), None, "{header}");
        }
        assert_eq!(ByteRange::parse("bytes=99999999999999999999999-"), Some(ByteRange::From(u64::MAX)));
    }

    #[test]
    fn a_content_range_that_contradicts_itself_is_refused() {
        assert_eq!(parse_content_range("bytes 0-9/10"), Some((Span { start: 0, end: 10 }, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((Span { start: 5, end: 10 }, None)));
        for header in ["bytes 0-10/10", "bytes 9-5/10", "bytes */10", "0-9/10", "bytes 0-18446744073709551615/*"] {
            assert_eq!(parse_content_range(header), None, "{header}");
        }
    }

    proptest! {
        /// The reference: walk over the offsets and keep those that the range names.
        #[test]
        fn a_span_holds_the_bytes_that_the_range_names(size in 0u64..40, first in 0u64..50, last in 0u64..50) {
            for (header, wanted) in [
                (format!("bytes={first}-{last}"), (0..size).filter(|o| (first..=last).contains(o)).collect::<Vec<_>>()),
                (format!("bytes={first}-"), (0..size).filter(|o| *o >= first).collect()),
                (format!("bytes=-{last}"), (0..size).filter(|o| *o + last >= size).collect()),
            ] {
                let got = ByteRange::parse(&header).unwrap().resolve(size);
                let got = got.map_or_else(|_| Vec::new(), |span| (span.start..span.end).collect());
                prop_assert_eq!(got, wanted, "{}", header);
            }
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = ByteRange::parse(&text);
            let _ = ByteRange::parse(&format!("bytes={text}"));
            let _ = parse_content_range(&text);
        }
    }
}
