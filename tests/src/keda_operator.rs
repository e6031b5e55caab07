//! KEDA's operator, the real one: it asks scalers, and scales between none and one itself.
//!
//! The rest, from one to many, is the HPA's, which would ask KEDA's adapter: not here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::api::{Api, define};
use crate::http::Client;
use crate::kubernetes::ControlPlane;
use crate::net::{Place, Port};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::stage::eventually;
use crate::tls::Authority;
use crate::tools;

/// Where it runs, as far as it is told.
const NAMESPACE: &str = "keda";

/// A running operator.
pub struct Keda {
    process: Process,
    raw_metrics: SocketAddr,
    _ports: [Port; 2],
    // Last: the directory goes when the process is gone.
    dir: Scratch,
}

impl Keda {
    /// Starts one, and waits until it works.
    pub async fn start(place: &Place, plane: &ControlPlane) -> Result<Self> {
        let (program, kinds) = tools::keda().context("no operator of KEDA: scripts/install-tools kube")?;
        for kinds in kinds {
            define(&plane.api(), &kinds).await?;
        }
        plane.namespace(NAMESPACE).await?;
        let dir = Scratch::new()?;
        let authority = Authority::new()?;
        let (certificate, key) = authority.issue(&[&place.address().to_string()])?.write(dir.path())?;
        std::fs::write(dir.join("ca.crt"), authority.pem())?;
        std::fs::rename(certificate, dir.join("tls.crt"))?;
        std::fs::rename(key, dir.join("tls.key"))?;
        let ports = [place.port()?, place.port()?];
        let [probe, raw_metrics] = [0, 1].map(|n: usize| SocketAddr::new(place.address(), ports[n].number()));
        let mut command = place.command(program);
        command
            .env("KUBECONFIG", plane.admin_kubeconfig(NAMESPACE)?)
            // All of them.
            .env("WATCH_NAMESPACE", "")
            .env("POD_NAMESPACE", NAMESPACE)
            .env("KEDA_CLUSTER_OBJECT_NAMESPACE", NAMESPACE)
            .env("RAW_METRICS_GRPC_PROTOCOL", "enabled")
            .arg(format!("--cert-dir={}", dir.path().display()))
            .arg(format!("--ca-dir={}", dir.path().display()))
            .arg(format!("--health-probe-bind-address={probe}"))
            .arg(format!("--metrics-service-bind-address={raw_metrics}"))
            .args(["--metrics-bind-address=0", "--zap-log-level=info"]);
        let mut process = Process::start("keda-operator", command, &dir.join("log"))?;
        let (client, ready) = (Client::new(place.clone()), format!("http://{probe}/readyz"));
        let is_ready = eventually("KEDA is ready", async || {
            ensure!(process.exited()?.is_none(), "it ended");
            Ok(client.get(&ready).await.is_ok_and(|answer| answer.status == 200))
        });
        if let Err(error) = is_ready.await {
            return Err(error.context(process::tail(&process.log())));
        }
        Ok(Self { process, raw_metrics, _ports: ports, dir })
    }

    /// Where it tells what its scalers said, to whom shows a certificate out of [`certificates`](Self::certificates).
    pub const fn raw_metrics(&self) -> SocketAddr {
        self.raw_metrics
    }

    /// The directory with `ca.crt`, `tls.crt` and `tls.key`.
    pub fn certificates(&self) -> &Path {
        self.dir.path()
    }

    /// The file that it logs to.
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The end of what it logged.
    pub fn log(&self) -> String {
        process::tail(&self.process.log())
    }
}

/// A ScaledObject for a Deployment of the same name, with one trigger. `spec` is besides, or instead, of the defaults of
/// KEDA.
pub async fn scaled_object(api: &Api, namespace: &str, name: &str, trigger: &Value, spec: &Value) -> Result<()> {
    let mut all = json!({ "scaleTargetRef": { "name": name }, "minReplicaCount": 0, "maxReplicaCount": 10,
        "triggers": [trigger] });
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    let object = json!({ "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject",
        "metadata": { "namespace": namespace, "name": name }, "spec": all });
    api.apply(&object).await.map(|_| ())
}
