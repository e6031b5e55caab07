//! Agents that lie, and agents that are gone: what was known stays, and nothing is done because of it.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{Evidence, Going, GoingReason, Report};
use darter_tests::scaler::{Mouth, Scaler, at, image, report};
use tonic::{Code, Status};

use crate::{ONE, is_here};

/// Says it on a stream of its own; why it was not taken.
async fn refused(scaler: &Scaler, report: Report) -> Result<Status> {
    let refused = Mouth::to(scaler).await?.say(report).await;
    refused.err().context("it was taken")
}

/// How often a reason was counted.
async fn counted(scaler: &Scaler, reason: &str) -> Result<f64> {
    Ok(scaler.metrics().await?.sum("darter_scaler_report_refusals_total", &[("reason", reason)]))
}

#[tokio::test]
async fn a_report_that_was_said_before_or_cannot_be_changes_nothing_and_is_counted() -> Result<()> {
    if !is_here("a_report_that_was_said_before_or_cannot_be_changes_nothing_and_is_counted") {
        return Ok(());
    }
    let scaler = Scaler::start(ONE).await?;
    let mut agent = Mouth::to(&scaler).await?;
    agent.say(report("gpu-1", 7)).await?;
    let state = scaler.until("/v1/state", "heard", |page| !page["state"]["nodes"]["gpu-1"]["report"].is_null()).await?;
    let heard = at(&state, "state.nodes.gpu-1.report.heard")?.clone();
    let of = |change: fn(&mut Report)| {
        let mut report = report("gpu-1", 8);
        change(&mut report);
        report
    };
    for (report, reason, code) in [
        (report("gpu-1", 7), "sequence", Code::InvalidArgument),
        (report("gpu-1", 1), "sequence", Code::InvalidArgument),
        (of(|report| report.images = vec![image(1); 201]), "bounds", Code::InvalidArgument),
        (of(|report| report.images = vec![image(1); 100_000]), "too_long", Code::OutOfRange),
        (of(|report| report.running_ms = u64::MAX), "nonsense", Code::InvalidArgument),
        (of(|report| report.images[0].used_ms = Some(u64::MAX)), "nonsense", Code::InvalidArgument),
        (
            of(|report| {
                let idleness = report.gpus.as_mut().and_then(|gpus| gpus.gpus[0].idleness.as_mut());
                if let Some(idleness) = idleness {
                    idleness.evidence = vec![Evidence { value: Some(f64::NAN), ..Evidence::default() }];
                }
            }),
            "nonsense",
            Code::InvalidArgument,
        ),
    ] {
        let before = counted(&scaler, reason).await?;
        let status = refused(&scaler, report).await?;
        assert_eq!(status.code(), code, "{reason}: {status}");
        assert_eq!(counted(&scaler, reason).await?, before + 1.0, "{reason}");
    }
    // The stream that did nothing wrong is still there; what it says is taken.
    agent.say(report("gpu-1", 8)).await?;
    let state =
        scaler.until("/v1/state", "newer", |page| page["state"]["nodes"]["gpu-1"]["report"]["heard"] != heard).await?;
    assert_eq!(at(&state, "state.images")?.as_array().map(Vec::len), Some(1), "nothing of what was refused is kept");
    // Another life counts anew, and then none of the one before is heard.
    agent.say(Report { instance: "second".to_owned(), ..report("gpu-1", 1) }).await?;
    let status = refused(&scaler, report("gpu-1", 9)).await?;
    assert!(status.message().contains("earlier life"), "{status}");
    assert_eq!(counted(&scaler, "instance").await?, 1.0);
    Ok(())
}

#[tokio::test]
async fn one_stream_speaks_for_one_node_and_a_second_stream_of_it_ends_the_first() -> Result<()> {
    if !is_here("one_stream_speaks_for_one_node_and_a_second_stream_of_it_ends_the_first") {
        return Ok(());
    }
    let scaler = Scaler::start(ONE).await?;
    let mut agent = Mouth::to(&scaler).await?;
    agent.say(report("gpu-1", 1)).await?;
    let status = agent.say(report("gpu-2", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let (mut first, mut second) = (Mouth::to(&scaler).await?, Mouth::to(&scaler).await?);
    first.say(report("gpu-1", 2)).await?;
    second.say(report("gpu-1", 3)).await?;
    let ended = first.end().await;
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    second.say(report("gpu-1", 4)).await?;
    Ok(())
}

#[tokio::test]
async fn an_agent_that_is_gone_is_not_known_and_its_node_is_not_removed() -> Result<()> {
    if !is_here("an_agent_that_is_gone_is_not_known_and_its_node_is_not_removed") {
        return Ok(());
    }
    let quick = "[policy]\nreport_period_ms = 200\nreport_lifetime_ms = 1000\n[policy.remove]\ndoomed = true\n";
    let scaler = Scaler::start(&format!("{ONE}\n{quick}")).await?;
    let mut agent = Mouth::to(&scaler).await?;
    // As long as it reports it is known.
    for sequence in 1.. {
        agent.say(report("gpu-1", sequence)).await?;
        let page = scaler.get("/v1/explain/gpu-1").await?.text();
        if page.contains("last copy of") {
            break;
        }
        ensure!(sequence < 1000, "{page}");
    }
    drop(agent);
    let said = scaler.says("gpu-1", "nothing is known of it").await?;
    assert!(said.contains("it reported"), "{said}");
    // Even one that its cloud takes back, by its last word.
    let going = Going { reason: GoingReason::SpotNotice.into(), since_ms: 0 };
    let mut doomed = Mouth::to(&scaler).await?;
    doomed.say(Report { going: Some(going), images: Vec::new(), ..report("gpu-2", 1) }).await?;
    drop(doomed);
    scaler.says("gpu-2", "nothing is known of it").await?;
    let metrics = scaler.metrics().await?;
    assert_eq!(metrics.sum("darter_scaler_input_stale", &[("input", "reports")]), 2.0);
    assert_eq!(metrics.sum("darter_scaler_report_streams", &[]), 0.0);
    Ok(())
}

#[tokio::test]
async fn two_hundred_agents_are_known_again_after_a_restart() -> Result<()> {
    if !is_here("two_hundred_agents_are_known_again_after_a_restart") {
        return Ok(());
    }
    // However long this machine takes to open them: what was said once stays fresh.
    let slow = "[policy]\nreport_period_ms = 60000\nreport_lifetime_ms = 600000\n";
    let mut scaler = Scaler::start(&format!("{ONE}\n{slow}")).await?;
    let known = |nodes: u64| move |page: &serde_json::Value| page["nodes"]["fresh"] == nodes;
    let mut sequence = 0;
    for _ in 0..2 {
        sequence += 1;
        let speak = |n: u64| {
            let scaler = &scaler;
            async move {
                let mut agent = Mouth::to(scaler).await?;
                agent.say(report(&format!("gpu-{n}"), sequence)).await?;
                anyhow::Ok(agent)
            }
        };
        let agents = futures_util::future::try_join_all((0..200).map(speak)).await?;
        scaler.until("/v1/status", "all known", known(200)).await?;
        assert_eq!(scaler.metrics().await?.sum("darter_scaler_report_streams", &[]), 200.0);
        drop(agents);
        if sequence == 1 {
            scaler.stop().await?;
            scaler.start_again().await?;
        }
    }
    Ok(())
}
