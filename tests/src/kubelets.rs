//! A double of all kubelets of a cluster: nodes get ready, and pods run that were bound to them.
//!
//! Nodes are what cannot exist here. What a kubelet tells the API server is told as it tells it: a node's condition, its
//! lease and what it has to give; that a pod runs, and since when; that one is gone. Nothing else is real about them: no
//! container starts, no probe is asked, nothing is mounted. Not here: the kubelet's own API (`kubelet`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Error, Result};
use http::Method;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::api::{Api, is_true};

const NODES: &str = "/api/v1/nodes";
const PODS: &str = "/api/v1/pods";
/// As the kubelet does. A node whose lease is 40 s old is taken for dead.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// More than go wrong in any test; those that come later say the same.
const TROUBLES: usize = 100;
/// A node with this annotation has a kubelet that is dead, whatever its value.
pub const DEAD: &str = "tests.darter.dev/kubelet-is-dead";
/// A node with this annotation has no GPU yet to give: the device plugin has not come.
pub const NO_GPUS: &str = "tests.darter.dev/no-device-plugin";

/// What pods and nodes ask for, and have.
pub const GPU: &str = "nvidia.com/gpu";

/// Running kubelets.
pub struct Kubelets {
    task: JoinHandle<()>,
    troubles: Arc<Mutex<Vec<String>>>,
}

impl Kubelets {
    /// Those of all nodes there are, and will be.
    pub fn start(api: &Api) -> Self {
        let troubles = Arc::<Mutex<Vec<String>>>::default();
        let task = tokio::spawn(run(api.clone(), troubles.clone()));
        Self { task, troubles }
    }

    /// What went wrong. Much is in order: objects are gone, or were changed meanwhile.
    pub fn log(&self) -> String {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }
}

impl Drop for Kubelets {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(api: Api, troubles: Arc<Mutex<Vec<String>>>) {
    let note = |error: &Error| {
        let mut troubles = troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.len() < TROUBLES {
            troubles.push(format!("{error:#}"));
        }
    };
    let (mut nodes, mut pods) = (api.watch(NODES), api.watch(PODS));
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    // What was seen to, by uid, in which version: what a kubelet itself writes comes back, and is nothing new.
    let mut done = BTreeMap::new();
    loop {
        let (news, mut beats) = tokio::select! {
            news = nodes.changed() => (news, false),
            news = pods.changed() => (news, false),
            _ = heartbeat.tick() => (Ok(()), true),
        };
        if let Err(error) = news {
            // The server is away: at its next beat a kubelet tries again.
            note(&error);
            heartbeat.tick().await;
            beats = true;
        }
        let is_alive = |node: &Value| node["metadata"]["annotations"][DEAD].is_null();
        let alive: BTreeMap<_, _> = nodes.objects().iter().filter(|(_, node)| is_alive(node)).collect();
        let mut now = BTreeMap::new();
        for (name, node) in &alive {
            let (uid, version) = identity(node);
            let result = if done.get(&uid) == Some(&version) { Ok(()) } else { register(&api, name, node).await };
            let result = if beats { result.and(renew(&api, name).await) } else { result };
            match result {
                Ok(()) => _ = now.insert(uid, version),
                Err(error) => note(&error),
            }
        }
        for pod in pods.objects().values() {
            if !pod["spec"]["nodeName"].as_str().is_some_and(|node| alive.contains_key(&node.to_owned())) {
                continue;
            }
            let (uid, version) = identity(pod);
            let result = if done.get(&uid) == Some(&version) { Ok(()) } else { keep(&api, pod).await };
            match result {
                Ok(()) => _ = now.insert(uid, version),
                Err(error) => note(&error),
            }
        }
        done = now;
    }
}

/// What an object is, and in which version.
fn identity(object: &Value) -> (String, String) {
    let meta = &object["metadata"];
    (meta["uid"].to_string(), meta["resourceVersion"].to_string())
}

/// What a kubelet says of its node: it is ready, and this is what it has to give.
async fn register(api: &Api, name: &str, node: &Value) -> Result<()> {
    let mut wanted = node["status"]["allocatable"].clone();
    if !node["metadata"]["annotations"][NO_GPUS].is_null() && wanted[GPU].is_string() {
        wanted[GPU] = json!("0");
    }
    let gives_it = wanted == node["status"]["allocatable"] && wanted == node["status"]["capacity"];
    if is_true(node, "Ready") && gives_it {
        return Ok(());
    }
    let now = now();
    let condition = json!({ "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
        "lastHeartbeatTime": now, "lastTransitionTime": now });
    let status = json!({ "conditions": [condition], "capacity": wanted, "allocatable": wanted,
        "nodeInfo": { "kubeletVersion": "v1.35.4" } });
    api.patch(&format!("{NODES}/{name}/status"), &json!({ "status": status })).await?;
    renew(api, name).await
}

async fn renew(api: &Api, node: &str) -> Result<()> {
    let lease = json!({ "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": { "namespace": "kube-node-lease", "name": node },
        "spec": { "holderIdentity": node, "leaseDurationSeconds": 40,
            "renewTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string() } });
    api.apply(&lease).await.map(|_| ())
}

/// What a kubelet does for a pod: it runs, or it is gone.
async fn keep(api: &Api, pod: &Value) -> Result<()> {
    let (meta, status) = (&pod["metadata"], &pod["status"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let path = format!("/api/v1/namespaces/{}/pods/{}", text(&meta["namespace"]), text(&meta["name"]));
    if meta["deletionTimestamp"].is_string() {
        let options = json!({ "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0,
            "preconditions": { "uid": meta["uid"] } });
        api.call(Method::DELETE, &path, Some(("application/json", &options))).await?;
        return Ok(());
    }
    if status["phase"] != "Pending" {
        return Ok(());
    }
    let now = now();
    let condition = |kind: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": now });
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten().map(|container| {
        json!({ "name": container["name"], "image": container["image"], "imageID": "", "ready": true, "started": true,
            "restartCount": 0, "state": { "running": { "startedAt": now } } })
    });
    let conditions = ["Initialized", "ContainersReady", "Ready"].map(condition);
    let change = json!({ "metadata": { "uid": meta["uid"] }, "status": {
        "phase": "Running", "startTime": now, "containerStatuses": containers.collect::<Vec<_>>(),
        "conditions": conditions } });
    api.patch(&format!("{path}/status"), &change).await?;
    Ok(())
}

/// As Kubernetes writes times.
pub fn now() -> String {
    written(Timestamp::now())
}

/// A time as Kubernetes writes it.
pub fn written(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
