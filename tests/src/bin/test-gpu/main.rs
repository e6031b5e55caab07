//! What an agent says of real GPUs against what the fixtures of the mock say of such GPUs: one table.
//!
//! The golden files of the tests are what is expected: which series a GPU of this name has, and the values that
//! do not depend on what it does. A driver that says less or more than they do is news: then a fixture is wrong,
//! or the reader is. Changes nothing on the GPU.

mod compare;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use darter_tests::agent::{Agent, Metrics, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;

use compare::{Row, Series, Verdict, compare, split};

/// GPUs by the driver's name, and the golden file of one that is in one piece and of one that is in MIG mode.
const KNOWN: [(&str, &str, Option<&str>); 5] = [
    ("Tesla T4", "t4-healthy", None),
    ("NVIDIA A10G", "a10g", None),
    ("NVIDIA H100 80GB HBM3", "h100x8", None),
    ("NVIDIA H200", "h200-idle", Some("h200-mig")),
    ("NVIDIA A100-SXM4-40GB", "", Some("a100-mig-mixed")),
];
/// Nothing is to be compared with.
const NO_GPU: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("test-gpu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mock = match arguments.as_slice() {
        [] => None,
        [flag, config] if flag == "--mock" => Some(Mock::new(config)?),
        _ => bail!("usage: test-gpu [--mock CONFIG], where CONFIG is what the mock of NVIDIA's library says, in TOML"),
    };
    let options = match &mock {
        Some(mock) => {
            println!("== A MOCK in the driver's place");
            mock.options(1)?
        }
        None => real(),
    };
    let agent = Agent::start(options).await?;
    let asked = async || Ok(calls(&agent.metrics().await?, "init").0 > 0.0);
    eventually("NVML was looked for", asked).await?;
    if agent.metrics().await?.sum("darter_node_gpus", &[("state", "present")]) == 0.0 && !is_running(&agent).await? {
        println!("no GPU here that NVML answers for: nothing was compared. The agent says:");
        for line in agent.log().lines().filter(|line| line.contains("NVML")) {
            println!("  {line}");
        }
        return Ok(NO_GPU.into());
    }
    let page = twice(&agent).await?;
    let metrics = agent.metrics().await?;
    let mut is_as_expected = true;
    for (uuid, name) in gpus(&page) {
        is_as_expected &= show(&page, &uuid, &name)?;
    }
    costs(&metrics);
    println!("\n== {}", if is_as_expected { "as expected" } else { "NOT as expected: see MISSING, BESIDES and WRONG" });
    Ok(if is_as_expected { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An agent that asks the driver of this machine, or the library that the environment names.
fn real() -> Options {
    let options = Options::new(&Place::Host)
        .plain_registry("registry.example", "http://127.0.0.1:9")
        .set("gpu.interval", "1s")
        .set("gpu.slow_interval", "1s")
        .set("gpu.processes", true)
        .set("gpu.pod_resources", "");
    match std::env::var_os("DARTER_NVML_PATH") {
        Some(library) => options.set("gpu.library", PathBuf::from(library).display().to_string()),
        None => options,
    }
}

/// Whether NVML answers within its time.
async fn is_running(agent: &Agent) -> Result<bool> {
    let says_none = async || {
        let log = agent.log();
        let metrics = agent.metrics().await?;
        let present = metrics.sum("darter_node_gpus", &[("state", "present")]) > 0.0;
        Ok(present || log.contains("no NVML") || log.contains("NVML does not start") || log.contains("counts no GPU"))
    };
    eventually("NVML answers, or is not there", says_none).await?;
    Ok(agent.metrics().await?.sum("darter_node_gpus", &[("state", "present")]) > 0.0)
}

/// The text of a scrape after some rounds: what takes two readings is there.
async fn twice(agent: &Agent) -> Result<String> {
    let mut rounds = Vec::new();
    eventually("the GPUs were asked three times, and judged", async || {
        let metrics = agent.metrics().await?;
        let round = metrics.sum("darter_gpu_collect_timestamp_seconds", &[]);
        if round > 0.0 && rounds.last() != Some(&round) {
            rounds.push(round);
        }
        Ok(rounds.len() > 2 && metrics.series().iter().any(|(series, _)| series.starts_with("darter_gpu_state")))
    })
    .await?;
    Ok(agent.admin("/metrics").await?.text())
}

/// UUID and name of each.
fn gpus(page: &str) -> Vec<(String, String)> {
    let info = page.lines().filter(|line| line.starts_with("darter_gpu_info{"));
    info.filter_map(|line| Some((label(line, "uuid")?, label(line, "name")?))).collect()
}

fn label(line: &str, name: &str) -> Option<String> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    Some(rest.split_once('"')?.0.to_owned())
}

/// Prints one GPU's rows. Whether all is as expected.
fn show(page: &str, uuid: &str, name: &str) -> Result<bool> {
    let real = split(page, Some(uuid));
    let is_mig = real.keys().any(|key| key.starts_with("darter_gpu_mig_info"));
    let known = KNOWN.iter().find(|(known, _, _)| *known == name);
    let golden =
        known.and_then(|(_, whole, mig)| if is_mig { *mig } else { Some(*whole).filter(|name| !name.is_empty()) });
    let Some(golden) = golden else {
        println!(
            "\n== {uuid}: {name}{}: no fixture of such a GPU, so this is what it says",
            if is_mig { " (MIG)" } else { "" }
        );
        real.iter().for_each(|(key, value)| println!("  {key} {value}"));
        return Ok(true);
    };
    println!("\n== {uuid}: {name}, expected as in {golden}");
    let rows = compare(&real, &expected(golden)?);
    let width = rows.iter().map(|row| row.key.len()).max().unwrap_or(0);
    println!("  {:width$}  {:>18}  {:>18}  verdict", "series", "real", "expected");
    for Row { key, real, expected, verdict } in &rows {
        let (real, expected) = (real.as_deref().unwrap_or("-"), expected.as_deref().unwrap_or("-"));
        println!("  {key:width$}  {real:>18}  {expected:>18}  {}", verdict.word());
    }
    Ok(rows.iter().all(|row| matches!(row.verdict, Verdict::Same | Verdict::Other)))
}

/// What the first GPU of a golden file says.
fn expected(golden: &str) -> Result<Series> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/gpu").join(golden).with_extension("txt");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let first = gpus(&text).into_iter().next().with_context(|| format!("no GPU in {}", path.display()))?;
    Ok(split(&text, Some(&first.0)))
}

/// How often a call was made, and what all of them took in seconds.
fn calls(metrics: &Metrics, call: &str) -> (f64, f64) {
    let of = |what: &str| metrics.sum(&format!("darter_nvml_call_seconds_{what}"), &[("call", call)]);
    (of("count"), of("sum"))
}

/// What each call into NVML takes here, and what went wrong.
fn costs(metrics: &Metrics) {
    let names = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_nvml_call_seconds_count"));
    let mut costs: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for name in names.filter_map(|(series, _)| label(series, "call")) {
        costs.insert(name.clone(), calls(metrics, &name));
    }
    println!("\n== calls into NVML\n  {:26}  {:>6}  {:>9}", "call", "calls", "mean us");
    for (name, (count, seconds)) in costs {
        println!("  {name:26}  {count:>6}  {:>9.0}", seconds / count.max(1.0) * 1e6);
    }
    let errors = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_nvml_errors_total"));
    errors.for_each(|(series, count)| println!("  {series} {count}"));
}
