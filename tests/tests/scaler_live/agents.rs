//! Real agents that report to a real scaler, over TLS with a token; and what it asks of those that speak for them.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{GpuState, Report};
use darter_tests::agent::{Agent, Options};
use darter_tests::nvml::Mock;
use darter_tests::scaler::{Mouth, Scaler, at, report};
use darter_tests::tls::Authority;
use darter_tests::tools::{Need, can_run};

use crate::{ONE, is_here};

#[tokio::test]
async fn a_real_agent_is_heard_over_tls_with_its_token_and_what_its_gpus_do_is_known() -> Result<()> {
    if !can_run(
        "a_real_agent_is_heard_over_tls_with_its_token_and_what_its_gpus_do_is_known",
        &[Need::Darter, Need::MockNvml],
    ) {
        return Ok(());
    }
    let authority = Authority::new()?;
    let secure =
        "[grpc]\ncert = 'DIR/cert.pem'\nkey = 'DIR/key.pem'\n[access]\nmode = 'tokens'\ntoken_file = 'DIR/tokens'\n";
    let scaler = Scaler::start_with(&format!("{ONE}\n{secure}"), |dir| {
        authority.issue(&["127.0.0.1"])?.write(dir)?;
        std::fs::write(dir.join("tokens"), "0123456789abcdef0 report:gpu-7\n")?;
        std::fs::write(dir.join("ca.pem"), authority.pem())?;
        Ok(std::fs::write(dir.join("token"), "0123456789abcdef0\n")?)
    })
    .await?;
    let mock =
        Mock::new("base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\n")?;
    let at_dir = |name: &str| scaler.dir().join(name).display().to_string();
    let options = |node: &str| -> Result<Options> {
        Ok(mock
            .options(2)?
            .set("kubernetes.node", node)
            // There is no kubelet: else the verdict on the GPUs waits for it.
            .set("gpu.device_plugin", false)
            .set("report.scaler", scaler.grpc())
            .set("report.interval", "1s")
            .set("report.ca", at_dir("ca.pem"))
            .set("report.token_file", at_dir("token")))
    };
    let agent = Agent::start_unready(options("gpu-7")?).await?;
    let known = |page: &serde_json::Value| {
        let nodes = page["state"]["nodes"].as_object();
        nodes.is_some_and(|nodes| {
            // One more while the verdict on all of them is not known: that keeps it from being idle.
            let gpus = |node: &serde_json::Value| node["report"]["gpus"].as_array().map(Vec::len);
            nodes.values().any(|node| node["name"] == "gpu-7" && gpus(node) == Some(2))
        })
    };
    let state = scaler.until("/v1/state", "both GPUs of gpu-7", known).await.with_context(|| agent.log())?;
    let node = at(&state, "state.nodes")?.as_object().and_then(|nodes| nodes.values().next()).context("no node")?;
    assert_eq!(node["pool"], "l4");
    assert_eq!(agent.metrics().await?.sum("darter_report_connected", &[]), 1.0);
    // The same token for another node.
    let liar = Agent::start_unready(options("gpu-8")?).await?;
    scaler.until_counted("darter_scaler_report_refusals_total", &[("reason", "identity")]).await?;
    let state = scaler.json("/v1/state").await?;
    let nodes = at(&state, "state.nodes")?.as_object().context("no nodes")?;
    ensure!(nodes.values().all(|node| node["name"] != "gpu-8"), "{nodes:#?}\n{}", liar.log());
    Ok(())
}

#[tokio::test]
async fn the_last_copy_of_a_hot_image_keeps_its_node_and_the_agent_is_asked_to_say_so() -> Result<()> {
    if !is_here("the_last_copy_of_a_hot_image_keeps_its_node_and_the_agent_is_asked_to_say_so") {
        return Ok(());
    }
    let scaler = Scaler::start(&format!("{ONE}\n[policy.protect]\ncopy_bytes = 0\n")).await?;
    let mut agent = Mouth::to(&scaler).await?;
    agent.say(report("gpu-1", 1)).await?;
    let asked = loop {
        let directive = agent.next().await?;
        if directive.protect.is_some() {
            break directive;
        }
    };
    let protect = asked.protect.context("no lease")?;
    assert!(asked.sequence > 0 && (590_000..=600_000).contains(&protect.for_ms), "{protect:?}");
    assert!(protect.reason.contains("node gpu-1 kept: last copy of sha256:"), "{protect:?}");
    let metrics = scaler.metrics().await?;
    assert_eq!(metrics.sum("darter_scaler_actions_total", &[("actuator", "protect"), ("outcome", "done")]), 1.0);
    assert_eq!(metrics.sum("darter_scaler_protected_nodes", &[("reason", "last-copy")]), 1.0);
    Ok(())
}

#[tokio::test]
async fn an_image_that_one_node_alone_has_is_brought_to_another_by_its_digest() -> Result<()> {
    if !is_here("an_image_that_one_node_alone_has_is_brought_to_another_by_its_digest") {
        return Ok(());
    }
    let slow = "[policy]\nreport_period_ms = 60000\nreport_lifetime_ms = 600000\n";
    let scaler = Scaler::start(&format!("{ONE}\n{slow}")).await?;
    let (mut has, mut stays) = (Mouth::to(&scaler).await?, Mouth::to(&scaler).await?);
    // This one stays by itself: its GPU works.
    let mut busy = Report { images: Vec::new(), ..report("gpu-2", 1) };
    for idleness in busy.gpus.iter_mut().flat_map(|gpus| &mut gpus.gpus).filter_map(|gpu| gpu.idleness.as_mut()) {
        idleness.state = GpuState::Busy.into();
    }
    stays.say(busy).await?;
    has.say(report("gpu-1", 1)).await?;
    let asked = loop {
        if let Some(prewarm) = stays.next().await?.prewarm {
            break prewarm;
        }
    };
    let wanted = darter_tests::scaler::image(1);
    assert_eq!(asked.images, [format!("registry.example/team/app@{}", wanted.digest)]);
    Ok(())
}
