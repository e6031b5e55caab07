//! What most tests start with: an ECR with an image, an agent that mirrors it, and with [`Stage`] a
//! containerd that pulls through both. [`Pair`] is the two without containerd and without root.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use toml_edit::Value;

use crate::agent::{Agent, Options};
use crate::containerd::{self, Containerd, hosts_toml};
use crate::emulator::raw;
use crate::fake_ecr::{self, Auth, FakeEcr};
use crate::http::{Answer, Client};
use crate::image::{Format, Image, Item};
use crate::net::{Network, Place};
use crate::tools::Release;

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// Past this, what a test waits for does not happen.
const PATIENCE: Duration = Duration::from_secs(40);

/// The repository and the tag of a stage's image.
pub const REPOSITORY: &str = "team/app";
/// See [`REPOSITORY`].
pub const TAG: &str = "v1";

/// A node with a containerd, and an ECR that it can reach, each in a network of its own.
pub struct Stage {
    /// Which containerd.
    pub release: Release,
    /// The agent, once it was started.
    pub agent: Option<Agent>,
    /// The node's containerd.
    pub containerd: Containerd,
    /// The registry.
    pub ecr: FakeEcr,
    /// What is in it.
    pub image: Image,
    /// Where they are.
    pub network: Network,
}

impl Stage {
    /// Everybody may read, and containerd is configured as on EKS.
    pub async fn new(release: Release, layers: &[u64]) -> Result<Self> {
        Self::with(release, layers, Auth::Public, &containerd::Options::default()).await
    }

    /// With this registry and this containerd.
    pub async fn with(release: Release, layers: &[u64], auth: Auth, options: &containerd::Options) -> Result<Self> {
        let network = Network::new(1)?;
        let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options { auth, ..fake_ecr::Options::default() })?;
        let image = Image::index(Format::Oci, 7, layers)?;
        ecr.push(&image, REPOSITORY, TAG);
        let containerd = Containerd::start(release, &network.node(0), options).await?;
        Ok(Self { release, agent: None, containerd, ecr, image, network })
    }

    /// The options of an agent that mirrors this ECR for this containerd.
    pub fn options(&self, access: &str) -> Options {
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
    pub async fn start(&mut self, options: Options) -> Result<()> {
        let text = hosts_toml(&self.ecr.url(), None, &[]);
        self.containerd.write_hosts(&self.ecr.name(), &text)?;
        self.agent = Some(Agent::start(options).await?);
        Ok(())
    }

    /// Starts the agent as [`options`](Self::options) say, for a registry that everybody may read.
    pub async fn start_default(&mut self) -> Result<()> {
        self.start(self.options("public")).await
    }

    /// The agent, which was started.
    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("the agent was started")
    }

    /// The image as pods name it.
    pub fn reference(&self) -> String {
        format!("{}/{REPOSITORY}:{TAG}", self.ecr.name())
    }

    /// Pulls by CRI, as kubelet does.
    pub async fn pull(&self) -> Result<()> {
        self.containerd.cri().pull(&self.reference(), None).await.with_context(|| self.story())?;
        Ok(())
    }

    /// The sum of a metric of the agent.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.agent().metrics().await?.sum(name, labels))
    }

    /// The largest layer.
    pub fn layer(&self) -> (Digest, u64) {
        let layer = largest(&self.image);
        (layer.digest(), layer.size())
    }

    /// What containerd itself read of the layers from the ECR, as it says in its requests.
    pub fn read_by_containerd(&self) -> u64 {
        self.ecr.log().iter().filter(|seen| seen.agent.starts_with("containerd/")).map(fake_ecr::Seen::bytes).sum()
    }

    /// For the error message of a test that failed.
    pub fn story(&self) -> String {
        let agent = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        let tail =
            |log: &str| log.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
        format!("{:?}\n--- agent\n{}\n--- containerd\n{}", self.release, tail(&agent), tail(&self.containerd.log()))
    }
}

