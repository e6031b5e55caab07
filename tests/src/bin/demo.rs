//! `make demo`: a real containerd pulls an image through an agent, twice, from a registry with a
//! password, and every byte is accounted for.
//!
//! Everything runs in two network namespaces of its own and is gone afterwards, also after Ctrl-C.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use darter_tests::agent::{Agent, Metrics, Options};
use darter_tests::containerd::{self, Containerd};
use darter_tests::image::{Format, Image};
use darter_tests::net::Network;
use darter_tests::registry::{self, Registry};
use darter_tests::tools::{Need, Release, can_run};

const USER: &str = "demo";
const PASSWORD: &str = "a-password-of-the-demo";
/// 320 MiB in four layers: long enough to see, small enough for every machine.
const LAYERS: [u64; 4] = [96 << 20, 96 << 20, 64 << 20, 64 << 20];
/// The registry's link. Without a limit, memory copies memory and all pulls look alike.
const ORIGIN_BYTES_PER_SECOND: u64 = 100_000_000;
/// The name the image is pulled by; its registry is really in this machine.
const REGISTRY: &str = "registry.demo.example";

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = tokio::select! {
        outcome = demo() => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted; everything the demo started is gone")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    let release = if Release::V2.programs().is_some() { Release::V2 } else { Release::V1 };
    let needs = [Need::Root, Need::Containerd(release), Need::DockerRegistry, Need::Darter];
    ensure!(can_run("demo", &needs), "the demo cannot run here; the line above says why");

    println!(
        "1. an image of {} MiB in {} layers, in a docker-registry with a password",
        mib(LAYERS.iter().sum()),
        LAYERS.len()
    );
    let network = Network::new(1)?;
    let image = Image::index(Format::Oci, 2026, &LAYERS)?;
    let origin = Registry::start(&network.hub(), registry::Options::with_password(USER, PASSWORD)).await?;
    origin.push(&image, "team/model", "v1").await?;
    network.shape_hub(ORIGIN_BYTES_PER_SECOND)?;

    println!("2. a node: {} and a darter agent, which writes its hosts.toml", name(release));
    let node = network.node(0);
    let containerd = Containerd::start(release, &node, &containerd::Options::default()).await?;
    let agent = start_agent(&node, &containerd, &origin).await?;
    println!("{}", indent(&std::fs::read_to_string(containerd.certs_d().join(REGISTRY).join("hosts.toml"))?));

    println!("3. pulls of {REGISTRY}/team/model:v1, all layers gone from containerd before each\n");
    let reference = format!("{REGISTRY}/team/model:v1");
    println!("  {:<28} {:>12} {:>12} {:>12} {:>9}", "", "seconds", "origin MiB", "cache MiB", "images");
    for (who, by_ctr) in [("first pull, CRI (kubelet)", false), ("second pull, CRI", false), ("third pull, ctr", true)]
    {
        containerd.forget().await?;
        pull(who, &containerd, &agent, &reference, by_ctr).await?;
    }
    println!(
        "\n  The registry's link is limited to {} MB/s. Seconds include unpacking.",
        ORIGIN_BYTES_PER_SECOND / 1_000_000
    );
    stop(agent, &containerd).await
}

async fn start_agent(node: &darter_tests::net::Place, containerd: &Containerd, origin: &Registry) -> Result<Agent> {
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

/// One pull, as a line of the table.
async fn pull(who: &str, containerd: &Containerd, agent: &Agent, reference: &str, by_ctr: bool) -> Result<()> {
    let before = agent.metrics().await?;
    let started = Instant::now();
    if by_ctr {
        containerd.ctr_pull(reference, None).await?;
    } else {
        containerd.cri().pull(reference, None).await?;
    }
    let seconds = started.elapsed();
    let after = agent.metrics().await?;
    let images = containerd.ctr(&["images", "ls", "--quiet"]).await?;
    ensure!(images.lines().any(|line| line == reference), "containerd does not have the image after the pull");
    println!(
        "  {who:<28} {:>12.1} {:>12} {:>12} {:>9}",
        seconds.as_secs_f64(),
        mib(bytes(&before, &after, "origin")),
        mib(bytes(&before, &after, "cache")),
        1,
    );
    Ok(())
}

/// Bytes that the mirror gave to containerd between two looks, from one source.
fn bytes(before: &Metrics, after: &Metrics, source: &str) -> u64 {
    let read = |metrics: &Metrics| metrics.sum("darter_mirror_bytes_total", &[("source", source)]);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a difference of byte counters")]
    let bytes = (read(after) - read(before)) as u64;
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

fn name(release: Release) -> &'static str {
    match release {
        Release::V1 => "Debian's containerd",
        Release::V2 => "containerd 2.2.4",
    }
}

const fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("     | {line}")).collect::<Vec<_>>().join("\n")
}
