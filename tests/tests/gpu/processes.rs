//! Processes on GPUs: whose lists are believed, and what is not proved by those that are not.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::kubelet::Kubelet;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use serde_json::Value;

use crate::{NEEDS, becomes};

const UUID: &str = "GPU-4a2b6f10-0000-4000-8000-000000000200";

/// An agent that reads the kernel's own link, not the one that the mock's host has.
fn options(mock: &Mock) -> Result<Options> {
    let options = mock.options(1)?;
    let own = mock.host(1)?.join("proc/self");
    fs::remove_dir_all(&own)?;
    symlink("/proc/self", own)?;
    Ok(options)
}

/// What is said of the processes of the GPU: the number of series, and the witness.
async fn said(agent: &Agent) -> Result<(usize, Value)> {
    let metrics = agent.metrics().await?;
    let series = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_gpu_processes")).count();
    let page: Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
    let evidence = page["gpu"]["idleness"][UUID]["evidence"].as_array().cloned().unwrap_or_default();
    let witness = evidence.into_iter().find(|evidence| evidence["witness"] == "processes").unwrap_or_default();
    Ok((series, witness))
}

#[tokio::test]
async fn in_a_pid_namespace_of_its_own_an_agent_takes_no_list_for_a_proof() -> Result<()> {
    let name = "in_a_pid_namespace_of_its_own_an_agent_takes_no_list_for_a_proof";
    if !can_run(name, &[NEEDS[0], NEEDS[1], Need::Root]) {
        return Ok(());
    }
    // Nobody has it, nothing is in its memory, and NVML lists nothing: all that keeps it from being empty is where
    // the agent is.
    let mock = Mock::new("base = 'h200-idle'\n[gpu]\nenergy_follows_power = true")?;
    let kubelet = Kubelet::start()?;
    kubelet.set(&[], &[("nvidia.com/gpu", &[UUID])]);
    let socket = kubelet.socket().display().to_string();
    let options = options(&mock)?.set("gpu.pod_resources", socket).set("gpu.idle_window", "12s").own_pids();
    let agent = Agent::start(options).await?;
    becomes(&agent, "Ready", "ProcessesNotVisible").await?;
    let (mut states, patience) = (Vec::new(), Duration::from_secs(90));
    let comes = tokio::time::timeout(patience, async {
        loop {
            let metrics = agent.metrics().await?;
            let is = |state: &&str| metrics.sum("darter_gpu_state", &[("state", *state)]) == 1.0;
            states.extend(["empty", "loaded_idle", "busy"].into_iter().find(is));
            if states.len() > 10 {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    comes.await.with_context(|| format!("nothing was concluded after {patience:?}"))??;
    ensure!(states.iter().all(|state| *state == "loaded_idle"), "{states:?}");
    let (series, witness) = said(&agent).await?;
    ensure!(series == 0 && witness["says"] == "nothing" && witness["value"].is_null(), "{series} {witness}");
    let log = agent.log();
    let told = "processes on GPUs are not counted (gpu.processes): this agent is not in the PID namespace of the host";
    assert_eq!(log.matches(told).count(), 1, "{log}");
    Ok(())
}

#[tokio::test]
async fn where_this_test_runs_lists_count_if_that_is_the_hosts_namespace_and_else_do_not() -> Result<()> {
    if !can_run("where_this_test_runs_lists_count_if_that_is_the_hosts_namespace_and_else_do_not", &NEEDS) {
        return Ok(());
    }
    let is_host = fs::read_link("/proc/self/ns/pid")?.as_os_str() == "pid:[4026531836]";
    let mock = Mock::fixture("h200-busy")?;
    let agent = Agent::start(options(&mock)?).await?;
    becomes(&agent, "Ready", if is_host { "" } else { "ProcessesNotVisible" }).await?;
    let read = async || Ok(agent.metrics().await?.sum("darter_gpu_power_limit_watts", &[]) > 0.0);
    eventually("the GPU was read", read).await?;
    let (series, witness) = said(&agent).await?;
    ensure!((series == 3) == is_host, "{series} {witness}");
    if is_host {
        assert_eq!(agent.metrics().await?.sum("darter_gpu_processes", &[("type", "compute")]), 3.0);
    }
    Ok(())
}
