//! Prometheus on both sides: a real one that is asked for demand, and one that reads what the scaler says of itself.

use anyhow::{Result, ensure};
use darter_tests::prometheus::{Prometheus, lint};
use darter_tests::scaler::{Mouth, Scaler, report};
use darter_tests::tools::{Need, can_run};

use crate::{LLM, ONE};

#[tokio::test]
async fn a_prometheus_is_asked_for_demand_and_no_series_of_it_is_not_zero() -> Result<()> {
    if !can_run("a_prometheus_is_asked_for_demand_and_no_series_of_it_is_not_zero", &[Need::Darter, Need::Prometheus]) {
        return Ok(());
    }
    let prometheus = Prometheus::start("127.0.0.1:9".parse()?).await?;
    let lost = "[[workloads]]\nname = 'models/lost'\nmost = 4\nprometheus = 'nobody_has_this'\n";
    let wrong = "[[workloads]]\nname = 'models/wrong'\nmost = 4\nprometheus = 'sum('\n";
    let asked = format!("[demand]\nprometheus = '{}'\nevery = '1s'\n", prometheus.url());
    let one = ONE.replace("target = \"1\"", "target = \"1\"\nprometheus = 'vector(3) + 0.5'");
    let scaler = Scaler::start(&format!("{one}\n{lost}\n{wrong}\n{asked}")).await?;
    scaler.until("/v1/explain/models/llm", "3.5 of 1 each", |page| page["keda"] == "KEDA is told 4").await?;
    for (workload, reason) in [("lost", "prometheus_empty"), ("wrong", "prometheus_query")] {
        scaler.until_counted("darter_scaler_demand_refusals_total", &[("reason", reason)]).await?;
        let page = scaler.json(&format!("/v1/explain/models/{workload}")).await?;
        let said = page["keda"].as_str().unwrap_or_default();
        ensure!(said.contains("no sample of its demand came yet"), "{said}");
    }
    drop(prometheus);
    scaler.until_counted("darter_scaler_demand_refusals_total", &[("reason", "prometheus_away")]).await?;
    let page = scaler.json("/v1/explain/models/llm").await?;
    assert_eq!(page["keda"], "KEDA is told 4", "what it said last holds for a while, and what was told stays");
    Ok(())
}

#[tokio::test]
async fn the_scalers_metrics_are_clean_and_have_what_alerts_look_at() -> Result<()> {
    if !can_run("the_scalers_metrics_are_clean_and_have_what_alerts_look_at", &[Need::Darter, Need::Prometheus]) {
        return Ok(());
    }
    let scaler = Scaler::start(ONE).await?;
    let mut agent = Mouth::to(&scaler).await?;
    agent.say(report("gpu-1", 1)).await?;
    scaler.demand(LLM, 2).await?;
    scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 2").await?;
    let page = scaler.get("/metrics").await?.text();
    assert_eq!(lint(&page).await?, "");
    for series in [
        "darter_scaler_report_age_seconds{node=\"gpu-1\"} ",
        "darter_scaler_desired_replicas{workload=\"models/llm\"} 2\n",
        "darter_scaler_queue_depth{workload=\"models/llm\"} 2",
        "darter_scaler_queue_sample_age_seconds{workload=\"models/llm\"} ",
        "darter_scaler_decisions_total{kind=\"keda\",reason=\"backlog\"} 1\n",
        "darter_scaler_input_stale{input=\"reports\"} 0\n",
        "darter_scaler_report_refusals_total{reason=\"identity\"} 0\n",
    ] {
        ensure!(page.contains(series), "no {series} in\n{page}");
    }
    Ok(())
}
