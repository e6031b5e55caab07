//! What is concluded of each fixture of the mock, whole: the state, every reason, and the GPUs that have it.
//!
//! `golden/gpu/verdicts.txt` has a line for each fixture: its name, the GPUs of its host, and the verdict; with each
//! reason the GPU that has it, or how many do.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use futures_util::stream::{self, StreamExt as _};
use serde_json::Value;

use crate::NEEDS;
use crate::scrapes::{ensure_golden, gpu_series};

/// So many agents at once: each waits most of its time, and two processors start no more in a second or two.
const AT_ONCE: usize = 6;
/// Verdicts settle: after so many waits for one that still changes it is not going to be this one.
const NEWS_MAX: usize = 4;

/// Of those whose GPUs cannot be read the series stand still with the verdict, and are compared here.
const UNREAD: [&str; 5] = ["count-0", "driver-mismatch", "hang-power", "init-unknown", "no-driver"];

fn path(of: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(of)
}

/// A verdict as a line has it.
fn written(gpu: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let reasons = gpu["reasons"].as_array().into_iter().flatten().map(|finding| {
        let gpus: Vec<String> = finding["gpus"].as_array().into_iter().flatten().map(text).collect();
        let of = match &gpus[..] {
            [] => String::new(),
            [gpu] => format!("@{gpu}"),
            several => format!("@{}", several.len()),
        };
        format!(" {}{of}", text(&finding["reason"]))
    });
    text(&gpu["state"]) + &reasons.collect::<String>()
}

async fn is_judged(fixture: &str, gpus: u32, verdict: &str) -> Result<()> {
    let mock = Mock::fixture(fixture)?;
    let agent = Agent::start(mock.options(gpus)?).await?;
    let said = RefCell::new(String::new());
    let mut is_so = async || {
        let answer = agent.admin("/readyz").await?;
        // A node whose GPUs are broken still mirrors.
        ensure!(answer.status == 200, "{}", answer.status);
        let now = written(&serde_json::from_str::<Value>(&answer.text())?["gpu"]);
        let is_so = now == verdict;
        said.replace(now);
        Ok(is_so)
    };
    // A storm of errors takes its time on a busy machine: it is waited for as long as it brings news.
    let mut before = String::new();
    for _ in 0..NEWS_MAX {
        let waited = eventually(fixture, &mut is_so).await;
        if waited.is_ok() && UNREAD.contains(&fixture) {
            return ensure_golden(fixture, &gpu_series(&agent).await?);
        }
        if waited.is_ok() || *said.borrow() == before {
            return waited.with_context(|| format!("{fixture} {gpus} {}", said.borrow()));
        }
        before.clone_from(&said.borrow());
    }
    anyhow::bail!("{fixture} {gpus} comes and goes, and now is {before}")
}

#[tokio::test]
async fn each_fixture_is_judged_as_it_is_written_down_and_readyz_stays_200() -> Result<()> {
    if !can_run("each_fixture_is_judged_as_it_is_written_down_and_readyz_stays_200", &NEEDS) {
        return Ok(());
    }
    let golden = fs::read_to_string(path("golden/gpu/verdicts.txt"))?;
    let mut lines = Vec::new();
    for line in golden.lines() {
        let [fixture, gpus, verdict] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else {
            anyhow::bail!("no verdict: {line}");
        };
        lines.push((fixture, gpus.parse::<u32>()?, verdict));
    }
    let named: BTreeSet<String> = lines.iter().map(|(fixture, ..)| format!("{fixture}.toml")).collect();
    let there = fs::read_dir(path("nvml-mock/fixtures"))?;
    let there = there.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    assert_eq!(named, there.collect::<Result<BTreeSet<_>>>()?, "each fixture has its line");
    let judged = lines.iter().map(|(fixture, gpus, verdict)| is_judged(fixture, *gpus, verdict));
    let judged: Vec<Result<()>> = stream::iter(judged).buffer_unordered(AT_ONCE).collect().await;
    // All that differ: they are the new lines, if they are right.
    let others: Vec<_> = judged.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
    ensure!(others.is_empty(), "otherwise judged:\n{}", others.join("\n"));
    Ok(())
}
