//! A double of an external scaler: KEDA asks it, and it says what a test tells it.
//!
//! The messages are written a second time from what KEDA's client sends, so that a number that the real scaler has
//! wrong is found.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use futures_util::{Stream, StreamExt as _, stream};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::net::{Place, Port};
use crate::tls::Identity;

/// What it is called to KEDA.
const METRIC: &str = "replicas";

/// What is said of a workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Says {
    /// Whether there is to be any replica at all.
    pub active: bool,
    /// How many.
    pub replicas: f64,
}

/// A call that came: the method, and whom it was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Such as `GetMetrics`.
    pub method: String,
    /// `namespace/name` of the ScaledObject.
    pub object: String,
    /// The trigger's metadata.
    pub metadata: BTreeMap<String, String>,
}

struct Shared {
    says: watch::Sender<Option<Says>>,
    calls: Mutex<Vec<Call>>,
    called: watch::Sender<()>,
}

/// A running scaler.
pub struct ExternalScaler {
    shared: Arc<Shared>,
    address: SocketAddr,
    task: JoinHandle<()>,
    _port: Port,
}

impl ExternalScaler {
    /// Starts one, with a certificate or in plaintext. Until it is told what to say it knows nothing, and says so.
    pub fn start(place: &Place, identity: Option<&Identity>) -> Result<Self> {
        let tls = identity.map(with_http2).transpose()?;
        let port = place.port()?;
        let address = SocketAddr::new(place.address(), port.number());
        let shared = Arc::new(Shared {
            says: watch::Sender::new(None),
            calls: Mutex::default(),
            called: watch::Sender::new(()),
        });
        let task = tokio::spawn(serve(place.listen(address)?, tls, shared.clone()));
        Ok(Self { shared, address, task, _port: port })
    }

    /// What `scalerAddress` has to be.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it says from now on, of every workload: to whom asks, and at once to whom listens.
    pub fn say(&self, says: Option<Says>) {
        self.shared.says.send_replace(says);
    }

    /// Waits until so many calls came of which this is so.
    pub async fn called(&self, times: usize, is_so: impl Fn(&Call) -> bool) -> Result<()> {
        let mut called = self.shared.called.subscribe();
        loop {
            called.mark_unchanged();
            if self.shared.calls().iter().filter(|call| is_so(call)).count() >= times {
                return Ok(());
            }
            called.changed().await?;
        }
    }

    /// All calls that came.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.calls().clone()
    }
}

impl Drop for ExternalScaler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, method: &str, about: ScaledObjectRef) {
        let object = format!("{}/{}", about.namespace, about.name);
        self.calls().push(Call { method: method.to_owned(), object, metadata: about.metadata });
        self.called.send_replace(());
    }

    fn says(&self) -> Result<Says, Status> {
        self.says.borrow().ok_or_else(|| Status::unavailable("nothing is known yet"))
    }
}

fn with_http2(identity: &Identity) -> Result<TlsAcceptor> {
    let mut config = (*identity.server_config()?).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    // Connections end with this task: they are its own.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), shared.clone());
        connections.spawn(async move {
            match tls {
                // Who does not trust the certificate goes away.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        speak(stream, shared).await;
                    }
                }
                None => speak(stream, shared).await,
            }
        });
    }
}

async fn speak(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let answer = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(shared, request).await) }
    });
    let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
}

async fn answer(
    shared: Arc<Shared>,
    request: http::Request<hyper::body::Incoming>,
) -> http::Response<tonic::body::Body> {
    match request.uri().path() {
        "/externalscaler.ExternalScaler/IsActive" => {
            unary(request, move |about: ScaledObjectRef| {
                shared.note("IsActive", about);
                Ok(IsActiveResponse { result: shared.says()?.active })
            })
            .await
        }
        "/externalscaler.ExternalScaler/GetMetricSpec" => {
            unary(request, move |about: ScaledObjectRef| {
                shared.note("GetMetricSpec", about);
                let spec = MetricSpec { name: METRIC.to_owned(), target: 1, target_float: 1.0 };
                Ok(GetMetricSpecResponse { specs: vec![spec] })
            })
            .await
        }
        "/externalscaler.ExternalScaler/GetMetrics" => {
            unary(request, move |asked: GetMetricsRequest| {
                shared.note("GetMetrics", asked.about.unwrap_or_default());
                let replicas = shared.says()?.replicas;
                #[expect(clippy::cast_possible_truncation, reason = "tests say small numbers")]
                let value =
                    MetricValue { name: METRIC.to_owned(), value: replicas.round() as i64, value_float: replicas };
                Ok(GetMetricsResponse { values: vec![value] })
            })
            .await
        }
        "/externalscaler.ExternalScaler/StreamIsActive" => {
            Grpc::new(ProstCodec::<IsActiveResponse, ScaledObjectRef>::default())
                .server_streaming(Listening(shared), request)
                .await
        }
        _ => Status::unimplemented("no such method").into_http(),
    }
}

async fn unary<Q, A>(
    request: http::Request<hyper::body::Incoming>,
    says: impl FnOnce(Q) -> Result<A, Status> + Send,
) -> http::Response<tonic::body::Body>
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
{
    struct Once<F>(Option<F>);
    impl<Q, A, F> UnaryService<Q> for Once<F>
    where
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
        F: FnOnce(Q) -> Result<A, Status> + Send,
    {
        type Response = A;
        type Future = std::future::Ready<Result<Response<A>, Status>>;

        fn call(&mut self, request: Request<Q>) -> Self::Future {
            let says = self.0.take().ok_or_else(|| Status::internal("asked twice"));
            std::future::ready(says.and_then(|says| says(request.into_inner())).map(Response::new))
        }
    }
    Grpc::new(ProstCodec::<A, Q>::default()).unary(Once(Some(says)), request).await
}

/// Who listens is told what is so now, and each change.
struct Listening(Arc<Shared>);

impl ServerStreamingService<ScaledObjectRef> for Listening {
    type Response = IsActiveResponse;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<ScaledObjectRef>) -> Self::Future {
        self.0.note("StreamIsActive", request.into_inner());
        let mut says = self.0.says.subscribe();
        says.mark_changed();
        let said = stream::unfold(says, |mut says| async move {
            loop {
                says.changed().await.ok()?;
                let now = *says.borrow_and_update();
                if let Some(now) = now {
                    return Some((Ok(IsActiveResponse { result: now.active }), says));
                }
            }
        });
        std::future::ready(Ok(Response::new(said.boxed())))
    }
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ScaledObjectRef {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(btree_map = "string, string", tag = "3")]
    metadata: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct IsActiveResponse {
    #[prost(bool, tag = "1")]
    result: bool,
}

#[derive(Clone, PartialEq, Message)]
struct GetMetricSpecResponse {
    #[prost(message, repeated, tag = "1")]
    specs: Vec<MetricSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct MetricSpec {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "2")]
    target: i64,
    #[prost(double, tag = "3")]
    target_float: f64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct GetMetricsRequest {
    #[prost(message, optional, tag = "1")]
    about: Option<ScaledObjectRef>,
    #[prost(string, tag = "2")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct GetMetricsResponse {
    #[prost(message, repeated, tag = "1")]
    values: Vec<MetricValue>,
}

#[derive(Clone, PartialEq, Message)]
struct MetricValue {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "2")]
    value: i64,
    #[prost(double, tag = "3")]
    value_float: f64,
}
