//! The contract with containerd, on each release that is installed: whatever happens to the agent or
//! to the registry, the pull succeeds, and the origin sends no more than it must.
//!
//! Numbers in brackets are rows of the contract list.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::containerd::{self, Containerd, hosts_toml};
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::image::{Format, Image};
use darter_tests::net::Network;
use darter_tests::tools::{Need, Release, can_run};

const MIB: u64 = 1 << 20;

/// A node with a containerd, and an ECR that it can reach, each in a network of its own.
struct Stage {
    release: Release,
    agent: Option<Agent>,
    containerd: Containerd,
    ecr: FakeEcr,
    image: Image,
    network: Network,
}

impl Stage {
    async fn new(release: Release, layers: &[u64]) -> Result<Self> {
        Self::with(release, layers, Auth::Public, &containerd::Options::default()).await
    }

    async fn with(release: Release, layers: &[u64], auth: Auth, options: &containerd::Options) -> Result<Self> {
        let network = Network::new(1)?;
        let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options { auth, ..fake_ecr::Options::default() })?;
        let image = Image::index(Format::Oci, 7, layers)?;
        ecr.push(&image, "team/app", "v1");
        let containerd = Containerd::start(release, &network.node(0), options).await?;
        Ok(Self { release, agent: None, containerd, ecr, image, network })
    }

    /// The options of an agent that mirrors this ECR for this containerd.
    fn options(&self, access: &str) -> Options {
        Options::new(&self.network.node(0))
            .set("certs_d.path", self.containerd.certs_d().display().to_string())
            .set("containerd.config", self.containerd.config().display().to_string())
            .set("certs_d.check_every", "1s")
            .set("mirror.stall", "1s")
            .set("agent.drain", "1s")
            .registry(
                &self.ecr.name(),
                &[("endpoint", self.ecr.url().into()), ("plain_http", true.into()), ("access", access.into())],
            )
    }

    /// Starts the agent. The `server` line that darter writes names the real ECR, which is not here:
    /// a foreign host below it is where containerd goes when the mirror says no.
    async fn start(&mut self, options: Options) -> Result<()> {
        let text = hosts_toml(&self.ecr.url(), None, &[]);
        self.containerd.write_hosts(&self.ecr.name(), &text)?;
        self.agent = Some(Agent::start(options).await?);
        Ok(())
    }

    async fn start_default(&mut self) -> Result<()> {
        self.start(self.options("public")).await
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("the agent was started")
    }

    fn reference(&self) -> String {
        format!("{}/team/app:v1", self.ecr.name())
    }

    /// Pulls by CRI, as kubelet does.
    async fn pull(&self) -> Result<()> {
        self.containerd.cri().pull(&self.reference(), None).await.with_context(|| self.story())?;
        Ok(())
    }

    async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.agent().metrics().await?.sum(name, labels))
    }

    /// The largest layer.
    fn layer(&self) -> (Digest, u64) {
        let layer = self.image.layers.iter().max_by_key(|layer| layer.size()).expect("an image has layers");
        (layer.digest(), layer.size())
    }

    /// What containerd itself read of the layers from the ECR, as it says in its requests.
    fn read_by_containerd(&self) -> u64 {
        self.ecr.log().iter().filter(|seen| seen.agent.starts_with("containerd/")).map(fake_ecr::Seen::bytes).sum()
    }

    /// For the error message of a test that failed.
    fn story(&self) -> String {
        let agent = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        let tail =
            |log: &str| log.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
        format!("{:?}\n--- agent\n{}\n--- containerd\n{}", self.release, tail(&agent), tail(&self.containerd.log()))
    }
}

/// Runs a test on each release that can run here.
macro_rules! on_each_release {
    ($($name:ident($release:ident) $body:block)*) => {$(
        mod $name {
            use super::*;

            async fn run($release: Release) -> Result<()> $body

            #[tokio::test]
            async fn containerd_1_6() -> Result<()> {
                let needs = [Need::Containerd(Release::V1), Need::Darter];
                if can_run(concat!(stringify!($name), " on 1.6"), &needs) { run(Release::V1).await } else { Ok(()) }
            }

            #[tokio::test]
            async fn containerd_2() -> Result<()> {
                let needs = [Need::Containerd(Release::V2), Need::Darter];
                if can_run(concat!(stringify!($name), " on 2.2.4"), &needs) { run(Release::V2).await } else { Ok(()) }
            }
        }
    )*};
}

