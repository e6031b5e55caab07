//! The part of the OCI distribution API that a pull-only mirror answers: requests in, errors out.
//!
//! Not here: HTTP itself, and headers other than the request line; `darter_agent::mirror` has them.

use serde::Serialize;

use crate::digest::{Digest, DigestError};
use crate::names::{Reference, Registry, Repository};

/// One request of the distribution API, as its path and query say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What is asked for.
    pub request: Request,
    /// containerd's `ns=`: the registry whose content is asked for. Absent from clients that were
    /// told to talk to the mirror as if it were the registry.
    pub registry: Option<Registry>,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `/v2/`: is this a registry?
    Base,
    /// `/v2/<repository>/manifests/<tag or digest>`
    Manifest {
        /// Where it lives.
        repository: Repository,
        /// Which one.
        reference: Reference,
    },
    /// `/v2/<repository>/blobs/<digest>`
    Blob {
        /// Where it lives.
        repository: Repository,
        /// Which one.
        digest: Digest,
    },
    /// `/v2/<repository>/tags/list`, passed through to the origin.
    Tags {
        /// Whose tags.
        repository: Repository,
        /// `n` and `last`, as given; empty if none.
        query: String,
    },
    /// `/v2/<repository>/referrers/<digest>`, passed through to the origin.
    Referrers {
        /// Where it lives.
        repository: Repository,
        /// What is referred to.
        digest: Digest,
        /// `artifactType`, as given; empty if none.
        query: String,
    },
}

impl Request {
    /// The word that metrics and logs use for this kind of request.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Manifest { .. } => "manifest",
            Self::Blob { .. } => "blob",
            Self::Tags { .. } => "tags",
            Self::Referrers { .. } => "referrers",
        }
    }
}

/// The error codes of the distribution spec that a pull can meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    /// The blob is not here, or not now.
    BlobUnknown,
    /// The manifest is not here, or not now.
    ManifestUnknown,
    /// The repository or registry is not one we mirror.
    NameUnknown,
    /// The repository name breaks the spec.
    NameInvalid,
    /// The digest breaks the spec.
    DigestInvalid,
    /// Credentials are wanted.
    Unauthorized,
    /// The method or path is not part of a pull.
    Unsupported,
    /// The request itself is broken: not in the spec's list, which has no word for it.
    RequestInvalid,
}

/// An error as the distribution API tells it: a status and `{"errors":[{code,message}]}`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{status} {code:?}: {message}")]
pub struct OciError {
    /// HTTP status.
    pub status: u16,
    /// The spec's code.
    pub code: Code,
    /// For people: containerd prints it.
    pub message: String,
}

impl OciError {
    /// An error with this status, code and message.
    pub fn new(status: u16, code: Code, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    /// 404, "not here, not now": containerd goes to the next host at once.
    pub fn not_here(request: &Request, message: impl Into<String>) -> Self {
        let code = match request {
            Request::Manifest { .. } => Code::ManifestUnknown,
            Request::Blob { .. } => Code::BlobUnknown,
            Request::Base | Request::Tags { .. } | Request::Referrers { .. } => Code::NameUnknown,
        };
        Self::new(404, code, message)
    }

    /// The JSON body.
    pub fn body(&self) -> String {
        #[derive(Serialize)]
        struct Body<'a> {
            errors: [Entry<'a>; 1],
        }
        #[derive(Serialize)]
        struct Entry<'a> {
            code: Code,
            message: &'a str,
        }
        let body = Body { errors: [Entry { code: self.code, message: &self.message }] };
        serde_json::to_string(&body).unwrap_or_else(|_| String::from(r#"{"errors":[]}"#))
    }
}

/// Reads the path and query of a request: `/v2/library/nginx/manifests/latest?ns=docker.io`.
///
/// Errors carry the status and body to answer with.
pub fn parse(target: &str) -> Result<Call, OciError> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (registry, query) = take_namespace(query)?;
    let request = parse_path(path, query)?;
    Ok(Call { request, registry })
}

fn parse_path(path: &str, query: String) -> Result<Request, OciError> {
    let Some(path) = path.strip_prefix("/v2") else {
        return Err(OciError::new(404, Code::Unsupported, "not a path of the distribution API: it starts with /v2/"));
    };
    if path.is_empty() || path == "/" {
        return Ok(Request::Base);
    }
    // Percent-encoding is legal in a path, and no name of the spec needs it.
    let unknown = || OciError::new(404, Code::Unsupported, "no such endpoint in a pull-only mirror");
    let path = path.strip_prefix('/').ok_or_else(unknown)?;
    let (before, last) = path.rsplit_once('/').ok_or_else(unknown)?;
    let (repository, endpoint) = before.rsplit_once('/').ok_or_else(unknown)?;
    if !matches!(endpoint, "manifests" | "blobs" | "tags" | "referrers") {
        return Err(unknown());
    }
    let repository: Repository = repository
        .parse()
        .map_err(|_| OciError::new(400, Code::NameInvalid, "repository name breaks the distribution spec"))?;
    match endpoint {
        "manifests" => {
            let reference = last.parse().map_err(|_| match last.parse::<Digest>() {
                Err(error) if last.contains(':') => digest_error(error),
                _ => OciError::new(404, Code::ManifestUnknown, "not a tag"),
            })?;
            Ok(Request::Manifest { repository, reference })
        }
        "blobs" => Ok(Request::Blob { repository, digest: last.parse().map_err(digest_error)? }),
        "tags" if last == "list" => Ok(Request::Tags { repository, query }),
        "referrers" => Ok(Request::Referrers { repository, digest: last.parse().map_err(digest_error)?, query }),
        _ => Err(unknown()),
    }
}

/// A broken digest is the client's fault (400); one of another algorithm is merely not here (404).
fn digest_error(error: DigestError) -> OciError {
    match error {
        DigestError::Malformed => OciError::new(400, Code::DigestInvalid, error.to_string()),
        DigestError::Algorithm => OciError::new(404, Code::BlobUnknown, error.to_string()),
    }
}

/// Takes `ns=` out of a query and gives back the rest as it was.
fn take_namespace(query: &str) -> Result<(Option<Registry>, String), OciError> {
    let mut registry = None;
    let mut rest = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.strip_prefix("ns=") {
            Some(value) => {
                let named = percent_decode(value)
                    .and_then(|value| value.parse::<Registry>().ok())
                    .ok_or_else(|| OciError::new(404, Code::NameUnknown, "ns= does not name a registry"))?;
                if registry.replace(named).is_some() {
                    return Err(OciError::new(400, Code::RequestInvalid, "ns= is given twice"));
                }
            }
            None => rest.push(pair),
        }
    }
    Ok((registry, rest.join("&")))
}

