//! The head of an answer on the data plane, as one node writes it and another reads it.
//!
//! Between is only what the two ends need: no header that is not here counts. Pure. Not here: requests
//! (`crate::head`), and bodies.

use std::fmt;
use std::time::Duration;

use darter_core::swarm::attest::{self, Attest};

/// Bytes of an answer's head: an attest has under 300.
pub const HEAD_MAX: usize = 4 * 1024;
const HEADERS_MAX: usize = 16;

const RETRY_AFTER: &str = "retry-after-ms";

/// The head of an answer. Printed as it goes over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answer {
    /// 200, or why not.
    pub status: u16,
    /// Bytes of the body.
    pub length: Option<u64>,
    /// When to ask again, in whole milliseconds.
    pub retry_after: Option<Duration>,
    /// Who vouches for the piece.
    pub attest: Option<Attest>,
    /// Whether the connection ends after it.
    pub close: bool,
}

/// What is wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer has {0}")]
pub struct Malformed(pub &'static str);

impl Answer {
    /// A body of so many bytes follows.
    pub fn with_body(length: u64) -> Self {
        Self { status: 200, length: Some(length), ..Self::default() }
    }

    /// Nothing follows.
    pub fn empty(status: u16) -> Self {
        Self { status, length: Some(0), ..Self::default() }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, length, retry_after, attest, close } = self;
        write!(f, "HTTP/1.1 {status:03} {}\r\n", if *status == 200 { "OK" } else { "Refused" })?;
        if let Some(length) = length {
            write!(f, "Content-Length: {length}\r\n")?;
        }
        if let Some(attest) = attest {
            write!(f, "{}: {attest}\r\n", attest::HEADER)?;
        }
        if let Some(after) = retry_after {
            write!(f, "{RETRY_AFTER}: {}\r\n", after.as_millis())?;
        }
        f.write_str(if *close { "Connection: close\r\n\r\n" } else { "\r\n" })
    }
}

/// Reads an answer's head from the start of `buffer`, and where it ends. `None`: not all of it yet.
///
/// # Errors
/// No such head begins there.
pub fn parse(buffer: &[u8]) -> Result<Option<(Answer, usize)>, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let end = match response.parse(buffer) {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) if buffer.len() < HEAD_MAX => return Ok(None),
        Ok(httparse::Status::Partial) => return Err(Malformed("a head without an end")),
        Err(_) => return Err(Malformed("no HTTP")),
    };
    let mut answer = Answer { status: response.code.unwrap_or(0), ..Answer::default() };
    for header in response.headers.iter() {
        let value = std::str::from_utf8(header.value).map_err(|_| Malformed("a header that is no text"))?;
        let name = header.name.to_ascii_lowercase();
        match name.as_str() {
            "content-length" => {
                once(&mut answer.length, value.parse().map_err(|_| Malformed("a length that is no number"))?)?;
            }
            attest::HEADER => {
                once(&mut answer.attest, value.parse().map_err(|_| Malformed("an attest that is none"))?)?;
            }
            RETRY_AFTER => {
                let after = value.parse().map_err(|_| Malformed("a time that is no number"))?;
                once(&mut answer.retry_after, Duration::from_millis(after))?;
            }
            "transfer-encoding" => return Err(Malformed("a body without a length")),
            "connection" => answer.close |= value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    Ok(Some((answer, end)))
}

/// Which of two would count?
fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), Malformed> {
    if slot.replace(value).is_some() { Err(Malformed("a header twice")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use darter_core::swarm::PeerId;
    use proptest::prelude::*;

    use super::*;

    fn attests() -> impl Strategy<Value = Attest> {
        any::<([u8; 32], [u8; 32], [[u8; 32]; 2])>().prop_map(|(importer, cv, halves)| {
            let mut signature = [0; 64];
            signature.copy_from_slice(halves.as_flattened());
            Attest { importer: PeerId::from_bytes(importer), cv, signature }
        })
    }

    fn answers() -> impl Strategy<Value = Answer> {
        let (length, after) = (any::<Option<u64>>(), any::<Option<u64>>());
        let parts = (0u16..1000, length, after, prop::option::of(attests()), any::<bool>());
        parts.prop_map(|(status, length, after, attest, close)| {
            let retry_after = after.map(Duration::from_millis);
            Answer { status, length, retry_after, attest, close }
        })
    }

    #[test]
    fn heads_look_as_they_always_did() {
        let busy = Answer { retry_after: Some(Duration::from_millis(25)), ..Answer::empty(503) };
        assert_eq!(busy.to_string(), "HTTP/1.1 503 Refused\r\nContent-Length: 0\r\nretry-after-ms: 25\r\n\r\n");
        let last = Answer { close: true, ..Answer::empty(400) };
        assert_eq!(last.to_string(), "HTTP/1.1 400 Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        assert_eq!(Answer::with_body(64).to_string(), "HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n");
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read_as_it_was_and_nothing_of_the_body(answer in answers(), body: Vec<u8>) {
            let head = answer.to_string();
            prop_assert!(head.len() < HEAD_MAX / 2);
            prop_assert_eq!(parse(&[head.as_bytes(), &body].concat()), Ok(Some((answer, head.len()))));
        }

        #[test]
        fn a_head_is_read_whole_or_not_at_all(cut in 0usize..90, body: Vec<u8>) {
            let head = b"HTTP/1.1 503 Refused\r\nContent-Length: 0\r\nretry-after-ms: 25\r\nConnection: Close\r\n\r\n";
            prop_assert!(matches!(parse(&head[..cut.min(head.len() - 1)]), Ok(None)));
            let Ok(Some((answer, end))) = parse(&[&head[..], &body].concat()) else { panic!("not read") };
            prop_assert_eq!(end, head.len());
            let told = (answer.status, answer.length, answer.retry_after, answer.close);
            prop_assert_eq!(told, (503, Some(0), Some(Duration::from_millis(25)), true));
        }

        #[test]
        fn headers_that_count_come_once(name in "content-length|retry-after-ms", first in 0u32..9, second in 0u32..9) {
            let head = format!("HTTP/1.1 200 OK\r\n{name}: {first}\r\n{name}: {second}\r\n\r\n");
            prop_assert_eq!(parse(head.as_bytes()).err(), Some(Malformed("a header twice")));
        }
    }
}
