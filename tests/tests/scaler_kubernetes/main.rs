//! The scaler's side of Kubernetes, at a real kube-apiserver: who leads, whose a token is, what is watched, what is
//! written and taken back. The kinds are Karpenter's and KEDA's own; neither runs, and there is no controller.

mod actuators;
mod election;
mod live;
mod removal;
mod review;
mod side;
mod spare;
mod undo;
mod watch;
mod watch_trouble;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use darter_base::kubernetes::connect;
use darter_scaler::fleet::{Act, Done};
use darter_scaler::kubernetes::{Actuators, Events, Metrics, Settings, write_events};
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::tools::{self, Need};
use http::Method;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What most of these need.
const NEEDS: [Need; 3] = [Need::Kubernetes, Need::KarpenterKinds, Need::KedaKinds];

const KARPENTER: [&str; 2] = ["karpenter.sh_nodeclaims.yaml", "karpenter.sh_nodepools.yaml"];
const BUFFERS: [&str; 1] = ["autoscaling.x-k8s.io_capacitybuffers.yaml"];
const KEDA: [&str; 1] = ["keda.sh_scaledobjects.yaml"];

/// What the scaler may do everywhere, and nothing more.
fn everywhere() -> Value {
    json!([
        { "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch"] },
        { "apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["list", "watch"] },
        { "apiGroups": ["karpenter.sh"], "resources": ["nodeclaims"], "verbs": ["get", "list", "watch", "delete"] },
        { "apiGroups": ["karpenter.sh"], "resources": ["nodepools"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": ["karpenter.sh"], "resources": ["nodepools/scale"], "verbs": ["get", "patch"] },
        { "apiGroups": ["keda.sh"], "resources": ["scaledobjects"], "verbs": ["list", "watch"] },
        { "apiGroups": ["policy"], "resources": ["poddisruptionbudgets"], "verbs": ["list"] },
        { "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"] },
        { "apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"] },
        { "apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"] },
    ])
}

/// And in its own namespace.
fn at_home() -> Value {
    json!([
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"] },
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": ["darter-scaler"],
            "verbs": ["get", "update"] },
        { "apiGroups": ["autoscaling.x-k8s.io"], "resources": ["capacitybuffers"], "verbs": ["list", "patch"] },
        { "apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "patch"] },
        { "apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"] },
        { "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["darter-scaler-before"],
            "verbs": ["get", "patch"] },
    ])
}

/// A cluster with a scaler's account in namespace gpu, and a namespace team.
struct Cluster {
    plane: ControlPlane,
    token: String,
    settings: Settings,
}

impl Cluster {
    /// With these kinds of others.
    async fn start(karpenter: &[&str], keda: &[&str]) -> Result<Self> {
        let plane = ControlPlane::start(&Place::Host).await?;
        for namespace in ["gpu", "team"] {
            plane.namespace(namespace).await?;
        }
        // As a controller makes it, which is not here: without one no pod is made.
        plane.service_account("team", "default").await?;
        plane.define(&tools::karpenter_kinds().context("no kinds of Karpenter")?, karpenter).await?;
        plane.define(&tools::keda_kinds().context("no kinds of KEDA")?, keda).await?;
        let token = plane.service_account("gpu", "darter-scaler").await?;
        plane.allow_everywhere("gpu", "darter-scaler", &everywhere()).await?;
        plane.allow("gpu", "darter-scaler", &at_home()).await?;
        let kubeconfig = plane.kubeconfig("gpu", &token)?;
        let settings = Settings { kubeconfig: Some(kubeconfig), look_again_ms: 100, ..Settings::default() };
        Ok(Self { plane, token, settings })
    }

    fn kubeconfig(&self) -> Result<PathBuf> {
        self.settings.kubeconfig.clone().context("no kubeconfig")
    }

