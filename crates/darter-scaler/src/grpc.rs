//! The door on :4010: HTTP/2 with or without TLS, for agents and for KEDA.
//!
//! Here are connections: how many, with which certificate, how they end. Not here: what is said over them.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use darter_api::externalscaler::external_scaler_server::ExternalScalerServer;
use darter_api::report::reports_server::ReportsServer;
use darter_base::log::chain;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tower::ServiceExt as _;
use tracing::{debug, info, warn};

use crate::config::{Grpc, given};
use crate::hub::Hub;
use crate::keda::Keda;
use crate::reports::Hearer;

/// A handshake takes so long, or nobody is there.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// A machine that is gone without a word is noticed after the two together.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_PATIENCE: Duration = Duration::from_secs(10);
/// Streams of one connection: an agent has one, KEDA one for each workload.
const STREAMS_MAX: u32 = 20_000;
/// Connections are told to end, and have so long to do it.
const GOODBYE: Duration = Duration::from_secs(2);

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} (grpc.listen)")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate cannot be shown.
    #[error("cannot use {} (grpc.cert) with {} (grpc.key)", .cert.display(), .key.display())]
    Certificate {
        /// Which file.
        cert: PathBuf,
        /// And which key.
        key: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The services behind it.
#[derive(Debug, Clone)]
pub struct Services {
    /// For agents.
    pub reports: ReportsServer<Hearer>,
    /// For KEDA.
    pub keda: ExternalScalerServer<Keda>,
}

/// Listens.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    certificate: Option<Arc<Certificate>>,
    places: usize,
    hub: Arc<Hub>,
}

impl Door {
    /// Listens, and reads the certificate.
    pub async fn bind(settings: &Grpc, hub: Arc<Hub>) -> Result<Self, GrpcError> {
        let address = settings.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| GrpcError::Listen { address, source })?;
        let certificate = match (given(&settings.cert), given(&settings.key)) {
            (Some(cert), Some(key)) => Some(Arc::new(Certificate::read(cert, key)?)),
            _ => None,
        };
        Ok(Self { listener, certificate, places: settings.max_connections, hub })
    }

    /// Where.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, and lets connections end.
    pub async fn run(self, services: Services, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(self.places));
        let connections = TaskTracker::new();
        let accept = async {
            while let Ok(place) = places.clone().acquire_owned().await {
                let (stream, from) = match self.listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, mostly: others have to end first.
                        warn!(%error, "cannot accept a connection to grpc.listen");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        continue;
                    }
                };
                // Pushes are small and are waited for.
                let _ = stream.set_nodelay(true);
                let (hub, services, stop) = (self.hub.clone(), services.clone(), stop.clone());
                let certificate = self.certificate.clone();
                connections.spawn(async move {
                    hub.metrics.connections.inc();
                    match certificate {
                        None => serve(stream, from, services, &stop).await,
                        Some(certificate) => {
                            let acceptor = TlsAcceptor::from(certificate.config());
                            match timeout(HANDSHAKE_PATIENCE, acceptor.accept(stream)).await {
                                Ok(Ok(stream)) => serve(stream, from, services, &stop).await,
                                Ok(Err(error)) => debug!(%from, %error, "no TLS came about"),
                                Err(_) => debug!(%from, "no TLS came about in time"),
                            }
                        }
                    }
                    hub.metrics.connections.dec();
                    drop(place);
                });
            }
        };
        stop.run_until_cancelled(accept).await;
        connections.close();
        if timeout(GOODBYE, connections.wait()).await.is_err() {
            debug!("some connections did not end by themselves");
        }
    }
}

async fn serve<S>(stream: S, from: SocketAddr, services: Services, stop: &CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(from);
        let Services { reports, keda } = services.clone();
        async move {
            let path = request.uri().path();
            if path.starts_with("/darter.v1.Reports/") {
                reports.oneshot(request).await
            } else if path.starts_with("/externalscaler.ExternalScaler/") {
                keda.oneshot(request).await
            } else {
                Ok(Status::unimplemented("there are darter.v1.Reports and externalscaler.ExternalScaler").into_http())
            }
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_PATIENCE)
        .max_concurrent_streams(STREAMS_MAX);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            // GOAWAY: who is there goes elsewhere, and tries again without a pause.
            connection.as_mut().graceful_shutdown();
            match timeout(GOODBYE, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        debug!(%from, error = %chain(&error), "a connection to grpc.listen broke off");
    }
}

/// A certificate in files, read again when they change.
#[derive(Debug)]
struct Certificate {
    cert: PathBuf,
    key: PathBuf,
    state: Mutex<(Option<SystemTime>, Arc<ServerConfig>)>,
}

impl Certificate {
    fn read(cert: &Path, key: &Path) -> Result<Self, GrpcError> {
        let config = load(cert, key)?;
        let state = Mutex::new((changed(cert, key), config));
        Ok(Self { cert: cert.to_owned(), key: key.to_owned(), state })
    }

    /// As the files are now; as they were, while they cannot be used.
    fn config(&self) -> Arc<ServerConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = changed(&self.cert, &self.key);
        if changed != state.0 {
            state.0 = changed;
            match load(&self.cert, &self.key) {
                Ok(config) => {
                    info!(cert = %self.cert.display(), "read the certificate again");
                    state.1 = config;
                }
                Err(error) => warn!(error = %chain(&error), "the certificate that was read before is shown"),
            }
        }
        state.1.clone()
    }
}

fn changed(cert: &Path, key: &Path) -> Option<SystemTime> {
    let of = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
    of(cert).max(of(key))
}

fn load(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, GrpcError> {
    let wrong = |source| GrpcError::Certificate { cert: cert.to_owned(), key: key.to_owned(), source };
    let read = || -> Result<ServerConfig, Box<dyn std::error::Error + Send + Sync>> {
        let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_file(key)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let mut config = config.with_no_client_auth().with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    };
    read().map(Arc::new).map_err(wrong)
}