/// An ECR and an agent that mirrors it, on the loopback of the test itself.
pub struct Pair {
    /// The agent.
    pub agent: Agent,
    /// The registry. It serves blobs itself: a redirect to loopback would be refused.
    pub ecr: FakeEcr,
    /// What is in it.
    pub image: Image,
}

impl Pair {
    /// With layers of these sizes, for everybody to read, and nothing fetched ahead.
    pub async fn new(layers: &[u64]) -> Result<Self> {
        Self::with(layers, Auth::Public, &[("access", "public".into())], |o| o.set("mirror.prefetch", "off")).await
    }

    /// With these further keys of the registry, and options changed by `change`.
    pub async fn with(
        layers: &[u64],
        auth: Auth,
        keys: &[(&str, Value)],
        change: impl FnOnce(Options) -> Options,
    ) -> Result<Self> {
        let ecr = ecr(auth)?;
        let image = Image::index(Format::Oci, 7, layers)?;
        ecr.push(&image, REPOSITORY, TAG);
        let agent = Agent::start(change(pair_options(&ecr, keys))).await?;
        Ok(Self { agent, ecr, image })
    }

    /// A URL at the mirror: `manifests/v1`, `blobs/sha256:…` of the image's repository.
    pub fn url(&self, path: &str) -> String {
        self.url_in(REPOSITORY, path)
    }

    /// The same of another repository.
    pub fn url_in(&self, repository: &str, path: &str) -> String {
        format!("{}{}", self.agent.mirror_url(), self.target(repository, path))
    }

    /// A path and query of the mirror, as in a request line.
    pub fn target(&self, repository: &str, path: &str) -> String {
        format!("/v2/{repository}/{path}?ns={}", self.ecr.name())
    }

    /// GET at the mirror.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.client().get(&self.url(path)).await
    }

    /// HEAD at the mirror.
    pub async fn head(&self, path: &str) -> Result<Answer> {
        self.client().head(&self.url(path)).await
    }

    /// GET with these headers.
    pub async fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        self.client().call(http::Method::GET, &self.url(path), headers).await
    }

    /// Sends a GET whose body is read by the caller, who also sees how it ends.
    pub async fn open(&self, path: &str, headers: &[(&str, &str)]) -> Result<raw::Answer> {
        self.open_in(REPOSITORY, path, headers).await
    }

    /// The same of another repository.
    pub async fn open_in(&self, repository: &str, path: &str, headers: &[(&str, &str)]) -> Result<raw::Answer> {
        let line = format!("GET {}", self.target(repository, path));
        let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        raw::send(&Place::Host, self.agent.mirror(), &line, &headers, PATIENCE).await
    }

    /// Reads the index and the image manifest, as a pull does before it asks for blobs.
    pub async fn read_manifests(&self) -> Result<()> {
        for reference in [TAG.to_owned(), self.image.manifests[0].digest().to_string()] {
            let answer = self.get(&format!("manifests/{reference}")).await?;
            ensure!(answer.status == 200, "{reference}: {} {}", answer.status, answer.text());
        }
        Ok(())
    }

    /// Brings a blob into the store, and waits until it is complete there and the agent knows it: it has its
    /// name before that.
    pub async fn bring(&self, blob: &Item) -> Result<()> {
        let file = self.blob_file(blob.digest());
        let pulls = async || self.metric("darter_pulls_total", &[]).await;
        // In this order: a pull that ends in between has named its file before it is counted.
        let before = pulls().await?;
        let was_there = file.exists();
        let answer = self.get(&format!("blobs/{}", blob.digest())).await?;
        ensure!(answer.status == 200, "{}: {} {}", blob.digest(), answer.status, answer.text());
        ensure!(Digest::of(&answer.body) == blob.digest(), "{} came wrong", blob.digest());
        let is_known = async || Ok(file.exists() && (was_there || pulls().await? > before));
        eventually("the blob is complete", is_known).await
    }

    /// Where the store keeps a complete blob.
    pub fn blob_file(&self, digest: Digest) -> PathBuf {
        self.agent.dir().join("data/blobs").join(digest.hex())
    }

    /// Where the store keeps a blob that is half written.
    pub fn ingest_file(&self, digest: Digest) -> PathBuf {
        self.agent.dir().join("data/ingest").join(digest.hex())
    }

    /// The largest layer.
    pub fn layer(&self) -> Item {
        largest(&self.image).clone()
    }

    /// The sum of a metric of the agent.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.agent.metrics().await?.sum(name, labels))
    }

    /// Where the mirror is, for an emulator.
    pub fn mirror(&self) -> SocketAddr {
        self.agent.mirror()
    }

    /// A client without credentials.
    pub fn client(&self) -> Client {
        Client::new(Place::Host)
    }
}

