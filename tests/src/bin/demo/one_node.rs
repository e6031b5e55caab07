//! The first part: a real containerd pulls an image through an agent, three times, from a registry
//! with a password, and every byte is accounted for.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::containerd::{self, Containerd};
use darter_tests::image::{Format, Image};
use darter_tests::net::{Network, Place};
use darter_tests::registry::{self, Registry};
use darter_tests::tools::Release;

const USER: &str = "demo";
const PASSWORD: &str = "a-password-of-the-demo";
/// 320 MiB in four layers: long enough to see, small enough for every machine.
const LAYERS: [u64; 4] = [96 << 20, 96 << 20, 64 << 20, 64 << 20];
/// The registry's link. Without a limit, memory copies memory and all pulls look alike.
const ORIGIN_BYTES_PER_SECOND: u64 = 100_000_000;
/// The name the image is pulled by; its registry is really in this machine.
const REGISTRY: &str = "registry.demo.example";

pub(crate) async fn show(release: Release) -> Result<()> {
    println!(
        "1. an image of {} MiB in {} layers, in a docker-registry with a password",
        crate::mib(LAYERS.iter().sum()),
        LAYERS.len()
    );
    let network = Network::new(1)?;
    let image = Image::index(Format::Oci, 2026, &LAYERS)?;
    let origin = Registry::start(&network.hub(), registry::Options::with_password(USER, PASSWORD)).await?;
    origin.push(&image, "team/model", "v1").await?;
    network.shape_hub(ORIGIN_BYTES_PER_SECOND)?;

    println!("2. a node: {} and a darter agent, which writes its hosts.toml", crate::name(release));
    let node = network.node(0);
    let containerd = Containerd::start(release, &node, &containerd::Options::default()).await?;
    let agent = start_agent(&node, &containerd, &origin).await?;
    println!("{}", indent(&std::fs::read_to_string(containerd.certs_d().join(REGISTRY).join("hosts.toml"))?));

    println!("3. pulls of {REGISTRY}/team/model:v1, all layers gone from containerd before each\n");
    let reference = format!("{REGISTRY}/team/model:v1");
    println!(
        "  {:<26} {:>8} {:>18} {:>18} {:>18}",
        "", "seconds", "from registry MiB", "network card MiB", "from store MiB"
    );
    let mut counts = Vec::new();
    for (who, by_ctr) in [("first pull, CRI (kubelet)", false), ("second pull, CRI", false), ("third pull, ctr", true)]
    {
        containerd.forget().await?;
        counts.push(pull(who, &node, &containerd, &agent, &reference, by_ctr).await?);
    }
    check(counts[0], &counts[1..], image.layer_bytes())?;
    println!(
        "\n  The registry's link is limited to {} MB/s. Seconds include unpacking.",
        ORIGIN_BYTES_PER_SECOND / 1_000_000
    );
    stop(agent, &containerd).await
}

async fn start_agent(node: &Place, containerd: &Containerd, origin: &Registry) -> Result<Agent> {
    // Outside the agent's own directory, as on a real node: a file that only its owner reads.
    let password = containerd.root().join("demo-password");
    std::fs::write(&password, PASSWORD).context("cannot write the password file")?;
    let options = Options::new(node)
        .set("certs_d.path", containerd.certs_d().display().to_string())
        .set("containerd.config", containerd.config().display().to_string())
        .set("containerd.socket", containerd.socket().display().to_string())
        .set("log.level", "info")
        .registry(
            REGISTRY,
            &[
                ("endpoint", origin.url().into()),
                ("plain_http", true.into()),
                ("access", "node".into()),
                ("username", USER.into()),
                ("password_file", password.display().to_string().into()),
            ],
        );
    Agent::start(options).await
}

/// What was counted up to a moment.
#[derive(Clone, Copy)]
struct Counts {
    /// Read from the registry, says darter.
    origin: u64,
    /// Received by the node's network card, says the kernel: a witness of its own.
    network: u64,
    /// Given to containerd out of darter's store.
    cache: u64,
    /// Given to containerd in all.
    given: u64,
}

impl Counts {
    async fn now(node: &Place, agent: &Agent) -> Result<Self> {
        let metrics = agent.metrics().await?;
        let given = |labels: &[(&str, &str)]| whole(metrics.sum("darter_mirror_bytes_total", labels));
        let network = node.traffic()?.received;
        let origin = whole(metrics.sum("darter_origin_bytes_total", &[]));
        Ok(Self { origin, network, cache: given(&[("source", "cache")]), given: given(&[]) })
    }

    const fn since(self, before: Self) -> Self {
        Self {
            origin: self.origin - before.origin,
            network: self.network - before.network,
            cache: self.cache - before.cache,
            given: self.given - before.given,
        }
    }
}

/// One pull, as a line of the table.
async fn pull(
    who: &str,
    node: &Place,
    containerd: &Containerd,
    agent: &Agent,
    reference: &str,
    by_ctr: bool,
) -> Result<Counts> {
    let before = Counts::now(node, agent).await?;
    let started = Instant::now();
    if by_ctr {
        containerd.ctr_pull(reference, None).await?;
    } else {
        containerd.cri().pull(reference, None).await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let counts = Counts::now(node, agent).await?.since(before);
    let images = containerd.ctr(&["images", "ls", "--quiet"]).await?;
    ensure!(images.lines().any(|line| line == reference), "containerd does not have the image after the pull");
    println!(
        "  {who:<26} {seconds:>8.1} {:>18.1} {:>18.1} {:>18.1}",
        crate::mib(counts.origin),
        crate::mib(counts.network),
        crate::mib(counts.cache)
    );
    Ok(counts)
}

/// What the demo is to show: the registry is read once, and never again.
fn check(first: Counts, later: &[Counts], image: u64) -> Result<()> {
    let slack = image / 50;
    ensure!(first.origin.abs_diff(image) < slack, "the first pull read {} bytes of {image}", first.origin);
    ensure!(first.network < image + image / 10, "{} bytes came in for an image of {image}", first.network);
    for counts in later.iter().chain([&first]) {
        ensure!(counts.given >= image, "containerd got {} of {image} bytes from darter", counts.given);
    }
    for counts in later {
        ensure!(counts.network < slack, "{} bytes came in though all were here", counts.network);
    }
    Ok(())
}

fn whole(bytes: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a counter of bytes")]
    let bytes = bytes as u64;
    bytes
}

async fn stop(mut agent: Agent, containerd: &Containerd) -> Result<()> {
    println!("\n4. stop the agent: its hosts.toml goes, and containerd asks the registry itself");
    agent.stop().await?;
    let left = containerd.certs_d().join(REGISTRY).join("hosts.toml").exists();
    ensure!(!left, "hosts.toml is still there");
    // Nothing that the demo started is left when this returns; the caller drops the rest.
    tokio::time::timeout(Duration::from_secs(60), containerd.forget()).await.context("containerd keeps its images")?
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("     | {line}")).collect::<Vec<_>>().join("\n")
}
