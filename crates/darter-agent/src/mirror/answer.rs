//! One answer of the mirror: status, headers, and where its body comes from.

use std::fmt::Write as _;

use bytes::Bytes;
use darter_core::oci::OciError;
use darter_core::range::Span;
use darter_core::{Digest, Registry};

use crate::images::{Share, Taken};
use crate::metrics::Source;
use crate::pulls::Reader;
use crate::store::{Blob, Doubt};

/// An answer before it is on the wire.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Ready-made header lines but for Content-Length, Date and Connection.
    headers: String,
    pub(super) body: Body,
    /// Where the body's bytes come from, for the metrics.
    pub(super) source: Source,
    /// Why it is a 404 of our own, for the metrics.
    pub(super) refused: Option<&'static str>,
    /// Who asked for which blob: a failure in mid-body is handed over under that name.
    pub(super) share: Option<Share>,
    /// What a body in memory takes of the room for such bodies.
    room: Option<Taken>,
}

/// The body of an answer. Its length is always known: containerd needs it to see a short body.
#[derive(Debug)]
pub(super) enum Body {
    /// In memory: small manifests, lists, errors.
    Bytes(Bytes),
    /// A part of a file that will not change: complete blobs, large manifests. One that is in doubt is looked at first.
    File(Blob, Span, Option<Doubt>),
    /// A blob that is still being fetched, from its first byte to its last.
    Trail(Reader),
    /// None, though the headers tell of one of this length: the answer to a HEAD.
    Absent(u64),
}

impl Body {
    /// The value of Content-Length.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, span, _) => span.len(),
            Self::Trail(reader) => reader.size(),
            Self::Absent(len) => *len,
        }
    }
}

impl Answer {
    /// An answer with a body.
    pub(super) fn new(status: u16, source: Source, body: Body) -> Self {
        Self { status, headers: String::new(), body, source, refused: None, share: None, room: None }
    }

    /// The answer to an error, in the distribution API's form.
    pub(super) fn error(error: &OciError) -> Self {
        let answer = Self::new(error.status, Source::None, Body::Bytes(Bytes::from(error.body())));
        answer.header("Content-Type", "application/json")
    }

    /// The same answer, which is 404 for this reason.
    pub(super) const fn because(mut self, reason: &'static str) -> Self {
        self.refused = Some(reason);
        self
    }

    /// 401 that asks for the credential of the pull. containerd sends it to us only after this.
    pub(super) fn challenge(error: &OciError) -> Self {
        Self::error(error).header("WWW-Authenticate", r#"Basic realm="darter""#)
    }

    /// The same answer with one header line more. Values with line breaks are dropped: one that
    /// came from an origin must not end our head early.
    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        if !value.contains(['\r', '\n', '\0']) {
            // Writing to a String cannot fail.
            let _ = write!(self.headers, "{name}: {value}\r\n");
        }
        self
    }

    /// The same answer, whose body takes this room until it is out.
    pub(super) fn taking(mut self, room: Option<Taken>) -> Self {
        self.room = room;
        self
    }

    /// The same answer, to this question for a blob.
    pub(super) fn to(mut self, share: Share) -> Self {
        self.share = Some(share);
        self
    }

    /// The same answer, naming the blob or manifest it carries.
    pub(super) fn content(self, digest: Digest, media_type: &str) -> Self {
        self.header("Content-Type", media_type)
            .header("Docker-Content-Digest", &digest.to_string())
            .header("ETag", &format!("\"{digest}\""))
            .header("Accept-Ranges", "bytes")
    }

    /// The same answer, echoing the namespace that was asked for.
    pub(super) fn namespace(self, registry: Option<&Registry>) -> Self {
        match registry {
            Some(registry) => self.header("OCI-Namespace", registry.as_str()),
            None => self,
        }
    }

    /// The same answer without its body but with its length, for a HEAD.
    pub(super) fn without_body(mut self) -> Self {
        self.body = Body::Absent(self.body.len());
        self.room = None;
        self
    }

    /// The head as it goes on the wire.
    pub(super) fn head(&self, close: bool) -> String {
        let reason = http::StatusCode::from_u16(self.status).ok().and_then(|status| status.canonical_reason());
        let connection = if close { "Connection: close\r\n" } else { "" };
        // 304 has no body, and its Content-Length would be that of the 200.
        let length =
            if self.status == 304 { String::new() } else { format!("Content-Length: {}\r\n", self.body.len()) };
        format!(
            "HTTP/1.1 {} {}\r\n{}{length}Docker-Distribution-API-Version: registry/2.0\r\nX-Darter-Source: {}\r\n{connection}\r\n",
            self.status,
            reason.unwrap_or("Status"),
            self.headers,
            self.source.as_str(),
        )
    }
}

#[cfg(test)]
mod tests {
    use darter_core::oci::{Code, OciError};

    use super::*;

    #[test]
    fn a_head_holds_what_containerd_needs() {
        let digest = Digest::of(b"x");
        let body = Body::Bytes(Bytes::from_static(b"x"));
        let answer = Answer::new(200, Source::Cache, body)
            .content(digest, "application/octet-stream")
            .header("X-Evil", "a\r\nContent-Length: 0");
        let head = answer.head(false).replace(&digest.hex(), "…");
        assert_eq!(
            head,
            "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nDocker-Content-Digest: sha256:…\r\n\
             ETag: \"sha256:…\"\r\nAccept-Ranges: bytes\r\nContent-Length: 1\r\n\
             Docker-Distribution-API-Version: registry/2.0\r\nX-Darter-Source: cache\r\n\r\n"
        );
    }

    #[test]
    fn a_head_request_is_told_the_length_it_does_not_get() {
        let error = OciError::new(404, Code::BlobUnknown, "no");
        let length = Answer::error(&error).body.len();
        let answer = Answer::error(&error).without_body();
        assert!(answer.head(true).contains(&format!("Content-Length: {length}\r\n")));
        assert!(answer.head(true).ends_with("Connection: close\r\n\r\n"));
    }
}
