//! Calls into NVML that do not come back, or late: what is said meanwhile, what is not held up, and what is said again.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;

use crate::{NEEDS, becomes};

/// The stop waits for NVML for 2 s.
const STOP: Duration = Duration::from_secs(6);

/// A healthy GPU of which this call does not come back while the configuration says so.
fn hanging(symbol: &str) -> String {
    format!("base = 'h200-idle'\n[[overrides]]\nsymbol = '{symbol}'\nhang = true\n")
}

/// How often a call was made, by what is known of how long it took.
async fn made(agent: &Agent, call: &str) -> Result<f64> {
    Ok(agent.metrics().await?.sum("darter_nvml_call_seconds_count", &[("call", call)]))
}

#[tokio::test]
async fn a_wait_for_events_that_does_not_end_is_told_and_is_no_error_where_nothing_came() -> Result<()> {
    if !can_run("a_wait_for_events_that_does_not_end_is_told_and_is_no_error_where_nothing_came", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    eventually("it waited three times", async || Ok(made(&agent, "event_wait").await? >= 3.0)).await?;
    for call in ["event_set_create", "event_register"] {
        assert_eq!(made(&agent, call).await?, 1.0, "{call}");
    }
    let metrics = agent.metrics().await?;
    let waited = metrics.sum("darter_nvml_call_seconds_sum", &[("call", "event_wait")]);
    ensure!(waited > 2.5, "three waits of a second each took {waited} s");
    assert_eq!(metrics.sum("darter_nvml_errors_total", &[]), 0.0);
    assert_eq!(metrics.sum("darter_gpu_collect_success", &[]), 1.0);
    // The rest of NVML answers on: only who waits for events does not come back.
    mock.set(&hanging("nvmlEventSetWait_v2"))?;
    becomes(&agent, "Unknown", "NvmlUnresponsive").await?;
    eventually("the log says what hangs", async || Ok(agent.log().contains("NVML hangs call=\"event_wait\""))).await?;
    let rounds = async || Ok(agent.metrics().await?.sum("darter_gpu_collect_timestamp_seconds", &[]));
    let before: f64 = rounds().await?;
    eventually("it is asked on", async || Ok(rounds().await? > before)).await?;
    assert_eq!(agent.metrics().await?.sum("darter_gpu_collect_success", &[]), 0.0);
    let began = Instant::now();
    agent.stop().await?;
    ensure!(began.elapsed() < STOP, "the stop took {:?}", began.elapsed());
    Ok(())
}
