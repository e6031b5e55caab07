//! The registries that own the images: asking them for manifests and blobs as containerd would.
//!
//! One `Origin` for each mirrored registry: its connections, credentials, tokens and limits.
//! `fetch` is the way of a request; `send` follows redirects; `http` connects, and `guard` says where
//! to. Not here: what was asked before (`images`), and resuming a body that broke (`pulls`).

mod away;
mod blob;
mod challenge;
mod credential;
mod docker_config;
mod ecr;
mod error;
mod fetch;
mod guard;
mod http;
mod limits;
mod line;
mod node;
mod retry;
mod send;
mod signed;
mod slots;
mod target;
#[cfg(test)]
mod tests;
mod token;
mod url;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, LINK};
use ::http::{HeaderMap, Method};
use bytes::Bytes;
use darter_core::hosts_toml::ForeignOrigin;
use darter_core::manifest::{ACCEPT, MANIFEST_MAX_BYTES};
use darter_core::range::Span;
use darter_core::{Digest, Reference, Repository};
use rustls::RootCertStore;

use crate::config::{Config, RegistryConfig};
use crate::metrics::{Metrics, RegistryLabel};

pub use away::Away;
pub use blob::BlobStream;
pub use credential::{Basic, Credential};
pub use error::OriginError;
pub use fetch::Whom;
pub use line::Claim;
pub use url::without_secrets;

use ecr::Ecr;
use fetch::{Answer, Job};
use guard::Guard;
use limits::{Slots as Connections, Throttle, Weight};
use node::NodeCredential;
use retry::Pauses;
use send::{Wire, collect};
use signed::SIGNED_MAX;
use slots::Slots;
use target::{Target, place, targets};
use token::Tokens;
use url::{Place, api_root};

/// Lists of tags and referrers that are passed on: registries page them, by 1,000 at most.
const LIST_MAX_BYTES: u64 = 4 * 1024 * 1024;
/// The headers of such a list that a client needs.
static LIST_HEADERS: [HeaderName; 3] = [CONTENT_TYPE, LINK, HeaderName::from_static("oci-filters-applied")];
const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

/// One registry to ask. Cheap to clone.
///
/// As it is made it asks the registry itself, whose answers are proofs; [`Origin::of`] asks others.
#[derive(Clone)]
pub struct Origin {
    inner: Arc<Inner>,
    whom: Whom,
    waits_when_throttled: bool,
    /// Whose turn its blobs wait for; none: each request is one of its own.
    claim: Option<Claim>,
}

struct Inner {
    targets: Vec<Target>,
    wire: Wire,
    kept: Arc<Kept>,
}

/// What stays where other hosts come to stand before the registry: its limits would else be doubled while
/// fetches run on, and its tokens be asked for again.
struct Kept {
    slots: Connections,
    tokens: Tokens,
    node: NodeCredential,
    signed: Slots<signed::Key, signed::Known>,
    body: blob::Settings,
    attempts: u32,
    /// Until when the registry itself is left alone.
    pauses: Pauses,
    storages: Arc<Pauses>,
    registry: RegistryConfig,
    settings: crate::config::Origin,
    /// The certificates that are trusted, and which file of them the registry has.
    trust: Mutex<(Arc<RootCertStore>, Option<Digest>)>,
    /// Where AWS is asked for tokens, if not at its usual address.
    api: Option<Place>,
}

/// What all registries have in common: the system's certificates, the tokens of AWS, and storages.
pub struct Shared {
    roots: RootCertStore,
    ecr: Arc<Ecr>,
    storages: Arc<Pauses>,
}

/// What a registry says of a manifest without sending it.
#[derive(Debug)]
pub struct Described {
    /// Its digest, where the registry told it.
    pub digest: Option<Digest>,
    /// Its size in bytes, where the registry told it.
    pub size: Option<u64>,
}

/// A manifest.
#[derive(Debug)]
pub struct Fetched {
    /// Its bytes.
    pub content: Bytes,
    /// Its Content-Type, without parameters.
    pub media_type: String,
    /// The digest of the bytes, computed here.
    pub digest: Digest,
}

/// An answer that is passed on as it came.
#[derive(Debug)]
pub struct Passed {
    /// 200 or 404.
    pub status: u16,
    /// The headers that matter to clients.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub content: Bytes,
}

/// Whether a registry, or the API of ECR, can be asked at this URL.
pub fn is_url(url: &str) -> bool {
    api_root(url).is_ok()
}

/// Whether the certificates of this file can be trusted: it is there and holds some.
pub fn check_ca(path: &Path) -> Result<(), OriginError> {
    let wrong = |source| OriginError::File { path: path.to_owned(), source };
    http::roots(&RootCertStore::empty(), path, &std::fs::read(path).map_err(wrong)?).map(|_| ())
}

impl Shared {
    /// Reads the system's certificates.
    pub async fn new(config: &Config) -> Result<Self, OriginError> {
        // Files are read: some hundred, on a slow disk at boot.
        let roots = tokio::task::spawn_blocking(http::system_roots).await.unwrap_or_else(|_| RootCertStore::empty());
        let ecr = Arc::new(Ecr::new(config, !roots.is_empty()));
        Ok(Self { roots, ecr, storages: Arc::default() })
    }
}

