//! Images that are to be on a node before any pod (`prewarm.images`): ordered by the agent itself, at its start.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::fake_ecr::{Auth, Fault, Rule};
use darter_tests::process;
use darter_tests::stage::{MIB, Pair, REPOSITORY, Stage, TAG, ecr, eventually, pair_options};
use darter_tests::tools::{Need, Release, can_run};
use toml_edit::Array;

async fn missing(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics().await?.sum("darter_warm_images_missing", &[]))
}

#[tokio::test]
async fn it_is_in_the_store_pinned_and_in_containerd_which_had_it_from_the_mirror() -> Result<()> {
    let test = "it_is_in_the_store_pinned_and_in_containerd_which_had_it_from_the_mirror";
    if !can_run(test, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    let mut stage = Stage::new(Release::V2, &[2 * MIB, MIB]).await?;
    let image = stage.reference();
    let options = stage
        .options("public")
        .set("containerd.socket", stage.containerd.socket().display().to_string())
        .set("prewarm.images", Array::from_iter([image.clone()]));
    stage.start(options).await?;
    let is_here = async || Ok(missing(stage.agent()).await? == 0.0);
    eventually("it is here", is_here).await.with_context(|| stage.story())?;
    ensure!(stage.containerd.cri().status(&image).await?.is_some(), "containerd has it\n{}", stage.story());
    let metrics = stage.agent().metrics().await?;
    ensure!(metrics.sum("darter_store_pinned_bytes", &[]) > 3e6, "it is pinned\n{}", stage.story());
    let from_the_mirror = stage.agent().counted("darter_mirror_bytes_total", &[("source", "cache")], |sum| sum > 3e6);
    from_the_mirror.await.with_context(|| stage.story())?;
    Ok(())
}

#[tokio::test]
async fn what_does_not_come_is_tried_until_the_deadline_and_then_said_to_be_missing() -> Result<()> {
    let test = "what_does_not_come_is_tried_until_the_deadline_and_then_said_to_be_missing";
    if !can_run(test, &[Need::Darter]) {
        return Ok(());
    }
    let ecr = ecr(Auth::Public)?;
    ecr.inject(Rule::any().always(), Fault::Status(503, None));
    let image = format!("{}/{REPOSITORY}:{TAG}", ecr.name());
    let options = pair_options(&ecr, &[("access", "public".into())])
        .set("origin.attempts", 1)
        .set("kubernetes.startup_deadline", "4s")
        .set("prewarm.images", Array::from_iter([image]));
    let agent = Agent::start(options).await?;
    let gave_up = async || Ok(agent.log().contains("they are not tried any more"));
    eventually("it gives up", gave_up).await.with_context(|| process::tail(&agent.log()))?;
    assert_eq!(missing(&agent).await?, 1.0);
    let tries = agent.log().matches("an image that is to be here cannot be brought").count();
    ensure!(tries >= 2, "{tries} tries\n{}", agent.log());
    ensure!(agent.log().matches("it is tried again").count() == 1, "once for people\n{}", agent.log());
    ensure!(agent.admin("/readyz").await?.status == 200, "an image is no part of the mirror");
    Ok(())
}

#[tokio::test]
async fn without_any_nothing_is_brought() -> Result<()> {
    if !can_run("without_any_nothing_is_brought", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[4096]).await?;
    assert_eq!(missing(&pair.agent).await?, 0.0);
    assert_eq!(pair.ecr.blob_bytes(), 0);
    Ok(())
}
