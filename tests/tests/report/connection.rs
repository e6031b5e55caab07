//! How reports come: at once, the newest alone, over TLS, with the token of the day.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{CheckState, GoingReason, GpuState};
use darter_core::status::Status;
use darter_tests::agent::{Agent, Options};
use darter_tests::imds::Imds;
use darter_tests::net::Place;
use darter_tests::reports::Ear;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tls::Authority;
use darter_tests::tools::{Need, can_run};
use tonic::Status as Refusal;

use crate::{NEEDS, Secure, TWO, is_lost, is_ready, plain, plain_options, two};

/// The line of `/v1/status`.
async fn standing(agent: &Agent) -> Result<darter_core::status::Report> {
    let status: Status = serde_json::from_str(&agent.admin("/v1/status").await?.text())?;
    status.report.context("no line about reports")
}

async fn errors(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(agent.metrics().await?.sum("darter_report_errors_total", &[("reason", reason)]))
}

#[tokio::test]
async fn a_report_comes_at_the_start_and_with_each_change_at_once() -> Result<()> {
    if !can_run("a_report_comes_at_the_start_and_with_each_change_at_once", &NEEDS) {
        return Ok(());
    }
    let (mock, secure) = (two()?, Secure::start().await?);
    let options = secure.options(mock.options(2)?).set("kubernetes.node", "gpu-7").set("swarm.zone", "us-east-1a");
    // There is no kubelet to ask.
    let options = options.set("gpu.device_plugin", false);
    let agent = Agent::start(options).await?;
    let first = secure.ear.next(0).await?;
    let node = first.report.node.clone().context("no node")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    assert_eq!((node.name.as_str(), node.boot_id.as_deref()), ("gpu-7", Some(boot.trim())));
    ensure!(node.uid.is_none() && node.provider_id.is_none(), "nobody was asked: {node:?}");
    assert_eq!((node.zone.as_deref(), node.agent_version.is_empty()), (Some("us-east-1a"), false));
    assert_eq!((first.report.sequence, first.report.instance.len()), (1, 32));
    ensure!(first.report.images.is_empty() && first.report.going.is_none() && first.report.swarm.is_none());
    let ready = secure.ear.hears(0, "both GPUs are ready", |heard| is_ready(&heard.report)).await?;
    let all = secure.ear.heard();
    // All that is known of a GPU.
    let gpus = ready.report.gpus.clone().context("no GPUs")?;
    let gpu = &gpus.gpus[0];
    ensure!(gpu.memory_total_bytes > Some(1 << 36) && gpu.memory_used_bytes.is_some(), "{gpu:?}");
    ensure!(gpu.power_milliwatts > Some(0) && gpu.sample_ms < Some(5_000), "{gpu:?}");
    ensure!(gpu.allocation.is_none(), "there is no kubelet to say who has it: {gpu:?}");
    let idleness = gpu.idleness.clone().context("no idleness")?;
    assert_eq!((idleness.state(), idleness.evidence.len()), (GpuState::Unknown, 7));
    let checks = ready.report.readiness.clone().context("no checks")?;
    ensure!(checks.checks.iter().any(|check| check.check == "store" && check.state() == CheckState::Ok), "{checks:?}");
    // The interval is a minute.
    mock.set(&format!("{TWO}lost = true\n"))?;
    let lost = secure.ear.hears(all.len(), "one is lost", |heard| is_lost(&heard.report)).await?;
    let gpus = lost.report.gpus.context("no GPUs")?;
    ensure!(gpus.reasons.iter().any(|reason| reason.reason == "GpuLost"), "{:?}", gpus.reasons);
    let gpu = gpus.gpus.iter().find(|gpu| gpu.is_lost).context("none is lost")?;
    assert_eq!((gpu.memory_used_bytes, gpu.sample_ms), (None, None), "absent is not zero");
    assert_eq!(gpu.idleness.clone().unwrap_or_default().state(), GpuState::Unknown);
    // One connection, each sequence once, and no report that says nothing new.
    let heard = secure.ear.heard();
    let sequences: Vec<_> = heard.iter().map(|heard| heard.report.sequence).collect();
    assert_eq!(sequences, (1..=heard.len() as u64).collect::<Vec<_>>());
    ensure!(heard.iter().all(|heard| heard.stream == 1 && heard.report.instance == first.report.instance));
    // Rounds of questions that say the same are no news.
    let calls =
        async || anyhow::Ok(agent.metrics().await?.sum("darter_nvml_call_seconds_count", &[("call", "power_usage")]));
    let before = calls().await?;
    eventually("five rounds", async || Ok(calls().await? >= before + 5.0)).await?;
    let idle = secure.ear.heard().split_off(heard.len());
    ensure!(idle.len() <= 1, "{} reports without a reason: {idle:#?}", idle.len());
    let taken = async || Ok(agent.metrics().await?.sum("darter_reports_accepted_total", &[]) >= 3.0);
    eventually("reports are taken", taken).await?;
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_report_connected", &[]), 1.0);
    let told = standing(&agent).await?;
    ensure!(told.connected_seconds.is_some() && told.accepted_seconds.is_some() && told.error.is_none(), "{told:?}");
    assert_eq!(told.scaler, secure.ear.url());
    ensure!(!agent.log().contains("first-token"), "the token is in the log");
    Ok(())
}

