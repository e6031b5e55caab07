//! Work that no look at a GPU happens to see.

use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::tools::can_run;
use serde_json::Value;

use crate::NEEDS;

/// NVML's own samples: microseconds, and percent.
fn samples(samples: &[(u64, u32)]) -> String {
    let each = samples.iter().map(|(timestamp, value)| format!("{{ timestamp = {timestamp}, value = {value} }}"));
    format!("base = 't4-healthy'\n[gpu]\nsamples = {{ 1 = [{}] }}\n", each.collect::<Vec<_>>().join(", "))
}

#[tokio::test]
async fn a_kernel_between_two_looks_makes_a_gpu_without_profiling_busy() -> Result<()> {
    if !can_run("a_kernel_between_two_looks_makes_a_gpu_without_profiling_busy", &NEEDS) {
        return Ok(());
    }
    // From before the agent: no word on what happens now.
    let old = [(1_000_000, 90), (2_000_000, 0)];
    let mock = Mock::new(&samples(&old))?;
    let agent = Agent::start(mock.options(1)?.set("gpu.idle_window", "12s")).await?;
    let says = async |wanted: &str, value: f64| {
        let patience = Duration::from_secs(60);
        let comes = tokio::time::timeout(patience, async {
            loop {
                let page: Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
                let gpus = page["gpu"]["idleness"].as_object().cloned().unwrap_or_default();
                let evidence = gpus.values().flat_map(|gpu| gpu["evidence"].as_array().into_iter().flatten());
                let mut activity = evidence.filter(|evidence| evidence["witness"] == "activity");
                if activity.any(|one| one["says"] == wanted && one["value"].as_f64() == Some(value)) {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        comes.await.with_context(|| format!("not {wanted} {value} after {patience:?}"))?
    };
    // The first half minute after NVML starts says nothing.
    says("idle", 0.0).await?;
    // The utilization itself is 0 whenever it is asked for.
    let busy = [&old[..], &[(3_000_000, 40), (4_000_000, 0)]].concat();
    mock.set(&samples(&busy))?;
    says("busy", 0.4).await?;
    // Each sample counts once: a window later it is over.
    says("idle", 0.0).await
}
