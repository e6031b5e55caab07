//! The bytes of a blob as they come: checked against what was asked, never silent for long.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use darter_core::range::{Span, parse_content_range};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::OriginError;
use super::limits::Throttle;
use super::line::Slot;
use crate::metrics::{Metrics, RegistryLabel, RegistryLabels};

/// A blob, or a range of it, on its way.
pub struct BlobStream {
    /// Offset of the first byte that comes. 0 where a range was asked for and the origin sends the
    /// whole blob.
    pub start: u64,
    /// Offset after the last byte, where the origin told it.
    pub end: Option<u64>,
    /// Size of the whole blob in bytes, where the origin told it.
    pub size: Option<u64>,
    at: u64,
    body: Incoming,
    settings: Settings,
    /// What came is paid for then, where bytes are spread over time.
    owes: Option<Instant>,
    /// The connection counts as used for as long as its body lives.
    slot: Option<Slot>,
}

/// What reading a body needs to know of its registry.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) stall: Duration,
    pub(super) throttle: Option<Arc<Throttle>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) label: RegistryLabel,
}

impl Settings {
    /// Counts bytes that came.
    pub(super) fn count(&self, bytes: usize) {
        let labels = RegistryLabels { registry: self.label.clone() };
        self.metrics.origin_bytes.get_or_create(&labels).inc_by(bytes as u64);
    }
}

impl std::fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { start, end, size, at, .. } = self;
        write!(f, "BlobStream {{ start: {start}, end: {end:?}, size: {size:?}, at: {at} }}")
    }
}

impl BlobStream {
    /// The body of an answer to a request for `asked`.
    pub(super) fn new(
        answer: Response<Incoming>,
        asked: Option<Span>,
        settings: Settings,
        slot: Option<Slot>,
    ) -> Result<Self, OriginError> {
        let Extent { start, end, size } = extent(answer.status(), answer.headers(), asked)?;
        Ok(Self { start, end, size, at: start, body: answer.into_body(), settings, owes: None, slot })
    }

    /// The next bytes; `None` at the end. An error ends the stream.
    pub async fn next(&mut self) -> Option<Result<Bytes, OriginError>> {
        // Before more is read, and not before what came goes on: somebody waits for it.
        if let Some(paid) = self.owes.take() {
            tokio::time::sleep_until(paid).await;
        }
        loop {
            let stall = self.settings.stall;
            let frame = match tokio::time::timeout(stall, self.body.frame()).await {
                Err(_) => return Some(Err(OriginError::Stalled { after: stall })),
                Ok(None) => return self.ended().map(Err),
                Ok(Some(Err(error))) => return Some(Err(self.broken(error))),
                Ok(Some(Ok(frame))) => frame,
            };
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                return Some(self.took(data));
            }
        }
    }

    fn took(&mut self, data: Bytes) -> Result<Bytes, OriginError> {
        self.at += data.len() as u64;
        self.settings.count(data.len());
        if self.end.is_some_and(|end| self.at > end) {
            return Err(OriginError::Lied("it sends more than it announced"));
        }
        self.owes = self.settings.throttle.as_ref().map(|throttle| throttle.owes(data.len()));
        if let Some(slot) = &self.slot {
            slot.came();
        }
        Ok(data)
    }

    /// A body without Content-Length ends where the connection does, early or not.
    fn ended(&self) -> Option<OriginError> {
        let wanted = self.end.filter(|end| self.at < *end)?;
        Some(OriginError::Truncated { got: self.at, wanted })
    }

    fn broken(&self, error: hyper::Error) -> OriginError {
        match self.end {
            Some(wanted) if is_early_end(&error) => OriginError::Truncated { got: self.at, wanted },
            _ => OriginError::Broken(error),
        }
    }
}

/// Whether the connection was closed before Content-Length: hyper says so in the cause.
fn is_early_end(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    error.is_incomplete_message() || cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::UnexpectedEof)
}

#[derive(Debug, PartialEq, Eq)]
struct Extent {
    start: u64,
    end: Option<u64>,
    size: Option<u64>,
}

/// Which bytes an answer holds. A 206 must be for the range that was asked: bytes at the wrong
/// offset are found out only when the whole blob is hashed, after all of them were fetched.
fn extent(status: StatusCode, headers: &HeaderMap, asked: Option<Span>) -> Result<Extent, OriginError> {
    let length = number(headers, CONTENT_LENGTH.as_str())?;
    if status != StatusCode::PARTIAL_CONTENT {
        return Ok(Extent { start: 0, end: length, size: length });
    }
    let asked = asked.ok_or(OriginError::Lied("206 to a request without a range"))?;
    let header = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let (span, size) = header.and_then(parse_content_range).ok_or(OriginError::Lied("206 without a Content-Range"))?;
    // A range past the end is cut at the end.
    let end = size.map_or(asked.end, |size| asked.end.min(size));
    if span.start != asked.start || span.end != end {
        return Err(OriginError::Lied("another range than was asked for"));
    }
    if length.is_some_and(|length| length != span.len()) {
        return Err(OriginError::Lied("Content-Length and Content-Range differ"));
    }
    Ok(Extent { start: span.start, end: Some(span.end), size })
}

fn number(headers: &HeaderMap, name: &str) -> Result<Option<u64>, OriginError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    text.parse().map(Some).map_err(|_| OriginError::Lied("a Content-Length that is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, range: Option<&str>, length: Option<u64>) -> Result<Extent, OriginError> {
        let mut headers = HeaderMap::new();
        if let Some(range) = range {
            headers.insert(CONTENT_RANGE, range.parse().unwrap());
        }
        if let Some(length) = length {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        extent(StatusCode::from_u16(status).unwrap(), &headers, Some(Span { start: 10, end: 20 }))
    }

    #[test]
    fn a_range_is_the_one_that_was_asked_for_or_a_lie() {
        let wanted = |end, size| Extent { start: 10, end: Some(end), size };
        assert_eq!(answer(206, Some("bytes 10-19/100"), Some(10)).unwrap(), wanted(20, Some(100)));
        assert_eq!(answer(206, Some("bytes 10-19/*"), None).unwrap(), wanted(20, None));
        assert_eq!(answer(206, Some("bytes 10-14/15"), Some(5)).unwrap(), wanted(15, Some(15)), "the blob ends there");
        let whole = Extent { start: 0, end: Some(100), size: Some(100) };
        assert_eq!(answer(200, None, Some(100)).unwrap(), whole, "ranges are not known there");
        for (range, length) in [
            (None, Some(10)),
            (Some("bytes 0-9/100"), None),
            (Some("bytes 10-14/100"), None),
            (Some("bytes 10-29/100"), None),
            (Some("bytes 10-19/100"), Some(9)),
            (Some("nonsense"), None),
        ] {
            assert!(matches!(answer(206, range, length), Err(OriginError::Lied(_))), "{range:?} {length:?}");
        }
    }
}
