//! What containerd does with a mirror that fails, without darter: the facts that darter's own ways of
//! failing are chosen by. The mirror here is a second fake registry.

use std::time::Duration;

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::containerd::{self, Containerd, hosts_toml};
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::image::{Format, Image, Item};
use darter_tests::net::Network;
use darter_tests::on_each_way;
use darter_tests::stage::{MIB, REPOSITORY, Stage, TAG};
use darter_tests::tools::{Need, Release, can_run};

const SIZE: u64 = 8 * MIB;
const HALF: u64 = 4 * MIB;

/// A containerd whose hosts.toml names a mirror before the registry; both have the image.
struct Scene {
    mirror: FakeEcr,
    origin: FakeEcr,
    containerd: Containerd,
    image: Image,
    _network: Network,
}

impl Scene {
    async fn new(release: Release, mirror: Auth, options: &containerd::Options) -> Result<Self> {
        let network = Network::new(1)?;
        let registry = |auth, redirect| {
            let options = fake_ecr::Options { auth, redirect, ..fake_ecr::Options::default() };
            FakeEcr::start(&network.hub(), options)
        };
        let (mirror, origin) = (registry(mirror, false)?, registry(Auth::Public, true)?);
        let image = Image::index(Format::Oci, 7, &[SIZE])?;
        for at in [&mirror, &origin] {
            at.push(&image, REPOSITORY, TAG);
        }
        let containerd = Containerd::start(release, &network.node(0), options).await?;
        let text = hosts_toml(&origin.url(), Some(&mirror.url()), &["pull", "resolve"]);
        containerd.write_hosts(&origin.name(), &text)?;
        Ok(Self { mirror, origin, containerd, image, _network: network })
    }

    async fn open(release: Release) -> Result<Self> {
        Self::new(release, Auth::Public, &containerd::Options::default()).await
    }

    fn layer(&self) -> Digest {
        self.image.layers[0].digest()
    }

    /// The mirror does this with the layer once, and has it no more after that.
    fn breaks_off(&self, fault: Fault) {
        self.mirror.inject(Rule::on(Kind::Blob).digest(self.layer()), fault);
        self.mirror.inject(Rule::on(Kind::Blob).digest(self.layer()).always(), Fault::Status(404, None));
    }

    async fn pull(&self, credential: Option<(&str, &str)>) -> Result<()> {
        let image = format!("{}/{REPOSITORY}:{TAG}", self.origin.name());
        self.containerd.cri().pull(&image, credential).await?;
        Ok(())
    }

    /// Bytes of the layer that the origin sent.
    fn sent_by_origin(&self) -> u64 {
        self.origin.count_of(Kind::Object, self.layer()).bytes
    }
}

on_each_way! {
    a_fin_in_mid_body_is_resumed_at_the_byte_reached(release) {
        // Also after silence: the stall costs its time, and nothing else.
        for fault in [Fault::Truncate(HALF), Fault::StallThenFin(HALF, Duration::from_secs(2))] {
            let scene = Scene::open(release).await?;
            scene.breaks_off(fault);
            scene.pull(None).await?;
            assert_eq!(scene.sent_by_origin(), scene.image.layers[0].size() - HALF);
            let log = scene.mirror.log();
            let asked = log.iter().filter(|seen| seen.digest == Some(scene.layer())).map(|seen| seen.range.as_str());
            // It came back to the mirror first: the fast 404 there is what sends it on.
            assert_eq!(asked.collect::<Vec<_>>(), ["", &format!("bytes={HALF}-")]);
        }
        Ok(())
    }

    a_fin_in_mid_body_goes_on_at_the_mirror_where_that_can(release) {
        let scene = Scene::open(release).await?;
        scene.mirror.inject(Rule::on(Kind::Blob).digest(scene.layer()), Fault::Truncate(HALF));
        scene.pull(None).await?;
        assert_eq!(scene.sent_by_origin(), 0);
        Ok(())
    }

    a_206_that_is_cut_is_resumed_at_the_byte_reached_too(release) {
        // Row 4: the answer to the Range that followed the first FIN ends early itself, and then the mirror has
        // nothing any more.
        let scene = Scene::open(release).await?;
        let (layer, more) = (Rule::on(Kind::Blob).digest(scene.layer()), 2 * MIB);
        scene.mirror.inject(layer.clone(), Fault::Truncate(HALF));
        scene.breaks_off(Fault::Truncate(more));
        scene.pull(None).await?;
        assert_eq!(scene.sent_by_origin(), scene.image.layers[0].size() - HALF - more);
        let log = scene.mirror.log();
        let asked = log.iter().filter(|seen| seen.digest == Some(scene.layer()));
        let asked: Vec<_> = asked.map(|seen| (seen.status, seen.range.clone())).collect();
        let from = |at: u64| format!("bytes={at}-");
        assert_eq!(asked, [(200, String::new()), (206, from(HALF)), (404, from(HALF + more))]);
        Ok(())
    }

    a_reset_in_mid_body_fails_the_pull(release) {
        // Why darter closes with a FIN and never lets Linux send an RST.
        let scene = Scene::open(release).await?;
        scene.breaks_off(Fault::Reset(HALF));
        let error = scene.pull(None).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains("connection reset by peer"), "{error:?}");
        assert_eq!(scene.sent_by_origin(), 0, "the origin was asked");
        Ok(())
    }

    a_mirror_that_refuses_is_passed_over(release) {
        // Row 12. What it costs is the mirror's requests: 408 and 429 are repeated at once.
        for (status, layer_requests) in [(404, 1), (503, 1), (401, 1), (403, 1), (429, 6)] {
            let scene = Scene::open(release).await?;
            scene.mirror.inject(Rule::any().always(), Fault::Status(status, Some(1)));
            scene.pull(None).await?;
            assert_eq!(scene.sent_by_origin(), scene.image.layers[0].size(), "{status}");
            assert_eq!(scene.mirror.count_of(Kind::Blob, scene.layer()).requests, layer_requests, "{status}");
        }
        Ok(())
    }

    a_mirror_that_asks_for_a_credential_gets_the_pulls_own(release) {
        let scene = Scene::new(release, Auth::Ecr, &containerd::Options::default()).await?;
        // Without one the pull goes on to the origin.
        scene.pull(None).await?;
        assert_eq!(scene.sent_by_origin(), scene.image.layers[0].size());
        ensure!(scene.mirror.log().iter().all(|seen| seen.status == 401 && seen.authorization.is_empty()));
        scene.containerd.forget().await?;
        scene.mirror.reset_counts();
        scene.origin.reset_counts();
        let password = scene.mirror.password();
        scene.pull(Some(("AWS", &password))).await?;
        assert_eq!(scene.sent_by_origin(), 0);
        assert_eq!(scene.mirror.count(Kind::Blob).bytes, scene.image.pulled_blobs().map(Item::size).sum::<u64>());
        ensure!(scene.origin.log().is_empty(), "the origin got a credential that was not asked for there");
        Ok(())
    }
}

