//! Connections to origins: names looked up and addresses checked, TLS by ring, memory bounded.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::net::TcpStream;

use super::OriginError;
use super::guard::Guard;
use super::url::{Place, shown};

/// What one connection buffers at most. 16 connections of 8 registries come to 32 MiB, and a pull
/// at 10 Gbit/s still sees only 5,000 reads a second.
const BUFFER_MAX_BYTES: usize = 256 * 1024;
/// ECR's front ends close idle connections after a minute; a reused one must not be about to close.
const IDLE: Duration = Duration::from_secs(30);
/// Addresses of one name that are tried: more of them would each get too little time.
const ADDRESSES_MAX: usize = 4;

/// An HTTP client for one registry.
#[derive(Clone)]
pub(super) struct Http {
    client: Client<HttpsConnector<Dialer>, Full<Bytes>>,
    header_timeout: Duration,
}

impl Http {
    pub(super) fn new(
        settings: &crate::config::Origin,
        connections: usize,
        roots: Arc<RootCertStore>,
        guard: Guard,
    ) -> Result<Self, OriginError> {
        let dialer = Dialer { guard, timeout: settings.connect_timeout.0 };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(OriginError::Tls)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(dialer);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(connections)
            .http1_max_buf_size(BUFFER_MAX_BYTES)
            .build(connector);
        Ok(Self { client, header_timeout: settings.header_timeout.0 })
    }

    /// One request and the head of its response.
    pub(super) async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, OriginError> {
        let host = shown(request.uri());
        match tokio::time::timeout(self.header_timeout, self.client.request(request)).await {
            Err(_) => Err(OriginError::TimedOut { host, after: self.header_timeout }),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if is_refused(&error) => {
                Err(OriginError::Refused { host, reason: "it is an address of this node or of the cloud's metadata" })
            }
            Ok(Err(error)) => Err(OriginError::Unreachable { host, source: error.into() }),
        }
    }
}

/// The certificates that are trusted: the system's and those of a PEM file. A system without any is
/// no error: its registries may speak http, or have their own file.
pub(super) fn roots(system: &RootCertStore, path: &Path, content: &[u8]) -> Result<RootCertStore, OriginError> {
    let mut roots = system.clone();
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| OriginError::File {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
    };
    let before = roots.len();
    for certificate in CertificateDer::pem_slice_iter(content) {
        let certificate = certificate.map_err(|error| wrong(error.into()))?;
        roots.add(certificate).map_err(|error| wrong(error.into()))?;
    }
    if roots.len() == before { Err(wrong("it holds no certificate".into())) } else { Ok(roots) }
}

/// The system's certificates.
pub(super) fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "a certificate of the system cannot be read");
    }
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        tracing::info!("this system has no root certificates: https works with a `ca` only");
    }
    roots
}

/// Nowhere else does an address appear that was not checked.
#[derive(Clone)]
struct Dialer {
    guard: Guard,
    timeout: Duration,
}

#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("all of its addresses are local")]
    Refused,
    #[error("its name has no address")]
    NoAddress,
    #[error("its name cannot be looked up")]
    Lookup(#[source] std::io::Error),
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("no connection within {0:?}")]
    TimedOut(Duration),
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<TokioIo<TcpStream>, DialError> {
        let timeout = self.timeout;
        tokio::time::timeout(timeout, self.connect(uri)).await.unwrap_or(Err(DialError::TimedOut(timeout)))
    }

    async fn connect(self, uri: Uri) -> Result<TokioIo<TcpStream>, DialError> {
        let Place { host, port, .. } = Place::of(&uri).ok_or(DialError::NoAddress)?;
        let mut found = tokio::net::lookup_host((host.as_str(), port)).await.map_err(DialError::Lookup)?.peekable();
        found.peek().ok_or(DialError::NoAddress)?;
        let allowed = found.filter(|address| self.guard.allows(&host, port, address.ip()));
        let allowed: Vec<SocketAddr> = allowed.take(ADDRESSES_MAX).collect();
        let share = self.timeout / u32::try_from(allowed.len().max(1)).unwrap_or(1);
        let mut last = DialError::Refused;
        for address in allowed {
            match tokio::time::timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true).map_err(DialError::Connect)?;
                    return Ok(TokioIo::new(stream));
                }
                Ok(Err(error)) => last = DialError::Connect(error),
                Err(_) => last = DialError::TimedOut(share),
            }
        }
        Err(last)
    }
}

impl tower::Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}

fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if matches!(error.downcast_ref(), Some(DialError::Refused)) {
            return true;
        }
        next = error.source();
    }
    false
}