/// Undoes `%3A` and the like; `None` if the result is not text.
pub fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Encodes a value for a query: all but RFC 3986's unreserved characters, and `/` and `:`, which may
/// stand there and which scopes are full of.
pub fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn status(target: &str) -> u16 {
        parse(target).expect_err(target).status
    }

    #[test]
    fn the_requests_of_a_pull() {
        let digest = Digest::of(b"layer");
        let repository: Repository = "team/app".parse().unwrap();
        let ecr: Registry = "123456789012.dkr.ecr.us-east-1.amazonaws.com".parse().unwrap();
        assert_eq!(
            parse(&format!("/v2/team/app/manifests/v1?ns={ecr}")),
            Ok(Call {
                request: Request::Manifest { repository: repository.clone(), reference: "v1".parse().unwrap() },
                registry: Some(ecr),
            })
        );
        assert_eq!(
            parse(&format!("/v2/team/app/blobs/{digest}?ns=reg.example%3A5000")),
            Ok(Call {
                request: Request::Blob { repository: repository.clone(), digest },
                registry: Some("reg.example:5000".parse().unwrap()),
            })
        );
        assert_eq!(
            parse("/v2/team/app/tags/list?n=2&ns=docker.io&last=a").map(|call| call.request),
            Ok(Request::Tags { repository, query: "n=2&last=a".to_owned() })
        );
        assert_eq!(parse("/v2/"), Ok(Call { request: Request::Base, registry: None }));
        assert_eq!(parse("/v2"), Ok(Call { request: Request::Base, registry: None }));
    }

    #[test]
    fn garbage_gets_the_error_that_names_it() {
        assert_eq!(status("/"), 404);
        assert_eq!(status("/v1/search"), 404);
        assert_eq!(status("/v2x"), 404);
        assert_eq!(status("/v2/a/b/uploads/x"), 404);
        assert_eq!(status("/v2/blobs/sha256:00"), 404);
        assert_eq!(status("/v2/a/blobs/sha256:00"), 400);
        assert_eq!(status("/v2/a/blobs/sha512:00"), 404);
        assert_eq!(status("/v2/UPPER/manifests/latest"), 400);
        assert_eq!(status("/v2/../../etc/manifests/passwd"), 400);
        assert_eq!(status("/v2/a/manifests/%2e%2e"), 404);
        assert_eq!(status("/v2/a/manifests/sha256:1"), 400);
        assert_eq!(status("/v2/?ns=*"), 404);
        assert_eq!(status("/v2/?ns=a.b&ns=c.d"), 400);
        assert_eq!(status("/v2/?ns=%zz"), 404);
    }

    #[test]
    fn an_error_body_is_the_specs() {
        let error = OciError::new(404, Code::BlobUnknown, r#"say "no""#);
        insta::assert_snapshot!(error.body(), @r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"say \"no\""}]}"#);
    }

    proptest! {
        #[test]
        fn no_target_panics(target: String, path: String) {
            let _ = parse(&target);
            let _ = parse(&format!("/v2/{path}"));
        }

        #[test]
        fn encoding_and_decoding_are_inverse(text: String) {
            prop_assert_eq!(percent_decode(&percent_encode(&text)), Some(text));
        }
    }
}
