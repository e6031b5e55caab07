//! stand-in while the real one is written: plain and https, Basic and anonymous, redirects
use crate::config::{Config, RegistryConfig};
use crate::metrics::{Metrics, OriginLabels, RegistryLabel, RegistryLabels};
use base64::Engine as _;
use bytes::Bytes;
use darter_core::access::CredentialKey;
use darter_core::range::{Span, parse_content_range};
use darter_core::{Digest, Reference, Registry, Repository};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use std::sync::Arc;
use std::time::Duration;
#[derive(Clone)]
pub struct Origin(Arc<Inner>);
struct Inner {
    name: Registry,
    base: String,
    basic: Option<String>,
    client: Client<HttpConnector, Empty<Bytes>>,
    metrics: Arc<Metrics>,
    stall: Duration,
}
pub struct Shared;
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    #[error("not found")]
    NotFound,
    #[error("denied: {status}")]
    Denied { status: u16 },
    #[error("short body: {got} of {wanted}")]
    Truncated { got: u64, wanted: u64 },
    #[error("status {0}")]
    Status(u16),
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("stalled")]
    Stalled,
    #[error("lied")]
    Lied,
}
impl OriginError {
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Stalled | Self::Status(500..))
    }
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::NotFound | Self::Denied { .. } | Self::Lied)
    }
}
#[derive(Clone)]
pub enum Credential {
    Anonymous,
    Node,
    Caller(String),
}
impl Credential {
    pub fn from_header(h: &str) -> Option<Self> {
        Some(Self::Caller(h.to_owned()))
    }
    pub fn key(&self) -> CredentialKey {
        let text = match self {
            Self::Anonymous => "a",
            Self::Node => "n",
            Self::Caller(c) => c,
        };
        CredentialKey(*Digest::of(text.as_bytes()).as_bytes())
    }
}
pub struct Described {
    pub digest: Option<Digest>,
}
pub struct Fetched {
    pub content: Bytes,
    pub media_type: String,
    pub digest: Digest,
}
pub struct BlobStream {
    pub start: u64,
    pub end: Option<u64>,
    pub size: Option<u64>,
    body: Incoming,
    stall: Duration,
    metrics: Arc<Metrics>,
    label: RegistryLabel,
}
impl BlobStream {
    pub async fn next(&mut self) -> Option<Result<Bytes, OriginError>> {
        loop {
            match tokio::time::timeout(self.stall, self.body.frame()).await {
                Err(_) => return Some(Err(OriginError::Stalled)),
                Ok(None) => return None,
                Ok(Some(Err(e))) => return Some(Err(OriginError::Unreachable(e.to_string()))),
                Ok(Some(Ok(f))) => {
                    if let Ok(d) = f.into_data() {
                        self.metrics
                            .origin_bytes
                            .get_or_create(&RegistryLabels { registry: self.label.clone() })
                            .inc_by(d.len() as u64);
                        return Some(Ok(d));
                    }
                }
            }
        }
    }
}
pub struct Passed {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub content: Bytes,
}
impl Shared {
    pub async fn new(_c: &Config) -> Result<Self, OriginError> {
        Ok(Self)
    }
}
impl Origin {
    pub fn new(
        c: &Config,
        r: &RegistryConfig,
        _f: Vec<String>,
        _s: &Shared,
        metrics: Arc<Metrics>,
    ) -> Result<Self, OriginError> {
        let client = Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
        let basic = r.username.as_ref().zip(r.password_file.as_ref()).map(|(u, f)| {
            let p = std::fs::read_to_string(f).unwrap_or_default();
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{u}:{}", p.trim())))
        });
        let base = r.endpoint.clone().unwrap_or_else(|| format!("https://{}", r.name));
        Ok(Self(Arc::new(Inner { name: r.name.clone(), base, basic, client, metrics, stall: c.origin.stall.0 })))
    }
    async fn send(
        &self,
        method: &str,
        path: &str,
        kind: &'static str,
        range: Option<String>,
        cred: &Credential,
    ) -> Result<http::Response<Incoming>, OriginError> {
        let mut url = format!("{}/v2/{path}", self.0.base);
        let mut auth = match cred {
            Credential::Anonymous => None,
            Credential::Node => self.0.basic.clone(),
            Credential::Caller(c) => Some(c.clone()),
        };
        for _ in 0..5 {
            let mut b =
                http::Request::builder().method(method).uri(&url).header("accept", darter_core::manifest::ACCEPT);
            if let Some(a) = &auth {
                b = b.header("authorization", a);
            }
            if let Some(r) = &range {
                b = b.header("range", r);
            }
            let answer = tokio::time::timeout(
                Duration::from_secs(10),
                self.0.client.request(b.body(Empty::new()).expect("request")),
            )
            .await
            .map_err(|_| OriginError::Stalled)?
            .map_err(|e| OriginError::Unreachable(e.to_string()))?;
            let status = answer.status().as_u16();
            self.0
                .metrics
                .origin_requests
                .get_or_create(&OriginLabels { registry: RegistryLabel::of(&self.0.name), kind, code: status })
                .inc();
            match status {
                200 | 206 => return Ok(answer),
                301..=308 => {
                    url = answer.headers()["location"].to_str().unwrap_or_default().to_owned();
                    auth = None;
                }
                404 => return Err(OriginError::NotFound),
                401 | 403 => return Err(OriginError::Denied { status }),
                s => return Err(OriginError::Status(s)),
            }
        }
        Err(OriginError::Lied)
    }
    pub async fn head_manifest(&self, r: &Repository, f: &Reference, c: &Credential) -> Result<Described, OriginError> {
        let a = self.send("HEAD", &format!("{r}/manifests/{f}"), "manifest", None, c).await?;
        Ok(Described { digest: a.headers().get("docker-content-digest").and_then(|d| d.to_str().ok()?.parse().ok()) })
    }
    pub async fn manifest(&self, r: &Repository, f: &Reference, c: &Credential) -> Result<Fetched, OriginError> {
        let a = self.send("GET", &format!("{r}/manifests/{f}"), "manifest", None, c).await?;
        let media_type = a.headers().get("content-type").and_then(|d| d.to_str().ok()).unwrap_or_default().to_owned();
        let content = Limited::new(a.into_body(), 4 << 20)
            .collect()
            .await
            .map_err(|e| OriginError::Unreachable(e.to_string()))?
            .to_bytes();
        let digest = Digest::of(&content);
        Ok(Fetched { content, media_type, digest })
    }
    pub async fn blob(
        &self,
        r: &Repository,
        d: &Digest,
        s: Option<Span>,
        c: &Credential,
    ) -> Result<BlobStream, OriginError> {
        let range = s.map(|s| format!("bytes={}-{}", s.start, s.end - 1));
        let a = self.send("GET", &format!("{r}/blobs/{d}"), "blob", range, c).await?;
        let len: Option<u64> = a.headers().get("content-length").and_then(|d| d.to_str().ok()?.parse().ok());
        let (start, end, size) = if a.status() == 206 {
            let (span, size) = parse_content_range(a.headers()["content-range"].to_str().unwrap_or_default())
                .ok_or(OriginError::Lied)?;
            (span.start, Some(span.end), size)
        } else {
            (0, len, len)
        };
        Ok(BlobStream {
            start,
            end,
            size,
            body: a.into_body(),
            stall: self.0.stall,
            metrics: self.0.metrics.clone(),
            label: RegistryLabel::of(&self.0.name),
        })
    }
    pub async fn pass(&self, p: &str, c: &Credential) -> Result<Passed, OriginError> {
        let a = self.send("GET", p, "pass", None, c).await?;
        let content = Limited::new(a.into_body(), 4 << 20)
            .collect()
            .await
            .map_err(|e| OriginError::Unreachable(e.to_string()))?
            .to_bytes();
        Ok(Passed { status: 200, headers: vec![], content })
    }
}
