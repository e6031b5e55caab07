//! The fourth part: a scaler to which an agent reports, and which tells KEDA how many replicas there are to be.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::keda::{Keda, Push};
use darter_tests::nvml::Mock;
use darter_tests::scaler::Scaler;
use serde_json::Value;

/// What is scaled. Replicas are kept for three seconds, as nobody waits five minutes for a demo.
const CONFIG: &str = r#"
[log]
level = "warn"

[actuators]
keda = "on"
protect = "on"

[[pools]]
name = "h200"
price_per_hour = "4.00"
gpus = 1
nodes_most = 20

[[workloads]]
name = "models/llm"
pool = "h200"
most = 10
target = "4"
lead = "84s"

[policy.keep]
usual_ms = 3000
most_ms = 3000
"#;
const WORKLOAD: &str = "models/llm";

pub(crate) async fn show() -> Result<()> {
    println!(
        "== Scaling: KEDA here is A DOUBLE that asks as KEDA does, and the GPU a mock (the real KEDA: make test-kube)"
    );
    let mut scaler = Scaler::start(CONFIG).await?;
    let mock = Mock::fixture("h200-busy")?;
    let options = mock.options(1)?.set("gpu.device_plugin", false).set("report.scaler", scaler.grpc());
    let _agent = Agent::start_unready(options.set("report.interval", "1s")).await?;
    let has_gpus = |node: &Value| node["report"]["gpus"].as_array().is_some_and(|gpus| !gpus.is_empty());
    let nodes = |page: &Value| page["state"]["nodes"].as_object().cloned().unwrap_or_default();
    let state = scaler.until("/v1/state", "a node with a GPU", |page| nodes(page).values().any(has_gpus)).await?;
    let node = nodes(&state).into_iter().next().context("a node")?.1["name"].as_str().context("a name")?.to_owned();

    scaler.demand(WORKLOAD, 0).await?;
    told(&scaler, 0).await?;
    let mut keda = Keda::new(&scaler.grpc(), "models", "llm", &[])?;
    let mut pushes = keda.listen();
    ensure!(pushes.next().await? == Push::Opened, "KEDA's stream is not open");
    println!("\n12 requests wait for {WORKLOAD}, of which one replica takes 4:\n");
    println!("$ curl -X PUT -d '{{\"backlog\": 12}}' {}/v1/demand/{WORKLOAD}", scaler.http());
    let began = Instant::now();
    scaler.demand(WORKLOAD, 12).await?;
    let pushed = pushes.active().await?.into_std().saturating_duration_since(began);
    told(&scaler, 3).await?;
    let polled = keda.poll().await?;
    println!("KEDA was told after {} ms, and makes it {} replicas.", pushed.as_millis(), polled.replicas);
    explain(&scaler, WORKLOAD, "12 wait or run").await?;
    println!("\nOf its GPU nothing is known in the agent's first half minute, and that is not idleness:");
    explain(&scaler, &node, "").await?;

    println!(
        "\nNothing waits any more, and what a replica costs is not worth the next cold start for longer than 3 s:"
    );
    scaler.demand(WORKLOAD, 0).await?;
    let began = Instant::now();
    told(&scaler, 0).await?;
    println!("KEDA was told 0 after {:.1} s.", began.elapsed().as_secs_f64());
    explain(&scaler, WORKLOAD, "").await?;

    println!("\nEach decision is on disk with all that it was made from, and is made again from that:\n");
    scaler.stop().await?;
    let file = scaler.dir().join("record/decisions.jsonl").display().to_string();
    darter(&scaler, &["replay", &file], "the same to the bit").await
}

/// Waits until KEDA is told so many replicas.
async fn told(scaler: &Scaler, replicas: u32) -> Result<()> {
    let words = format!("KEDA is told {replicas}");
    scaler.until(&format!("/v1/explain/{WORKLOAD}"), &words, |page| page["keda"] == words.as_str()).await?;
    Ok(())
}

async fn explain(scaler: &Scaler, what: &str, wanted: &str) -> Result<()> {
    println!();
    darter(scaler, &["explain", what], wanted).await
}

/// Runs `darter` and shows what it says, which has these words in it.
async fn darter(scaler: &Scaler, words: &[&str], wanted: &str) -> Result<()> {
    println!("$ darter {}", words.join(" "));
    let output = scaler.darter(words).await?;
    print!("{}", output.stdout);
    ensure!(output.status.success() && output.stdout.contains(wanted), "darter {words:?}: {}", output.stderr);
    Ok(())
}
