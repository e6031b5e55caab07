//! This node as a real kube-apiserver has it: its condition, its startup taint, and what is said when the
//! API server is away or says no. The GPUs are those of the mock of NVIDIA's library; there is no kubelet, and
//! the tests write in its name.

mod alerts;
mod away;
mod condition;
mod handed;
mod notes;
mod startup;
mod upgrade;

use anyhow::{Context as _, Result};
use darter_tests::agent::{Agent, Options};
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::tools::Need;
use http::Method;
use serde_json::{Value, json};

/// What each of these needs.
const NEEDS: [Need; 3] = [Need::Kubernetes, Need::Darter, Need::MockNvml];
/// The startup taint's key.
const TAINT: &str = "darter.dev/not-ready";

/// Its GPU has fallen off the bus.
const LOST: &str = "base = 'h200-idle'\n[gpus.0]\nlost = true\n";

/// What the chart lets an agent do with nodes, and nothing more.
fn rules() -> Value {
    json!([
        { "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"] },
        { "apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"] },
        { "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"] },
    ])
}

/// A cluster that has the node gpu-1, and an account for its agent.
struct Cluster {
    plane: ControlPlane,
    token: String,
}

impl Cluster {
    /// The node has these taints and can give this many GPUs. The account has no rights yet.
    async fn without_rights(taints: &[&str], gpus: u32) -> Result<Self> {
        let plane = ControlPlane::start(&Place::Host).await?;
        plane.namespace("gpu").await?;
        let token = plane.service_account("gpu", "darter").await?;
        let taints: Vec<_> = taints.iter().map(|key| json!({ "key": key, "effect": "NoSchedule" })).collect();
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" },
            "spec": { "taints": taints } });
        plane.apply(&node).await?;
        let cluster = Self { plane, token };
        cluster.kubelet(gpus, "True").await?;
        Ok(cluster)
    }

    /// The account has the chart's rights.
    async fn start(taints: &[&str], gpus: u32) -> Result<Self> {
        let cluster = Self::without_rights(taints, gpus).await?;
        cluster.plane.allow_everywhere("gpu", "darter", &rules()).await?;
        Ok(cluster)
    }

    /// Says what a kubelet says, as it does: the node can give these GPUs, and is ready or not.
    async fn kubelet(&self, gpus: u32, is_ready: &str) -> Result<()> {
        let mut resources = json!({ "cpu": "8", "memory": "64Gi", "pods": "110" });
        if gpus > 0 {
            resources["nvidia.com/gpu"] = gpus.to_string().into();
        }
        let ready = json!({ "type": "Ready", "status": is_ready, "reason": "KubeletReady", "message": "a test" });
        let status = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" },
            "status": { "capacity": resources, "allocatable": resources, "conditions": [ready] } });
        let path = "/api/v1/nodes/gpu-1/status?fieldManager=kubelet&force=true";
        self.plane.call(Method::PATCH, path, Some(("application/apply-patch+yaml", &status))).await?;
        Ok(())
    }

    /// An agent of this node.
    fn options(&self, options: Options) -> Result<Options> {
        let kubeconfig = self.plane.kubeconfig("gpu", &self.token)?;
        Ok(options.set("kubernetes.node", "gpu-1").set("kubernetes.kubeconfig", kubeconfig.display().to_string()))
    }

    /// The node as it is now.
    async fn node(&self) -> Result<Value> {
        self.plane.call(Method::GET, "/api/v1/nodes/gpu-1", None).await
    }

    /// A condition of the node; null where there is none.
    async fn condition(&self, of: &str) -> Result<Value> {
        let node = self.node().await?;
        let conditions = node["status"]["conditions"].as_array().context("no conditions")?;
        Ok(conditions.iter().find(|condition| condition["type"] == of).cloned().unwrap_or_default())
    }

    /// The keys of the node's taints, in their order. The API server's own, of a node that is new, is left out.
    async fn taints(&self) -> Result<Vec<String>> {
        let node = self.node().await?;
        let taints = node["spec"]["taints"].as_array().into_iter().flatten();
        let keys = taints.map(|taint| taint["key"].as_str().unwrap_or_default().to_owned());
        Ok(keys.filter(|key| key != "node.kubernetes.io/not-ready").collect())
    }

    /// Puts a taint before all others.
    async fn taint(&self, key: &str) -> Result<()> {
        let patch = json!([{ "op": "add", "path": "/spec/taints/0", "value": { "key": key, "effect": "NoSchedule" } }]);
        let body = Some(("application/json-patch+json", &patch));
        self.plane.call(Method::PATCH, "/api/v1/nodes/gpu-1", body).await?;
        Ok(())
    }

    /// The Events about the node with this reason: type and note of each.
    async fn events(&self, reason: &str) -> Result<Vec<(String, String)>> {
        let node = self.node().await?;
        let list = self.plane.call(Method::GET, "/apis/events.k8s.io/v1/namespaces/default/events", None).await?;
        let events = list["items"].as_array().context("no list")?.iter().filter(|event| {
            let regarding = &event["regarding"];
            let is_ours = regarding["name"] == "gpu-1" && regarding["uid"] == node["metadata"]["uid"];
            is_ours && event["reason"] == reason && event["reportingController"] == "darter-agent"
        });
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(events.map(|event| (text(&event["type"]), text(&event["note"]))).collect())
    }
}

/// What the agent says of the node's startup taint.
async fn startup(agent: &Agent) -> Result<Value> {
    let answer = agent.admin("/v1/status").await?;
    let status: Value = serde_json::from_slice(&answer.body)?;
    Ok(status["kubernetes"]["startup_taint"].clone())
}