impl Origin {
    /// The origin of a registry. `foreign` are hosts that its hosts.toml named before us.
    pub fn new(
        config: &Config,
        registry: &RegistryConfig,
        foreign: &[ForeignOrigin],
        shared: &Shared,
        metrics: Arc<Metrics>,
    ) -> Result<Self, OriginError> {
        let settings = &config.origin;
        let label = RegistryLabel::of(&registry.name);
        let throttle = registry.bandwidth.or(settings.bandwidth).map(|rate| Arc::new(Throttle::new(rate)));
        // Whoever is waited for makes up to three requests: with an old token, for a new one, with it.
        let patience = settings.header_timeout.0 * 3;
        let kept = Kept {
            slots: Connections::new(registry.connections.unwrap_or(settings.connections)),
            tokens: Tokens::new(patience, settings.stall.0),
            node: NodeCredential::of(registry, &shared.ecr),
            signed: Slots::new(SIGNED_MAX, patience),
            body: blob::Settings { stall: settings.stall.0, throttle, metrics, label },
            attempts: settings.attempts,
            pauses: Pauses::default(),
            storages: shared.storages.clone(),
            registry: registry.clone(),
            settings: settings.clone(),
            trust: Mutex::new(trust(shared, registry)?),
            api: config.aws.ecr_endpoint.as_deref().map(place).transpose()?,
        };
        Self::behind(foreign, Arc::new(kept))
    }

    /// The same registry behind other hosts. What was begun on this one goes on with the hosts it has.
    pub fn with_foreign(&self, foreign: &[ForeignOrigin]) -> Result<Self, OriginError> {
        Self::behind(foreign, self.inner.kept.clone())
    }

    /// Reads the registry's `ca` again. If it is another one by now, what `with_foreign` makes trusts that.
    pub fn has_new_ca(&self, shared: &Shared) -> Result<bool, OriginError> {
        let kept = &self.inner.kept;
        let now = trust(shared, &kept.registry)?;
        let mut known = kept.trust.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = known.1 != now.1;
        *known = now;
        Ok(is_news)
    }

    fn behind(foreign: &[ForeignOrigin], kept: Arc<Kept>) -> Result<Self, OriginError> {
        let Kept { registry, settings, body, .. } = &*kept;
        let targets = targets(registry, foreign)?;
        let guard = Guard::new(targets.iter().map(|target| &target.place).chain(&kept.api), &settings.allow_local);
        let connections = registry.connections.unwrap_or(settings.connections);
        let roots = kept.trust.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        let http = http::Http::new(settings, connections, roots, guard)?;
        let (metrics, label) = (body.metrics.clone(), body.label.clone());
        let storages = kept.storages.clone();
        let wire = Wire { http, plain_http: registry.plain_http, metrics, label, storages };
        let inner = Arc::new(Inner { targets, wire, kept });
        Ok(Self { inner, whom: Whom::Registry, waits_when_throttled: true, claim: None })
    }

    /// The same registry, for answers of these.
    pub fn of(&self, whom: Whom) -> Self {
        Self { whom, ..self.clone() }
    }

    /// The same, for whoever paces all readers of a registry and has to hear at once that it throttles.
    pub fn telling_throttles(&self) -> Self {
        Self { waits_when_throttled: false, ..self.clone() }
    }

    /// The same, for a blob whose ranges wait for their turn with this.
    pub fn with_claim(&self, claim: Claim) -> Self {
        Self { claim: Some(claim), ..self.clone() }
    }

    /// Whether other hosts stand before the registry.
    pub fn has_others(&self) -> bool {
        self.inner.targets.len() > 1
    }

    /// The hosts before the registry, in the order they are asked.
    pub fn others(&self) -> Vec<String> {
        let others = self.inner.targets.split_last().map_or(&[][..], |(_, others)| others);
        others.iter().map(|target| target.place.to_string()).collect()
    }

    /// Whether `Credential::Node` is more than `Credential::Anonymous` here.
    pub fn has_node_credential(&self) -> bool {
        !self.inner.kept.node.is_none()
    }

