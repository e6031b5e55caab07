//! Who hears agents' reports in a test: the real protocol over real TLS, and nobody who decides behind it.
//!
//! What it hears is kept, what it is to say is said. A double of the scaler's ear, and no scaler.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_api::report::reports_server::{Reports, ReportsServer};
use darter_api::report::{Directive, Report};
use futures_util::{Stream, StreamExt as _, stream};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt as _;

use crate::net::{Place, Port};
use crate::tls::Identity;

/// Past this it does not come at all. Less than the longest interval: what comes within came by itself.
const PATIENCE: Duration = Duration::from_secs(45);
/// What may wait to be said.
const SAYINGS: usize = 1024;

/// A report, and how it came.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Which connection, from 1.
    pub stream: u64,
    /// When.
    pub at: Instant,
    /// What it says.
    pub report: Report,
}

/// What everybody shares.
struct Shared {
    state: Mutex<State>,
    /// Something was heard, or somebody tried.
    news: watch::Sender<()>,
}

struct State {
    heard: Vec<Heard>,
    /// The value of `authorization` of each try.
    tries: Vec<Option<String>>,
    /// What it has to be, if anything.
    wanted: Option<String>,
    /// What is said to all who are not taken.
    refusal: fn() -> Status,
    /// Whether reports are answered.
    answers: bool,
    /// Whether reports are read.
    reads: watch::Sender<bool>,
    open: Vec<mpsc::Sender<Result<Directive, Status>>>,
    sequence: u64,
}

/// A server that hears reports.
pub struct Ear {
    shared: Arc<Shared>,
    tls: Option<Arc<ServerConfig>>,
    address: SocketAddr,
    place: Place,
    task: Option<JoinHandle<()>>,
    _port: Port,
}

