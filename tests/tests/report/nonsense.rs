//! Scalers that ask for what makes no sense, or for too much of it.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{Directive, PrewarmImages, Protect, Refusal, Release, Report};
use darter_tests::agent::Agent;
use darter_tests::reports::Ear;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};

use crate::plain;

const NEEDS: [Need; 1] = [Need::Darter];

async fn refusals(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(agent.metrics().await?.sum("darter_report_refusals_total", &[("reason", reason)]))
}

fn protect(for_ms: u64) -> Directive {
    Directive { protect: Some(Protect { for_ms, reason: "busy".to_owned() }), ..Directive::default() }
}

fn images(images: Vec<String>) -> Directive {
    Directive { prewarm: Some(PrewarmImages { images }), ..Directive::default() }
}

/// Says it, and waits until a report has why it was refused.
async fn refused(ear: &Ear, directive: Directive, of: impl Fn(&Report) -> Option<Refusal>) -> Result<Refusal> {
    let after = ear.heard().len();
    let sequence = ear.say(directive)?;
    let is_it = |refusal: &Refusal| refusal.sequence == sequence;
    let heard = ear.hears(after, "a refusal", |heard| of(&heard.report).as_ref().is_some_and(is_it)).await?;
    of(&heard.report).context("no refusal")
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_counted_and_told_and_the_stream_goes_on() -> Result<()> {
    if !can_run("what_makes_no_sense_is_refused_counted_and_told_and_the_stream_goes_on", &NEEDS) {
        return Ok(());
    }
    let (ear, agent) = plain().await?;
    ear.next(0).await?;
    let lease = |report: &Report| report.carried_out.clone().unwrap_or_default().protection_refused;
    let prewarm = |report: &Report| report.carried_out.clone().unwrap_or_default().prewarm_refused;
    // No pod of its own: outside of Kubernetes.
    let refusal = refused(&ear, protect(60_000), lease).await?;
    ensure!(refusal.reason == "no_pod" && refusal.detail.contains("kubernetes.pod"), "{refusal:?}");
    let both = Directive { release: Some(Release {}), ..protect(60_000) };
    assert_eq!(refused(&ear, both, lease).await?.reason, "contradiction");
    let many = (0..17).map(|n| format!("registry.example/a:{n}")).collect();
    assert_eq!(refused(&ear, images(many), prewarm).await?.reason, "too_many");
    let long = format!("registry.example/{}", "a/".repeat(400));
    for name in ["", "no image", "registry.example/a@sha256:xyz", &long] {
        assert_eq!(refused(&ear, images(vec![name.to_owned()]), prewarm).await?.reason, "bad_image", "{name}");
    }
    // What was asked for before, and what asks for nothing.
    ear.say_plainly(Directive { sequence: 1, ..images(vec!["registry.example/a:1".to_owned()]) })?;
    ear.say_plainly(Directive::default())?;
    for reason in ["replayed", "empty"] {
        eventually(reason, async || Ok(refusals(&agent, reason).await? == 1.0)).await?;
    }
    assert_eq!(refusals(&agent, "bad_image").await?, 4.0);
    assert_eq!(agent.log().matches("a directive of the scaler is not carried out").count(), 6, "each once");
    assert_eq!(ear.tries().len(), 1, "still the first stream");
    assert_eq!(agent.metrics().await?.sum("darter_report_protected", &[]), 0.0);
    Ok(())
}

#[tokio::test]
async fn a_million_images_and_a_flood_of_directives_cost_next_to_nothing() -> Result<()> {
    if !can_run("a_million_images_and_a_flood_of_directives_cost_next_to_nothing", &NEEDS) {
        return Ok(());
    }
    let (ear, agent) = plain().await?;
    ear.next(0).await?;
    let before = agent.usage()?;
    // As fast as it can be said; what is not read waits at the sender.
    for n in 0..500 {
        ear.say(images(vec![format!("elsewhere.example/a:{n}")]))?;
    }
    eventually("some were read", async || Ok(agent.metrics().await?.sum("darter_report_directives_total", &[]) > 20.0))
        .await?;
    let seconds = agent.metrics().await?.sum("darter_report_directives_total", &[]) / 50.0;
    ensure!(agent.admin("/readyz").await?.status == 200 && seconds < 9.0, "read all at once");
    // 60 MB of names, which nobody decodes.
    let million = vec!["registry.example/team/model:v1-with-a-name-of-sixty-bytes-or-so".to_owned(); 1_000_000];
    ear.say(images(million))?;
    eventually("refused for its size", async || Ok(refusals(&agent, "too_large").await? >= 1.0)).await?;
    ear.hears(0, "another stream", |heard| heard.stream > 1).await?;
    let after = agent.usage()?;
    let grown = after.peak_bytes.saturating_sub(before.peak_bytes);
    ensure!(grown < 40 << 20, "{grown} bytes more");
    Ok(())
}
