//! What it costs to watch GPUs: a scrape, processor time, memory, and what a call that hangs holds up.
//!
//! The GPUs are those of the mock: a call into it takes some 5 µs, and one into a driver as long as the driver
//! takes. So processor time here is the agent's own share, without the driver's; its wait is in
//! `darter_nvml_call_seconds` of a real node. An agent that watches nothing runs beside it, in the same run.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use darter_benches::{Better, Report, percentile};
use darter_tests::agent::{Agent, Options};
use darter_tests::fake_ecr::Auth;
use darter_tests::image::{Format, Image};
use darter_tests::kubelet::Kubelet;
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::stage::{REPOSITORY, TAG, ecr, eventually};

/// The largest node that is common.
const GPUS: u32 = 8;
/// Pods that have a replica of one of them each.
const PODS: usize = 100;
const SCRAPES: usize = 500;
/// What is asked of the mirror as often: what takes long is the answer, not the bytes.
const LAYER: u64 = 16 << 10;
const ROUNDS: usize = 10;
/// Long enough for some rounds of the slow tier.
const WATCHED: Duration = Duration::from_secs(90);
const MIB: f64 = 1_048_576.0;

#[tokio::main]
async fn main() -> Result<()> {
    let mut report = Report::default();
    let mock = Mock::fixture("h100x8")?;
    let kubelet = pods(&mock)?;
    let (ecr, image) = (ecr(Auth::Public)?, Image::new(Format::Oci, 7, &[LAYER])?);
    ecr.push(&image, REPOSITORY, TAG);
    let defaults = Options::new(&Place::Host)
        .registry(
            &ecr.name(),
            &[("endpoint", ecr.url().into()), ("plain_http", true.into()), ("access", "public".into())],
        )
        .set("gpu.library", mock.library().display().to_string())
        .set("gpu.host_root", mock.host(GPUS)?.display().to_string());
    let watching = defaults.clone().set("gpu.pod_resources", kubelet.socket().display().to_string());
    let watching = Agent::start(watching.set("gpu.dcgm_names", "legacy").set("gpu.processes", true)).await?;
    let without = Agent::start(defaults.set("gpu.mode", "off")).await?;
    // Both have started, and the first has judged.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (from, from_without) = (watching.usage()?, without.usage()?);
    tokio::time::sleep(WATCHED).await;
    let (to, to_without) = (watching.usage()?, without.usage()?);
    let share = |cpu: Duration| cpu.as_secs_f64() / WATCHED.as_secs_f64() * 100.0;
    let own = share(to.cpu - from.cpu) - share(to_without.cpu - from_without.cpu);
    let conditions = "8 mock GPUs at the default tiers, over an agent without GPUs";
    report.add("gpu: processor time", own, "% of a core", Better::Lower, Some(0.5), conditions);
    #[allow(clippy::cast_precision_loss, reason = "megabytes")]
    let more = (to.resident_bytes as f64 - to_without.resident_bytes as f64) / MIB;
    report.add("gpu: memory", more, "MiB", Better::Lower, Some(15.0), conditions);
    let before = scrapes(&watching).await?;
    let layer = format!("/v2/{REPOSITORY}/blobs/{}?ns={}", image.layers[0].digest(), ecr.name());
    // The first of them brings it.
    hits(&watching, &layer).await?;
    let hits_before = hits(&watching, &layer).await?;
    let conditions =
        format!("{GPUS} GPUs, {PODS} pods, with dcgm-exporter's names, {SCRAPES} scrapes one after the other");
    let goal = Some(10.0);
    let all = before.concat();
    report.add("gpu: scrape, p99", percentile(all, 0.99), "ms", Better::Lower, goal, conditions);
    mock.set("base = 'h100x8'\n[[overrides]]\nsymbol = 'nvmlDeviceGetPowerUsage'\nhang = true\n")?;
    hangs(&watching).await?;
    let hits_while_it_hangs = hits(&watching, &layer).await?;
    // What else this machine does makes a round slower, and a scrape that waits for the call all of them.
    let median = |rounds: Vec<Vec<f64>>| {
        let mut each: Vec<f64> = rounds.into_iter().map(|round| percentile(round, 0.99)).collect();
        each.sort_by(f64::total_cmp);
        each[each.len() / 2]
    };
    let (while_it_hangs, before) = (median(scrapes(&watching).await?), median(before));
    let (hit_while_it_hangs, hit_before) = (median(hits_while_it_hangs), median(hits_before));
    // To the end, and not only at the beginning.
    hangs(&watching).await?;
    println!("a scrape while a call hangs: {while_it_hangs:.3} ms, before: {before:.3} ms");
    println!("a hit of the mirror while a call hangs: {hit_while_it_hangs:.3} ms, before: {hit_before:.3} ms");
    let conditions = "p99 of a scrape (whose page is shorter then) while a call hangs, over that before; the median of \
                      ten rounds of each";
    let goal = Some(1.0);
    report.add("gpu: a hung call holds up a scrape by", while_it_hangs - before, "ms", Better::Lower, goal, conditions);
    let conditions = "the same of 16 KiB that the mirror has";
    let later = hit_while_it_hangs - hit_before;
    report.add("gpu: a hung call holds up a hit of the mirror by", later, "ms", Better::Lower, goal, conditions);
    report.finish("gpu")
}

