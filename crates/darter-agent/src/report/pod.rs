//! What the API server has of this agent: its own pod, on which a lease is written, and its node's identity.
//!
//! Written by server-side apply and never by force: an annotation that somebody else set belongs to him, and the
//! API server itself says so. Not here: how long the lease is.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tracing::debug;

use super::lease::go_duration;
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
    found: Option<Found>,
}

struct Found {
    api: Api<Pod>,
    /// A name may be used again, a uid is not.
    uid: String,
    started: SystemTime,
}

impl OwnPod {
    /// As configured, if it is.
    pub(super) fn new(settings: &config::Kubernetes) -> Option<Self> {
        let (name, kubeconfig) = (settings.pod.clone()?, settings.kubeconfig.clone());
        Some(Self { name, kubeconfig, found: None })
    }

    /// Has it protected until then.
    pub(super) async fn protect(&mut self, until: Instant) -> Result<(), Fault> {
        let started = self.find().await?.started;
        let age = SystemTime::now().duration_since(started).unwrap_or_default();
        let value = go_duration(age + until.saturating_duration_since(Instant::now()));
        self.apply(Some(&value)).await
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
        let api = Api::<Pod>::namespaced(client, &namespace);
        let pod = api.get(name).await.map_err(|error| Fault::of(&error, name))?;
        let lacks = |what| Fault::new("api", format!("the pod {name} has no {what} yet"));
        let uid = pod.metadata.uid.ok_or_else(|| lacks("uid"))?;
        let started = pod.status.and_then(|status| status.start_time).ok_or_else(|| lacks("status.startTime"))?;
        Ok(Found { api, uid, started: started.0.into() })
    }
}

async fn connected(kubeconfig: Option<&std::path::Path>) -> Result<Connected, Fault> {
    connect(kubeconfig).await.map_err(|reason| Fault::new("credentials", reason))
}

/// What the API server says of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Identity {
    /// metadata.uid.
    pub(super) uid: Option<String>,
    /// spec.providerID.
    pub(super) provider_id: Option<String>,
    /// Of the agent's credentials.
    pub(super) namespace: Option<String>,
}

/// Between two questions that were not answered, doubled each time.
const ASK_AGAIN_MIN: Duration = Duration::from_secs(1);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(60);

/// Asks until it is known. A pod does not outlive its node, so once is enough.
pub(super) async fn identify(settings: &config::Kubernetes) -> Identity {
    let mut wait = ASK_AGAIN_MIN;
    loop {
        match ask(settings).await {
            Ok(identity) => return identity,
            // What cannot be asked is not told: the log has it from those who watch there.
            Err(Fault { reason, detail, .. }) => {
                debug!(reason, detail, "who this node is for the API server is not known")
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(ASK_AGAIN_MAX);
    }
}

async fn ask(settings: &config::Kubernetes) -> Result<Identity, Fault> {
    let Connected { client, namespace, .. } = connected(settings.kubeconfig.as_deref()).await?;
    let (uid, provider_id) = match &settings.node {
        Some(name) => node(client, name).await?,
        None => (None, None),
    };
    Ok(Identity { uid, provider_id, namespace: Some(namespace) })
}

async fn node(client: Client, name: &str) -> Result<(Option<String>, Option<String>), Fault> {
    let node = Api::<Node>::all(client).get(name).await;
    let node = node.map_err(|error| Fault::new("api", format!("node {name}: {}", chain(&error))))?;
    Ok((node.metadata.uid, node.spec.and_then(|spec| spec.provider_id)))
}