/// An ECR on the loopback of the test itself that serves blobs without a redirect.
pub fn ecr(auth: Auth) -> Result<FakeEcr> {
    FakeEcr::start(&Place::Host, fake_ecr::Options { auth, redirect: false, ..fake_ecr::Options::default() })
}

/// The options of an agent on the loopback of the test that mirrors `ecr`.
pub fn pair_options(ecr: &FakeEcr, keys: &[(&str, Value)]) -> Options {
    let place: [(&str, Value); 2] = [("endpoint", ecr.url().into()), ("plain_http", true.into())];
    Options::new(&Place::Host)
        .set("mirror.platform", "linux/amd64")
        .set("mirror.stall", "5s")
        .set("certs_d.check_every", "1s")
        .set("agent.drain", "1s")
        .registry(&ecr.name(), &[place.as_slice(), keys].concat())
}

fn largest(image: &Image) -> &Item {
    image.layers.iter().max_by_key(|layer| layer.size()).expect("an image has layers")
}

/// A number of bytes as metrics have it.
#[expect(clippy::cast_precision_loss, reason = "images of tests are far below 2^53 bytes")]
pub const fn bytes(count: u64) -> f64 {
    count as f64
}

/// Turns one byte of a file round.
pub fn flip(path: &Path, offset: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(file.write_all_at(&[!byte[0]], offset)?)
}

/// Looks again and again until something is so, and says what is not if it does not get so.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let so = async {
        while !is_so().await? {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, so).await.with_context(|| format!("not so after {PATIENCE:?}: {what}"))?
}

/// Runs a test on each release that can run here.
#[macro_export]
macro_rules! on_each_release {
    ($($name:ident($release:ident) $body:block)*) => {$(
        mod $name {
            use super::*;
            use $crate::tools::{Need, Release, can_run};

            async fn run($release: Release) -> anyhow::Result<()> $body

            $crate::on_releases!($name: containerd_1_6 V1, containerd_2 V2);
        }
    )*};
}

/// Runs a test on each release that can run here, on 2.x also where the transfer service pulls.
#[macro_export]
macro_rules! on_each_way {
    ($($name:ident($release:ident) $body:block)*) => {$(
        mod $name {
            use super::*;
            use $crate::tools::{Need, Release, can_run};

            async fn run($release: Release) -> anyhow::Result<()> $body

            $crate::on_releases!($name: containerd_1_6 V1, containerd_2 V2, transfer_service V2Transfer);
        }
    )*};
}

/// The tests of [`on_each_release`] and [`on_each_way`].
#[macro_export]
macro_rules! on_releases {
    ($name:ident: $($test:ident $release:ident),*) => {$(
        #[tokio::test]
        async fn $test() -> anyhow::Result<()> {
            let needs = [Need::Containerd(Release::$release), Need::Darter];
            let test = concat!(stringify!($name), ", ", stringify!($test));
            if can_run(test, &needs) { run(Release::$release).await } else { Ok(()) }
        }
    )*};
}
