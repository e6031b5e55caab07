//! What the API server has of this agent: its own pod, on which a lease is written.
//!
//! Written by server-side apply and never by force: an annotation that somebody else set belongs to him, and the
//! API server itself says so. Not here: how long the lease is.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;

use super::lease::Written;
use crate::config;
use crate::kubernetes::{Connected, connect};
use crate::log::chain;

/// Karpenter's. A duration counts from `status.startTime` of the pod; it lapses without anybody's doing.
const ANNOTATION: &str = "karpenter.sh/do-not-disrupt";
/// Whose the annotation is, for the API server.
const MANAGER: &str = "darter-agent";

/// What was not done, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// For the metric.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) detail: String,
    /// Trying again may help.
    pub(super) may_pass: bool,
}

impl Fault {
    const fn new(reason: &'static str, detail: String) -> Self {
        Self { reason, detail, may_pass: true }
    }

    fn of(error: &kube::Error, pod: &str) -> Self {
        let text = chain(error).to_string();
        match error {
            kube::Error::Api(status) => match status.code {
                401 => Self::new("unauthorized", text),
                403 => {
                    Self::new("forbidden", format!("this service account needs get and patch of the pod {pod}: {text}"))
                }
                404 => Self::new("no_pod", format!("is kubernetes.pod the name of the agent's own pod? {text}")),
                409 => {
                    let detail =
                        format!("{ANNOTATION} of the pod {pod} is somebody else's, and stays as it is: {text}");
                    Self { may_pass: false, ..Self::new("not_ours", detail) }
                }
                _ => Self::new("api", text),
            },
            _ => Self::new("unreachable", text),
        }
    }
}

/// The agent's own pod.
pub(super) struct OwnPod {
    name: String,
    kubeconfig: Option<PathBuf>,
    /// Where it is, once the credentials said so.
    namespace: watch::Sender<Option<String>>,
    found: Option<Found>,
}

struct Found {
    api: Api<Pod>,
    /// A name may be used again, a uid is not.
    uid: String,
    started: SystemTime,
    /// The annotation as it was found, if an agent wrote it.
    written: Option<String>,
}

/// A lease that an earlier life of the agent left on its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Left {
    /// When its row began.
    pub(super) began: Instant,
    pub(super) until: Instant,
}

impl OwnPod {
    /// As configured, if it is.
    pub(super) fn new(settings: &config::Kubernetes, namespace: watch::Sender<Option<String>>) -> Option<Self> {
        let (name, kubeconfig) = (settings.pod.clone()?, settings.kubeconfig.clone());
        Some(Self { name, kubeconfig, namespace, found: None })
    }

    /// What an earlier life left there. To be asked for before anything is written.
    pub(super) async fn left(&mut self) -> Result<Option<Left>, Fault> {
        let Found { started, written, .. } = self.find().await?;
        let Some(text) = written else { return Ok(None) };
        let (now, age) = (Instant::now(), SystemTime::now().duration_since(*started).unwrap_or_default());
        // What no agent of this kind wrote under our name is over now. Times before the machine's first are now.
        let left = Written::read(text).map_or(Left { began: now, until: now }, |Written { began, length }| Left {
            began: at(now, age, began),
            until: at(now, age, began.saturating_add(length)),
        });
        Ok(Some(left))
    }

    /// Has it protected until then, in a row of leases that began there.
    pub(super) async fn protect(&mut self, began: Instant, until: Instant) -> Result<(), Fault> {
        let started = self.find().await?.started;
        let (now, age) = (Instant::now(), SystemTime::now().duration_since(started).unwrap_or_default());
        let began = age.saturating_sub(now.saturating_duration_since(began));
        let written = Written::new(began, age + until.saturating_duration_since(now));
        self.apply(Some(&written.to_string())).await
    }

    /// Takes the annotation back, if it is ours.
    pub(super) async fn release(&mut self) -> Result<(), Fault> {
        self.apply(None).await
    }

    /// What this agent says of it. What is not said any more, the API server removes.
    async fn apply(&mut self, value: Option<&str>) -> Result<(), Fault> {
        let name = self.name.clone();
        let Found { api, uid, .. } = self.find().await?;
        let mut metadata = json!({ "name": name, "uid": uid });
        if let Some(value) = value {
            metadata["annotations"] = json!({ ANNOTATION: value });
        }
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata });
        let applied = api.patch_metadata(&name, &PatchParams::apply(MANAGER), &Patch::Apply(pod)).await;
        applied.map(|_| ()).map_err(|error| {
            // A token may have been renewed, a server replaced.
            self.found = None;
            Fault::of(&error, &name)
        })
    }

    async fn find(&mut self) -> Result<&Found, Fault> {
        let found = match self.found.take() {
            Some(found) => found,
            None => self.look().await?,
        };
        Ok(self.found.insert(found))
    }

    async fn look(&self) -> Result<Found, Fault> {
        let name = &self.name;
        let Connected { client, namespace, .. } = connected(self.kubeconfig.as_deref()).await?;
        self.namespace.send_if_modified(|known| {
            let is_news = known.as_ref() != Some(&namespace);
            *known = Some(namespace.clone());
            is_news
        });
        let api = Api::<Pod>::namespaced(client, &namespace);
        let pod = api.get(name).await.map_err(|error| Fault::of(&error, name))?;
        let written = written(&pod.metadata);
        let lacks = |what| Fault::new("api", format!("the pod {name} has no {what} yet"));
        let uid = pod.metadata.uid.ok_or_else(|| lacks("uid"))?;
        let started = pod.status.and_then(|status| status.start_time).ok_or_else(|| lacks("status.startTime"))?;
        Ok(Found { api, uid, started: started.0.into(), written })
    }
}

/// The moment when the pod, which has this age now, has that one.
fn at(now: Instant, age: Duration, then: Duration) -> Instant {
    let moment = match then.checked_sub(age) {
        Some(later) => now.checked_add(later),
        None => now.checked_sub(age.saturating_sub(then)),
    };
    moment.unwrap_or(now)
}

/// The annotation, if it is an agent's by the API server's own books.
fn written(metadata: &ObjectMeta) -> Option<String> {
    let ours = metadata.managed_fields.iter().flatten().any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0["f:metadata"]["f:annotations"]);
        entry.manager.as_deref() == Some(MANAGER)
            && entry.operation.as_deref() == Some("Apply")
            && fields.is_some_and(|fields| fields.get(format!("f:{ANNOTATION}")).is_some())
    });
    metadata.annotations.as_ref()?.get(ANNOTATION).filter(|_| ours).cloned()
}

async fn connected(kubeconfig: Option<&std::path::Path>) -> Result<Connected, Fault> {
    connect(kubeconfig).await.map_err(|reason| Fault::new("credentials", reason))
}
