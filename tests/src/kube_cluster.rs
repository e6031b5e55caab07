//! A whole cluster but for its machines: a control plane with its controllers and scheduler, and nodes whose kubelets
//! are played. Karpenter and KEDA come to it where a test wants them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::api::{Api, Objects};
use crate::controllers::{Controllers, Scheduler};
use crate::karpenter::{self, INSTANCES, Karpenter};
use crate::keda_operator::Keda;
use crate::kubelets::{GPU, Kubelets};
use crate::kubernetes::ControlPlane;
use crate::net::{Network, Place};

/// Those that pods come from and go by.
const CONTROLLERS: [&str; 9] = [
    "daemonset-controller",
    "deployment-controller",
    "disruption-controller",
    "garbage-collector-controller",
    "horizontal-pod-autoscaler-controller",
    "node-lifecycle-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "serviceaccount-controller",
];

/// The namespace that workloads of tests are in.
pub const NAMESPACE: &str = "inference";
/// What their containers are called to run. Nothing pulls it.
const IMAGE: &str = "registry.example.com/model:v1";

/// A running cluster.
pub struct KubeCluster {
    karpenter: Option<Karpenter>,
    keda: Option<Keda>,
    kubelets: Kubelets,
    scheduler: Scheduler,
    controllers: Controllers,
    plane: ControlPlane,
    place: Place,
    _network: Network,
}

impl KubeCluster {
    /// Starts one in a network of its own, since Karpenter listens at every address. Needs root.
    pub async fn start() -> Result<Self> {
        let network = Network::new(0)?;
        let place = network.hub();
        let plane = ControlPlane::start(&place).await?;
        plane.namespace(NAMESPACE).await?;
        let controllers = Controllers::start(&place, &plane, &CONTROLLERS)?;
        let scheduler = Scheduler::start(&place, &plane)?;
        let kubelets = Kubelets::start(&plane.api());
        let (karpenter, keda) = (None, None);
        Ok(Self { karpenter, keda, kubelets, scheduler, controllers, plane, place, _network: network })
    }

    /// With Karpenter, and a NodePool `gpu` of the smallest instance with one GPU.
    pub async fn with_karpenter(mut self) -> Result<Self> {
        self.karpenter = Some(Karpenter::start(&self.place, &self.plane, &INSTANCES).await?);
        karpenter::pool(&self.api(), "gpu", &[INSTANCES[0].name], Duration::ZERO, &json!({})).await?;
        Ok(self)
    }

    /// With KEDA's operator.
    pub async fn with_keda(mut self) -> Result<Self> {
        self.keda = Some(Keda::start(&self.place, &self.plane).await?);
        Ok(self)
    }

    /// The administrator's way to its API server.
    pub fn api(&self) -> Api {
        self.plane.api()
    }

    /// Its control plane.
    pub const fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// Where its processes run.
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// What all of them logged last, for an error message.
    pub fn log(&self) -> String {
        let parts = [
            ("controllers", self.controllers.log()),
            ("scheduler", self.scheduler.log()),
            ("kubelets", self.kubelets.log()),
            ("Karpenter", self.karpenter.as_ref().map(Karpenter::log).unwrap_or_default()),
            ("KEDA", self.keda.as_ref().map(Keda::log).unwrap_or_default()),
        ];
        parts.iter().map(|(who, log)| format!("== {who}\n{log}\n")).collect()
    }

    /// Makes a Deployment of pods that take one GPU each.
    pub async fn deploy(&self, name: &str, replicas: u32) -> Result<()> {
        let labels = json!({ "app": name });
        let deployment = json!({ "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "namespace": NAMESPACE, "name": name },
            "spec": { "replicas": replicas, "selector": { "matchLabels": labels },
                "template": { "metadata": { "labels": labels }, "spec": pod_spec(1) } } });
        self.api().apply(&deployment).await?;
        Ok(())
    }

    /// So many replicas of a Deployment, as whoever scales it says.
    pub async fn scale(&self, name: &str, replicas: u32) -> Result<()> {
        let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{name}/scale");
        self.api().patch(&path, &json!({ "spec": { "replicas": replicas } })).await.map(|_| ())
    }

    /// Waits until so many pods of an app run, and gives back these.
    pub async fn running(&self, app: &str, number: usize) -> Result<Vec<Value>> {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app={app}");
        let runs = |pod: &&Value| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
        let found = |pods: &Objects| {
            let running: Vec<_> = pods.values().filter(runs).cloned().collect();
            (running.len() == number && pods.len() == number).then_some(running)
        };
        let running = self.api().until(&path, &format!("{number} pods of {app} run"), found).await;
        running.with_context(|| self.log())
    }
}

/// What a pod that takes so many GPUs says of itself.
pub fn pod_spec(gpus: u32) -> Value {
    // Of a pod the API server makes the requests out of the limits, but not of a template: a buffer by a template with
    // limits alone keeps room for pods that need nothing.
    let resources = json!({ "limits": { GPU: gpus.to_string() }, "requests": { GPU: gpus.to_string() } });
    json!({ "terminationGracePeriodSeconds": 1,
        "containers": [{ "name": "model", "image": IMAGE, "resources": resources }] })
}
