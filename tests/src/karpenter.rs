//! Karpenter, the real one, with its kwok provider: the instances that it launches are made of nothing.
//!
//! It decides as it does on EC2; what it makes is a Node object, which `kubelets` makes ready.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::api::{Api, define};
use crate::http::Client;
use crate::kubelets::GPU;
use crate::kubernetes::ControlPlane;
use crate::net::{Place, Port};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::stage::eventually;
use crate::tools;

/// A kind of instance.
#[derive(Debug, Clone, Copy)]
pub struct Instance<'a> {
    /// Such as `g4dn.xlarge`.
    pub name: &'a str,
    /// Its GPUs.
    pub gpus: u32,
    /// Its processors.
    pub cpus: u32,
    /// Its memory, in GiB.
    pub memory_gib: u32,
    /// What it costs by the hour on demand, in dollars, as Karpenter reads it.
    pub price: f64,
}

/// Those of the reference stack, and a larger one.
pub const INSTANCES: [Instance<'static>; 3] = [
    Instance { name: "g4dn.xlarge", gpus: 1, cpus: 4, memory_gib: 16, price: 0.526 },
    Instance { name: "g4dn.12xlarge", gpus: 4, cpus: 48, memory_gib: 192, price: 3.912 },
    Instance { name: "m5.large", gpus: 0, cpus: 2, memory_gib: 8, price: 0.096 },
];

/// The zones in which there are instances of each kind.
pub const ZONES: [&str; 2] = ["zone-a", "zone-b"];

/// A running Karpenter.
pub struct Karpenter {
    process: Process,
    _ports: [Port; 2],
    // Last: the directory goes when the process is gone.
    _dir: Scratch,
}

impl Karpenter {
    /// Starts one that knows these instances, and waits until it works. Its alpha features are on.
    pub async fn start(place: &Place, plane: &ControlPlane, instances: &[Instance<'_>]) -> Result<Self> {
        let (program, kinds) = tools::karpenter().context("no Karpenter: scripts/install-tools kube")?;
        for kinds in kinds {
            define(&plane.api(), &kinds).await?;
        }
        let dir = Scratch::new()?;
        let types: Vec<_> = instances.iter().map(Instance::described).collect();
        std::fs::write(dir.join("instances.json"), json!(types).to_string())?;
        let ports = [place.port()?, place.port()?];
        let mut command = place.command(program);
        command
            .env("KUBECONFIG", plane.admin_kubeconfig("default")?)
            .env("DISABLE_LEADER_ELECTION", "true")
            .env("FEATURE_GATES", "NodeRepair=true,StaticCapacity=true,CapacityBuffer=true,NodeOverlay=true")
            .env("INSTANCE_TYPES_FILE_PATH", dir.join("instances.json"))
            .env("METRICS_PORT", ports[0].number().to_string())
            .env("HEALTH_PROBE_PORT", ports[1].number().to_string())
            .env("LOG_LEVEL", "debug");
        let mut process = Process::start("karpenter", command, &dir.join("log"))?;
        let ready = format!("http://{}/readyz", SocketAddr::new(place.address(), ports[1].number()));
        let client = Client::new(place.clone());
        let is_ready = eventually("Karpenter is ready", async || {
            anyhow::ensure!(process.exited()?.is_none(), "it ended");
            Ok(client.get(&ready).await.is_ok_and(|answer| answer.status == 200))
        });
        if let Err(error) = is_ready.await {
            return Err(error.context(process::tail(&process.log())));
        }
        Ok(Self { process, _ports: ports, _dir: dir })
    }

    /// The end of what it logged.
    pub fn log(&self) -> String {
        process::tail(&self.process.log())
    }
}

impl Instance<'_> {
    /// As the kwok provider wants it.
    fn described(&self) -> Value {
        let offering = |capacity: &str, zone: &str, price: f64| {
            let one = |key: &str, value: &str| json!({ "key": key, "operator": "In", "values": [value] });
            json!({ "Price": price, "Available": true, "Requirements":
                [one("karpenter.sh/capacity-type", capacity), one("topology.kubernetes.io/zone", zone)] })
        };
        // Spot for a third, as it often is.
        let offerings: Vec<_> = ZONES
            .iter()
            .flat_map(|zone| [offering("on-demand", zone, self.price), offering("spot", zone, self.price / 3.0)])
            .collect();
        let mut resources = json!({ "cpu": self.cpus.to_string(), "memory": format!("{}Gi", self.memory_gib),
            "ephemeral-storage": "100Gi", "pods": "58" });
        if self.gpus > 0 {
            resources[GPU] = json!(self.gpus.to_string());
        }
        json!({ "name": self.name, "offerings": offerings, "architecture": "amd64", "operatingSystems": ["linux"],
            "resources": resources })
    }
}

/// A NodePool of this name, of these instances, which register after so long. `spec` is besides, or instead, of what is
/// said here: nodes go when they are empty, at once.
pub async fn pool(api: &Api, name: &str, instances: &[&str], boot: Duration, spec: &Value) -> Result<()> {
    let class = json!({ "apiVersion": "karpenter.kwok.sh/v1alpha1", "kind": "KWOKNodeClass", "metadata": { "name": name },
        "spec": { "nodeRegistrationDelay": format!("{}s", boot.as_secs()) } });
    api.apply(&class).await?;
    let requirement = |key: &str, values: &[&str]| json!({ "key": key, "operator": "In", "values": values });
    let template = json!({ "spec": {
        "nodeClassRef": { "group": "karpenter.kwok.sh", "kind": "KWOKNodeClass", "name": name },
        "requirements": [requirement("node.kubernetes.io/instance-type", instances),
            requirement("karpenter.sh/capacity-type", &["on-demand"])],
        "expireAfter": "Never",
    } });
    let mut all = json!({ "template": template, "disruption": { "consolidationPolicy": "WhenEmpty",
        "consolidateAfter": "0s", "budgets": [{ "nodes": "100%" }] } });
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    let pool =
        json!({ "apiVersion": "karpenter.sh/v1", "kind": "NodePool", "metadata": { "name": name }, "spec": all });
    api.apply(&pool).await.map(|_| ())
}
