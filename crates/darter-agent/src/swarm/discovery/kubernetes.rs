//! The EndpointSlices of one Service, watched: where all agents are, within a second.
//!
//! One LIST, then a WATCH that goes on where it broke off. Addresses stay while the API server is
//! away, and a file has them for the next start, so that nothing ever waits for an API server.
//! Not here: which endpoints count (`slices`).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Status;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Config};
use tokio::sync::{Notify, watch};
use tower::{BoxError, Service};
use tracing::{info, warn};

use super::remembered::Remembered;
use super::slices::{Slices, Wanted};
use super::{ServiceName, ServicePort, replace};
use crate::log::chain;
use crate::metrics::{Metrics, ReasonLabels};

/// A connection takes so long, or it is not to be had.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Response headers come by then. A busy API server lets a request wait, a dead one for ever.
const HEADER_PATIENCE: Duration = Duration::from_secs(30);
/// A response that says nothing for so long has broken off. A watch, which the server ends after
/// 290 s, may be that silent.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Credentials are read anew after so long without success: a kubeconfig may have been replaced.
const FAILING_MAX: Duration = Duration::from_secs(60);
/// And not before this.
const AGAIN: Duration = Duration::from_secs(5);

/// What is watched, and how.
#[derive(Debug, Clone)]
pub struct ServiceWatch {
    /// The Service whose endpoints are the agents.
    pub service: ServiceName,
    /// The port of their control planes.
    pub port: ServicePort,
    /// Whether they listen on IPv6, else on IPv4.
    pub is_ipv6: bool,
    /// Where the API server is and who asks it; none: as every pod is told.
    pub kubeconfig: Option<PathBuf>,
    /// Where the last membership is kept.
    pub file: PathBuf,
    /// Addresses at most.
    pub max: usize,
    /// Where errors are counted.
    pub metrics: Arc<Metrics>,
}

impl ServiceWatch {
    /// Keeps `found` up to date. Never ends.
    pub(super) async fn run(self, found: watch::Sender<BTreeSet<SocketAddr>>) {
        let remembered = Remembered::new(&self.file, &self.service);
        replace(&found, remembered.read().await.into_iter().take(self.max).collect());
        tokio::join!(remembered.follow(found.subscribe()), self.follow(&found));
    }

    async fn follow(&self, found: &watch::Sender<BTreeSet<SocketAddr>>) {
        let mut teller = Teller { service: &self.service, metrics: &self.metrics, said: Said::Nothing, since: None };
        loop {
            match self.connect().await {
                Ok(connected) => self.watch(connected, &mut teller, found).await,
                Err(reason) => teller.fails("credentials", reason),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Reads credentials. Asks nobody anything yet.
    async fn connect(&self) -> Result<Connected, String> {
        let mut config = match &self.kubeconfig {
            Some(path) => kubeconfig(path).await?,
            None => Config::incluster().map_err(|error| {
                format!(
                    "this is no pod of a cluster, or its service account is not mounted \
                    (automountServiceAccountToken); elsewhere set swarm.kubeconfig: {}",
                    chain(&error)
                )
            })?,
        };
        config.connect_timeout = Some(CONNECT_PATIENCE);
        config.read_timeout = Some(SILENCE_MAX);
        // What the connection was idle before does not count.
        config.reset_reader_on_write = true;
        // The watch has pauses of its own, and wants to hear of errors.
        config.default_retry = false;
        let namespace = self.service.namespace.clone().unwrap_or_else(|| config.default_namespace.trim().to_owned());
        let heard = Arc::new(Notify::new());
        let builder = ClientBuilder::try_from(config)
            .map_err(|error| format!("cannot use what says where the API server is: {}", chain(&error)))?;
        let layer = tower::layer::layer_fn(|inner| Patient { inner, heard: heard.clone() });
        Ok(Connected { client: builder.with_layer(&layer).build(), namespace, heard })
    }

    /// Until credentials should be read anew.
    async fn watch(&self, connected: Connected, teller: &mut Teller<'_>, found: &watch::Sender<BTreeSet<SocketAddr>>) {
        let Connected { client, namespace, heard } = connected;
        let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
        let label = format!("kubernetes.io/service-name={}", self.service.name);
        // What the API server has in memory is new enough, and costs etcd nothing when all nodes boot.
        let config = watcher::Config::default().labels(&label).any_semantic();
        let mut events = pin!(watcher(api, config).default_backoff());
        let mut slices = Slices::new(Wanted { port: self.port.clone(), is_ipv6: self.is_ipv6 }, self.max);
        loop {
            let event = tokio::select! {
                // In this order: that it answers is said before what it says, and an error after both.
                biased;
                () = heard.notified() => {
                    teller.works(found.borrow().len());
                    continue;
                }
                event = events.try_next() => event,
            };
            match event {
                Ok(Some(event)) => {
                    if slices.on(event) {
                        replace(found, slices.addresses().into_iter().take(self.max).collect());
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let Some((reason, text)) = trouble(&error, &namespace) else { continue };
                    teller.fails(reason, text);
                    if reason == "unauthorized" || teller.since.is_some_and(|since| since.elapsed() > FAILING_MAX) {
                        return;
                    }
                }
            }
        }
    }
}

struct Connected {
    client: Client,
    namespace: String,
    /// A watch was accepted.
    heard: Arc<Notify>,
}

async fn kubeconfig(path: &Path) -> Result<Config, String> {
    let wrong = |error: kube::config::KubeconfigError| {
        format!("cannot use {} (swarm.kubeconfig): {}", path.display(), chain(&error))
    };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)
}

/// Gives up on a server that does not answer, and tells when a watch begins: the watcher itself is
/// silent until something changes.
#[derive(Clone)]
struct Patient<S> {
    inner: S,
    heard: Arc<Notify>,
}

impl<S, B> Service<Request<Body>> for Patient<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<B>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        let answer = tokio::time::timeout(HEADER_PATIENCE, self.inner.call(request));
        let heard = self.heard.clone();
        Box::pin(async move {
            let late = |_| format!("no answer within {} s", HEADER_PATIENCE.as_secs());
            let response = answer.await.map_err(late)??;
            if is_watch && response.status().is_success() {
                heard.notify_one();
            }
            Ok(response)
        })
    }
}

/// A word for the metric, and what the operator should know. None: nothing is wrong.
fn trouble(error: &watcher::Error, namespace: &str) -> Option<(&'static str, String)> {
    match error {
        watcher::Error::WatchError(status) => refused(status, namespace),
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => match error {
            kube::Error::Api(status) => refused(status, namespace),
            kube::Error::Auth(_) => Some(("credentials", chain(error).to_string())),
            kube::Error::Service(error) => Some(("unreachable", chain(error.as_ref()).to_string())),
            kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => Some(("unreachable", chain(error).to_string())),
            _ => Some(("answer", chain(error).to_string())),
        },
        watcher::Error::NoResourceVersion => Some(("answer", error.to_string())),
    }
}

fn refused(status: &Status, namespace: &str) -> Option<(&'static str, String)> {
    let Status { code, message, .. } = status;
    match code {
        // Too much has happened since: all is listed again.
        410 => None,
        401 => Some(("unauthorized", format!("the API server does not accept the token or certificate: {message}"))),
        403 => {
            let advice = format!(
                "this service account needs a Role that lets it get, list and watch endpointslices \
                (discovery.k8s.io) in namespace {namespace}: {message}"
            );
            Some(("forbidden", advice))
        }
        code => Some(("answer", format!("{code}: {message}"))),
    }
}

/// What the log said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    Works,
    Fails(&'static str),
}

/// Says each change once, and counts every error.
struct Teller<'a> {
    service: &'a ServiceName,
    metrics: &'a Metrics,
    said: Said,
    /// Since when nothing worked.
    since: Option<Instant>,
}

