//! What a test makes go wrong, where, and how often.

use std::time::Duration;

use darter_core::Digest;

use super::counts::Kind;
use crate::wire::{Ending, Pace, Reply, Request};

/// One thing that goes wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status instead of an answer, with a Retry-After of so many seconds.
    Status(u16, Option<u64>),
    /// The answer, after this silence. `Duration::MAX` is for ever.
    Delay(Duration),
    /// After so many body bytes this silence, then the rest.
    Stall(u64, Duration),
    /// After so many body bytes this silence, then FIN.
    StallThenFin(u64, Duration),
    /// After so many body bytes the connection is closed.
    Truncate(u64),
    /// After so many body bytes the connection is reset.
    Reset(u64),
    /// The byte at this offset of the body is another.
    WrongByte(u64),
    /// The body is consistently longer (zeros) or shorter than the content.
    WrongLength(i64),
    /// So many bytes per second on this connection.
    Slow(u64),
}

/// Which requests a fault is for, and how many of them.
#[derive(Debug, Clone)]
pub struct Rule {
    kind: Option<Kind>,
    digest: Option<Digest>,
    path: Option<String>,
    key: Option<String>,
    from: Option<u64>,
    skip: u32,
    times: u32,
}

impl Rule {
    /// The next request of this kind.
    pub const fn on(kind: Kind) -> Self {
        Self { kind: Some(kind), digest: None, path: None, key: None, from: None, skip: 0, times: 1 }
    }

    /// The next request of any kind.
    pub const fn any() -> Self {
        Self { kind: None, digest: None, path: None, key: None, from: None, skip: 0, times: 1 }
    }

    /// Only for this manifest or blob.
    pub const fn digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// Only where the path has this in it.
    pub fn path(mut self, part: &str) -> Self {
        self.path = Some(part.to_owned());
        self
    }

    /// Only where it is signed with this access key.
    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(format!("Credential={key}/"));
        self
    }

    /// Only where a range is asked for that begins with the first byte.
    pub const fn first_bytes(self) -> Self {
        self.from(0)
    }

    /// Only where a range is asked for that begins at this offset.
    pub const fn from(mut self, offset: u64) -> Self {
        self.from = Some(offset);
        self
    }

    /// The next so many.
    pub const fn times(mut self, times: u32) -> Self {
        self.times = times;
        self
    }

    /// All from now on.
    pub const fn always(self) -> Self {
        self.times(u32::MAX)
    }

    /// Not the next so many, but those after them.
    pub const fn after(mut self, skip: u32) -> Self {
        self.skip = skip;
        self
    }

    fn matches(&self, kind: Kind, digest: Option<Digest>, request: &Request) -> bool {
        let range = request.header("range");
        let is_there = self.from.is_none_or(|from| range.starts_with(&format!("bytes={from}-")));
        is_there
            && self.key.as_ref().is_none_or(|key| request.header("authorization").contains(key))
            && self.kind.is_none_or(|wanted| wanted == kind)
            && self.digest.is_none_or(|wanted| Some(wanted) == digest)
            && self.path.as_ref().is_none_or(|part| request.target.contains(part))
    }
}

/// The rules of a server, in the order they were given.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<(Rule, Fault)>);

impl Faults {
    pub(super) fn add(&mut self, rule: Rule, fault: Fault) {
        self.0.push((rule, fault));
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// What goes wrong with this request: the first rule that fits, which is used up by it.
    pub(super) fn take(&mut self, kind: Kind, digest: Option<Digest>, request: &Request) -> Option<Fault> {
        for (rule, fault) in &mut self.0 {
            if rule.times == 0 || !rule.matches(kind, digest, request) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            if rule.times != u32::MAX {
                rule.times -= 1;
            }
            return Some(fault.clone());
        }
        None
    }
}

impl Fault {
    /// The reply with this fault in it.
    pub(super) fn apply(self, mut reply: Reply) -> Reply {
        let script = &mut reply.script;
        match self {
            Self::Status(status, retry_after) => return refusal(status, retry_after),
            Self::Delay(time) => script.delay = time,
            Self::Stall(at, time) => script.stall = Some((at, time)),
            Self::StallThenFin(at, time) => {
                script.stall = Some((at, time));
                script.end = Some((at, Ending::Fin));
            }
            Self::Truncate(at) => script.end = Some((at, Ending::Fin)),
            Self::Reset(at) => script.end = Some((at, Ending::Reset)),
            Self::WrongByte(at) => script.wrong_byte = Some(at),
            Self::WrongLength(error) => script.length_error = error,
            Self::Slow(bytes_per_second) => script.paces.push(Pace::new(bytes_per_second)),
        }
        reply
    }
}

/// The words of the registry for this status.
fn refusal(status: u16, retry_after: Option<u64>) -> Reply {
    let (code, message) = match status {
        401 => ("UNAUTHORIZED", "authentication required"),
        403 => ("DENIED", "requested access to the resource is denied"),
        404 => ("BLOB_UNKNOWN", "blob unknown to registry"),
        429 => ("TOOMANYREQUESTS", "Rate exceeded"),
        _ => ("UNKNOWN", "unknown error"),
    };
    let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#);
    let reply = Reply::text(status, "application/json", body);
    match retry_after {
        Some(seconds) => reply.header("retry-after", &seconds.to_string()),
        None => reply,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_used_up_by_the_requests_it_fits() {
        let (digest, other) = (Digest::of(b"a"), Digest::of(b"b"));
        let mut faults = Faults::default();
        faults.add(Rule::on(Kind::Object).digest(digest).after(1).times(2), Fault::Status(503, None));
        let mut hit = |kind, digest| faults.take(kind, Some(digest), &signed("AKIA")).is_some();
        assert!(!hit(Kind::Object, other));
        assert!(!hit(Kind::Blob, digest));
        let row: Vec<bool> = (0..4).map(|_| hit(Kind::Object, digest)).collect();
        assert_eq!(row, [false, true, true, false]);
    }

    #[test]
    fn a_rule_for_a_key_is_for_no_other() {
        let mut faults = Faults::default();
        faults.add(Rule::on(Kind::Token).key("AKIANODE1").always(), Fault::Status(403, None));
        let mut hit = |key: &str| faults.take(Kind::Token, None, &signed(key)).is_some();
        assert_eq!(["AKIANODE1", "AKIANODE12", "AKIANODE2", "AKIANODE1"].map(&mut hit), [true, false, false, true]);
    }

    /// As the AWS SDK signs.
    fn signed(key: &str) -> Request {
        let words = format!("AWS4-HMAC-SHA256 Credential={key}/20261201/us-east-1/ecr/aws4_request, Signature=0");
        let words = words.parse().expect("a header");
        let headers = [(http::header::AUTHORIZATION, words)].into_iter().collect();
        Request { method: http::Method::POST, target: "/x".to_owned(), headers, body: bytes::Bytes::new() }
    }
}
