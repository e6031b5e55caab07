//! The door on :4010: HTTP/2 with or without TLS, for agents and for KEDA.
//!
//! Here are connections: how many, with which certificates, how they end. Not here: what is said over them.

mod certificate;
mod guests;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_api::externalscaler::external_scaler_server::ExternalScalerServer;
use darter_api::report::reports_server::ReportsServer;
use darter_base::log::chain;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, interval_at, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use self::certificate::Certificate;
use self::guests::Guest;
pub(crate) use self::guests::Turned;
use crate::clock::stopwatch;
use crate::config::Grpc;
use crate::hub::Hub;
use crate::keda::Keda;
use crate::metrics::ReasonLabels;
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
/// A certificate that was taken is looked at again: it expires, and its authority is exchanged, while KEDA, which never
/// ends a connection by itself, stays.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Who is turned away comes again at once: of each reason the log has one line in this time, the counter has all.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// What who asks as KEDA does is told.
const UNNAMED: &str = "KEDA is to show a certificate here (grpc.keda_ca): name tlsClientCert and tlsClientKey in the \
                       TriggerAuthentication of this trigger";

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
    /// Nobody could be known by it.
    #[error(
        "cannot use {} (grpc.keda_ca): it has to be the certificate of the authority that signs KEDA's, as PEM; leave the \
         key out where KEDA shows none", .path.display()
    )]
    Authority {
        /// Which file.
        path: PathBuf,
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
    places: usize,
    porter: Arc<Porter>,
}

/// Looks at who comes in.
#[derive(Debug)]
struct Porter {
    certificate: Option<Certificate>,
    hub: Arc<Hub>,
    /// When the log was last told of each reason.
    told: Mutex<BTreeMap<Turned, Instant>>,
}

impl Door {
    /// Listens, and reads the certificate.
    pub async fn bind(settings: &Grpc, hub: Arc<Hub>) -> Result<Self, GrpcError> {
        let address = settings.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| GrpcError::Listen { address, source })?;
        let certificate = Certificate::read(settings)?;
        let porter = Arc::new(Porter { certificate, hub, told: Mutex::default() });
        Ok(Self { listener, places: settings.max_connections, porter })
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
                let (porter, services, stop) = (self.porter.clone(), services.clone(), stop.clone());
                connections.spawn(async move {
                    porter.hub.metrics.connections.inc();
                    if porter.certificate.is_none() {
                        serve(stream, from, Guest::Anybody, &porter, services, &stop).await;
                    } else if let Some((stream, guest)) = porter.greet(stream, from).await {
                        serve(stream, from, guest, &porter, services, &stop).await;
                    }
                    porter.hub.metrics.connections.dec();
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

impl Porter {
    /// The handshake, and whose certificate came with it; none where there is no connection.
    async fn greet(&self, stream: TcpStream, from: SocketAddr) -> Option<(TlsStream<TcpStream>, Guest)> {
        let shown = self.certificate.as_ref()?.shown();
        let acceptor = TlsAcceptor::from(shown.config);
        let error = match timeout(HANDSHAKE_PATIENCE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let guest = match (shown.guests, certificates) {
                    (None, _) => Guest::Anybody,
                    (Some(_), []) => Guest::Unnamed,
                    (Some(_), certificates) => Guest::Named(certificates.to_vec()),
                };
                return Some((stream, guest));
            }
            Ok(Err(error)) => error,
            Err(_) => {
                self.turn_away(from, Turned::Late, &"nothing was said");
                return None;
            }
        };
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
        self.turn_away(from, cause.map_or(Turned::Handshake, Turned::of), &error);
        None
    }

    /// Until the certificate of this guest is one that would not be taken any more.
    async fn outlasts(&self, guest: &Guest, from: SocketAddr) {
        let (Some(certificate), Guest::Named(shown)) = (&self.certificate, guest) else {
            return std::future::pending().await;
        };
        let mut looks = interval_at(stopwatch() + LOOK_AGAIN, LOOK_AGAIN);
        loop {
            looks.tick().await;
            let guests = certificate.shown().guests;
            if let Some(Err(error)) = guests.map(|guests| guests.still(shown)) {
                return self.turn_away(from, Turned::of(&error), &error);
            }
        }
    }

    /// Counts it, and tells it from time to time.
    fn turn_away(&self, from: SocketAddr, why: Turned, detail: &dyn std::fmt::Display) {
        self.hub.metrics.tls_refusals.get_or_create(&ReasonLabels { reason: why.word() }).inc();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stopwatch();
        if why.is_told() && told.get(&why).is_none_or(|at| now.duration_since(*at) >= TELL_AGAIN) {
            told.insert(why, now);
            warn!(%from, reason = why.word(), %detail, "a connection to grpc.listen is turned away: {}", why.why());
        } else {
            debug!(%from, reason = why.word(), %detail, "a connection to grpc.listen is turned away: {}", why.why());
        }
    }
}

/// Until the other end goes, `stop`, or it is turned away.
async fn serve<S>(
    stream: S,
    from: SocketAddr,
    guest: Guest,
    porter: &Arc<Porter>,
    services: Services,
    stop: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let is_unnamed = matches!(guest, Guest::Unnamed);
    let leave = stop.child_token();
    let (leaves, counts) = (leave.clone(), porter.clone());
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(from);
        let Services { reports, keda } = services.clone();
        let (leaves, porter) = (leaves.clone(), counts.clone());
        async move {
            let path = request.uri().path();
            if path.starts_with("/darter.v1.Reports/") {
                reports.oneshot(request).await
            } else if path.starts_with("/externalscaler.ExternalScaler/") && is_unnamed {
                if !leaves.is_cancelled() {
                    porter.turn_away(from, Turned::NoCertificate, &path);
                    leaves.cancel();
                }
                Ok(Status::unauthenticated(UNNAMED).into_http())
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
    let goes = async {
        tokio::select! {
            () = leave.cancelled() => {}
            () = porter.outlasts(&guest, from) => {}
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = goes => {
            // GOAWAY, as the scaler ends or this guest may not stay: who is there goes elsewhere, and tries again without a pause.
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
