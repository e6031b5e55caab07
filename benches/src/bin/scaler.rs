//! The real scaler with a thousand agents: how long a push takes to reach KEDA, what it costs to hear all, and how
//! long it does not know all of them after a restart.
//!
//! Agents are streams that report as agents do, each over a connection of its own, and come back as agents do; KEDA is
//! the double that the tests use. All of it is on one machine, so that the times have the agents' own work in them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_api::report::Report as Told;
use darter_benches::{Better, Report, percentile};
use darter_tests::keda::{Keda, Push};
use darter_tests::scaler::{Mouth, Scaler, channel, image, report};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const AGENTS: u64 = 1000;
/// Images that a node has, and different ones in the cluster.
const HELD: u64 = 200;
const IMAGES: u64 = 2000;
/// Pushes that are measured, each of a workload of its own.
const PUSHES: usize = 200;
/// As agents report, and come back.
const INTERVAL: Duration = Duration::from_secs(5);
const AGAIN_MIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(8);
/// It does not come at all after this.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::main]
async fn main() -> Result<()> {
    let mut figures = Report::default();
    let mut scaler = Scaler::start(&config()).await?;
    let idle = scaler.usage()?.resident_bytes;
    let mut agents = JoinSet::new();
    for n in 0..AGENTS {
        agents.spawn(agent(scaler.grpc(), n));
    }
    let took = all_known(&scaler).await?;
    let conditions = format!("{AGENTS} agents, {HELD} images each of {IMAGES}, a report each 5 s");
    figures.add("scaler: all nodes known at first", took.as_secs_f64(), "s", Better::Lower, None, &*conditions);
    pushes(&scaler, &mut figures, &conditions).await?;
    let usage = scaler.usage()?;
    let mib = |bytes: u64| f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0;
    let name = "scaler: resident memory";
    figures.add(name, mib(usage.resident_bytes), "MiB", Better::Lower, Some(100.0), &*conditions);
    figures.add("scaler: resident memory with no agent", mib(idle), "MiB", Better::Lower, None, "for comparison");
    let page = scaler.metrics().await?;
    let decisions = page.sum("darter_scaler_decision_seconds_count", &[]);
    let mean_ms = page.sum("darter_scaler_decision_seconds_sum", &[]) / decisions.max(1.0) * 1000.0;
    let conditions = format!("{conditions}; mean of {decisions} decisions, with the look at what is known");
    figures.add("scaler: a decision", mean_ms, "ms", Better::Lower, None, conditions);
    scaler.stop().await?;
    scaler.start_again().await?;
    let took = all_known(&scaler).await?;
    let conditions = format!("{AGENTS} agents that come back as agents do; from when it is ready");
    figures.add(
        "scaler: all nodes known after a restart",
        took.as_secs_f64(),
        "s",
        Better::Lower,
        Some(10.0),
        conditions,
    );
    figures.finish("scaler-live")
}

fn config() -> String {
    let mut text = "[actuators]\nkeda = 'on'\nprotect = 'on'\ncopy = 'on'\n[policy.rails]\ngpus_most = 100000\n\
                    [[pools]]\nname = 'l4'\nprice_per_hour = '0.80'\ngpus = 1\n"
        .to_owned();
    for n in 0..PUSHES {
        text += &format!("[[workloads]]\nname = 'models/m{n}'\nmost = 3\n");
    }
    text
}

/// Speaks as the agent of one node, for ever.
async fn agent(url: String, n: u64) {
    let (mut sequence, mut failures) = (0, 0);
    loop {
        if let Ok(channel) = channel(&url, None).await
            && let Ok(mut mouth) = Mouth::open(channel, None).await
        {
            loop {
                sequence += 1;
                if mouth.say(told(n, sequence)).await.is_err() {
                    break;
                }
                failures = 0;
                sleep(INTERVAL).await;
            }
        }
        let most = AGAIN_MIN.saturating_mul(1 << failures).min(AGAIN_MAX);
        // Each at another time, as agents do.
        sleep(most / 2 + most / 2 * u32::try_from(n % 256).unwrap_or(0) / 255).await;
        failures = (failures + 1).min(8);
    }
}

fn told(n: u64, sequence: u64) -> Told {
    let images = (0..HELD).map(|i| image((n * 7 + i * 11) % IMAGES)).collect();
    Told { images, ..report(&format!("gpu-{n}"), sequence) }
}

async fn all_known(scaler: &Scaler) -> Result<Duration> {
    let began = Instant::now();
    loop {
        let page = scaler.json("/v1/status").await?;
        if page["nodes"]["fresh"] == AGENTS {
            return Ok(began.elapsed());
        }
        anyhow::ensure!(began.elapsed() < PATIENCE, "not all nodes are known: {}", page["nodes"]);
        sleep(Duration::from_millis(20)).await;
    }
}

/// From the demand that caused it, as its sender sees it, to the push, as KEDA does.
async fn pushes(scaler: &Scaler, figures: &mut Report, conditions: &str) -> Result<()> {
    let mut took = Vec::with_capacity(PUSHES);
    for n in 0..PUSHES {
        let name = format!("m{n}");
        let mut pushes = Keda::new(&scaler.grpc(), "models", &name, &[])?.listen();
        anyhow::ensure!(pushes.next().await? == Push::Opened, "no stream");
        let began = Instant::now();
        scaler.demand(&format!("models/{name}"), 1).await?;
        let at = pushes.active().await.context("no push")?;
        took.push(at.duration_since(began).as_secs_f64() * 1000.0);
    }
    let conditions = format!("{conditions}; {PUSHES} pushes, from PUT to KEDA's stream");
    let name = "scaler: a push reaches KEDA, p99";
    figures.add(name, percentile(took.clone(), 0.99), "ms", Better::Lower, Some(250.0), &*conditions);
    figures.add("scaler: a push reaches KEDA, median", percentile(took, 0.5), "ms", Better::Lower, None, conditions);
    Ok(())
}
