//! How this node watches something at a Kubernetes API server, or asks it: with which credential, how patiently,
//! and what is said when it does not work. Not here: what is watched there, and what follows from it.

use std::fmt::Debug;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Status;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Config, Resource};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tower::{BoxError, Service};
use tracing::warn;

use crate::log::chain;
use crate::metrics::ReasonLabels;

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

/// What is watched.
pub struct Watch<K> {
    pub api: Api<K>,
    pub config: watcher::Config,
    /// What the service account has to be allowed, for people.
    pub rights: String,
}

/// What a watch tells.
pub enum Told<K> {
    /// That it is accepted: at first, and again after trouble.
    Works,
    Event(watcher::Event<K>),
}

/// Watches for ever, as the user of `kubeconfig`, or without one as every pod is told; credentials are read anew
/// when they fail. `watch` is given a client and the namespace of this pod, or of the kubeconfig's context. Each
/// change is said by `teller`.
pub async fn follow<K>(
    kubeconfig: Option<&Path>,
    mut teller: Teller<'_>,
    watch: impl Fn(Client, String) -> Watch<K>,
    mut tell: impl FnMut(Told<K>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    loop {
        match connect(kubeconfig).await {
            Ok(Connected { client, namespace, heard }) => {
                until_stale(watch(client, namespace), &heard, &mut teller, &mut tell).await;
            }
            Err(reason) => teller.fails("credentials", &reason),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Watches until credentials should be read anew.
async fn until_stale<K>(watch: Watch<K>, heard: &Notify, teller: &mut Teller<'_>, tell: &mut impl FnMut(Told<K>))
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let Watch { api, config, rights } = watch;
    // What the API server has in memory is new enough, and costs etcd nothing when all nodes boot.
    let mut events = pin!(watcher(api, config.any_semantic()).default_backoff());
    loop {
        let event = tokio::select! {
            // In this order: that it answers is said before what it says, and an error after both.
            biased;
            () = heard.notified() => {
                if teller.works() {
                    tell(Told::Works);
                }
                continue;
            }
            event = events.try_next() => event,
        };
        match event {
            Ok(Some(event)) => tell(Told::Event(event)),
            Ok(None) => return,
            Err(error) => {
                if teller.met(&error, &rights) {
                    return;
                }
            }
        }
    }
}

/// A client that has asked nobody anything yet.
pub struct Connected {
    pub client: Client,
    pub namespace: String,
    /// A watch was accepted.
    heard: Arc<Notify>,
}

/// Reads credentials: those of a kubeconfig, else those that every pod is given.
///
/// # Errors
/// Why there are none, for people.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Connected, String> {
    let mut config = match kubeconfig {
        Some(path) => read(path).await?,
        None => Config::incluster().map_err(|error| {
            format!(
                "this is no pod of a cluster, or its service account is not mounted \
                (automountServiceAccountToken); elsewhere set kubernetes.kubeconfig: {}",
                chain(&error)
            )
        })?,
    };
    config.connect_timeout = Some(CONNECT_PATIENCE);
    config.read_timeout = Some(SILENCE_MAX);
    // What the connection was idle before does not count.
    config.reset_reader_on_write = true;
    // A watch has pauses of its own, and wants to hear of errors.
    config.default_retry = false;
    let namespace = config.default_namespace.trim().to_owned();
    let heard = Arc::new(Notify::new());
    let builder = ClientBuilder::try_from(config)
        .map_err(|error| format!("cannot use what says where the API server is: {}", chain(&error)))?;
    let layer = tower::layer::layer_fn(|inner| Patient { inner, heard: heard.clone() });
    Ok(Connected { client: builder.with_layer(&layer).build(), namespace, heard })
}

async fn read(path: &Path) -> Result<Config, String> {
    let wrong = |error: kube::config::KubeconfigError| {
        format!("cannot use {} (kubernetes.kubeconfig): {}", path.display(), chain(&error))
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

/// A word for the metric, and what the operator should know; `rights` is what the service account has to
/// be allowed. None: nothing is wrong.
fn trouble(error: &watcher::Error, rights: &str) -> Option<(&'static str, String)> {
    match error {
        watcher::Error::WatchError(status) => refused(status, rights),
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => refusal(error, rights),
        watcher::Error::NoResourceVersion => Some(("answer", error.to_string())),
    }
}

/// The same of a question.
pub fn refusal(error: &kube::Error, rights: &str) -> Option<(&'static str, String)> {
    match error {
        kube::Error::Api(status) => refused(status, rights),
        kube::Error::Auth(_) => Some(("credentials", chain(error).to_string())),
        kube::Error::Service(error) => Some(("unreachable", chain(error.as_ref()).to_string())),
        kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => Some(("unreachable", chain(error).to_string())),
        _ => Some(("answer", chain(error).to_string())),
    }
}

fn refused(status: &Status, rights: &str) -> Option<(&'static str, String)> {
    let Status { code, message, .. } = status;
    match code {
        // Too much has happened since: all is listed again.
        410 => None,
        401 => Some(("unauthorized", format!("the API server does not accept the token or certificate: {message}"))),
        // RBAC gave the right, and a policy or a webhook does not want this one thing done. 422: one that names no
        // reason.
        403 | 422 if message.contains("denied request") || message.contains("denied the request") => {
            Some(("forbidden", format!("an admission policy does not let it: {message}")))
        }
        403 => Some(("forbidden", format!("this service account needs {rights}: {message}"))),
        404 => Some(("not_found", message.clone())),
        409 => Some(("conflict", message.clone())),
        422 => Some(("invalid", format!("the API server does not take it: {message}"))),
        429 => Some(("throttled", format!("the API server has too much to do: {message}"))),
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

/// Says each change of a watch once, and counts every error.
pub struct Teller<'a> {
    /// What cannot be watched, and what that means.
    trouble: String,
    errors: &'a Family<ReasonLabels, Counter>,
    said: Said,
    /// Since when nothing worked.
    since: Option<Instant>,
}

impl<'a> Teller<'a> {
    /// Of a watch that was not tried yet. `trouble` is the sentence to say when it fails.
    pub const fn new(trouble: String, errors: &'a Family<ReasonLabels, Counter>) -> Self {
        Self { trouble, errors, said: Said::Nothing, since: None }
    }

    /// It works. Whether that is news.
    pub fn works(&mut self) -> bool {
        self.since = None;
        std::mem::replace(&mut self.said, Said::Works) != Said::Works
    }

    /// It does not, for a reason: a word for the metric, and a sentence.
    pub fn fails(&mut self, reason: &'static str, text: &str) {
        self.errors.get_or_create(&ReasonLabels { reason }).inc();
        self.since.get_or_insert_with(Instant::now);
        if std::mem::replace(&mut self.said, Said::Fails(reason)) != Said::Fails(reason) {
            warn!(reason = text, "{}", self.trouble);
        }
    }

    /// The watch met an error. Whether credentials should be read anew.
    fn met(&mut self, error: &watcher::Error, rights: &str) -> bool {
        let Some((reason, text)) = trouble(error, rights) else { return false };
        self.fails(reason, &text);
        reason == "unauthorized" || self.since.is_some_and(|since| since.elapsed() > FAILING_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once_and_every_error_counted() {
        let errors = Family::default();
        let mut teller = Teller::new("cannot watch".to_owned(), &errors);
        teller.fails("unreachable", "refused");
        let since = teller.since.unwrap();
        teller.fails("unreachable", "timed out");
        assert_eq!((teller.said, teller.since), (Said::Fails("unreachable"), Some(since)));
        assert!(teller.works() && !teller.works());
        assert_eq!((teller.said, teller.since), (Said::Works, None));
        assert_eq!(errors.get_or_create(&ReasonLabels { reason: "unreachable" }).get(), 2);
    }

    #[test]
    fn a_list_that_is_too_old_is_no_trouble_and_a_refusal_names_the_way_out() {
        let status = |code| Status { code, message: "says the server".to_owned(), ..Status::default() };
        let told = |code| trouble(&watcher::Error::WatchError(Box::new(status(code))), "a Role for nodes");
        assert_eq!(told(410), None);
        let (reason, text) = told(403).unwrap();
        assert!(reason == "forbidden" && text.contains("needs a Role for nodes"), "{text}");
        for message in [
            "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
            "webhook \"w\" denied the request: no",
        ] {
            for code in [403, 422] {
                let status = Status { message: message.to_owned(), ..status(code) };
                let (reason, text) = refused(&status, "a Role for nodes").unwrap();
                assert!(reason == "forbidden" && text.ends_with(message) && !text.contains("a Role"), "{text}");
            }
        }
        assert_eq!(told(401).unwrap().0, "unauthorized");
        assert_eq!(
            [404, 409, 422, 429].map(|code| told(code).unwrap().0),
            ["not_found", "conflict", "invalid", "throttled"]
        );
        assert_eq!(told(500), Some(("answer", "500: says the server".to_owned())));
    }
}
