//! What operators, Prometheus and the kubelet ask: `/metrics`, `/healthz`, `/readyz`, `/v1/status`.
//!
//! Read only on TCP. What changes state (prewarm, unpin, uninstall, errors of GPUs) is answered on the unix socket alone,
//! which only its owner can open.

mod advice;
mod readiness;
mod status;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use darter_base::exposition;

use crate::certs_d::Uninstaller;
use crate::gpu::{Clear, ClearError, Judgement};
use crate::log::chain;
use crate::metrics::Metrics;
use crate::prewarm::{Event, Prewarm};

pub use readiness::{About, Watched};

/// Prometheus, the kubelet and a person: more at once is a mistake or an attack. Each door has so
/// many of its own: long orders on the unix socket must not keep the kubelet's probe out.
const CONNECTIONS_MAX: usize = 64;
/// A client that sends no head in this time is gone.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

type Body = BoxBody<Bytes, Infallible>;

/// Why the admin endpoint cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The TCP address is taken or not ours.
    #[error("cannot listen on {address} (admin.listen)")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Everything an answer is made from.
pub struct Admin {
    listener: TcpListener,
    socket: Option<(UnixListener, PathBuf)>,
    answers: Arc<Answers>,
}

struct Answers {
    metrics: Arc<Metrics>,
    watched: Watched,
    orders: Orders,
}

/// What `/readyz` says: the checks, and the verdict on the GPUs for whoever judges those.
#[derive(Serialize)]
struct ReadyPage<'a> {
    #[serde(flatten)]
    readiness: &'a darter_core::ready::Readiness,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<&'a Judgement>,
}

/// Who carries out what is ordered on the unix socket.
pub struct Orders {
    /// Brings and releases images.
    pub prewarm: Prewarm,
    /// Gives hosts.toml up.
    pub uninstall: Uninstaller,
}

/// Which door a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Tcp,
    Unix,
}

impl Admin {
    /// Listens on TCP and, where the directory allows it, on the unix socket. An agent without the
    /// socket still mirrors, so that failure is only logged.
    pub async fn bind(
        address: SocketAddr,
        socket: &Path,
        metrics: Arc<Metrics>,
        watched: Watched,
        orders: Orders,
    ) -> Result<Self, AdminError> {
        let listener = TcpListener::bind(address).await.map_err(|source| AdminError::Listen { address, source })?;
        let socket = match bind_socket(socket) {
            Ok(listener) => Some((listener, socket.to_owned())),
            Err(error) => {
                warn!(path = %socket.display(), %error, "no admin socket: `darter prewarm` and `darter uninstall` cannot reach this agent");
                None
            }
        };
        Ok(Self { listener, socket, answers: Arc::new(Answers { metrics, watched, orders }) })
    }

    /// Where TCP listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, socket, answers } = self;
        let tcp = async {
            let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            while let Ok(place) = places.clone().acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => spawn(stream, Door::Tcp, &answers, place, &stop),
                    Err(error) => pause(&error).await,
                }
            }
        };
        let unix = async {
            let Some((listener, _)) = &socket else { return };
            let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            while let Ok(place) = places.clone().acquire_owned().await {
                match listener.accept().await {
                    Ok((stream, _)) => spawn(stream, Door::Unix, &answers, place, &stop),
                    Err(error) => pause(&error).await,
                }
            }
        };
        stop.run_until_cancelled(async { tokio::join!(tcp, unix) }).await;
        if let Some((_, path)) = socket
            && let Err(error) = std::fs::remove_file(&path)
        {
            debug!(path = %path.display(), %error, "the admin socket was gone already");
        }
    }
}

/// Out of file descriptors, mostly: others have to end first.
async fn pause(error: &io::Error) {
    warn!(%error, "cannot accept an admin connection");
    tokio::time::sleep(Duration::from_millis(200)).await;
}

fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // A socket that a killed agent left; a living one still answers and keeps its place.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another darter agent answers there"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn spawn<S>(
    stream: S,
    door: Door,
    answers: &Arc<Answers>,
    place: tokio::sync::OwnedSemaphorePermit,
    stop: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (answers, stop) = (answers.clone(), stop.clone());
    tokio::spawn(async move {
        let service = service_fn(|request| {
            let answers = answers.clone();
            async move { Ok::<_, Infallible>(answers.answer(request, door).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let served = stop.run_until_cancelled(connection).await;
        if let Some(Err(error)) = served {
            debug!(%error, "admin connection broke off");
        }
        drop(place);
    });
}

impl Answers {
    async fn answer(&self, request: Request<Incoming>, door: Door) -> Response<Body> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => self.metrics(&request).await,
            // Answering at all is the check: the runtime turns, and sockets are accepted.
            (&Method::GET, "/healthz") => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
            (&Method::GET, "/readyz") => self.readyz().await,
            (&Method::GET, "/v1/status") => self.status().await,
            (&Method::POST, "/v1/prewarm") if door == Door::Unix => self.prewarm(request).await,
            (&Method::POST, "/v1/unpin") if door == Door::Unix => self.unpin(request).await,
            (&Method::POST, "/v1/uninstall") if door == Door::Unix => self.uninstall().await,
            (&Method::POST, "/v1/gpus/clear") if door == Door::Unix => self.clear(request).await,
            (_, "/v1/prewarm" | "/v1/unpin" | "/v1/uninstall" | "/v1/gpus/clear") => text(
                StatusCode::FORBIDDEN,
                "text/plain",
                "what changes state is answered on the unix socket only, to POST\n".to_owned(),
            ),
            (&Method::GET, _) => {
                let there_are = "there are /metrics, /healthz, /readyz and /v1/status\n";
                text(StatusCode::NOT_FOUND, "text/plain", there_are.to_owned())
            }
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET only\n".to_owned()),
        }
    }

    async fn metrics(&self, request: &Request<Incoming>) -> Response<Body> {
        self.watched.refresh(&self.metrics).await;
        let mut page = self.metrics.render();
        self.watched.gpus.add_dcgm(&mut page);
        let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
        if exposition::wants_open(accept) {
            return text(StatusCode::OK, exposition::OPEN, page);
        }
        text(StatusCode::OK, exposition::PLAIN, exposition::plain(&page))
    }

    async fn readyz(&self) -> Response<Body> {
        let readiness = self.watched.refresh(&self.metrics).await;
        let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let judgement = self.watched.gpus.judgement();
        page(status, &ReadyPage { readiness: &readiness, gpu: judgement.as_deref() })
    }

    /// 200 however the node is: the answer says it.
    async fn status(&self) -> Response<Body> {
        let readiness = self.watched.refresh(&self.metrics).await;
        page(StatusCode::OK, &self.watched.status(&readiness))
    }

    /// One JSON object a line, until the image is here or cannot come.
    async fn prewarm(&self, request: Request<Incoming>) -> Response<Body> {
        let order = match read(request).await {
            Ok(order) => order,
            Err(refused) => return *refused,
        };
        let lines = self.orders.prewarm.clone().run(order).map(|event| Ok::<_, Infallible>(Frame::data(line(&event))));
        response(StatusCode::OK, EVENTS, BodyExt::boxed(StreamBody::new(lines)))
    }

    /// One JSON object.
    async fn unpin(&self, request: Request<Incoming>) -> Response<Body> {
        match read(request).await {
            Ok(order) => {
                let event = self.orders.prewarm.clone().release(order).await;
                response(StatusCode::OK, EVENTS, Full::new(line(&event)).boxed())
            }
            Err(refused) => *refused,
        }
    }

    /// One JSON object a line, for each error that stands no more.
    async fn clear(&self, request: Request<Incoming>) -> Response<Body> {
        let order: Clear = match read(request).await {
            Ok(order) => order,
            Err(refused) => return *refused,
        };
        match self.watched.gpus.clear(&order) {
            Ok(cleared) => {
                let lines: String =
                    cleared.iter().filter_map(|one| Some(serde_json::to_string(one).ok()? + "\n")).collect();
                text(StatusCode::OK, EVENTS, lines)
            }
            Err(error @ ClearError::Unknown(_)) => text(StatusCode::NOT_FOUND, "text/plain", format!("{error}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{}\n", chain(&error))),
        }
    }

    /// One JSON object; or why not all was put back.
    async fn uninstall(&self) -> Response<Body> {
        let refused = |reason: String| text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", reason + "\n");
        match self.orders.uninstall.uninstall().await {
            Ok(done) => match serde_json::to_string(&done) {
                Ok(json) => text(StatusCode::OK, "application/json", json + "\n"),
                Err(error) => refused(error.to_string()),
            },
            Err(error) => refused(chain(&error).to_string()),
        }
    }
}

const EVENTS: &str = "application/x-ndjson";

fn line(event: &Event) -> Bytes {
    Bytes::from(serde_json::to_string(event).unwrap_or_default() + "\n")
}

/// What an order says; or the answer to one that is none.
async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, Box<Response<Body>>> {
    let order = http_body_util::Limited::new(request.into_body(), 64 * 1024).collect().await;
    let refused = |error: String| Box::new(text(StatusCode::BAD_REQUEST, "text/plain", error + "\n"));
    let body = order.map_err(|error| refused(error.to_string()))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| refused(error.to_string()))
}

/// JSON for programs, and for people with curl.
fn page(status: StatusCode, page: &impl Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(page) {
        Ok(json) => text(status, "application/json", json + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
    }
}

fn text(status: StatusCode, kind: &str, text: String) -> Response<Body> {
    response(status, kind, Full::new(Bytes::from(text)).boxed())
}

fn response(status: StatusCode, kind: &str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if let Ok(kind) = kind.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}
