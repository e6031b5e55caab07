//! A gate before a Kubernetes API server: it lets requests through, or answers some of them itself as a server does
//! that has too much to do. For what the real one says only under a load that no test can make.
//!
//! What passes is answered by the real server, whole or, for a watch, as it comes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::http::Client;
use crate::kubernetes::ControlPlane;
use crate::net::Place;

type Body = BoxBody<Bytes, hyper::Error>;

/// Which requests are answered here, and with which status.
type Rule = Box<dyn Fn(&Method, &Uri) -> Option<StatusCode> + Send>;

struct State {
    rule: Rule,
    /// What was answered here: method, and path with query.
    refused: Vec<(Method, String)>,
    passed: Vec<(Method, String)>,
}

struct Shared {
    state: Mutex<State>,
    upstream: SocketAddr,
    client: Client,
}

/// A running gate. Its connections end with it.
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Gate {
    /// Before this control plane, in plaintext on loopback; everything passes.
    pub fn start(plane: &ControlPlane) -> Result<Self> {
        let listener = Place::Host.listen(SocketAddr::new(Place::Host.address(), 0))?;
        let address = listener.local_addr()?;
        let state = Mutex::new(State { rule: Box::new(|_, _| None), refused: Vec::new(), passed: Vec::new() });
        let shared = Arc::new(Shared { state, upstream: plane.address(), client: plane.client() });
        let stop = CancellationToken::new();
        let accept = {
            let shared = shared.clone();
            async move {
                let mut connections = JoinSet::new();
                loop {
                    tokio::select! {
                        Some(_) = connections.join_next(), if !connections.is_empty() => {}
                        Ok((socket, _)) = listener.accept() => {
                            let shared = shared.clone();
                            let service = service_fn(move |request| serve(shared.clone(), request));
                            let server = hyper::server::conn::http1::Builder::new();
                            connections.spawn(server.serve_connection(TokioIo::new(socket), service));
                        }
                    }
                }
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept));
        Ok(Self { address, shared, stop })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on these are answered here.
    pub fn refuse(&self, rule: impl Fn(&Method, &Uri) -> Option<StatusCode> + Send + 'static) {
        self.shared.lock().rule = Box::new(rule);
    }

    /// What was answered here so far.
    pub fn refused(&self) -> Vec<(Method, String)> {
        self.shared.lock().refused.clone()
    }

    /// What was let through so far.
    pub fn passed(&self) -> Vec<(Method, String)> {
        self.shared.lock().passed.clone()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>> {
    let refusal = {
        let mut state = shared.lock();
        let status = (state.rule)(request.method(), request.uri());
        let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
        let asked = (request.method().clone(), path);
        match status {
            Some(_) => state.refused.push(asked),
            None => state.passed.push(asked),
        }
        status
    };
    if let Some(status) = refusal {
        let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(),
            "reason": "TooManyRequests", "message": "too many requests, says a gate" });
        let answer = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
        let answer = answer.header(header::RETRY_AFTER, "1");
        return Ok(answer.body(Full::new(Bytes::from(body.to_string())).map_err(|never| match never {}).boxed())?);
    }
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().context("no path")?;
    parts.uri = format!("https://{}{path}", shared.upstream).parse()?;
    let body = body.collect().await?.to_bytes();
    let answer = shared.client.send(Request::from_parts(parts, Full::new(body))).await?;
    Ok(answer.map(|body| body.boxed()))
}
