//! Which pod has which GPU, with a double of the kubelet's PodResources.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::kubelet::Kubelet;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;

use crate::{NEEDS, becomes};

const UUID: &str = "GPU-4a2b6f10-0000-4000-8000-000000000200";

async fn agent(mock: &Mock, kubelet: &Kubelet) -> Result<Agent> {
    let socket = kubelet.socket().display().to_string();
    Agent::start(mock.options(1)?.set("gpu.pod_resources", socket).set("gpu.dcgm_names", "legacy")).await
}

async fn allocations(agent: &Agent) -> Result<Vec<String>> {
    let metrics = agent.metrics().await?;
    let of = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_gpu_allocation_info"));
    Ok(of.map(|(series, _)| series.trim_start_matches("darter_gpu_allocation_info").to_owned()).collect())
}

#[tokio::test]
async fn a_gpu_is_joined_with_the_pod_that_has_it() -> Result<()> {
    if !can_run("a_gpu_is_joined_with_the_pod_that_has_it", &NEEDS) {
        return Ok(());
    }
    let (mock, mut kubelet) = (Mock::fixture("h200-idle")?, Kubelet::start()?);
    let shared = format!("{UUID}::1");
    kubelet.set(
        &[
            ("team", "train-0", "main", "nvidia.com/gpu", &[UUID]),
            ("team", "serve-0", "vllm", "nvidia.com/gpu.shared", &[&shared]),
            ("team", "slice-0", "main", "nvidia.com/mig-1g.18gb", &["MIG-77"]),
            ("team", "fpga-0", "main", "xilinx.com/fpga", &["GPU-no"]),
        ],
        &[("nvidia.com/gpu", &[UUID]), ("xilinx.com/fpga", &["a", "b"])],
    );
    let agent = agent(&mock, &kubelet).await?;
    let wanted = [
        format!(r#"{{uuid="{UUID}",namespace="team",pod="train-0",container="main",resource="nvidia.com/gpu"}}"#),
        format!(
            r#"{{uuid="{UUID}",replica="1",namespace="team",pod="serve-0",container="vllm",resource="nvidia.com/gpu.shared"}}"#
        ),
        r#"{mig_uuid="MIG-77",namespace="team",pod="slice-0",container="main",resource="nvidia.com/mig-1g.18gb"}"#
            .to_owned(),
    ];
    eventually("the pods are told", async || Ok(allocations(&agent).await?.len() == wanted.len())).await?;
    assert_eq!(allocations(&agent).await?, wanted);
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_node_gpu_devices_allocatable", &[]), 1.0);
    // Dashboards of dcgm-exporter look for the pod on the series itself.
    ensure!(metrics.sum("DCGM_FI_DEV_POWER_USAGE", &[("pod", "serve-0"), ("namespace", "team")]) > 0.0);
    // A kubelet that restarts takes nothing away, and is heard again.
    kubelet.stop();
    let round =
        async || Ok::<_, anyhow::Error>(agent.metrics().await?.sum("darter_gpu_collect_timestamp_seconds", &[]));
    let before = round().await?;
    eventually("the kubelet was asked in vain", async || Ok(round().await? > before + 2.0)).await?;
    assert_eq!(allocations(&agent).await?, wanted);
    kubelet.set(&[], &[("nvidia.com/gpu", &[UUID])]);
    kubelet.start_again()?;
    eventually("it is heard again", async || Ok(allocations(&agent).await?.is_empty())).await?;
    ensure!(agent.metrics().await?.sum("DCGM_FI_DEV_POWER_USAGE", &[("pod", "serve-0")]) == 0.0);
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_is_cut_up_while_the_agent_runs_has_its_parts_and_their_pods() -> Result<()> {
    if !can_run("a_gpu_that_is_cut_up_while_the_agent_runs_has_its_parts_and_their_pods", &NEEDS) {
        return Ok(());
    }
    let (mock, kubelet) = (Mock::fixture("h200-idle")?, Kubelet::start()?);
    let agent = agent(&mock, &kubelet).await?;
    let parts = async || anyhow::Ok(agent.metrics().await?.sum("darter_gpu_mig_info", &[("uuid", UUID)]));
    let read = async || Ok(agent.metrics().await?.sum("darter_gpu_power_limit_watts", &[]) > 0.0);
    eventually("the GPU was read", read).await?;
    assert_eq!(parts().await?, 0.0);
    // From Hopper on that takes no reset.
    mock.set("base = 'h200-mig'")?;
    eventually("its parts are told", async || Ok(parts().await? == 5.0)).await?;
    let slice = "MIG-4a2b6f10-0000-5000-8000-000000000203";
    kubelet.set(&[("team", "slice-0", "main", "nvidia.com/mig-1g.18gb", &[slice])], &[]);
    let wanted = format!(
        r#"{{uuid="{UUID}",mig_uuid="{slice}",namespace="team",pod="slice-0",container="main",resource="nvidia.com/mig-1g.18gb"}}"#
    );
    eventually("its pod is told", async || Ok(allocations(&agent).await? == [wanted.clone()])).await?;
    let metrics = agent.metrics().await?;
    let of = [("mig_uuid", slice), ("profile", "1g.18gb"), ("multiprocessors", "16")];
    assert_eq!(metrics.sum("darter_gpu_mig_info", &of), 1.0);
    assert_eq!(metrics.sum("darter_gpu_mig_memory_total_bytes", &[("mig_uuid", slice)]), 17_179_869_184.0);
    // What the whole card takes is not this pod's.
    assert_eq!(metrics.sum("DCGM_FI_DEV_POWER_USAGE", &[("pod", "slice-0")]), 0.0);
    ensure!(metrics.sum("DCGM_FI_DEV_POWER_USAGE", &[]) > 0.0);
    // What it does is told of its own GPU instance, and of its pod.
    mock.set("base = 'h200-mig'\n[gpu.gpm.instances]\n9 = { 1 = 40.0, 2 = 37.5, 3 = 0.0, 5 = 25.0, 10 = 12.5 }")?;
    let sm = [("darter_gpu_mig_sm_active_ratio", "mig_uuid", slice), ("DCGM_FI_PROF_SM_ACTIVE", "pod", "slice-0")];
    let works = async || {
        let metrics = agent.metrics().await?;
        Ok(sm.iter().all(|(name, label, value)| metrics.sum(name, &[(label, value)]) == 0.375))
    };
    eventually("its work is told", works).await?;
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_mig_sm_active_ratio", &[]), 0.375, "the other parts do nothing");
    assert_eq!(metrics.sum("DCGM_FI_PROF_SM_ACTIVE", &[("GPU_I_ID", "9"), ("GPU_I_PROFILE", "1g.18gb")]), 0.375);
    assert_eq!(metrics.sum("darter_gpu_mig_tensor_active_ratio", &[("mig_uuid", slice)]), 0.25);
    // Holes among its parts, and what a part does not have, are no errors.
    assert_eq!(metrics.sum("darter_nvml_errors_total", &[]), 0.0);
    mock.set("base = 'h200-idle'")?;
    eventually("it is in one piece again", async || Ok(parts().await? == 0.0)).await
}

#[tokio::test]
async fn a_node_whose_plugin_gives_out_nothing_is_not_ready_until_it_does() -> Result<()> {
    if !can_run("a_node_whose_plugin_gives_out_nothing_is_not_ready_until_it_does", &NEEDS) {
        return Ok(());
    }
    let (mock, kubelet) = (Mock::fixture("h200-idle")?, Kubelet::start()?);
    let agent = agent(&mock, &kubelet).await?;
    becomes(&agent, "NotReady", "DevicePluginNotRegistered").await?;
    kubelet.set(&[], &[("nvidia.com/gpu", &[UUID])]);
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn a_gpu_that_many_share_is_one_device_and_does_not_stand_in_for_one_that_is_missing() -> Result<()> {
    if !can_run("a_gpu_that_many_share_is_one_device_and_does_not_stand_in_for_one_that_is_missing", &NEEDS) {
        return Ok(());
    }
    const OTHER: &str = "GPU-4a2b6f10-0000-4000-8000-000000000201";
    let mock = Mock::new(&format!("base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = '{OTHER}'\n"))?;
    let kubelet = Kubelet::start()?;
    let replicas = |uuid: &str| (0..4).map(|replica| format!("{uuid}::{replica}")).collect::<Vec<_>>();
    let gives = |ids: &[String]| {
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        kubelet.set(&[], &[("nvidia.com/gpu", &ids)]);
    };
    let both = [replicas(UUID), replicas(OTHER)].concat();
    gives(&both);
    let socket = kubelet.socket().display().to_string();
    let agent = Agent::start(mock.options(2)?.set("gpu.pod_resources", socket)).await?;
    becomes(&agent, "Ready", "").await?;
    assert_eq!(agent.metrics().await?.sum("darter_node_gpu_devices_allocatable", &[]), 2.0);
    gives(&both[..4]);
    becomes(&agent, "NotReady", "DevicesUnhealthy(1 of 2)").await?;
    gives(&both);
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn a_gpu_that_nobody_has_is_empty_one_that_waits_is_idle_and_one_kernel_makes_it_busy() -> Result<()> {
    if !can_run("a_gpu_that_nobody_has_is_empty_one_that_waits_is_idle_and_one_kernel_makes_it_busy", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::new("base = 'h200-idle'\n[gpu]\nenergy_follows_power = true")?;
    let kubelet = Kubelet::start()?;
    kubelet.set(&[], &[("nvidia.com/gpu", &[UUID])]);
    let socket = kubelet.socket().display().to_string();
    let options = mock.options(1)?.set("gpu.pod_resources", socket).set("gpu.idle_window", "12s");
    let agent = Agent::start(options).await?;
    let is = async |state: &str| anyhow::Ok(agent.metrics().await?.sum("darter_gpu_state", &[("state", state)]) == 1.0);
    // The first half minute says nothing: a driver that just came up keeps a GPU busy by itself.
    let comes = async |state: &str| {
        let patience = std::time::Duration::from_secs(90);
        tokio::time::timeout(patience, async {
            while !is(state).await? {
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            anyhow::Ok(())
        })
        .await
        .with_context(|| format!("not {state} after {patience:?}"))?
    };
    comes("unknown").await?;
    comes("empty").await?;
    // A server that waits for requests: it holds the memory, and does nothing.
    let loaded = "base = 'h200-idle'\n[gpu]\nenergy_follows_power = true\nmemory = { used = 130000000000 }\n\
                  compute_processes = [{ pid = 7, used = 130000000000 }]\n";
    mock.set(loaded)?;
    kubelet.set(&[("team", "serve-0", "vllm", "nvidia.com/gpu", &[UUID])], &[("nvidia.com/gpu", &[UUID])]);
    comes("loaded_idle").await?;
    let idle = async || Ok(agent.metrics().await?.sum("darter_gpu_idle_seconds", &[]) > 3.0);
    eventually("it has been idle for some seconds", idle).await?;
    mock.set(&format!("{loaded}utilization = {{ gpu = 3, memory = 0 }}\n"))?;
    comes("busy").await?;
    ensure!(agent.metrics().await?.sum("darter_gpu_idle_seconds", &[]) == 0.0);
    Ok(())
}
