//! What the three servers of the fake answer, when nothing is made to go wrong.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use darter_core::manifest::OCI_INDEX;
use darter_core::oci::{Request as Wanted, parse};
use darter_core::range::ByteRange;
use darter_core::{Digest, Reference};
use http::Method;
use serde_json::json;

use super::counts::Kind;
use super::{Auth, Shared, State, is_good};
use crate::image::Item;
use crate::wire::{Pace, Reply, Request, Service};

const JSON: &str = "application/json";
const AMZ_JSON: &str = "application/x-amz-json-1.1";
const XML: &str = "application/xml";

/// The registry, and the token server of `Auth::Bearer`.
pub(super) struct Registry(pub(super) Arc<Shared>);

/// The ECR API.
pub(super) struct Api(pub(super) Arc<Shared>);

/// The object storage.
pub(super) struct Storage(pub(super) Arc<Shared>);

impl Shared {
    /// Puts the fault that is due into an answer, and counts it.
    fn finish(&self, request: &Request, kind: Kind, digest: Option<Digest>, reply: Reply) -> Reply {
        let fault = self.state().faults.take(kind, digest, request);
        let mut reply = match fault {
            Some(fault) => fault.apply(reply),
            None => reply,
        };
        self.counts.begin(request, kind, digest, &mut reply);
        reply
    }
}

impl Service for Registry {
    async fn answer(&self, request: Request) -> Reply {
        let head = request.method == Method::HEAD;
        let wanted = parse(&request.target).map(|call| call.request);
        let (kind, digest) = match &wanted {
            Ok(Wanted::Manifest { repository, reference }) => {
                let kind = if head { Kind::ManifestHead } else { Kind::Manifest };
                (kind, self.0.state().manifest(repository.as_str(), reference).map(|item| item.digest()))
            }
            Ok(Wanted::Blob { digest, .. }) => (if head { Kind::BlobHead } else { Kind::Blob }, Some(*digest)),
            _ if request.path() == "/token" => (Kind::Token, None),
            _ => (Kind::Other, None),
        };
        let reply = match wanted {
            _ if request.path() == "/token" => self.token(&request),
            Err(error) => Reply::text(error.status, JSON, error.body()),
            Ok(_) if !matches!(request.method, Method::GET | Method::HEAD) => {
                error(405, "UNSUPPORTED", "The operation is unsupported.")
            }
            Ok(wanted) => match self.challenge(&request, &wanted) {
                Some(challenge) => challenge,
                None => self.serve(&request, &wanted, head),
            },
        };
        self.0.finish(&request, kind, digest, reply)
    }
}