/// Waits until the agent says itself that a call hangs. An error if none does: then there is nothing to measure.
async fn hangs(agent: &Agent) -> Result<()> {
    eventually("a call into NVML hangs", async || {
        let metrics = agent.metrics().await?;
        let has = metrics.series().iter().any(|(series, _)| series.starts_with("darter_gpu_collect_success"));
        Ok(has && metrics.sum("darter_gpu_collect_success", &[]) == 0.0)
    })
    .await
}

/// A kubelet of whose GPUs many pods share each.
fn pods(mock: &Mock) -> Result<Kubelet> {
    let kubelet = Kubelet::start()?;
    let config = mock.set("base = 'h100x8'")?;
    let uuids: Vec<String> = config.gpus.iter().filter_map(|gpu| gpu.uuid.clone()).collect();
    let ids: Vec<String> = (0..PODS).map(|pod| format!("{}::{pod}", uuids[pod % uuids.len()])).collect();
    let names: Vec<String> = (0..PODS).map(|pod| format!("inference-{pod}")).collect();
    let given: Vec<[&str; 1]> = ids.iter().map(|id| [id.as_str()]).collect();
    let given: Vec<_> = names
        .iter()
        .zip(&given)
        .map(|(name, id)| ("models", name.as_str(), "server", "nvidia.com/gpu.shared", &id[..]))
        .collect();
    let all: Vec<&str> = ids.iter().map(String::as_str).collect();
    kubelet.set(&given, &[("nvidia.com/gpu.shared", &all)]);
    Ok(kubelet)
}

/// How long each hit of the mirror takes, in milliseconds, round by round.
async fn hits(agent: &Agent, path: &str) -> Result<Vec<Vec<f64>>> {
    let client = agent.client();
    let url = format!("{}{path}", agent.mirror_url());
    let mut times = Vec::with_capacity(SCRAPES);
    for _ in 0..SCRAPES {
        let began = Instant::now();
        let answer = client.get(&url).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        let (status, bytes) = (answer.status, answer.body.len() as u64);
        anyhow::ensure!((status.as_u16(), bytes) == (200, LAYER), "{path}: {status}, {bytes} bytes");
    }
    Ok(times.chunks(SCRAPES / ROUNDS).map(<[f64]>::to_vec).collect())
}

/// How long each scrape takes, in milliseconds, round by round.
async fn scrapes(agent: &Agent) -> Result<Vec<Vec<f64>>> {
    let client = agent.client();
    let url = format!("http://{}/metrics", agent.admin_address());
    let mut times = Vec::with_capacity(SCRAPES);
    for _ in 0..SCRAPES {
        let began = Instant::now();
        let answer = client.get(&url).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        anyhow::ensure!(answer.status == 200, "/metrics: {}", answer.status);
        answer.text().contains("darter_gpu_info").then_some(()).context("a scrape without GPUs")?;
    }
    Ok(times.chunks(SCRAPES / ROUNDS).map(<[f64]>::to_vec).collect())
}
