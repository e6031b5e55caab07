//! Calls into NVML that do not come back, or late: what is said meanwhile, what is not held up, and what is said again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Metrics};
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use futures_util::future::try_join_all;
use serde_json::Value;

use crate::{NEEDS, becomes};

/// The stop waits for NVML for 2 s.
const STOP: Duration = Duration::from_secs(6);
/// A machine that others use too answers late. Who waits for a call that hangs never does.
const ANSWER: Duration = Duration::from_secs(1);

/// A healthy GPU of which this call does not come back while the configuration says so.
fn hanging(symbol: &str) -> String {
    format!("base = 'h200-idle'\n[[overrides]]\nsymbol = '{symbol}'\nhang = true\n")
}

/// Asks for a scrape, for liveness and for readiness again and again until `is_so`, and says how long the slowest
/// answer took.
async fn slowest(agent: &Agent, what: &str, is_so: impl Fn(&Metrics, &Value) -> bool) -> Result<Duration> {
    let mut slowest = Duration::ZERO;
    let mut timed = async |path: &str| {
        let began = Instant::now();
        let answer = agent.admin(path).await?;
        slowest = slowest.max(began.elapsed());
        ensure!(answer.status == 200, "{path}: {}", answer.status);
        anyhow::Ok(answer.text())
    };
    eventually(what, async || {
        timed("/healthz").await?;
        let page = serde_json::from_str(&timed("/readyz").await?)?;
        Ok(is_so(&Metrics::parse(&timed("/metrics").await?), &page))
    })
    .await?;
    Ok(slowest)
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
    let rounds = async || anyhow::Ok(agent.metrics().await?.sum("darter_gpu_collect_timestamp_seconds", &[]));
    let before = rounds().await?;
    eventually("it is asked on", async || Ok(rounds().await? > before)).await?;
    assert_eq!(agent.metrics().await?.sum("darter_gpu_collect_success", &[]), 0.0);
    let began = Instant::now();
    agent.stop().await?;
    ensure!(began.elapsed() < STOP, "the stop took {:?}", began.elapsed());
    Ok(())
}

/// A call hangs and comes back: what is told, and that nobody waits for it.
async fn comes_back(symbol: &str, call: &str) -> Result<()> {
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    let read = |metrics: &Metrics| metrics.sum("darter_gpu_collect_timestamp_seconds", &[]);
    let shown = |metrics: &Metrics| {
        metrics.series().iter().any(|(series, _)| series.starts_with("darter_gpu_temperature_celsius"))
    };
    eventually("it was read", async || Ok(shown(&agent.metrics().await?))).await?;
    mock.set(&hanging(symbol))?;
    let told = slowest(&agent, "it is told that it hangs, and what is old is not shown", |metrics, page| {
        let is_told = page["gpu"]["state"] == "Unknown" && page["gpu"]["reasons"][0]["reason"] == "NvmlUnresponsive";
        let is_in_metrics = metrics.series().iter().any(|(name, _)| name.contains("reason=\"NvmlUnresponsive\""));
        is_told && is_in_metrics && metrics.sum("darter_gpu_collect_success", &[]) == 0.0
    });
    let told = told.await?;
    ensure!(told < ANSWER, "an answer took {told:?}");
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_info", &[]), 1.0, "what does not change is known still");
    // Readings of before the call are too old by now, unless it is the other thread whose call hangs.
    assert_eq!(shown(&metrics), call == "event_wait", "{call}");
    ensure!(agent.log().contains(&format!("NVML hangs call=\"{call}\"")), "{}", agent.log());
    let before = read(&metrics);
    mock.set("base = 'h200-busy'")?;
    let again = slowest(&agent, "it is ready again, by what it says now", |metrics, page| {
        page["gpu"]["state"] == "Ready" && read(metrics) > before && metrics.sum("darter_gpu_power_watts", &[]) > 600.0
    });
    let again = again.await?;
    ensure!(again < ANSWER, "an answer took {again:?}");
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_collect_success", &[]), 1.0);
    assert_eq!(metrics.sum("darter_nvml_init_total", &[]), 1.0, "it was not started again for that");
    // What it took is counted once it is known.
    let took = metrics.sum("darter_nvml_call_seconds_sum", &[("call", call)]);
    ensure!(took > 15.0, "{call} took {took} s");
    eventually("it is said", async || Ok(agent.log().contains("NVML answers again"))).await?;
    let began = Instant::now();
    agent.stop().await?;
    ensure!(began.elapsed() < STOP, "the stop took {:?}", began.elapsed());
    ensure!(!agent.log().contains("does not let go"), "{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn a_call_that_hangs_makes_the_gpus_unknown_and_one_that_comes_back_makes_them_ready_by_new_readings()
-> Result<()> {
    let name = "a_call_that_hangs_makes_the_gpus_unknown_and_one_that_comes_back_makes_them_ready_by_new_readings";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let calls = [("nvmlDeviceGetPowerUsage", "power_usage"), ("nvmlEventSetWait_v2", "event_wait")];
    try_join_all(calls.map(|(symbol, call)| async move { comes_back(symbol, call).await.context(call) })).await?;
    Ok(())
}

#[tokio::test]
async fn a_call_that_hangs_for_good_holds_up_neither_a_scrape_nor_the_stop() -> Result<()> {
    if !can_run("a_call_that_hangs_for_good_holds_up_neither_a_scrape_nor_the_stop", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    mock.set(&hanging("nvmlDeviceGetPowerUsage"))?;
    let told =
        slowest(&agent, "it is told", |metrics, _| metrics.sum("darter_gpu_collect_success", &[]) == 0.0).await?;
    ensure!(told < ANSWER, "an answer took {told:?}");
    let began = Instant::now();
    agent.stop().await?;
    ensure!(began.elapsed() < STOP, "the stop took {:?}", began.elapsed());
    ensure!(agent.log().contains("NVML does not let go"), "{}", agent.log());
    Ok(())
}