impl Registry {
    /// 401 to whoever may not read.
    fn challenge(&self, request: &Request, wanted: &Wanted) -> Option<Reply> {
        let options = &self.0.options;
        let authorization = request.header("authorization");
        let state = self.0.state();
        let (good, challenge) = match &options.auth {
            Auth::Public => return None,
            Auth::Ecr => {
                let host = darter_core::ecr::Ecr::host(&options.account, &options.region);
                let good = basic(authorization)
                    .is_some_and(|(user, password)| user == "AWS" && is_good(&state.tokens, &password));
                (good, format!(r#"Basic realm="https://{host}/",service="ecr.amazonaws.com""#))
            }
            Auth::Bearer(_) => {
                let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
                let realm = self.0.registry.get().map(|address| format!("{}://{address}/token", self.0.scheme()));
                let realm = realm.unwrap_or_default();
                let scope = repository_of(wanted).map(|name| format!(r#",scope="repository:{name}:pull""#));
                let challenge = format!(r#"Bearer realm="{realm}",service="fake"{}"#, scope.unwrap_or_default());
                (is_good(&state.tokens, token), challenge)
            }
        };
        // ECR's own words, in plain text.
        let reply = || Reply::text(401, "text/plain; charset=utf-8", "Not Authorized\n");
        (!good).then(|| reply().header("www-authenticate", &challenge))
    }

    fn serve(&self, request: &Request, wanted: &Wanted, head: bool) -> Reply {
        match wanted {
            Wanted::Base => Reply::text(200, JSON, "{}"),
            Wanted::Manifest { repository, reference } => {
                let item = self.0.state().manifest(repository.as_str(), reference);
                match item {
                    Some(item) => manifest(request, item, head),
                    None => self.missing(repository.as_str(), "MANIFEST_UNKNOWN", "Requested image not found"),
                }
            }
            // As on public ECR: GET works, HEAD does not.
            Wanted::Blob { .. } if head => error(403, "DENIED", "Forbidden"),
            Wanted::Blob { repository, digest } => self.blob(request, repository.as_str(), digest),
            Wanted::Tags { repository, .. } => self.tags(request, repository.as_str()),
            Wanted::Referrers { .. } => {
                let body = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
                Reply::text(200, OCI_INDEX, body.to_string())
            }
        }
    }

    fn missing(&self, repository: &str, code: &str, message: &str) -> Reply {
        if self.0.state().repositories.contains_key(repository) {
            return error(404, code, message);
        }
        let account = &self.0.options.account;
        let text =
            format!("The repository with name '{repository}' does not exist in the registry with id '{account}'");
        error(404, "NAME_UNKNOWN", &text)
    }

    fn blob(&self, request: &Request, repository: &str, digest: &Digest) -> Reply {
        let mut state = self.0.state();
        let item = state.repositories.get(repository).and_then(|repository| repository.blobs.get(digest).cloned());
        let Some(item) = item else {
            drop(state);
            return self.missing(repository, "BLOB_UNKNOWN", "blob unknown to registry");
        };
        let Some(storage) = self.0.storage.get().filter(|_| self.0.options.redirect) else {
            return state.paced(ranged(request, item)).header("docker-content-digest", &digest.to_string());
        };
        let location = format!(
            "{}://{storage}/prod-{}-starport-layer-bucket/{}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires={}\
             &X-Amz-SignedHeaders=host&X-Amz-Signature={}",
            self.0.scheme(),
            self.0.options.region,
            digest.hex(),
            state.signature_lifetime.as_secs(),
            state.new_signature(),
        );
        Reply::text(307, "text/plain", "").header("location", &location)
    }

    /// `n` and `last` as the distribution spec has them.
    fn tags(&self, request: &Request, name: &str) -> Reply {
        let state = self.0.state();
        let Some(repository) = state.repositories.get(name) else {
            drop(state);
            return self.missing(name, "NAME_UNKNOWN", "unknown");
        };
        let last = request.query("last").unwrap_or_default();
        let mut tags: Vec<&String> = repository.tags.keys().filter(|tag| **tag > last).collect();
        tags.sort();
        let wanted = request.query("n").and_then(|n| n.parse().ok()).unwrap_or(tags.len());
        let more = tags.len() > wanted && wanted > 0;
        tags.truncate(wanted);
        let reply = Reply::text(200, JSON, json!({"name": name, "tags": tags}).to_string());
        match tags.last() {
            Some(last) if more => {
                reply.header("link", &format!("</v2/{name}/tags/list?n={wanted}&last={last}>; rel=\"next\""))
            }
            _ => reply,
        }
    }

    fn token(&self, request: &Request) -> Reply {
        let Auth::Bearer(wanted) = &self.0.options.auth else { return error(404, "NAME_UNKNOWN", "no token server") };
        if wanted.is_some() && *wanted != basic(request.header("authorization")) {
            return error(401, "UNAUTHORIZED", "wrong user or password")
                .header("www-authenticate", r#"Basic realm="token""#);
        }
        let mut state = self.0.state();
        let token = state.new_token();
        let body = json!({"token": token, "access_token": token, "expires_in": state.token_lifetime.as_secs()});
        Reply::text(200, JSON, body.to_string())
    }
}

impl Service for Api {
    async fn answer(&self, request: Request) -> Reply {
        let reply = self.authorization_token(&request);
        self.0.finish(&request, Kind::Token, None, reply)
    }
}

impl Api {
    fn authorization_token(&self, request: &Request) -> Reply {
        let options = &self.0.options;
        let amz_error =
            |name: &str, text: &str| Reply::text(400, AMZ_JSON, json!({"__type": name, "message": text}).to_string());
        let target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
        if request.method != Method::POST || request.header("x-amz-target") != target {
            return amz_error("UnknownOperationException", "no such operation");
        }
        let scope = format!("/{}/ecr/aws4_request", options.region);
        let authorization = request.header("authorization");
        if !authorization.starts_with("AWS4-HMAC-SHA256 Credential=") || request.header("x-amz-date").is_empty() {
            return amz_error("MissingAuthenticationTokenException", "Missing Authentication Token");
        }
        if !authorization.contains(&scope) {
            let text = format!("Credential should be scoped to a valid region: {}", options.region);
            return amz_error("InvalidSignatureException", &text);
        }
        let mut state = self.0.state();
        let password = state.new_token();
        let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO) + state.token_lifetime;
        let host = darter_core::ecr::Ecr::host(&options.account, &options.region);
        let body = json!({"authorizationData": [{
            "authorizationToken": BASE64.encode(format!("AWS:{password}")),
            "expiresAt": expires.as_secs_f64(),
            "proxyEndpoint": format!("https://{host}"),
        }]});
        Reply::text(200, AMZ_JSON, body.to_string())
    }
}

impl Service for Storage {
    async fn answer(&self, request: Request) -> Reply {
        let hex = request.path().rsplit('/').next().unwrap_or_default();
        let digest = Digest::from_hex(hex).ok();
        let reply = self.object(&request, digest);
        self.0.finish(&request, Kind::Object, digest, reply)
    }
}

impl Storage {
    fn object(&self, request: &Request, digest: Option<Digest>) -> Reply {
        if !request.header("authorization").is_empty() {
            return s3_error(400, "InvalidArgument", "Only one auth mechanism allowed");
        }
        let state = self.0.state();
        let signature = request.query("X-Amz-Signature").unwrap_or_default();
        if request.method != Method::GET {
            // The signature is over the method, too.
            return s3_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match");
        }
        if !is_good(&state.signatures, &signature) {
            return s3_error(403, "AccessDenied", "Request has expired");
        }
        match digest.and_then(|digest| state.blob(&digest)) {
            Some(item) => state.paced(ranged(request, item)),
            None => s3_error(404, "NoSuchKey", "The specified key does not exist."),
        }
    }
}

impl State {
    fn manifest(&self, repository: &str, reference: &Reference) -> Option<Item> {
        let repository = self.repositories.get(repository)?;
        let digest = match reference {
            Reference::Tag(tag) => repository.tags.get(tag.as_str())?,
            Reference::Digest(digest) => digest,
        };
        repository.manifests.get(digest).cloned()
    }

    /// As slow as asked for.
    fn paced(&self, mut reply: Reply) -> Reply {
        reply.script.paces.extend(self.total_pace.clone());
        reply.script.paces.extend(self.connection_rate.map(Pace::new));
        reply
    }
}

/// A manifest, to whoever takes its type. ECR leaves out the digest where containerd could use it.
fn manifest(request: &Request, item: Item, head: bool) -> Reply {
    let media_type = item.descriptor.media_type.clone();
    let accept = request.header_list("accept");
    let accepts =
        |wanted: &str| accept.split(',').any(|entry| entry.split(';').next().is_some_and(|t| t.trim() == wanted));
    if !accept.is_empty() && !accepts(&media_type) && !accepts("*/*") {
        return error(404, "MANIFEST_UNKNOWN", "Image manifest of this media type is not accepted");
    }
    let digest = item.digest().to_string();
    let reply = Reply::new(200, item.content).header("content-type", &media_type);
    if head { reply.header("docker-content-digest", &digest) } else { reply }
}

/// A blob, or the range of it that is asked for.
fn ranged(request: &Request, item: Item) -> Reply {
    let size = item.size();
    let reply = Reply::new(200, item.content)
        .header("content-type", "application/octet-stream")
        .header("accept-ranges", "bytes")
        // Not the digest: S3 knows nothing of it.
        .header("etag", &format!("\"{}\"", &Digest::of(&size.to_le_bytes()).hex()[..32]));
    match ByteRange::parse(request.header("range")).map(|range| range.resolve(size)) {
        None => reply,
        Some(Ok(span)) => {
            let range = format!("bytes {}-{}/{size}", span.start, span.end - 1);
            let mut reply = reply.header("content-range", &range);
            (reply.status, reply.span) = (206, span.start..span.end);
            reply
        }
        Some(Err(_)) => s3_error(416, "InvalidRange", "The requested range is not satisfiable")
            .header("content-range", &format!("bytes */{size}")),
    }
}

fn repository_of(wanted: &Wanted) -> Option<&str> {
    match wanted {
        Wanted::Base => None,
        Wanted::Manifest { repository, .. }
        | Wanted::Blob { repository, .. }
        | Wanted::Tags { repository, .. }
        | Wanted::Referrers { repository, .. } => Some(repository.as_str()),
    }
}

/// User and password of a Basic Authorization header.
fn basic(authorization: &str) -> Option<(String, String)> {
    let decoded = BASE64.decode(authorization.strip_prefix("Basic ")?).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

fn error(status: u16, code: &str, message: &str) -> Reply {
    Reply::text(status, JSON, json!({"errors": [{"code": code, "message": message}]}).to_string())
}

fn s3_error(status: u16, code: &str, message: &str) -> Reply {
    Reply::text(
        status,
        XML,
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"),
    )
}