    /// HEAD of a manifest: proves access, and tells the digest of a tag.
    pub async fn head_manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
        credential: &Credential,
    ) -> Result<Described, OriginError> {
        let Answer { response, .. } = self.fetch(&manifest(Method::HEAD, repository, reference), credential).await?;
        let digest = told(response.headers());
        if let (Reference::Digest(asked), Some(told)) = (reference, digest)
            && *asked != told
        {
            return Err(OriginError::Lied("another manifest than was asked for"));
        }
        let size = response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Described { digest, size })
    }

    /// A manifest, checked against every digest that is known of it.
    pub async fn manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
        credential: &Credential,
    ) -> Result<Fetched, OriginError> {
        let job = manifest(Method::GET, repository, reference);
        let Answer { response, slot: _slot } = self.fetch(&job, credential).await?;
        let (media_type, told) = (media_type(response.headers()), told(response.headers()));
        let content = collect(response, MANIFEST_MAX_BYTES, self.stall()).await?;
        self.inner.kept.body.count(content.len());
        let digest = Digest::of(&content);
        let asked = match reference {
            Reference::Digest(asked) => Some(*asked),
            Reference::Tag(_) => None,
        };
        if [asked, told].into_iter().flatten().any(|wanted| wanted != digest) {
            return Err(OriginError::Lied("a manifest with another digest"));
        }
        Ok(Fetched { content, media_type, digest })
    }

    /// A blob, or a range of it. An origin that knows no ranges sends all of it, from offset 0.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        span: Option<Span>,
        credential: &Credential,
    ) -> Result<BlobStream, OriginError> {
        let how = (Weight::Body, Some(*digest));
        self.blob_by(repository, digest, span, credential, how).await
    }

    /// A few bytes of a blob, not by a signed URL that is known: the storage behind one would go on giving
    /// it to a credential that is refused by now.
    pub async fn probe(
        &self,
        repository: &Repository,
        digest: &Digest,
        span: Span,
        credential: &Credential,
    ) -> Result<BlobStream, OriginError> {
        self.blob_by(repository, digest, Some(span), credential, (Weight::Small, None)).await
    }

    /// A blob, as a request of this weight, by the redirect that is known for `known`, if one is.
    async fn blob_by(
        &self,
        repository: &Repository,
        digest: &Digest,
        span: Option<Span>,
        credential: &Credential,
        (weight, known): (Weight, Option<Digest>),
    ) -> Result<BlobStream, OriginError> {
        let job = Job {
            method: Method::GET,
            path: format!("{repository}/blobs/{digest}"),
            repository: repository.as_str(),
            kind: "blob",
            accept: None,
            range: span.filter(|span| !span.is_empty()),
            weight,
            claim: self.claim.clone().unwrap_or_else(Claim::once),
            by_tag: false,
            blob: known,
        };
        let Answer { response, slot } = self.fetch(&job, credential).await?;
        BlobStream::new(response, job.range, self.inner.kept.body.clone(), slot)
    }

    /// A list of tags or referrers: `path_and_query` is what follows `/v2/`.
    pub async fn pass(&self, path_and_query: &str, credential: &Credential) -> Result<Passed, OriginError> {
        let repository = ["/tags/list", "/referrers/"].iter().find_map(|end| path_and_query.rsplit_once(end));
        let job = Job {
            method: Method::GET,
            path: path_and_query.to_owned(),
            repository: repository.map_or("", |(repository, _)| repository),
            kind: "list",
            accept: None,
            range: None,
            weight: Weight::Small,
            claim: Claim::once(),
            by_tag: path_and_query.split('?').next().is_some_and(|path| path.ends_with("/tags/list")),
            blob: None,
        };
        let Answer { response, slot: _slot } = match self.fetch(&job, credential).await {
            Err(OriginError::NotFound) => return Ok(not_found()),
            answer => answer?,
        };
        let headers = LIST_HEADERS.iter().filter_map(|name| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some((name.as_str().to_owned(), value.to_owned()))
        });
        let (status, headers) = (response.status().as_u16(), headers.collect());
        let content = collect(response, LIST_MAX_BYTES, self.stall()).await?;
        self.inner.kept.body.count(content.len());
        Ok(Passed { status, headers, content })
    }

    async fn fetch(&self, job: &Job<'_>, credential: &Credential) -> Result<Answer, OriginError> {
        self.inner.fetch(job, self.whom, self.waits_when_throttled, credential).await
    }

    fn stall(&self) -> Duration {
        self.inner.kept.body.stall
    }
}

/// What is trusted for a registry, with the certificates of its own file. Reads it.
fn trust(shared: &Shared, registry: &RegistryConfig) -> Result<(Arc<RootCertStore>, Option<Digest>), OriginError> {
    let Some(path) = registry.ca.as_deref() else { return Ok((Arc::new(shared.roots.clone()), None)) };
    let wrong = |source| OriginError::File { path: path.to_owned(), source };
    let content = std::fs::read(path).map_err(wrong)?;
    Ok((Arc::new(http::roots(&shared.roots, path, &content)?), Some(Digest::of(&content))))
}

fn manifest<'a>(method: Method, repository: &'a Repository, reference: &Reference) -> Job<'a> {
    Job {
        method,
        path: format!("{repository}/manifests/{reference}"),
        repository: repository.as_str(),
        kind: "manifest",
        accept: Some(ACCEPT),
        range: None,
        weight: Weight::Small,
        claim: Claim::once(),
        by_tag: matches!(reference, Reference::Tag(_)),
        blob: None,
    }
}

/// The digest that a registry tells. Of an algorithm that we do not know: as if it told none.
fn told(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

fn media_type(headers: &HeaderMap) -> String {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_owned()
}

fn not_found() -> Passed {
    let content =
        Bytes::from_static(br#"{"errors":[{"code":"NAME_UNKNOWN","message":"the origin does not have it"}]}"#);
    Passed { status: 404, headers: vec![("content-type".to_owned(), "application/json".to_owned())], content }
}
