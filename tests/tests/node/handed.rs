//! GPUs that the agent was not handed, and GPUs that the instance type promises: what follows for the node.

use anyhow::{Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use serde_json::{Value, json};

use crate::{Cluster, NEEDS, TAINT, startup};

/// What the agent says of its GPUs: the state, the first reason for it, the numbers.
async fn gpus(agent: &Agent) -> Result<(String, String, String)> {
    let page: Value = serde_json::from_str(&agent.admin("/readyz").await?.text())?;
    let reasons = page["gpu"]["reasons"].as_array().cloned().unwrap_or_default();
    let first = reasons.iter().find(|finding| finding["state"] == page["gpu"]["state"]).cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok((text(&page["gpu"]["state"]), text(&first["reason"]), text(&first["detail"])))
}

#[tokio::test]
async fn a_node_whose_gpus_the_agent_was_not_handed_keeps_its_taint_and_is_not_called_broken() -> Result<()> {
    if !can_run("a_node_whose_gpus_the_agent_was_not_handed_keeps_its_taint_and_is_not_called_broken", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let options = cluster.options(mock.options(1)?)?.set("kubernetes.startup_deadline", "1s");
    let dev = mock.host(1)?.join("dev");
    let devices = ["nvidiactl", "nvidia0"].map(|device| dev.join(device));
    devices.iter().try_for_each(std::fs::remove_file)?;
    let agent = Agent::start(options).await?;
    let is_late = async || Ok(agent.metrics().await?.sum("darter_startup_overdue", &[]) == 1.0);
    eventually("it is late", is_late).await?;
    let (state, reason, _) = gpus(&agent).await?;
    assert_eq!((state.as_str(), reason.as_str()), ("Unknown", "GpusNotVisible"));
    assert_eq!(startup(&agent).await?["waits_for"], json!(["gpu"]));
    assert_eq!(cluster.taints().await?, [TAINT]);
    ensure!(cluster.condition("darter.dev/GpuReady").await?["status"] != "False", "{}", agent.log());
    devices.iter().try_for_each(|device| std::fs::write(device, ""))?;
    eventually("the taint goes", async || Ok(cluster.taints().await?.is_empty())).await
}

#[tokio::test]
async fn gpus_that_the_instance_type_has_are_missed_from_the_first_look_on() -> Result<()> {
    if !can_run("gpus_that_the_instance_type_has_are_missed_from_the_first_look_on", &NEEDS) {
        return Ok(());
    }
    let label = async |labels: Value| {
        let cluster = Cluster::start(&[TAINT], 1).await?;
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1", "labels": labels },
            "spec": { "taints": [{ "key": TAINT, "effect": "NoSchedule" }] } });
        cluster.plane.apply(&node).await?;
        let mock = Mock::fixture("h200-idle")?;
        let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
        anyhow::Ok((cluster, mock, agent))
    };
    let manufacturer = "karpenter.k8s.aws/instance-gpu-manufacturer";
    let karpenter = json!({ manufacturer: "nvidia", "karpenter.k8s.aws/instance-gpu-count": "8" });
    let discovery = json!({ "nvidia.com/gpu.present": "true", "nvidia.com/gpu.count": "8" });
    for labels in [karpenter, discovery] {
        let (cluster, _mock, agent) = label(labels).await?;
        let wanted = ("NotReady".to_owned(), "GpuCountMismatch".to_owned());
        let missed = async || {
            let (state, reason, detail) = gpus(&agent).await?;
            Ok((state, reason) == wanted && detail.ends_with("1 in NVML, 8 expected"))
        };
        eventually("seven are missed", missed).await?;
        assert_eq!(cluster.taints().await?, [TAINT]);
    }
    Ok(())
}
