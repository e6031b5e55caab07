//! The door on :4011: health and metrics; what is known, what was decided and why; demand and freeze.
//!
//! Reading is free, as it is at an agent's. What changes something is `access`'s word.

mod answers;
mod orders;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::access::Access;
use crate::hub::Hub;

/// Prometheus, the kubelet, people, and a gateway for each few workloads that says their demand.
const CONNECTIONS_MAX: usize = 1024;
/// A client that sends no head in this time is gone.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// And one that does not send what it began to.
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);

type Answer = Response<Full<Bytes>>;

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (http.listen)")]
pub struct HttpError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// Listens.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    page: Arc<Page>,
}

#[derive(Debug)]
struct Page {
    hub: Arc<Hub>,
    access: Access,
    /// For how long a sample says something where nobody says so.
    ttl_ms: u64,
}

impl Http {
    /// Listens.
    pub async fn bind(address: SocketAddr, hub: Arc<Hub>, access: Access, ttl_ms: u64) -> Result<Self, HttpError> {
        let listener = TcpListener::bind(address).await.map_err(|source| HttpError { address, source })?;
        Ok(Self { listener, page: Arc::new(Page { hub, access, ttl_ms }) })
    }

    /// Where.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let accept = async {
            while let Ok(place) = places.clone().acquire_owned().await {
                let (stream, from) = match self.listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        warn!(%error, "cannot accept a connection to http.listen");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        continue;
                    }
                };
                let (page, stop) = (self.page.clone(), stop.clone());
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let page = page.clone();
                        async move { Ok::<_, Infallible>(page.answer(request, from).await) }
                    });
                    let connection = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(HEAD_TIMEOUT)
                        .serve_connection(TokioIo::new(stream), service);
                    if let Some(Err(error)) = stop.run_until_cancelled(connection).await {
                        debug!(%error, "a connection to http.listen broke off");
                    }
                    drop(place);
                });
            }
        };
        stop.run_until_cancelled(accept).await;
    }
}

impl Page {
    async fn answer(&self, request: Request<Incoming>, from: SocketAddr) -> Answer {
        let path = request.uri().path().to_owned();
        let demand = path.strip_prefix("/v1/demand/");
        match (request.method().clone(), path.as_str(), demand) {
            (Method::GET, "/metrics", _) => self.metrics(&request),
            // Answering at all is the check: the runtime turns, and sockets are accepted.
            (Method::GET, "/healthz", _) => text(StatusCode::OK, "ok\n"),
            (Method::GET, "/readyz", _) => self.readyz(),
            (Method::GET, "/v1/status", _) => self.status(),
            (Method::GET, "/v1/state", _) => self.state(),
            (Method::GET, "/v1/decisions", _) => self.decisions(request.uri().query()),
            (Method::GET, path, _) if path.starts_with("/v1/explain/") => self.explain(&path["/v1/explain/".len()..]),
            (Method::PUT, _, Some(workload)) => {
                let workload = workload.to_owned();
                within(self.demand(request, from, &workload)).await
            }
            (Method::POST, "/v1/freeze", _) => within(self.freeze(request, from)).await,
            (Method::DELETE, "/v1/freeze", _) => within(self.thaw(&request, from)).await,
            (_, "/v1/freeze", _) => text(StatusCode::METHOD_NOT_ALLOWED, "POST freezes, DELETE lets go\n"),
            (_, _, Some(_)) => text(StatusCode::METHOD_NOT_ALLOWED, "PUT says demand\n"),
            (Method::GET, ..) => text(
                StatusCode::NOT_FOUND,
                "there are /metrics, /healthz, /readyz, /v1/status, /v1/state, /v1/explain/{node or namespace/workload}, \
                 /v1/decisions?since=; PUT /v1/demand/{namespace}/{workload}; POST and DELETE /v1/freeze\n",
            ),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n"),
        }
    }
}

async fn within(answer: impl Future<Output = Answer>) -> Answer {
    timeout(ORDER_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| text(StatusCode::REQUEST_TIMEOUT, "the order did not come whole\n"))
}

/// JSON for programs, and for people with curl.
fn page(status: StatusCode, page: &impl Serialize) -> Answer {
    match serde_json::to_string(page) {
        Ok(json) => response(status, "application/json", json + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn text(status: StatusCode, text: &str) -> Answer {
    response(status, "text/plain", text.to_owned())
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
