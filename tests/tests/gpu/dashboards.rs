//! What dashboards and alerts that people have already ask for, on a real Prometheus that scrapes an agent.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::chart::{Helm, NAMESPACE, find};
use darter_tests::kubelet::Kubelet;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::prometheus::Prometheus;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use serde_json::json;

/// The queries of Grafana's dashboard 12239 (NVIDIA DCGM Exporter), with its variables for one node and all
/// of its GPUs, and what an H200 under load gives.
fn panels(instance: &str) -> Vec<(String, f64)> {
    let of = |metric: &str| format!("{metric}{{instance=~\"{instance}\", gpu=~\".*\"}}");
    vec![
        (of("DCGM_FI_DEV_GPU_TEMP"), 52.0),
        (format!("avg({})", of("DCGM_FI_DEV_GPU_TEMP")), 52.0),
        (of("DCGM_FI_DEV_POWER_USAGE"), 627.4),
        (format!("sum({})", of("DCGM_FI_DEV_POWER_USAGE")), 627.4),
        (format!("{} * 1000000", of("DCGM_FI_DEV_SM_CLOCK")), 1.98e9),
        (of("DCGM_FI_DEV_GPU_UTIL"), 100.0),
        (of("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), 0.62),
        (of("DCGM_FI_DEV_FB_USED"), 32362.0),
    ]
}

#[tokio::test]
async fn grafanas_dashboard_of_dcgm_exporter_finds_its_series() -> Result<()> {
    let needs = [Need::Darter, Need::MockNvml, Need::Prometheus];
    if !can_run("grafanas_dashboard_of_dcgm_exporter_finds_its_series", &needs) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-busy")?;
    let options = mock.options(1)?.set("gpu.dcgm_names", "legacy");
    let agent = Agent::start(options).await?;
    let instance = agent.admin_address();
    let prometheus = Prometheus::start(instance).await?;
    for (query, wanted) in panels(&instance.to_string()) {
        let mut found = Vec::new();
        let is_found = async || {
            found = prometheus.query(&query).await?;
            Ok(!found.is_empty())
        };
        eventually(&format!("a series for {query}"), is_found).await?;
        let [(labels, value)] = &found[..] else { anyhow::bail!("{query}: {found:?}") };
        ensure!((value - wanted).abs() < 1e-6 * wanted, "{query}: {value}, not {wanted}");
        // The dashboard's variables and legends.
        let is_sum = query.starts_with("avg") || query.starts_with("sum");
        ensure!(is_sum || labels["gpu"] == "0", "{query}: {labels}");
    }
    // Prometheus itself took every line: types of both formats, and series of the rest of the agent.
    let up = prometheus.query("up").await?;
    ensure!(up.len() == 1 && up[0].1 == 1.0, "{up:?}");
    let own = prometheus.query("darter_gpu_power_watts and on(uuid) darter_gpu_info{name=\"NVIDIA H200\"}").await?;
    ensure!(own.len() == 1 && (own[0].1 - 627.4).abs() < 1e-6, "{own:?}");
    Ok(())
}

#[tokio::test]
async fn a_gpus_pod_is_the_one_that_has_it_and_not_the_agents_where_the_chart_has_it_scraped() -> Result<()> {
    let name = "a_gpus_pod_is_the_one_that_has_it_and_not_the_agents_where_the_chart_has_it_scraped";
    if !can_run(name, &[Need::Darter, Need::MockNvml, Need::Prometheus, Need::Helm]) {
        return Ok(());
    }
    let (mock, kubelet) = (Mock::fixture("h200-busy")?, Kubelet::start()?);
    let uuid = "GPU-4a2b6f10-0000-4000-8000-000000000200";
    kubelet.set(&[("team", "train-0", "main", "nvidia.com/gpu", &[uuid])], &[("nvidia.com/gpu", &[uuid])]);
    let socket = kubelet.socket().display().to_string();
    let options = mock.options(1)?.set("gpu.pod_resources", socket).set("gpu.dcgm_names", "legacy");
    let agent = Agent::start(options).await?;
    let objects = Helm::new()?.render(&json!({ "podMonitor": { "enabled": true } })).await?;
    let endpoint = &find(&objects, "PodMonitor", "darter")?["spec"]["podMetricsEndpoints"][0];
    // What the operator makes of a pod.
    let labels = json!({ "namespace": NAMESPACE, "pod": "darter-x7k2p", "container": "agent" });
    let scrape = json!({ "honor_labels": endpoint["honorLabels"].as_bool().unwrap_or_default(),
        "static_configs": [{ "targets": [agent.admin_address().to_string()], "labels": labels }] });
    let prometheus = Prometheus::start_with(scrape).await?;
    let readme = "darter_gpu_power_watts * on(uuid) group_left(namespace, pod) darter_gpu_allocation_info";
    for query in [readme, "DCGM_FI_DEV_POWER_USAGE"] {
        let mut found = Vec::new();
        let is_told = async || {
            found = prometheus.query(query).await?;
            Ok(!found.is_empty() && prometheus.query("darter_gpu_allocation_info").await?.len() == 1)
        };
        eventually(query, is_told).await?;
        let (labels, _) = found.first().context("no series")?;
        ensure!(labels["namespace"] == "team" && labels["pod"] == "train-0", "{query}: {labels}");
    }
    // What says nothing of a pod is still of the agent's.
    let up = prometheus.query("up").await?;
    ensure!(up[0].0["pod"] == "darter-x7k2p", "{up:?}");
    Ok(())
}

#[tokio::test]
async fn prometheus_takes_the_alerts_and_they_ask_for_what_there_is() -> Result<()> {
    if !can_run("prometheus_takes_the_alerts_and_they_ask_for_what_there_is", &[Need::Prometheus]) {
        return Ok(());
    }
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/alerts/gpus.yml");
    let mut promtool = process::command("promtool");
    promtool.args(["check", "rules"]).arg(&rules);
    process::run_ok("promtool", promtool, Duration::from_secs(30)).await?;
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/gpu/h200-idle.txt"))?;
    let t4 = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/gpu/t4-healthy.txt"))?;
    let rules = std::fs::read_to_string(rules)?;
    let names = rules.split(|other: char| !other.is_ascii_alphanumeric() && other != '_');
    let names: std::collections::BTreeSet<_> = names.filter(|name| name.starts_with("darter_")).collect();
    ensure!(names.len() > 6, "{names:?}");
    for name in names {
        let is_told = |page: &str| page.lines().any(|line| line.split(['{', ' ']).next() == Some(name));
        ensure!(is_told(&page) || is_told(&t4), "an alert asks for {name}, which no agent says");
    }
    Ok(())
}
