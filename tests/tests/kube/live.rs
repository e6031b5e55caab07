//! The real scaler under the real KEDA: who says demand to the one sees the other scale.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use darter_tests::api::Objects;
use darter_tests::http::Client;
use darter_tests::keda_operator::scaled_object;
use darter_tests::kube_cluster::{KubeCluster, NAMESPACE};
use darter_tests::net::{Place, Port};
use darter_tests::process::{self, Process};
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run, say};
use http::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::activation::{NEEDS, known, replicas};

const CONFIG: &str = r#"
[actuators]
keda = "on"

[policy.keep]
usual_ms = 3000
most_ms = 3000

[[pools]]
name = "l4"
price_per_hour = "0.80"
gpus = 1
nodes_most = 20

[[workloads]]
name = "inference/model"
most = 10
target = "1"
lead = "84s"
"#;

/// A scaler on the loopback of a cluster's network, where KEDA is too.
struct Scaler {
    process: Process,
    grpc: SocketAddr,
    http: SocketAddr,
    client: Client,
    place: Place,
    _ports: [Port; 2],
    // Last: the directory goes when the process is gone.
    dir: Scratch,
}

/// Starts it, or starts it again: with the same files, at the same addresses.
fn launch(place: &Place, dir: &Scratch, [grpc, http]: [SocketAddr; 2]) -> Result<Process> {
    let mut command = place.command(tools::darter()?);
    command.arg("scaler").arg("--config").arg(dir.join("scaler.toml"));
    command.args(["--set", &format!("grpc.listen={grpc}"), "--set", &format!("http.listen={http}")]);
    command.args(["--set", &format!("record.dir={}", dir.join("record").display())]);
    Process::start("darter scaler", command, &dir.join("log"))
}

impl Scaler {
    async fn start(cluster: &KubeCluster) -> Result<Self> {
        let (dir, place) = (Scratch::new()?, cluster.place());
        let ports = [place.port()?, place.port()?];
        let [grpc, http] = [0, 1].map(|n: usize| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), ports[n].number()));
        std::fs::write(dir.join("scaler.toml"), CONFIG)?;
        let process = launch(place, &dir, [grpc, http])?;
        let client = Client::new(place.clone());
        let mut scaler = Self { process, grpc, http, client, place: place.clone(), _ports: ports, dir };
        scaler.ready().await?;
        Ok(scaler)
    }

    async fn ready(&mut self) -> Result<()> {
        let ready = format!("http://{}/readyz", self.http);
        let is_ready = eventually("the scaler is ready", async || {
            ensure!(self.process.exited()?.is_none(), "it ended");
            Ok(self.client.get(&ready).await.is_ok_and(|answer| answer.status == 200))
        });
        is_ready.await.with_context(|| process::tail(&self.process.log()))
    }

    /// Kills it, without a word to anybody.
    async fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.exit(Duration::from_secs(30)).await.map(drop)
    }

    async fn start_again(&mut self) -> Result<()> {
        self.process = launch(&self.place, &self.dir, [self.grpc, self.http])?;
        self.ready().await
    }

    /// Waits until KEDA waits for pushes.
    async fn is_heard(&self) -> Result<()> {
        let metrics = format!("http://{}/metrics", self.http);
        eventually("KEDA listens", async || {
            Ok(self.client.get(&metrics).await?.text().contains("darter_scaler_keda_streams 1"))
        })
        .await
    }

    async fn demand(&self, backlog: u32) -> Result<()> {
        let url = format!("http://{}/v1/demand/{NAMESPACE}/model", self.http);
        let body = Bytes::from(json!({ "backlog": backlog }).to_string());
        let answer = self.client.send_bytes(Method::PUT, &url, "application/json", body).await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(())
    }
}

/// A Deployment without a replica, which KEDA scales by the scaler's word.
async fn scaled(cluster: &KubeCluster, scaler: &Scaler) -> Result<()> {
    scaler.demand(0).await?;
    cluster.deploy("model", 0).await?;
    let trigger = json!({ "type": "external-push", "metadata": { "scalerAddress": scaler.grpc.to_string() } });
    let spec = json!({ "pollingInterval": 5, "cooldownPeriod": 0 });
    scaled_object(&cluster.api(), NAMESPACE, "model", &trigger, &spec).await?;
    known(cluster, "model").await?;
    scaler.is_heard().await
}

fn can_start(test: &str) -> bool {
    can_run(test, &[&NEEDS[..], &[Need::LiveScaler]].concat())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn demand_that_the_scaler_hears_scales_a_deployment_from_none_and_back() -> Result<()> {
    if !can_start("demand_that_the_scaler_hears_scales_a_deployment_from_none_and_back") {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_keda().await?;
    let scaler = Scaler::start(&cluster).await?;
    let log = || format!("{}\n== scaler\n{}", cluster.log(), process::tail(&scaler.process.log()));
    scaled(&cluster, &scaler).await.with_context(log)?;
    let began = Instant::now();
    scaler.demand(3).await?;
    replicas(&cluster, "model", 1).await.with_context(log)?;
    say(&format!("PUT demand to spec.replicas: {:.3?}", began.elapsed()));
    let ceased = Instant::now();
    scaler.demand(0).await?;
    replicas(&cluster, "model", 0).await.with_context(log)?;
    ensure!(ceased.elapsed() >= Duration::from_secs(3), "it was not kept for as long as it is worth");
    Ok(())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_scaler_that_is_gone_scales_nothing_and_is_heard_again_when_it_is_back() -> Result<()> {
    if !can_start("a_scaler_that_is_gone_scales_nothing_and_is_heard_again_when_it_is_back") {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_keda().await?;
    let mut scaler = Scaler::start(&cluster).await?;
    scaled(&cluster, &scaler).await?;
    scaler.demand(1).await?;
    replicas(&cluster, "model", 1).await?;
    scaler.kill().await?;
    // KEDA notices, more than once.
    let events = format!("/api/v1/namespaces/{NAMESPACE}/events");
    let failed = |events: &Objects| {
        let failures = events.values().filter(|event| event["reason"] == "KEDAScalerFailed");
        let times = failures.map(|event| event["count"].as_u64().unwrap_or(1).max(1)).sum::<u64>();
        (times >= 2).then_some(())
    };
    let noticed = cluster.api().until(&events, "KEDA misses the scaler", failed).await;
    noticed.with_context(|| cluster.log())?;
    let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/model");
    let deployment = cluster.api().find(&path).await?.context("no Deployment")?;
    assert_eq!(deployment["spec"]["replicas"], 1, "silence was taken for idleness");
    scaler.start_again().await?;
    // Nor does one that just started say anything out of ignorance: only when it is told.
    scaler.is_heard().await.with_context(|| cluster.log())?;
    let deployment = cluster.api().find(&path).await?.context("no Deployment")?;
    assert_eq!(deployment["spec"]["replicas"], 1, "ignorance was taken for idleness");
    scaler.demand(0).await?;
    replicas(&cluster, "model", 0).await.with_context(|| process::tail(&scaler.process.log()))
}