#[tokio::test]
async fn a_chunk_that_fails_fails_the_pull() -> Result<()> {
    if !can_run("a_chunk_that_fails_fails_the_pull", &[Need::Containerd(Release::V2)]) {
        return Ok(());
    }
    // Why darter answers 200 to `bytes=0-` of a blob that may still fail: a 206 makes containerd 2.1
    // and later open chunks, and for a chunk it goes to no other host.
    let options = containerd::Options { concurrent_layer_fetch_buffer: MIB, ..containerd::Options::default() };
    for fault in [Fault::Status(404, None), Fault::Status(503, None), Fault::Reset(1000)] {
        let scene = Scene::new(Release::V2, Auth::Public, &options).await?;
        scene.mirror.inject(Rule::on(Kind::Blob).digest(scene.layer()).after(2).always(), fault.clone());
        ensure!(scene.pull(None).await.is_err(), "{fault:?} was survived");
        assert_eq!(scene.sent_by_origin(), 0, "{fault:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_fin_in_a_chunk_fails_the_pull_unless_all_chunks_before_it_have_come() -> Result<()> {
    let name = "a_fin_in_a_chunk_fails_the_pull_unless_all_chunks_before_it_have_come";
    if !can_run(name, &[Need::Containerd(Release::V2)]) {
        return Ok(());
    }
    let options = containerd::Options { concurrent_layer_fetch_buffer: MIB, ..containerd::Options::default() };
    let scene = async || Scene::new(Release::V2, Auth::Public, &options).await;
    // The second chunk still comes when the third ends: containerd cancels all that are on their way, and has
    // nothing that it could resume.
    let ahead = scene().await?;
    let chunk = |scene: &Scene, at: u64| Rule::on(Kind::Blob).digest(scene.layer()).from(at);
    ahead.mirror.inject(chunk(&ahead, MIB), Fault::Stall(MIB / 2, Duration::from_secs(20)));
    ahead.mirror.inject(chunk(&ahead, 2 * MIB), Fault::Truncate(MIB / 2));
    let error = ahead.pull(None).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains("context canceled"), "{error:?}");
    assert_eq!(ahead.sent_by_origin(), 0, "the origin was asked");
    // All before it have come when the second ends: it is resumed as a stream is.
    let read = scene().await?;
    read.mirror.inject(chunk(&read, MIB), Fault::StallThenFin(MIB / 2, Duration::from_secs(2)));
    read.pull(None).await?;
    assert_eq!(read.sent_by_origin(), 0, "the origin was asked");
    let (log, from) = (read.mirror.log(), format!("bytes={}-", MIB + MIB / 2));
    ensure!(log.iter().any(|seen| seen.range == from), "not resumed at the byte reached: {log:?}");
    Ok(())
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_resumed_where_chunks_were_asked_for_too() -> Result<()> {
    let name = "a_stream_that_breaks_off_is_resumed_where_chunks_were_asked_for_too";
    if !can_run(name, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    // The 200 to `bytes=0-`, and the agent's own way of cutting it. The chunks of the origin overlap.
    let options = containerd::Options { concurrent_layer_fetch_buffer: MIB, ..containerd::Options::default() };
    let mut stage = Stage::with(Release::V2, &[SIZE], Auth::Public, &options).await?;
    stage.start(stage.options("public").set("origin.ranges", 1).set("origin.stall", "20s")).await?;
    let (layer, size) = stage.layer();
    stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Stall(HALF, Duration::from_secs(60)));
    stage.pull().await?;
    assert_eq!(stage.metric("darter_mirror_handovers_total", &[("reason", "stalled")]).await?, 1.0);
    ensure!(stage.read_by_containerd() >= size - HALF - MIB, "{} of {size}", stage.read_by_containerd());
    Ok(())
}
