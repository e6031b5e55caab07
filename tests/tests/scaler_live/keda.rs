//! What KEDA is told, and when: nothing out of ignorance, and everything at once.

use anyhow::{Context as _, Result, ensure};
use darter_tests::keda::{Keda, Polled, Push};
use darter_tests::scaler::Scaler;
use http::Method;
use tonic::Code;

use crate::{LLM, ONE, is_here};

const NONE: Polled = Polled { replicas: 0, is_active: false };

fn some(replicas: u32) -> Polled {
    Polled { replicas, is_active: true }
}

#[tokio::test]
async fn demand_reaches_keda_as_a_push_and_as_a_metric_and_both_say_why() -> Result<()> {
    if !is_here("demand_reaches_keda_as_a_push_and_as_a_metric_and_both_say_why") {
        return Ok(());
    }
    let scaler = Scaler::start(ONE).await?;
    let mut keda = Keda::new(&scaler.grpc(), "models", "llm", &[])?;
    let silent = keda.poll().await.unwrap_err();
    assert_eq!(silent.code(), Code::Unavailable, "silence is not idleness: {silent}");
    assert!(silent.message().contains("no sample of its demand came yet"), "{silent}");
    scaler.demand(LLM, 0).await?;
    scaler.until("/v1/explain/models/llm", "decided", |page| page["keda"] == "KEDA is told 0").await?;
    assert_eq!(keda.poll().await?, NONE);
    let mut pushes = keda.listen();
    assert_eq!(pushes.next().await?, Push::Opened);
    scaler.demand(LLM, 3).await?;
    let first = pushes.active().await?;
    assert_eq!(keda.poll().await?, some(3));
    // KEDA drops what comes while it looks elsewhere: it is said again.
    let second = pushes.active().await?;
    assert!(second > first);
    scaler.says(LLM, "workload models/llm stays at 3 replicas: 3 wait or run, seen ").await?;
    let told = scaler.darter(&["explain", LLM]).await?;
    ensure!(told.status.success(), "{}", told.stderr);
    assert!(told.stdout.contains("3 wait or run") && told.stdout.ends_with("KEDA is told 3\n"), "{}", told.stdout);
    let told = scaler.darter(&["explain", "models/other"]).await?;
    assert_eq!(told.status.code(), Some(1));
    assert!(told.stderr.contains("nothing is known of models/other; known are models/llm, l4"), "{}", told.stderr);
    let status = scaler.darter(&["status", "--scaler", &scaler.http()]).await?;
    ensure!(status.status.success(), "{}", status.stderr);
    assert!(status.stdout.contains("workload models/llm: KEDA is told 3"), "{}", status.stdout);
    Ok(())
}

#[tokio::test]
async fn what_was_needed_is_kept_for_a_while_and_then_given_up() -> Result<()> {
    if !is_here("what_was_needed_is_kept_for_a_while_and_then_given_up") {
        return Ok(());
    }
    let scaler = Scaler::start(&format!("{ONE}\n[policy.keep]\nusual_ms = 1500\nmost_ms = 1500\n")).await?;
    let mut keda = Keda::new(&scaler.grpc(), "models", "llm", &[])?;
    scaler.demand(LLM, 2).await?;
    scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 2").await?;
    scaler.demand(LLM, 0).await?;
    // By itself: no further sample comes.
    scaler.until("/v1/explain/models/llm", "given up", |page| page["keda"] == "KEDA is told 0").await?;
    assert_eq!(keda.poll().await?, NONE);
    let page = scaler.json("/v1/decisions").await?;
    let lowered = page["decisions"].as_array().and_then(|decisions| decisions.last()).context("nothing was decided")?;
    let reasons = lowered["reasons"].as_array().context("no reasons")?;
    let mut compared = reasons.iter().flat_map(|reason| reason["compared"].as_array().into_iter().flatten());
    let gap = compared.find(|compared| compared["what"] == "gap-ms").context("no gap")?;
    assert!(gap["with"] == 1500 && gap["is"].as_u64() >= Some(1500), "{gap}");
    Ok(())
}

#[tokio::test]
async fn a_trigger_describes_a_workload_that_the_configuration_does_not_know() -> Result<()> {
    if !is_here("a_trigger_describes_a_workload_that_the_configuration_does_not_know") {
        return Ok(());
    }
    let scaler = Scaler::start(ONE).await?;
    let code = |error: tonic::Status| (error.code(), error.message().to_owned());
    let ask = |metadata: &[(&str, &str)]| Keda::new(&scaler.grpc(), "team", "scaled", metadata);
    let (of, text) = code(ask(&[("scalerAddress", "x:1")])?.poll().await.unwrap_err());
    assert!(of == Code::NotFound && text.contains("team/scaled: no such workload"), "{text}");
    let (of, text) = code(ask(&[("maxReplicas", "many")])?.poll().await.unwrap_err());
    assert!(of == Code::InvalidArgument && text.contains("`many` is not a count"), "{text}");
    let (of, text) = code(ask(&[("workload", "models/llm"), ("pool", "l4")])?.poll().await.unwrap_err());
    assert!(
        of == Code::InvalidArgument && text.contains("not the name of a Deployment"),
        "of no other namespace: {text}"
    );
    let (of, text) =
        code(ask(&[("workload", "app"), ("pool", "h100"), ("maxReplicas", "5")])?.poll().await.unwrap_err());
    assert!(of == Code::FailedPrecondition && text.contains("in which pool"), "{text}");
    let mut keda = ask(&[("workload", "app"), ("pool", "l4"), ("maxReplicas", "5"), ("target", "2.5")])?;
    let (of, text) = code(keda.poll().await.unwrap_err());
    assert!(of == Code::Unavailable && text.contains("no sample"), "{text}");
    scaler.demand("team/app", 6).await?;
    scaler.until("/v1/explain/team/app", "raised", |page| page["keda"] == "KEDA is told 3").await?;
    assert_eq!(keda.poll().await?, some(3));
    Ok(())
}