impl Teller<'_> {
    fn works(&mut self, addresses: usize) {
        self.since = None;
        if std::mem::replace(&mut self.said, Said::Works) == Said::Works {
            return;
        }
        if addresses == 0 {
            warn!(service = %self.service, "watching the EndpointSlices of this Service, and no agent is in them; \
                if that stays so: is there such a Service, does it select the agents, is swarm.endpoint_port right?");
        } else {
            info!(service = %self.service, addresses, "watching the EndpointSlices of this Service");
        }
    }

    fn fails(&mut self, reason: &'static str, text: String) {
        self.metrics.swarm_watch_errors.get_or_create(&ReasonLabels { reason }).inc();
        self.since.get_or_insert_with(Instant::now);
        if std::mem::replace(&mut self.said, Said::Fails(reason)) != Said::Fails(reason) {
            warn!(service = %self.service, reason = text, "cannot watch the EndpointSlices of this Service; the \
                addresses known before stay");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once_and_every_error_counted() {
        let metrics = Metrics::new("0", "none");
        let service: ServiceName = "gpu/darter".parse().unwrap();
        let mut teller = Teller { service: &service, metrics: &metrics, said: Said::Nothing, since: None };
        teller.fails("unreachable", "refused".to_owned());
        let since = teller.since.unwrap();
        teller.fails("unreachable", "timed out".to_owned());
        assert_eq!((teller.said, teller.since), (Said::Fails("unreachable"), Some(since)));
        teller.works(1);
        assert_eq!((teller.said, teller.since), (Said::Works, None));
        let count = metrics.swarm_watch_errors.get_or_create(&ReasonLabels { reason: "unreachable" }).get();
        assert_eq!(count, 2);
    }

    #[test]
    fn a_list_that_is_too_old_is_no_trouble_and_a_refusal_names_the_way_out() {
        let status = |code| Status { code, message: "says the server".to_owned(), ..Status::default() };
        let told = |code| trouble(&watcher::Error::WatchError(Box::new(status(code))), "gpu");
        assert_eq!(told(410), None);
        let (reason, text) = told(403).unwrap();
        assert!(
            reason == "forbidden" && text.contains("list and watch endpointslices") && text.contains("gpu"),
            "{text}"
        );
        assert_eq!(told(401).unwrap().0, "unauthorized");
        assert_eq!(told(500), Some(("answer", "500: says the server".to_owned())));
    }
}
