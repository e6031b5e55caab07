//! Images that the scaler wants here, and what a report says of images.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{Directive, Image as Told, PrewarmImages, PrewarmState, Report};
use darter_tests::agent::Agent;
use darter_tests::image::{Format, Image, Item};
use darter_tests::net::Place;
use darter_tests::registry::{self, Registry};
use darter_tests::reports::Ear;
use darter_tests::stage::{MIB, REPOSITORY, TAG};
use darter_tests::tools::{Need, can_run};

use crate::plain_options;

const NEEDS: [Need; 2] = [Need::Darter, Need::DockerRegistry];
const NAME: &str = "registry.example";

/// These are wanted.
fn prewarm(images: &[&str]) -> Directive {
    let images = images.iter().map(|image| (*image).to_owned()).collect();
    Directive { prewarm: Some(PrewarmImages { images }), ..Directive::default() }
}

/// How an image stands that was wanted.
fn state(report: &Report, image: &str) -> Option<PrewarmState> {
    let out = report.carried_out.as_ref()?;
    out.prewarm.iter().find(|told| told.image == image).map(|told| told.state())
}

fn told<'a>(report: &'a Report, image: &Image) -> Result<&'a Told> {
    let digest = image.child()?.to_string();
    report.images.iter().find(|told| told.digest == digest).with_context(|| format!("{:#?}", report.images))
}

#[tokio::test]
async fn an_image_that_the_scaler_wants_is_brought_and_told_and_known_after_a_restart() -> Result<()> {
    if !can_run("an_image_that_the_scaler_wants_is_brought_and_told_and_known_after_a_restart", &NEEDS) {
        return Ok(());
    }
    let registry = Registry::start(&Place::Host, registry::Options::default()).await?;
    let image = Image::index(Format::Oci, 7, &[3 * MIB, 4096, 2 * MIB])?;
    registry.push(&image, REPOSITORY, TAG).await?;
    let ear = Ear::start(&Place::Host, None).await?;
    let options = plain_options(&ear).in_registries("endpoint", registry.url()).set("mirror.platform", "linux/amd64");
    let mut agent = Agent::start(options).await?;
    ear.next(0).await?;
    let (wanted, absent) = (format!("{NAME}/{REPOSITORY}:{TAG}"), format!("{NAME}/{REPOSITORY}:none"));
    let elsewhere = "elsewhere.example/a:b";
    let sequence = ear.say(prewarm(&[&absent, &wanted, elsewhere]))?;
    let ended =
        |report: &Report, image: &str| matches!(state(report, image), Some(PrewarmState::Done | PrewarmState::Failed));
    let all = |report: &Report| [&*absent, &*wanted, elsewhere].iter().all(|image| ended(report, image));
    let last = ear.hears(0, "all were tried", |heard| all(&heard.report)).await?.report;
    assert_eq!(last.carried_out.as_ref().map(|out| out.sequence), Some(sequence));
    assert_eq!(state(&last, &wanted), Some(PrewarmState::Done), "{:#?}\n{}", last.carried_out, agent.log());
    let out = last.carried_out.clone().unwrap_or_default();
    for (image, why) in [(&*absent, "cannot get the manifest"), (elsewhere, "is not mirrored here")] {
        let told = out.prewarm.iter().find(|told| told.image == image).context("not told")?;
        ensure!(told.state() == PrewarmState::Failed, "{told:?}");
        ensure!(told.error.as_ref().is_some_and(|error| error.contains(why)), "{told:?}");
    }
    let done = out.prewarm.iter().find(|told| told.image == wanted).context("not told")?;
    let bytes: u64 = image.pulled_blobs().map(Item::size).sum();
    assert_eq!((done.done_bytes, done.total_bytes, done.is_pinned), (bytes, Some(bytes), Some(true)));
    assert_eq!(done.digest.as_deref(), Some(image.child()?.to_string().as_str()));
    // One after the other: none had begun before the one before it had ended.
    for heard in ear.heard() {
        let of = |state| {
            heard.report.carried_out.iter().flat_map(|out| &out.prewarm).filter(move |told| told.state() == state)
        };
        ensure!(of(PrewarmState::Coming).count() <= 1, "{:#?}", heard.report.carried_out);
    }
    // It is told as an image too.
    let here = ear
        .hears(0, "the image is whole", |heard| told(&heard.report, &image).is_ok_and(|told| told.is_complete))
        .await?;
    let told_image = told(&here.report, &image)?;
    let manifest = image.manifests.first().context("no manifest")?.size();
    assert_eq!((told_image.size_bytes, told_image.held_bytes), (bytes + manifest, bytes + manifest));
    ensure!(told_image.is_pinned && told_image.used_ms < Some(60_000), "{told_image:?}");
    ensure!(told_image.references.contains(&wanted), "{told_image:?}");
    // A heartbeat that says the same brings nothing again.
    let (requests, count) = (registry.log().lines().count(), ear.heard().len());
    let again = ear.say(prewarm(&[&absent, &wanted, elsewhere]))?;
    let told_again = |report: &Report| report.carried_out.as_ref().is_some_and(|out| out.sequence == again);
    let heard = ear.hears(count, "it is taken", |heard| told_again(&heard.report)).await?.report;
    assert_eq!(state(&heard, &wanted), Some(PrewarmState::Done));
    assert_eq!(registry.log().lines().count(), requests, "{}", registry.log());
    // Another life of the agent: its sequence begins anew under another name, and it knows what is here.
    agent.stop().await?;
    let before = ear.heard();
    agent.start_again().await?;
    let first = ear.next(before.len()).await?.report;
    ensure!(first.instance != last.instance && first.sequence == 1, "{} {}", first.instance, first.sequence);
    let found = told(&first, &image)?;
    ensure!(found.is_complete && found.is_pinned && found.references.is_empty(), "{found:?}");
    assert_eq!(first.carried_out.map(|out| out.sequence), Some(0));
    Ok(())
}

#[tokio::test]
async fn a_blob_on_its_way_is_told_when_it_begins_and_when_it_is_here() -> Result<()> {
    if !can_run("a_blob_on_its_way_is_told_when_it_begins_and_when_it_is_here", &NEEDS) {
        return Ok(());
    }
    let registry = Registry::start(&Place::Host, registry::Options::default()).await?;
    let image = Image::index(Format::Oci, 9, &[8 * MIB])?;
    registry.push(&image, REPOSITORY, TAG).await?;
    let ear = Ear::start(&Place::Host, None).await?;
    let options = plain_options(&ear)
        .in_registries("endpoint", registry.url())
        // Some seconds.
        .in_registries("bandwidth", "2MB/s")
        .set("mirror.platform", "linux/amd64");
    let _agent = Agent::start(options).await?;
    ear.next(0).await?;
    ear.say(prewarm(&[&format!("{NAME}/{REPOSITORY}:{TAG}")]))?;
    let layer = image.layers.first().context("no layer")?;
    let digest = layer.digest().to_string();
    let comes = |report: &Report| report.pulls.iter().any(|pull| pull.digest == digest);
    let coming = ear.hears(0, "the layer comes", |heard| comes(&heard.report)).await?;
    let pull = coming.report.pulls.iter().find(|pull| pull.digest == digest).context("no pull")?;
    assert_eq!((pull.total_bytes, pull.done_bytes < layer.size()), (Some(layer.size()), true), "{pull:?}");
    let whole = |report: &Report| !comes(report) && told(report, &image).is_ok_and(|told| told.is_complete);
    let here = ear.hears(0, "it is here", |heard| whole(&heard.report)).await?;
    ensure!(here.at > coming.at && here.stream == coming.stream, "one connection");
    Ok(())
}
