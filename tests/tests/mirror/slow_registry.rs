//! A registry that is healthy and slow: what waits for its turn here is neither answered 404 nor cut short,
//! whoever makes it wait.
//!
//! The patience of the agents is a fraction of what it is by default, and so is what comes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::{Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::image::{Format, Image, Item};
use darter_tests::stage::{MIB, Pair, TAG, ecr, eventually, pair_options};
use darter_tests::tools::{Need, can_run};
use futures_util::future::try_join_all;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

/// Images that pods of one node want at once.
struct Scene {
    pair: Pair,
    images: Vec<(String, Image)>,
}

impl Scene {
    /// So many images, each in a repository of its own, with layers of these sizes.
    async fn new(images: u64, layers: &[u64], change: impl FnOnce(Options) -> Options) -> Result<Self> {
        let ecr = ecr(Auth::Public)?;
        let image = |number: u64| -> Result<_> {
            let image = Image::index(Format::Oci, 1000 * (number + 1), layers)?;
            let repository = format!("team/app{number}");
            ecr.push(&image, &repository, TAG);
            Ok((repository, image))
        };
        let images = (0..images).map(image).collect::<Result<Vec<_>>>()?;
        let options = pair_options(&ecr, &[("access", "public".into())]);
        let agent =
            Agent::start(change(options.set("mirror.stall", "2s").set("mirror.answer_within", "800ms"))).await?;
        let image = images[0].1.clone();
        Ok(Self { pair: Pair { agent, ecr, image }, images })
    }

    fn ecr(&self) -> &FakeEcr {
        &self.pair.ecr
    }

