//! What dashboards and alerts that people have already ask for, on a real Prometheus that scrapes an agent.

use anyhow::{Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::prometheus::Prometheus;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};

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
