//! The condition `darter.dev/GpuReady`, beside those of others.

use anyhow::{Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::Method;
use serde_json::{Value, json};

use crate::{Cluster, LOST, NEEDS};

const OURS: &str = "darter.dev/GpuReady";
const LONG_AGO: &str = "2026-01-01T00:00:00Z";

async fn becomes(cluster: &Cluster, status: &str, reason: &str) -> Result<Value> {
    let mut found = Value::Null;
    let is_so = async || {
        found = cluster.condition(OURS).await?;
        Ok(found["status"] == status && found["reason"] == reason)
    };
    let waited = eventually(&format!("{status} {reason}"), is_so).await;
    waited.map(|()| found.clone()).map_err(|error| error.context(found.to_string()))
}

#[tokio::test]
async fn the_condition_follows_the_gpus_beside_the_kubelets_and_holds_over_a_restart() -> Result<()> {
    if !can_run("the_condition_follows_the_gpus_beside_the_kubelets_and_holds_over_a_restart", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let ready = becomes(&cluster, "True", "GpusReady").await?;
    ensure!(ready["message"] == "The GPUs can be given work", "{ready}");
    ensure!(ready["lastHeartbeatTime"].is_string() && ready["lastTransitionTime"].is_string(), "{ready}");
    // The kubelet's own is as it wrote it, and each owns what is its own.
    let kubelets = cluster.condition("Ready").await?;
    ensure!((&kubelets["status"], &kubelets["reason"]) == (&"True".into(), &"KubeletReady".into()), "{kubelets}");
    let node = cluster.node().await?;
    let managers = node["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let ours: Vec<_> = managers.iter().filter(|fields| fields["manager"] == "darter-agent").collect();
    let [ours] = ours[..] else { anyhow::bail!("{managers:?}") };
    ensure!((&ours["operation"], &ours["subresource"]) == (&"Apply".into(), &"status".into()), "{ours}");
    let fields = &ours["fieldsV1"]["f:status"]["f:conditions"];
    ensure!(fields.as_object().is_some_and(|fields| fields.len() == 1), "it owns more than its condition: {fields}");
    // The next agent finds what is there, and takes nothing back before it knows better.
    agent.kill().await?;
    agent.start_again().await?;
    eventually("it judges again", async || {
        Ok(agent.log().matches("the GPUs of this node state=\"Ready\"").count() >= 2)
    })
    .await?;
    assert_eq!(cluster.condition(OURS).await?, ready, "nothing has changed");
    // Another reason and the same status: it was never another one since.
    mock.set("base = 'remap-pending'")?;
    let degraded = becomes(&cluster, "True", "RowRemapPending").await?;
    assert_eq!(degraded["lastTransitionTime"], ready["lastTransitionTime"]);
    ensure!(degraded["lastHeartbeatTime"] != ready["lastHeartbeatTime"], "{degraded} after {ready}");
    mock.set(LOST)?;
    let lost = becomes(&cluster, "False", "GpuLost").await?;
    let message = lost["message"].as_str().unwrap_or_default();
    ensure!(message.contains("GPU-") && message.contains("Drain the node and reboot it"), "{message}");
    ensure!(lost["lastTransitionTime"].as_str() > ready["lastTransitionTime"].as_str(), "{lost} after {ready}");
    // What others write of theirs leaves ours alone.
    cluster.kubelet(1, "False").await?;
    assert_eq!(cluster.condition(OURS).await?["status"], "False");
    mock.set("base = 'h200-idle'")?;
    becomes(&cluster, "True", "GpusReady").await?;
    assert_eq!(cluster.condition("Ready").await?["status"], "False", "the kubelet's");
    // An Event for each time that the status changed, and none for the start.
    let is_told = async || Ok(!cluster.events("GpuReady").await?.is_empty());
    eventually("an Event for the end of it", is_told).await?;
    let events = [cluster.events("GpuNotReady").await?, cluster.events("GpuReady").await?];
    let [[(kind, note)], [(end, _)]] = [&events[0][..], &events[1][..]] else { anyhow::bail!("{events:?}") };
    ensure!(kind == "Warning" && note.starts_with("GpuLost: ") && end == "Normal", "{events:?}");
    assert_eq!(agent.metrics().await?.sum("darter_node_write_errors_total", &[]), 0.0);
    Ok(())
}

#[tokio::test]
async fn a_device_plugin_that_gives_out_nothing_makes_the_gpus_not_ready() -> Result<()> {
    if !can_run("a_device_plugin_that_gives_out_nothing_makes_the_gpus_not_ready", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 0).await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let bare = becomes(&cluster, "False", "AllocatableZero").await?;
    ensure!(bare["message"].as_str().is_some_and(|text| text.contains("tolerate the startup taint")), "{bare}");
    cluster.kubelet(1, "True").await?;
    becomes(&cluster, "True", "GpusReady").await?;
    // GPU feature discovery is worth a word, and no reason.
    let status = agent.admin("/v1/status").await?.text();
    ensure!(status.contains("GfdLabelsMissing"), "{status}");
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_node_gpu_ready", &[("state", "Ready"), ("reason", "")]), 1.0);
    Ok(())
}

/// An earlier agent wrote it, long ago.
async fn left_behind(cluster: &Cluster, message: &str) -> Result<()> {
    let condition = json!({ "type": OURS, "status": "True", "reason": "GpusReady", "message": message,
        "lastHeartbeatTime": LONG_AGO, "lastTransitionTime": LONG_AGO });
    let status = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" },
        "status": { "conditions": [condition] } });
    let path = "/api/v1/nodes/gpu-1/status?fieldManager=darter-agent&force=true";
    cluster.plane.call(Method::PATCH, path, Some(("application/apply-patch+yaml", &status))).await?;
    Ok(())
}

#[tokio::test]
async fn a_heartbeat_is_due_by_what_stands_there_and_keeps_when_the_status_changed() -> Result<()> {
    if !can_run("a_heartbeat_is_due_by_what_stands_there_and_keeps_when_the_status_changed", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 1).await?;
    left_behind(&cluster, "The GPUs can be given work").await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let beats = async || Ok(cluster.condition(OURS).await?["lastHeartbeatTime"] != LONG_AGO);
    eventually("a heartbeat", beats).await?;
    let now = cluster.condition(OURS).await?;
    assert_eq!((&now["status"], &now["lastTransitionTime"]), (&"True".into(), &LONG_AGO.into()), "{now}");
    // Somebody replaces the node by another of its name, which has no condition.
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" } });
    cluster.plane.delete(&node).await?;
    cluster.plane.apply(&node).await?;
    cluster.kubelet(1, "True").await?;
    let anew = becomes(&cluster, "True", "GpusReady").await?;
    ensure!(anew["lastTransitionTime"] != LONG_AGO, "{anew}\n{}", agent.log());
    let changes = || agent.log().matches("the condition darter.dev/GpuReady of this node").count();
    // The log has it after the API server.
    eventually("the change is said", async || Ok(changes() > 0)).await?;
    ensure!(changes() == 1, "a heartbeat is no change: {}\n{}", changes(), agent.log());
    Ok(())
}

#[tokio::test]
async fn a_node_without_gpus_has_no_condition_and_loses_one_that_an_earlier_agent_wrote() -> Result<()> {
    if !can_run("a_node_without_gpus_has_no_condition_and_loses_one_that_an_earlier_agent_wrote", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 0).await?;
    left_behind(&cluster, "of another time").await?;
    let mock = Mock::fixture("h200-idle")?;
    let options = Options::new(&Place::Host)
        .plain_registry("registry.example", "http://127.0.0.1:9")
        .set("gpu.library", "/nowhere/libnvidia-ml.so.1")
        .set("gpu.interval", "1s")
        .set("gpu.slow_interval", "1s")
        .set("gpu.host_root", mock.host(0)?.display().to_string());
    let agent = Agent::start(cluster.options(options)?).await?;
    eventually("the condition goes", async || Ok(cluster.condition(OURS).await?.is_null())).await?;
    assert_eq!(cluster.condition("Ready").await?["status"], "True", "the kubelet's stays");
    // Rounds go by.
    let rounds = async || Ok(agent.log().contains("this node has no condition darter.dev/GpuReady any more"));
    eventually("it says so", rounds).await?;
    ensure!(cluster.condition(OURS).await?.is_null());
    Ok(())
}

#[tokio::test]
async fn an_operator_who_wants_no_condition_gets_none() -> Result<()> {
    if !can_run("an_operator_who_wants_no_condition_gets_none", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&["darter.dev/not-ready"], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let options = cluster.options(mock.options(1)?)?.set("kubernetes.gpu_condition", false);
    let _agent = Agent::start(options).await?;
    // The taint goes when the GPUs are ready, and by then a condition would be there.
    eventually("the taint goes", async || Ok(cluster.taints().await?.is_empty())).await?;
    ensure!(cluster.condition(OURS).await?.is_null());
    Ok(())
}