impl Ear {
    /// Starts one, with a certificate or in plaintext.
    pub async fn start(place: &Place, identity: Option<&Identity>) -> Result<Self> {
        let port = place.port()?;
        let tls = match identity {
            Some(identity) => {
                let mut config = (*identity.server_config()?).clone();
                config.alpn_protocols = vec![b"h2".to_vec()];
                Some(Arc::new(config))
            }
            None => None,
        };
        let state = State {
            heard: Vec::new(),
            tries: Vec::new(),
            wanted: None,
            refusal: || Status::unauthenticated("not you"),
            answers: true,
            reads: watch::Sender::new(true),
            open: Vec::new(),
            sequence: 0,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), news: watch::Sender::new(()) });
        let address = SocketAddr::new(place.address(), port.number());
        let mut ear = Self { shared, tls, address, place: place.clone(), task: None, _port: port };
        ear.start_again()?;
        Ok(ear)
    }

    /// Listens again, at the same address.
    pub fn start_again(&mut self) -> Result<()> {
        let listener = self.place.listen(self.address)?;
        self.task = Some(tokio::spawn(serve(listener, self.tls.clone(), self.shared.clone())));
        Ok(())
    }

    /// Is gone, with its connections.
    pub async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            // An error is that it was aborted.
            let _ = task.await;
        }
        self.state().open.clear();
    }

    /// For `report.scaler`.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// From now on takes only who comes with this.
    pub fn want(&self, authorization: Option<&str>) {
        self.state().wanted = authorization.map(ToOwned::to_owned);
    }

    /// What those hear that are not taken.
    pub fn refuse_with(&self, refusal: fn() -> Status) {
        self.state().refusal = refusal;
    }

    /// Whether reports are answered.
    pub fn answer(&self, answers: bool) {
        self.state().answers = answers;
    }

    /// Whether reports are read.
    pub fn read(&self, reads: bool) {
        self.state().reads.send_replace(reads);
    }

    /// Ends all streams, as a server that is told to stop.
    pub fn end_streams(&self) {
        self.state().open.clear();
    }

    /// What came with `authorization`, of each try.
    pub fn tries(&self) -> Vec<Option<String>> {
        self.state().tries.clone()
    }

    /// All that was heard.
    pub fn heard(&self) -> Vec<Heard> {
        self.state().heard.clone()
    }

    /// Says this to all, with the next sequence, which it returns.
    pub fn say(&self, directive: Directive) -> Result<u64> {
        let mut state = self.state();
        state.sequence += 1;
        let directive = Directive { sequence: state.sequence, ..directive };
        send(&mut state, directive)?;
        Ok(state.sequence)
    }

    /// Says exactly this to all.
    pub fn say_plainly(&self, directive: Directive) -> Result<()> {
        send(&mut self.state(), directive)
    }

    /// The first report, of those that come after so many, of which this is so.
    pub async fn hears(&self, after: usize, what: &str, is_so: impl Fn(&Heard) -> bool) -> Result<Heard> {
        let found = || self.state().heard.iter().skip(after).find(|heard| is_so(heard)).cloned();
        self.until(found).await.with_context(|| {
            let heard = self.heard();
            format!("no report after {PATIENCE:?}: {what}; {} came, the last: {:#?}", heard.len(), heard.last())
        })
    }

    /// The next report, after so many.
    pub async fn next(&self, after: usize) -> Result<Heard> {
        self.hears(after, "any", |_| true).await
    }

    /// Waits until so many tried to connect.
    pub async fn tried(&self, times: usize) -> Result<()> {
        let tried = || (self.state().tries.len() >= times).then_some(());
        self.until(tried).await.with_context(|| format!("{times} tries, but {:?}", self.tries()))
    }

    async fn until<T>(&self, mut found: impl FnMut() -> Option<T>) -> Option<T> {
        let mut news = self.shared.news.subscribe();
        let wait = async {
            loop {
                news.mark_unchanged();
                if let Some(found) = found() {
                    return Some(found);
                }
                news.changed().await.ok()?;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.ok().flatten()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

fn send(state: &mut State, directive: Directive) -> Result<()> {
    state.open.retain(|open| !open.is_closed());
    ensure!(!state.open.is_empty(), "nobody is connected");
    for open in &state.open {
        open.try_send(Ok(directive.clone())).context("more is said than is heard")?;
    }
    Ok(())
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(listener: TcpListener, tls: Option<Arc<ServerConfig>>, shared: Arc<Shared>) {
    // Connections end with this task: they are its own.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), shared.clone());
        connections.spawn(async move {
            match tls {
                // Who does not trust the certificate goes away.
                Some(config) => {
                    if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                        speak(stream, shared).await;
                    }
                }
                None => speak(stream, shared).await,
            }
        });
    }
}

async fn speak(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let server = ReportsServer::new(Hearer(shared));
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| server.clone().oneshot(request));
    let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

#[derive(Clone)]
struct Hearer(Arc<Shared>);

#[tonic::async_trait]
impl Reports for Hearer {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<Directive, Status>> + Send>>;

    async fn stream(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::StreamStream>, Status> {
        let shared = self.0.clone();
        let (sender, receiver) = mpsc::channel(SAYINGS);
        let (number, reads) = {
            let mut state = shared.state();
            let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
            let token = token.map(ToOwned::to_owned);
            let is_taken = state.wanted.is_none() || state.wanted == token;
            state.tries.push(token);
            if !is_taken {
                let refusal = (state.refusal)();
                drop(state);
                shared.news.send_replace(());
                return Err(refusal);
            }
            state.open.push(sender.clone());
            (state.tries.len() as u64, state.reads.subscribe())
        };
        shared.news.send_replace(());
        tokio::spawn(hear(shared, request.into_inner(), number, reads, sender.downgrade()));
        let said = stream::unfold(receiver, |mut said| async { said.recv().await.map(|next| (next, said)) });
        Ok(Response::new(said.boxed()))
    }
}

async fn hear(
    shared: Arc<Shared>,
    mut reports: Streaming<Report>,
    stream: u64,
    mut reads: watch::Receiver<bool>,
    sender: mpsc::WeakSender<Result<Directive, Status>>,
) {
    // An error of the first is that nobody is left, of the second that the stream broke.
    while reads.wait_for(|reads| *reads).await.is_ok()
        && let Ok(Some(report)) = reports.message().await
    {
        let accepted = report.sequence;
        let answers = {
            let mut state = shared.state();
            state.heard.push(Heard { stream, at: Instant::now(), report });
            state.answers
        };
        shared.news.send_replace(());
        let answer = Directive { accepted, ..Directive::default() };
        if let Some(sender) = sender.upgrade().filter(|_| answers)
            && sender.send(Ok(answer)).await.is_err()
        {
            return;
        }
    }
}