#[tokio::test]
async fn keda_that_starts_again_is_told_at_once_and_one_whose_scaler_did_comes_back() -> Result<()> {
    if !is_here("keda_that_starts_again_is_told_at_once_and_one_whose_scaler_did_comes_back") {
        return Ok(());
    }
    // Longer than the test takes, whatever this machine does besides.
    let mut scaler = Scaler::start(&format!("{ONE}\n[policy.keep]\nleast_ms = 3600000\n")).await?;
    let mut keda = Keda::new(&scaler.grpc(), "models", "llm", &[])?;
    scaler.demand(LLM, 2).await?;
    keda.listen().active().await?;
    // Another operator: its stream begins with what is wanted now.
    let mut again = Keda::new(&scaler.grpc(), "models", "llm", &[])?.listen();
    again.active().await?;
    scaler.stop().await?;
    assert_eq!(keda.poll().await.unwrap_err().code(), Code::Unavailable);
    scaler.start_again().await?;
    while again.next().await? != Push::Opened {}
    let after = keda.poll().await.unwrap_err();
    assert!(
        after.message().contains("no sample of its demand came yet"),
        "a scaler that starts knows nothing: {after}"
    );
    // Two were there: that they are not needed now takes none of them away at once.
    scaler.demand(LLM, 0).await?;
    scaler.until("/v1/explain/models/llm", "kept", |page| page["keda"] == "KEDA is told 2").await?;
    again.active().await?;
    assert_eq!(keda.poll().await?, some(2));
    Ok(())
}

#[tokio::test]
async fn one_that_observes_decides_and_counts_and_tells_keda_nothing() -> Result<()> {
    if !is_here("one_that_observes_decides_and_counts_and_tells_keda_nothing") {
        return Ok(());
    }
    let scaler = Scaler::start(&ONE.replace("\"on\"", "\"observe\"")).await?;
    let mut keda = Keda::new(&scaler.grpc(), "models", "llm", &[])?;
    scaler.demand(LLM, 4).await?;
    let would = "KEDA would be told 4, and is told an error: this scaler only observes (actuators.keda)";
    scaler.until("/v1/explain/models/llm", "decided", |page| page["keda"] == would).await?;
    assert_eq!(keda.poll().await.unwrap_err().code(), Code::FailedPrecondition);
    let metrics = scaler.metrics().await?;
    let observed = [("actuator", "keda"), ("outcome", "observed")];
    assert_eq!(metrics.sum("darter_scaler_actions_total", &observed), 1.0, "once, not at each look");
    assert_eq!(metrics.sum("darter_scaler_actions_total", &[("outcome", "done")]), 0.0);
    Ok(())
}

#[tokio::test]
async fn while_it_is_frozen_nothing_is_raised_over_a_restart_too() -> Result<()> {
    if !is_here("while_it_is_frozen_nothing_is_raised_over_a_restart_too") {
        return Ok(());
    }
    let mut scaler = Scaler::start(ONE).await?;
    scaler.demand(LLM, 1).await?;
    scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 1").await?;
    let answer = scaler.order(Method::POST, "/v1/freeze", None, "{}").await?;
    assert_eq!(answer.status, 400, "who finds it frozen wants to know why");
    let answer = scaler.order(Method::POST, "/v1/freeze", None, r#"{"why": "an audit"}"#).await?;
    ensure!(answer.status == 200, "{}", answer.text());
    scaler.demand(LLM, 5).await?;
    scaler.says(LLM, "frozen").await?;
    scaler.stop().await?;
    scaler.start_again().await?;
    scaler.demand(LLM, 5).await?;
    scaler.until("/v1/explain/models/llm", "held", |page| page["keda"] == "KEDA is told 1").await?;
    let status = scaler.darter(&["status", "--scaler", &scaler.http()]).await?;
    assert!(status.stdout.contains("FROZEN: an audit"), "{}", status.stdout);
    assert_eq!(scaler.metrics().await?.sum("darter_scaler_frozen", &[]), 1.0);
    let answer = scaler.order(Method::DELETE, "/v1/freeze", None, "").await?;
    ensure!(answer.status == 200, "{}", answer.text());
    scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 5").await?;
    Ok(())
}