    /// Pulls all of them at the same moment, with so many downloads at once as containerd has for all.
    async fn pull(&self, downloads: usize) -> Result<()> {
        let downloads = Arc::new(Semaphore::new(downloads));
        let outcomes = try_join_all(self.images.iter().map(|image| self.pull_one(image, downloads.clone()))).await?;
        let went_wrong: Vec<String> = outcomes.into_iter().flatten().filter_map(Result::err).collect();
        ensure!(went_wrong.is_empty(), "{went_wrong:#?}");
        assert_eq!(self.pair.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
        Ok(())
    }

    async fn pull_one(
        &self,
        (repository, image): &(String, Image),
        downloads: Arc<Semaphore>,
    ) -> Result<Vec<Result<(), String>>> {
        self.read_manifests(repository, image).await?;
        try_join_all(image.pulled_blobs().map(async |blob| {
            let _download = downloads.acquire().await?;
            self.read(repository, blob).await
        }))
        .await
    }

    async fn read_manifests(&self, repository: &str, image: &Image) -> Result<()> {
        for reference in [TAG.to_owned(), image.manifests[0].digest().to_string()] {
            let url = self.pair.url_in(repository, &format!("manifests/{reference}"));
            let answer = self.pair.client().get(&url).await?;
            ensure!(answer.status == 200, "{reference}: {} {}", answer.status, answer.text());
        }
        Ok(())
    }

    /// Asks for all layers at the same moment. How each ended, and after how long.
    async fn read_all(&self) -> Result<Vec<(Digest, Result<(), String>, Duration)>> {
        try_join_all(self.images.iter().map(|(repository, image)| self.read_manifests(repository, image))).await?;
        let layers =
            self.images.iter().flat_map(|(repository, image)| image.layers.iter().map(move |l| (repository, l)));
        try_join_all(layers.map(async |(repository, layer)| {
            let started = Instant::now();
            let outcome = self.read(repository, layer).await?;
            Ok((layer.digest(), outcome, started.elapsed()))
        }))
        .await
    }

    /// Reads a whole blob as containerd does; the inner error says what the mirror did instead of giving it.
    async fn read(&self, repository: &str, blob: &Item) -> Result<Result<(), String>> {
        let mut answer = self.pair.open_in(repository, &format!("blobs/{}", blob.digest()), &[]).await?;
        if answer.exchange.status != Some(200) {
            let reason = String::from_utf8_lossy(&answer.body().await?).into_owned();
            return Ok(Err(format!("{:?}: {reason}", answer.exchange.status)));
        }
        let (mut hash, mut count) = (Sha256::new(), 0);
        let end = answer
            .read(None, |bytes| {
                hash.update(bytes);
                count += bytes.len();
            })
            .await?;
        if end != End::Complete {
            return Ok(Err(format!("{end:?} after {count} of {}", blob.size())));
        }
        ensure!(Digest::from_bytes(hash.finalize().into()) == blob.digest(), "the bytes are wrong");
        Ok(Ok(()))
    }
}

#[tokio::test]
async fn what_containerd_reads_is_not_held_up_by_what_is_fetched_ahead_under_a_limit() -> Result<()> {
    let name = "what_containerd_reads_is_not_held_up_by_what_is_fetched_ahead_under_a_limit";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let limit = |options: Options| options.set("origin.bandwidth", "50MB/s");
    Scene::new(6, &[20 * MIB; 3], limit).await?.pull(3).await
}

#[tokio::test]
async fn what_containerd_reads_is_not_held_up_by_what_is_fetched_ahead_on_a_slow_link() -> Result<()> {
    let name = "what_containerd_reads_is_not_held_up_by_what_is_fetched_ahead_on_a_slow_link";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new(6, &[20 * MIB; 3], |options| options).await?;
    scene.ecr().set_rate(Some(50 * MIB), None);
    scene.pull(3).await
}

#[tokio::test]
async fn a_blob_that_is_asked_for_overtakes_those_that_are_fetched_ahead() -> Result<()> {
    if !can_run("a_blob_that_is_asked_for_overtakes_those_that_are_fetched_ahead", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new(6, &[20 * MIB; 3], |options| options).await?;
    scene.ecr().set_rate(Some(50 * MIB), None);
    for (repository, image) in &scene.images {
        scene.read_manifests(repository, image).await?;
    }
    eventually("much is fetched ahead", async || Ok(scene.ecr().blob_bytes() > 10 * MIB)).await?;
    // The last in turn: the other 17 are fetched before it.
    let (repository, image) = scene.images.last().expect("there are images");
    let layer = image.layers.last().expect("it has layers");
    let outcome = scene.read(repository, layer).await?;
    ensure!(outcome.is_ok(), "{outcome:?}");
    let (came, all) = (scene.ecr().blob_bytes(), 18 * 20 * MIB);
    ensure!(came < all / 2, "{came} of {all} bytes came before one layer");
    Ok(())
}

#[tokio::test]
async fn more_blobs_at_once_than_a_registry_has_connections_all_come() -> Result<()> {
    if !can_run("more_blobs_at_once_than_a_registry_has_connections_all_come", &[Need::Darter]) {
        return Ok(());
    }
    for prefetch in ["off", "layers"] {
        let scene = Scene::new(8, &[12 * MIB; 3], |options| options.set("mirror.prefetch", prefetch)).await?;
        scene.ecr().set_rate(Some(40 * MIB), None);
        scene.pull(24).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_registry_that_hangs_is_no_slow_one_whoever_waits_for_a_turn() -> Result<()> {
    if !can_run("a_registry_that_hangs_is_no_slow_one_whoever_waits_for_a_turn", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new(8, &[12 * MIB; 3], |options| options.set("mirror.prefetch", "off")).await?;
    scene.ecr().inject(Rule::on(Kind::Blob).always(), Fault::Delay(Duration::MAX));
    for (digest, outcome, took) in scene.read_all().await? {
        ensure!(outcome.is_err(), "{digest} came");
        ensure!(took < Duration::from_secs(10), "{digest} was answered after {took:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_blob_that_hangs_has_its_turn_and_no_more_while_the_others_come() -> Result<()> {
    if !can_run("a_blob_that_hangs_has_its_turn_and_no_more_while_the_others_come", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new(8, &[12 * MIB; 3], |options| options.set("mirror.prefetch", "off")).await?;
    scene.ecr().set_rate(Some(24 * MIB), None);
    let hangs = scene.images[0].1.layers[0].digest();
    scene.ecr().inject(Rule::on(Kind::Blob).digest(hangs).always(), Fault::Delay(Duration::MAX));
    let read = scene.read_all().await?;
    let longest = read.iter().map(|(_, _, took)| *took).max().unwrap_or_default();
    for (digest, outcome, took) in read {
        ensure!(outcome.is_err() == (digest == hangs), "{digest}: {outcome:?} after {took:?}");
        ensure!(digest != hangs || took < longest * 3 / 4, "it was answered after {took:?}, the last of {longest:?}");
    }
    Ok(())
}
