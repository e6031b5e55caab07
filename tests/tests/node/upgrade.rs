//! GPU Operator replaces the driver of the node: nobody is sent there, nothing is called broken, and NVML lets go.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::Method;
use serde_json::{Value, json};

use crate::{Cluster, NEEDS, TAINT, startup};

const OURS: &str = "darter.dev/GpuReady";
const PATIENCE: Duration = Duration::from_secs(100);

/// Says, as GPU Operator does, how far it is.
async fn says(cluster: &Cluster, state: &str) -> Result<()> {
    let labels = json!({ "metadata": { "labels": { "nvidia.com/gpu-driver-upgrade-state": state } } });
    let body = Some(("application/merge-patch+json", &labels));
    cluster.plane.call(Method::PATCH, "/api/v1/nodes/gpu-1", body).await?;
    Ok(())
}

/// An agent that has just started leaves what it finds for a minute while it does not know better.
async fn becomes(cluster: &Cluster, status: &str, reason: &str, message: &str) -> Result<()> {
    let mut found = Value::Null;
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            found = cluster.condition(OURS).await?;
            let is_told = found["message"].as_str().is_some_and(|text| text.contains(message));
            if found["status"] == status && found["reason"] == reason && is_told {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let waited = waited.await;
    waited.with_context(|| format!("not {status} {reason} {message} after {PATIENCE:?}: {found}"))?
}

#[tokio::test]
async fn while_the_driver_is_replaced_the_gpus_are_unknown_and_nvml_lets_go_and_then_they_are_ready() -> Result<()> {
    let name = "while_the_driver_is_replaced_the_gpus_are_unknown_and_nvml_lets_go_and_then_they_are_ready";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    becomes(&cluster, "True", "GpusReady", "").await?;
    let calls =
        async |call: &str| anyhow::Ok(agent.metrics().await?.sum("darter_nvml_call_seconds_count", &[("call", call)]));
    // It waits for its turn: nothing is done to it. Then it is emptied, and what runs there is still watched.
    says(&cluster, "upgrade-required").await?;
    says(&cluster, "drain-required").await?;
    becomes(&cluster, "Unknown", "DriverUpgrading", "DriverUpgrading(drain-required)").await?;
    ensure!(!agent.log().contains("upgrade-required"), "{}", agent.log());
    let asked = calls("power_usage").await?;
    eventually("it is asked on", async || Ok(calls("power_usage").await? > asked)).await?;
    assert_eq!(calls("shutdown").await?, 0.0);
    // The driver goes, and with it all that needs it.
    let began = Instant::now();
    says(&cluster, "pod-restart-required").await?;
    eventually("NVML is shut down", async || Ok(calls("shutdown").await? == 1.0)).await?;
    ensure!(began.elapsed() < Duration::from_secs(6), "it took {:?}", began.elapsed());
    mock.set("base = 'h200-idle'\ninit = 9\n")?;
    let host = mock.host(1)?;
    for file in ["proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvidia0"] {
        fs::remove_file(host.join(file))?;
    }
    cluster.kubelet(0, "True").await?;
    cluster.taint(TAINT).await?;
    eventually("the taint is seen", async || Ok(startup(&agent).await?["state"] != "absent")).await?;
    // More looks than it takes for any of that to be a fault.
    let (began, looks) = (Instant::now(), Duration::from_secs(10));
    while began.elapsed() < looks {
        let page: Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
        ensure!(page["gpu"]["state"] == "Unknown", "{}", page["gpu"]);
        ensure!(cluster.condition(OURS).await?["status"] == "Unknown");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_nvml_init_total", &[]), 1.0, "it was asked meanwhile");
    assert_eq!((metrics.sum("darter_gpu_info", &[]), metrics.sum("darter_gpu_lost", &[])), (1.0, 0.0));
    ensure!(!metrics.series().iter().any(|(series, _)| series.starts_with("darter_gpu_collect_success")));
    assert_eq!(cluster.taints().await?, [TAINT], "nobody knows whether the GPUs can be given work");
    // The next driver is here, and the operator says so.
    mock.host(1)?;
    mock.set("base = 'h200-idle'\ndriver_version = '610.57.04'\n")?;
    cluster.kubelet(1, "True").await?;
    says(&cluster, "upgrade-done").await?;
    becomes(&cluster, "True", "GpusReady", "").await?;
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_info", &[("driver_version", "610.57.04")]), 1.0);
    eventually("the taint goes", async || Ok(cluster.taints().await?.is_empty())).await
}