on_each_release! {
    a_pull_reads_each_byte_from_the_origin_once_and_the_next_none(release) {
        let mut stage = Stage::new(release, &[9 * MIB, 3 * MIB, MIB / 2]).await?;
        stage.start_default().await?;
        stage.pull().await?;
        let wanted: u64 = stage.image.pulled_blobs().map(|item| item.size()).sum();
        assert_eq!(stage.ecr.blob_bytes(), wanted, "{}", stage.story());
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        assert_eq!(stage.metric("darter_mirror_bytes_total", &[]).await? as u64 >= wanted, true);
        // With discard_unpacked_layers containerd keeps no layer: the second pull needs them all. [11]
        stage.containerd.forget().await?;
        stage.ecr.reset_counts();
        stage.pull().await?;
        assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
        assert!(stage.metric("darter_mirror_bytes_total", &[("source", "cache")]).await? as u64 >= wanted);
        Ok(())
    }

    an_agent_that_is_down_costs_nothing(release) {
        // [1] hosts.toml still names the mirror, as after a kill.
        let stage = Stage::new(release, &[MIB]).await?;
        let text = hosts_toml(&stage.ecr.url(), Some("http://127.0.0.1:4001"), &["pull", "resolve"]);
        stage.containerd.write_hosts(&stage.ecr.name(), &text)?;
        stage.pull().await
    }

    an_origin_that_hangs_before_headers_is_answered_404_in_time(release) {
        // [2] The agent's first request for the layer never gets headers; containerd's own does.
        let mut stage = Stage::new(release, &[4 * MIB]).await?;
        stage.start(stage.options("public").set("mirror.answer_within", "500ms")).await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Blob).digest(layer), Fault::Delay(Duration::MAX));
        stage.pull().await?;
        assert!(stage.read_by_containerd() > 0, "{}", stage.story());
        Ok(())
    }

    a_body_that_stalls_is_cut_and_containerd_reads_only_the_rest(release) {
        // [3] [6] Half of the layer comes, then silence: longer than the mirror's patience.
        let mut stage = Stage::new(release, &[12 * MIB]).await?;
        stage.start(stage.options("public").set("origin.ranges", 1).set("origin.stall", "20s")).await?;
        let (layer, size) = stage.layer();
        let half = 4 * MIB;
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Stall(half, Duration::from_secs(60)));
        stage.pull().await?;
        assert_eq!(stage.metric("darter_mirror_handovers_total", &[("reason", "stalled")]).await?, 1.0, "{}", stage.story());
        let by_containerd = stage.read_by_containerd();
        assert!((1..=size - half + 2 * MIB).contains(&by_containerd), "{by_containerd} of {size}\n{}", stage.story());
        Ok(())
    }

    an_origin_that_breaks_off_is_resumed_unseen(release) {
        let mut stage = Stage::new(release, &[12 * MIB]).await?;
        stage.start_default().await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Truncate(MIB));
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Reset(2 * MIB));
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Status(503, Some(0)));
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        assert_eq!(stage.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
        Ok(())
    }

    a_signed_url_that_expires_in_mid_pull_is_asked_for_again(release) {
        let mut stage = Stage::new(release, &[20 * MIB]).await?;
        stage.start(stage.options("public").set("origin.ranges", 1)).await?;
        let (layer, _) = stage.layer();
        // The second range finds its signature gone.
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer).after(1), Fault::Status(403, None));
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        assert_eq!(stage.ecr.count_of(Kind::Blob, layer).requests, 2, "one 307 more, {}", stage.story());
        Ok(())
    }

    a_registry_that_lies_fails_the_pull_and_keeps_nothing(release) {
        let mut stage = Stage::new(release, &[4 * MIB]).await?;
        stage.start_default().await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer).always(), Fault::WrongByte(MIB));
        ensure!(stage.containerd.cri().pull(&stage.reference(), None).await.is_err(), "wrong bytes were taken");
        stage.ecr.clear_faults();
        stage.agent.as_mut().expect("started").stop().await?;
        stage.agent.as_mut().expect("started").start_again().await?;
        let blob = stage.agent().dir().join("data/blobs").join(layer.hex());
        ensure!(!blob.exists(), "the wrong blob was kept");
        Ok(())
    }

    sigterm_in_mid_pull_is_not_seen_by_the_pull(release) {
        // [7]
        let mut stage = Stage::new(release, &[24 * MIB]).await?;
        stage.start_default().await?;
        stage.ecr.set_rate(None, Some(4 * MIB));
        let mut agent = stage.agent.take().expect("started");
        let pull = stage.pull();
        let stop = async {
            wait_for_origin_bytes(&stage.ecr, 2 * MIB).await?;
            agent.stop().await
        };
        let (pulled, stopped) = tokio::join!(pull, stop);
        stopped?;
        pulled.with_context(|| agent.log())?;
        ensure!(stage.read_by_containerd() > 0, "containerd never went to the origin");
        let hosts = std::fs::read_to_string(stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml"))?;
        ensure!(!hosts.contains("127.0.0.1:4001"), "hosts.toml still names the mirror:\n{hosts}");
        Ok(())
    }

    kill_in_mid_pull_is_not_seen_by_the_pull_and_the_ingest_is_resumed(release) {
        let mut stage = Stage::new(release, &[24 * MIB]).await?;
        stage.start_default().await?;
        stage.ecr.set_rate(None, Some(4 * MIB));
        let mut agent = stage.agent.take().expect("started");
        let kill = async {
            wait_for_origin_bytes(&stage.ecr, 8 * MIB).await?;
            agent.kill().await
        };
        let (pulled, killed) = tokio::join!(stage.pull(), kill);
        killed?;
        pulled.with_context(|| agent.log())?;
        // What had arrived is not read again.
        stage.ecr.set_rate(None, None);
        stage.ecr.reset_counts();
        agent.start_again().await?;
        stage.agent = Some(agent);
        stage.containerd.forget().await?;
        stage.pull().await?;
        let (_, size) = stage.layer();
        let again = stage.ecr.blob_bytes();
        ensure!(again < size, "all {size} bytes were read again ({again})\n{}", stage.story());
        Ok(())
    }

    with_the_callers_policy_the_pull_secret_opens_the_mirror(release) {
        // [12] Without a credential the pull goes to the origin by itself, and is refused there.
        let options = containerd::Options::default();
        let mut stage = Stage::with(release, &[4 * MIB], Auth::Ecr, &options).await?;
        stage.start(stage.options("caller")).await?;
        ensure!(stage.containerd.cri().pull(&stage.reference(), None).await.is_err(), "an anonymous pull was let in");
        assert_eq!(stage.metric("darter_mirror_bytes_total", &[]).await?, 0.0);
        let password = stage.ecr.password();
        stage.containerd.cri().pull(&stage.reference(), Some(("AWS", &password))).await.with_context(|| stage.story())?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        ensure!(!stage.agent().log().contains(&password), "the credential is in the log");
        // Somebody else, after the blobs are here, still needs a credential of their own.
        stage.containerd.forget().await?;
        let wrong = stage.containerd.cri().pull(&stage.reference(), Some(("AWS", "wrong"))).await;
        ensure!(wrong.is_err(), "a wrong credential opened what is cached");
        Ok(())
    }

    a_digest_reference_is_pulled_too_and_without_resolve_tags_go_to_the_origin(release) {
        // [13]
        let mut stage = Stage::new(release, &[2 * MIB]).await?;
        let name = stage.ecr.name();
        let options = Options::new(&stage.network.node(0))
            .set("certs_d.path", stage.containerd.certs_d().display().to_string())
            .registry(&name, &[
                ("endpoint", stage.ecr.url().into()),
                ("plain_http", true.into()),
                ("access", "public".into()),
                ("resolve", false.into()),
            ]);
        stage.start(options).await?;
        stage.pull().await?;
        let tags = stage.ecr.log().iter().filter(|seen| seen.line.contains("/manifests/v1")).map(|seen| seen.agent.clone()).collect::<Vec<_>>();
        assert!(tags.iter().all(|agent| agent.starts_with("containerd/")) && !tags.is_empty(), "{tags:?}");
        assert_eq!(stage.ecr.count(Kind::Object).requests > 0, true);
        stage.containerd.forget().await?;
        stage.ecr.reset_counts();
        let reference = format!("{name}/team/app@{}", stage.image.root.digest());
        stage.containerd.cri().pull(&reference, None).await.with_context(|| stage.story())?;
        assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
        Ok(())
    }

    hosts_toml_comes_back_when_somebody_breaks_it(release) {
        // [14]
        let mut stage = Stage::new(release, &[MIB]).await?;
        stage.start_default().await?;
        let file = stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml");
        for broken in ["", "server = [", "server = \"http://10.77.0.1:1\"\n"] {
            std::fs::write(&file, broken)?;
            let healed = async {
                while !std::fs::read_to_string(&file).is_ok_and(|text| text.contains("127.0.0.1:4001")) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), healed).await.with_context(|| stage.story())?;
        }
        ensure!(stage.metric("darter_hosts_toml_repairs_total", &[]).await? >= 1.0, "repairs are not counted");
        Ok(())
    }

    an_origin_that_is_away_serves_what_is_here_by_digest(release) {
        let mut stage = Stage::new(release, &[2 * MIB]).await?;
        stage.start_default().await?;
        stage.pull().await?;
        stage.containerd.forget().await?;
        stage.ecr.down().await;
        let reference = format!("{}/team/app@{}", stage.ecr.name(), stage.image.root.digest());
        stage.containerd.cri().pull(&reference, None).await.with_context(|| stage.story())?;
        Ok(())
    }
}

async fn wait_for_origin_bytes(ecr: &FakeEcr, bytes: u64) -> Result<()> {
    let reached = async {
        while ecr.blob_bytes() < bytes {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reached).await.context("the pull does not start")
}