#[tokio::test]
async fn without_news_a_report_comes_each_interval() -> Result<()> {
    if !can_run("without_news_a_report_comes_each_interval", &[Need::Darter]) {
        return Ok(());
    }
    let ear = Ear::start(&Place::Host, None).await?;
    let agent = Agent::start(plain_options(&ear).set("report.interval", "1s")).await?;
    let fifth = ear.hears(0, "five reports", |heard| heard.report.sequence >= 5).await?;
    let first = ear.heard().remove(0);
    let (took, ran) = (fifth.at - first.at, fifth.report.running_ms - first.report.running_ms);
    ensure!(took > Duration::from_secs(1) && ran > 1_000, "{took:?}, {ran} ms");
    ensure!(!agent.log().contains("does not hear"), "{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn while_the_scaler_is_away_nothing_waits_and_the_newest_comes_first_when_it_is_back() -> Result<()> {
    if !can_run("while_the_scaler_is_away_nothing_waits_and_the_newest_comes_first_when_it_is_back", &NEEDS) {
        return Ok(());
    }
    let (mock, mut secure) = (two()?, Secure::start().await?);
    let agent = Agent::start(secure.options(mock.options(2)?)).await?;
    secure.ear.hears(0, "both GPUs are ready", |heard| is_ready(&heard.report)).await?;
    secure.ear.stop().await;
    let away = async || Ok(errors(&agent, "unreachable").await? + errors(&agent, "ended").await? >= 2.0);
    eventually("it is away", away).await?;
    let before = secure.ear.heard();
    // Much happens meanwhile, and none of it stops anything here.
    for what in [format!("{TWO}lost = true\n"), TWO.to_owned(), format!("{TWO}lost = true\n")] {
        mock.set(&what)?;
        let (is_lost, wanted) = (what.contains("lost"), if what.contains("lost") { "NotReady" } else { "Ready" });
        eventually(&format!("lost {is_lost}"), async || {
            let page: serde_json::Value = serde_json::from_str(&agent.admin("/readyz").await?.text())?;
            Ok(page["gpu"]["state"] == wanted)
        })
        .await?;
    }
    let told = standing(&agent).await?;
    ensure!(told.connected_seconds.is_none() && told.error.is_some() && told.accepted_seconds.is_some(), "{told:?}");
    assert_eq!(agent.admin("/readyz").await?.status, 200, "no node is worse for it");
    secure.ear.start_again()?;
    let first = secure.ear.next(before.len()).await?;
    ensure!(is_lost(&first.report) && first.stream > 1, "{first:?}");
    let last = before.last().context("nothing came")?;
    // One might have been on its way when the connection broke.
    ensure!(
        first.report.sequence <= last.report.sequence + 2,
        "{} after {}",
        first.report.sequence,
        last.report.sequence
    );
    assert_eq!(first.report.instance, last.report.instance);
    eventually("it is well", async || Ok(standing(&agent).await?.error.is_none())).await?;
    // That the connection broke, and that nobody is there: each once.
    for reason in ["ended", "unreachable"] {
        let line = format!("reason=\"{reason}\"");
        let lines =
            agent.log().lines().filter(|text| text.contains("does not hear this node") && text.contains(&line)).count();
        ensure!(lines <= 1, "{lines} of {reason}\n{}", agent.log());
    }
    Ok(())
}

#[tokio::test]
async fn a_scaler_that_takes_no_report_gets_no_more_and_is_left() -> Result<()> {
    if !can_run("a_scaler_that_takes_no_report_gets_no_more_and_is_left", &NEEDS) {
        return Ok(());
    }
    let (mock, ear) = (two()?, Ear::start(&Place::Host, None).await?);
    ear.answer(false);
    let options = mock.options(2)?.set("report.scaler", ear.url()).set("report.token_file", "");
    let agent = Agent::start(options.set("report.interval", "1s")).await?;
    // The next stream, after 15 s without a word.
    ear.tried(2).await?;
    assert_eq!(errors(&agent, "silent").await?, 1.0, "{}", agent.log());
    let first: Vec<_> = ear.heard().into_iter().filter(|heard| heard.stream == 1).collect();
    assert_eq!(first.len(), 8, "so many may be on their way, and no more");
    let told = standing(&agent).await?;
    ensure!(told.error.is_some_and(|error| error.contains("took no report for 15 s")));
    Ok(())
}

#[tokio::test]
async fn a_token_that_is_replaced_is_shown_at_once() -> Result<()> {
    if !can_run("a_token_that_is_replaced_is_shown_at_once", &[Need::Darter]) {
        return Ok(());
    }
    let secure = Secure::start().await?;
    let options =
        Options::new(&Place::Host).plain_registry("registry.example", "http://127.0.0.1:9").set("gpu.mode", "off");
    let agent = Agent::start(secure.options(options)).await?;
    secure.ear.next(0).await?;
    secure.ear.want(Some("Bearer second-token"));
    // As the kubelet does it: by a rename.
    std::fs::write(secure.dir.join("new"), "second-token")?;
    std::fs::rename(secure.dir.join("new"), secure.dir.join("token"))?;
    secure.ear.hears(0, "another stream", |heard| heard.stream == 2).await?;
    let bearer = |token: &str| Some(format!("Bearer {token}"));
    assert_eq!(secure.ear.tries(), [bearer("first-token"), bearer("second-token")]);
    assert_eq!(agent.metrics().await?.sum("darter_report_errors_total", &[]), 0.0, "{}", agent.log());
    // And at each connection.
    std::fs::remove_file(secure.dir.join("token"))?;
    secure.ear.end_streams();
    eventually("the token is missed", async || Ok(errors(&agent, "token").await? > 0.0)).await?;
    ensure!(agent.log().contains("report.token_file"), "{}", agent.log());
    std::fs::write(secure.dir.join("token"), "second-token")?;
    secure.ear.hears(0, "a third stream", |heard| heard.stream == 3).await?;
    Ok(())
}

#[tokio::test]
async fn a_scaler_that_refuses_is_said_once_with_the_way_out_and_asked_again() -> Result<()> {
    if !can_run("a_scaler_that_refuses_is_said_once_with_the_way_out_and_asked_again", &[Need::Darter]) {
        return Ok(());
    }
    let secure = Secure::start().await?;
    secure.ear.want(Some("Bearer another"));
    let options =
        Options::new(&Place::Host).plain_registry("registry.example", "http://127.0.0.1:9").set("gpu.mode", "off");
    let agent = Agent::start(secure.options(options)).await?;
    secure.ear.tried(3).await?;
    eventually("three refusals", async || Ok(errors(&agent, "unauthorized").await? >= 3.0)).await?;
    assert_eq!(agent.log().matches("the scaler does not hear this node").count(), 1, "{}", agent.log());
    ensure!(agent.log().contains("does not accept the token of report.token_file"), "{}", agent.log());
    secure.ear.refuse_with(|| Refusal::permission_denied("another node"));
    eventually("forbidden", async || Ok(errors(&agent, "forbidden").await? > 0.0)).await?;
    ensure!(agent.log().contains("is kubernetes.node its name?"), "{}", agent.log());
    ensure!(secure.ear.heard().is_empty() && !agent.log().contains("first-token"));
    secure.ear.want(Some("Bearer first-token"));
    secure.ear.next(0).await?;
    Ok(())
}

#[tokio::test]
async fn nothing_is_told_a_server_that_nobody_vouches_for() -> Result<()> {
    if !can_run("nothing_is_told_a_server_that_nobody_vouches_for", &[Need::Darter]) {
        return Ok(());
    }
    let secure = Secure::start().await?;
    std::fs::write(secure.dir.join("ca.pem"), Authority::new()?.pem())?;
    let options =
        Options::new(&Place::Host).plain_registry("registry.example", "http://127.0.0.1:9").set("gpu.mode", "off");
    let agent = Agent::start(secure.options(options.clone())).await?;
    eventually("another authority", async || Ok(errors(&agent, "tls").await? > 1.0)).await?;
    ensure!(agent.log().contains("report.ca") && secure.ear.tries().is_empty(), "{}", agent.log());
    // The right authority, and another name than the certificate's.
    let (authority, dir) = (Authority::new()?, Scratch::new()?);
    let ear = Ear::start(&Place::Host, Some(&authority.issue(&["scaler.example"])?)).await?;
    std::fs::write(dir.join("ca.pem"), authority.pem())?;
    let named = secure
        .options(options)
        .set("report.scaler", ear.url())
        .set("report.ca", dir.join("ca.pem").display().to_string());
    let agent = Agent::start(named.clone()).await?;
    eventually("another name", async || Ok(errors(&agent, "tls").await? > 0.0)).await?;
    ensure!(ear.tries().is_empty());
    drop(agent);
    // Where that name is the one that is meant.
    let _agent = Agent::start(named.set("report.server_name", "scaler.example")).await?;
    ear.next(0).await?;
    Ok(())
}

#[tokio::test]
async fn without_a_scaler_nobody_is_connected_to() -> Result<()> {
    if !can_run("without_a_scaler_nobody_is_connected_to", &[Need::Darter]) {
        return Ok(());
    }
    // All but the one key that says so.
    let options =
        Options::new(&Place::Host).plain_registry("registry.example", "http://127.0.0.1:9").set("gpu.mode", "off");
    let agent = Agent::start(options.set("report.interval", "1s").set("report.token_file", "")).await?;
    let status: Status = serde_json::from_str(&agent.admin("/v1/status").await?.text())?;
    ensure!(status.report.is_none(), "{:?}", status.report);
    let metrics = agent.metrics().await?;
    let is_told = |name: &str| metrics.series().iter().any(|(series, _)| series.starts_with(name));
    ensure!(!is_told("darter_report_connected") && !is_told("darter_report_errors_total"), "{:?}", metrics.series());
    assert_eq!(metrics.sum("darter_reports_total", &[]), 0.0);
    // One that has a scaler, for comparison: the same looks find something.
    let (ear, agent) = plain().await?;
    ear.next(0).await?;
    ensure!(agent.metrics().await?.sum("darter_reports_total", &[]) > 0.0);
    Ok(())
}

#[tokio::test]
async fn a_node_that_is_about_to_go_says_so_at_once_without_a_swarm_too() -> Result<()> {
    if !can_run("a_node_that_is_about_to_go_says_so_at_once_without_a_swarm_too", &[Need::Darter]) {
        return Ok(());
    }
    let (ear, imds) = (Ear::start(&Place::Host, None).await?, Imds::start(&Place::Host, "123456789012", "us-east-1")?);
    let _agent = Agent::start(plain_options(&ear).set("aws.imds_endpoint", imds.url())).await?;
    let first = ear.next(0).await?;
    ensure!(first.report.going.is_none());
    imds.take_back(true);
    let going = ear.hears(0, "it goes", |heard| heard.report.going.is_some()).await?.report.going.unwrap_or_default();
    assert_eq!(going.reason(), GoingReason::SpotNotice);
    ensure!(going.since_ms < 5_000, "{going:?}");
    let after = ear.heard().len();
    imds.take_back(false);
    ear.hears(after, "it stays", |heard| heard.report.going.is_none()).await?;
    Ok(())
}