    /// A client of the scaler's account.
    async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig()?).await
    }

    /// A token of an account in namespace gpu, for an audience, bound to a pod or to none.
    async fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        let mut spec = json!({ "audiences": [audience] });
        if let Some(name) = pod {
            let pod = self.get(&format!("/api/v1/namespaces/gpu/pods/{name}")).await?;
            spec["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Pod", "name": name,
                "uid": pod["metadata"]["uid"] });
        }
        let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
        let path = format!("/api/v1/namespaces/gpu/serviceaccounts/{account}/token");
        let answer = self.plane.call(Method::POST, &path, Some(("application/json", &request))).await?;
        Ok(answer["status"]["token"].as_str().context("no token")?.to_owned())
    }

    /// A pod of this account on a node, as of a DaemonSet of agents.
    async fn agent(&self, name: &str, account: &str, node: &str) -> Result<()> {
        let spec = json!({ "serviceAccountName": account, "automountServiceAccountToken": false,
            "nodeName": node, "containers": [{ "name": "c", "image": "i" }] });
        let metadata = json!({ "namespace": "gpu", "name": name });
        self.plane.apply(&json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec })).await?;
        Ok(())
    }

    async fn get(&self, path: &str) -> Result<Value> {
        self.plane.call(Method::GET, path, None).await
    }

    /// Changes the status of an object.
    async fn status(&self, object: &Value, status: Value) -> Result<()> {
        let path = format!("{}/status", darter_tests::kubernetes::path(object)?);
        let body = json!({ "status": status });
        self.plane.call(Method::PATCH, &path, Some(("application/merge-patch+json", &body))).await?;
        Ok(())
    }

    /// Events with this reason: what they are about, and what they say.
    async fn events(&self, namespace: &str, reason: &str) -> Result<Vec<(String, String)>> {
        let list = self.get(&format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events")).await?;
        let events = list["items"].as_array().context("no list")?.iter().filter(|event| event["reason"] == reason);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(events.map(|event| (text(&event["regarding"]["name"]), text(&event["note"]))).collect())
    }
}

async fn client(kubeconfig: &std::path::Path) -> Result<Client> {
    Ok(connect(Some(kubeconfig)).await.map_err(anyhow::Error::msg)?.client)
}

/// Actuators that run, and the ends of their queues.
struct Hands {
    acts: mpsc::Sender<Act>,
    done: mpsc::Receiver<Done>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

impl Hands {
    /// By this client, fenced or not.
    fn start(client: &Client, settings: &Settings) -> Self {
        let (acts, to_do) = mpsc::channel(16);
        let (answers, done) = mpsc::channel(16);
        let (metrics, stop) = (Arc::new(Metrics::default()), CancellationToken::new());
        let (events, said) = Events::new(metrics.clone());
        let actuators = Actuators::new(client.clone(), settings, metrics.clone(), events);
        tokio::spawn(actuators.run(to_do, answers, stop.clone()));
        tokio::spawn({
            let (client, metrics) = (client.clone(), metrics.clone());
            async move { write_events(client, "a-test", said, &metrics).await }
        });
        Self { acts, done, metrics, stop }
    }

    /// Does it, and says what came of it.
    async fn act(&mut self, act: Act) -> Result<darter_scaler::fleet::Outcome> {
        let action = act.action.clone();
        self.acts.send(act).await?;
        let done = self.done.recv().await.context("nobody acts")?;
        anyhow::ensure!(done.action == action, "{done:?} is no answer to {action:?}");
        Ok(done.outcome)
    }

    /// How many writes failed for this reason.
    fn errors(&self, reason: &'static str) -> u64 {
        self.metrics.write_errors.get_or_create(&darter_base::metrics::ReasonLabels { reason }).get()
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn node(name: &str) -> Value {
    let labels = json!({ "karpenter.sh/nodepool": "gpu", "topology.kubernetes.io/zone": "a" });
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels } })
}

fn claim(name: &str) -> Value {
    let reference = json!({ "group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "gpu" });
    let spec = json!({ "nodeClassRef": reference, "requirements": [],
        "resources": { "requests": { "nvidia.com/gpu": "1" } } });
    json!({ "apiVersion": "karpenter.sh/v1", "kind": "NodeClaim", "spec": spec,
        "metadata": { "name": name, "labels": { "karpenter.sh/nodepool": "gpu" } } })
}

/// A pod that has a GPU of a node.
fn pod(name: &str, node: &str) -> Value {
    let container = json!({ "name": "c", "image": "i", "resources": { "limits": { "nvidia.com/gpu": "1" } } });
    let spec = json!({ "nodeName": node, "containers": [container], "automountServiceAccountToken": false,
        "tolerations": [{ "operator": "Exists" }] });
    json!({ "apiVersion": "v1", "kind": "Pod", "spec": spec,
        "metadata": { "namespace": "team", "name": name, "labels": { "app": "serve" } } })
}
