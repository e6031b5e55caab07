//! What an agent says of GPUs, with the mock of NVIDIA's library in the driver's place.
//!
//! The golden files are whole: every series of a scrape that is about GPUs. `DARTER_GOLDEN=write` writes them
//! anew; read the difference before it is committed.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::prometheus::lint;
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run};
use futures_util::future::try_join_all;
use http::Method;

use crate::{NEEDS, becomes};

/// An agent that has asked its GPUs twice: what comes from two readings is there.
async fn agent(options: Options) -> Result<Agent> {
    let agent = Agent::start(options).await?;
    let mut rounds = Vec::new();
    eventually("the GPUs were asked twice, and judged", async || {
        let metrics = agent.metrics().await?;
        let round = metrics.sum("darter_gpu_collect_timestamp_seconds", &[]);
        if round > 0.0 && rounds.last() != Some(&round) {
            rounds.push(round);
        }
        let is_judged = metrics.series().iter().any(|(series, _)| series.starts_with("darter_gpu_state"));
        Ok(rounds.len() > 2 && is_judged)
    })
    .await?;
    Ok(agent)
}

/// The series of GPUs, but for what differs from run to run.
pub(crate) async fn gpu_series(agent: &Agent) -> Result<String> {
    let answer = agent.admin("/metrics").await?;
    let differs = |line: &str| {
        ["collect_duration", "timestamp_seconds", "idle_seconds", "busy_ratio_window"]
            .iter()
            .any(|name| line.contains(name))
    };
    let is_gpu = |line: &&str| {
        line.starts_with("darter_gpu_") || line.starts_with("darter_node_gpu") || line.starts_with("DCGM_FI_")
    };
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    let text = answer.text();
    let lines: Vec<_> = text.lines().filter(is_gpu).filter(|line| !differs(line)).collect();
    Ok(lines.join("\n").replace(&format!("ostname=\"{host}\""), "ostname=\"HOST\"") + "\n")
}

/// The lines of one text that another has not as often: a series that is there twice is one too many.
fn beyond<'a>(text: &'a str, other: &str) -> Vec<&'a str> {
    let times = |text: &str, line: &str| text.lines().filter(|other| *other == line).count();
    let lines: BTreeSet<_> = text.lines().collect();
    lines.into_iter().filter(|line| times(text, line) > times(other, line)).collect()
}

#[test]
fn a_line_that_is_there_twice_is_not_the_line_that_is_there_once() {
    assert_eq!(beyond("a 1\nb 2\n", "b 2\na 1\n"), [""; 0]);
    assert_eq!(beyond("a 1\na 1\nb 2\n", "a 1\nb 2\n"), ["a 1"]);
    assert_eq!(beyond("a 1\nb 2\n", "a 1\na 1\n"), ["b 2"]);
}

pub(crate) fn ensure_golden(name: &str, said: &str) -> Result<()> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/gpu").join(name).with_extension("txt");
    if std::env::var_os("DARTER_GOLDEN").is_some_and(|value| value == "write") {
        return Ok(std::fs::write(path, said)?);
    }
    let golden = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (lacks, more) = (beyond(&golden, said), beyond(said, &golden));
    ensure!(lacks.is_empty() && more.is_empty(), "{name} lacks {lacks:#?} and has besides {more:#?}");
    Ok(())
}

#[tokio::test]
async fn each_gpu_says_what_it_can_and_nothing_else() -> Result<()> {
    if !can_run("each_gpu_says_what_it_can_and_nothing_else", &NEEDS) {
        return Ok(());
    }
    let fixtures = [
        ("t4-healthy", 1),
        ("a10g", 1),
        ("a100-mig-mixed", 1),
        ("h100x8", 8),
        ("h200-idle", 1),
        ("h200-busy", 1),
        ("h200-mig", 1),
        ("unsupported", 1),
        ("remap-failed", 1),
        ("recovery-reset", 1),
        ("count-short", 8),
        ("driver-580-65", 1),
        ("driver-580-82", 1),
        ("ecc", 1),
        ("process-race", 1),
        ("recovery-reboot", 1),
        ("remap-pending", 1),
    ];
    // At once: each waits for its rounds. One after the other to the heap: all of them are too much for a stack.
    try_join_all(fixtures.into_iter().map(|(fixture, gpus)| async move {
        let mock = Mock::fixture(fixture)?;
        let agent = agent(mock.options(gpus)?).await.context(fixture)?;
        ensure_golden(fixture, &gpu_series(&agent).await?)
    }))
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_gpu_in_trouble_says_what_it_still_can_and_nothing_else() -> Result<()> {
    if !can_run("a_gpu_in_trouble_says_what_it_still_can_and_nothing_else", &NEEDS) {
        return Ok(());
    }
    let fixtures = [
        ("gpu-lost", 8, "NotReady", "GpuLost"),
        ("fabric-not-started", 8, "NotReady", "FabricNotReady"),
        ("sram-exceeded", 1, "NotReady", "UncorrectableEcc"),
        ("too-hot", 1, "Degraded", "ThermalSlowdown"),
        ("xid-63", 1, "Degraded", "DegradedXid"),
        ("xid-74", 1, "NotReady", "FatalXid"),
        ("xid-79", 1, "NotReady", "FatalXid"),
        ("xid-94", 1, "Degraded", "DegradedXid"),
    ];
    try_join_all(fixtures.into_iter().map(|(fixture, gpus, state, reason)| async move {
        let mock = Mock::fixture(fixture)?;
        let agent = agent(mock.options(gpus)?).await.context(fixture)?;
        becomes(&agent, state, reason).await.context(fixture)?;
        ensure_golden(fixture, &gpu_series(&agent).await?)
    }))
    .await?;
    Ok(())
}

#[tokio::test]
async fn dashboards_find_the_names_that_they_know() -> Result<()> {
    if !can_run("dashboards_find_the_names_that_they_know", &NEEDS) {
        return Ok(());
    }
    for (fixture, names) in [("h200-idle", "legacy"), ("h200-idle", "v49"), ("h200-mig", "legacy")] {
        let mock = Mock::fixture(fixture)?;
        let agent = agent(mock.options(1)?.set("gpu.dcgm_names", names)).await?;
        let said = gpu_series(&agent).await?;
        let dcgm: Vec<_> = said.lines().filter(|line| line.starts_with("DCGM_")).collect();
        ensure_golden(&format!("{fixture}-{names}"), &(dcgm.join("\n") + "\n"))?;
        let url = format!("http://{}/metrics", agent.admin_address());
        let accept = [("Accept", "application/openmetrics-text; version=1.0.0")];
        let page = agent.client().call(Method::GET, &url, &accept).await?.text();
        ensure!(page.ends_with("# EOF\n") && page.matches("# EOF").count() == 1, "{page}");
    }
    Ok(())
}

#[tokio::test]
async fn an_agent_that_was_not_handed_the_devices_does_not_call_gpus_broken() -> Result<()> {
    if !can_run("an_agent_that_was_not_handed_the_devices_does_not_call_gpus_broken", &NEEDS) {
        return Ok(());
    }
    let hidden = Mock::fixture("no-driver")?;
    let options = hidden.options(1)?;
    let dev = hidden.host(1)?.join("dev");
    for device in ["nvidiactl", "nvidia0"] {
        std::fs::remove_file(dev.join(device))?;
    }
    let agent = Agent::start(options).await?;
    becomes(&agent, "Unknown", "GpusNotVisible").await?;
    // It is the driver's absence that is a fault.
    std::fs::remove_file(hidden.dir().join("host/proc/driver/nvidia/version"))?;
    becomes(&agent, "NotReady", "DriverNotLoaded").await
}

#[tokio::test]
async fn of_dcgm_exporters_names_promtool_minds_what_cannot_be_otherwise_and_nothing_else() -> Result<()> {
    let name = "of_dcgm_exporters_names_promtool_minds_what_cannot_be_otherwise_and_nothing_else";
    if !can_run(name, &[Need::Darter, Need::MockNvml, Need::Prometheus]) {
        return Ok(());
    }
    let pages = [("h200-busy", "legacy"), ("h200-busy", "v49"), ("h200-mig", "legacy"), ("h200-mig", "v49")];
    let said = try_join_all(pages.into_iter().map(|(fixture, names)| async move {
        let mock = Mock::fixture(fixture)?;
        let agent = agent(mock.options(1)?.set("gpu.dcgm_names", names)).await.context(fixture)?;
        lint(&agent.admin("/metrics").await?.text()).await
    }))
    .await?;
    // Its labels (modelName), and one of its names.
    let is_theirs = |line: &&str| {
        line.starts_with("DCGM_FI_") && line.ends_with(" label names should be written in 'snake_case' not 'camelCase'")
            || *line == "DCGM_FI_DEV_PCIE_REPLAY_COUNTER metric name should not include type 'counter'"
    };
    for (page, said) in pages.iter().zip(&said) {
        let others: Vec<_> = said.lines().filter(|line| !is_theirs(line)).collect();
        ensure!(!said.is_empty() && others.is_empty(), "{page:?}: {others:#?}");
    }
    Ok(())
}

#[tokio::test]
async fn promtool_finds_nothing_to_say() -> Result<()> {
    if !can_run("promtool_finds_nothing_to_say", &[Need::Darter, Need::MockNvml, Need::Prometheus]) {
        return Ok(());
    }
    // Each has series that others lack.
    let pages = try_join_all(["t4-healthy", "h100x8", "h200-busy", "h200-mig", "unsupported"].map(|name| async move {
        let mock = Mock::fixture(name)?;
        let agent = agent(mock.options(if name == "h100x8" { 8 } else { 1 })?).await.context(name)?;
        anyhow::Ok((name, agent.admin("/metrics").await?.text()))
    }))
    .await?;
    for (name, page) in &pages {
        assert_eq!(lint(page).await?, "", "{name}");
    }
    let (_, page) = &pages[0];
    // It would find something.
    let said = lint(&format!("{page}# TYPE darter_things counter\ndarter_things 1\n")).await?;
    ensure!(said.contains("darter_things"), "{said}");
    Ok(())
}

#[tokio::test]
async fn names_that_nobody_knows_are_refused_with_those_that_there_are() -> Result<()> {
    if !can_run("names_that_nobody_knows_are_refused_with_those_that_there_are", &[Need::Darter]) {
        return Ok(());
    }
    let mut command = Place::Host.command(tools::darter()?);
    command.args(["agent", "--dcgm-names", "v48"]);
    let output = process::run("darter agent", command, Duration::from_secs(20)).await?;
    let says = ["off", "legacy", "v49"].iter().all(|name| output.stderr.contains(name));
    ensure!(output.status.code() == Some(2) && says, "{}: {}", output.status, output.stderr);
    Ok(())
}

#[tokio::test]
async fn a_node_without_a_driver_says_nothing_of_gpus_and_is_ready() -> Result<()> {
    if !can_run("a_node_without_a_driver_says_nothing_of_gpus_and_is_ready", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let without = mock.options(0)?.set("gpu.library", "/nonexistent/libnvidia-ml.so.1");
    let agent = Agent::start(without).await?;
    let asked = async || Ok(agent.metrics().await?.sum("darter_nvml_call_seconds_count", &[("call", "init")]) >= 1.0);
    eventually("it was looked for", asked).await?;
    becomes(&agent, "NotApplicable", "").await?;
    assert_eq!(gpu_series(&agent).await?, "\n");
    ensure!(agent.log().contains("no NVML"), "{}", agent.log());
    // One that has a GPU on its bus misses the library.
    let another = Mock::fixture("h200-idle")?;
    let lacking = another.options(1)?.set("gpu.library", "/nonexistent/libnvidia-ml.so.1");
    becomes(&Agent::start(lacking).await?, "Unknown", "LibraryNotFound").await?;
    let off = Agent::start(mock.options(1)?.set("gpu.mode", "off")).await?;
    assert_eq!(off.metrics().await?.sum("darter_nvml_init_total", &[]), 0.0);
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_falls_off_the_bus_is_told_and_comes_back() -> Result<()> {
    if !can_run("a_gpu_that_falls_off_the_bus_is_told_and_comes_back", &NEEDS) {
        return Ok(());
    }
    let healthy = "base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\n";
    let mock = Mock::new(healthy)?;
    let agent = agent(mock.options(2)?).await?;
    let states = async || {
        let metrics = agent.metrics().await?;
        let powers = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_gpu_power_watts"));
        let of = |state| metrics.sum("darter_node_gpus", &[("state", state)]);
        let lost = metrics.sum("darter_gpu_lost", &[("uuid", "GPU-4a2b6f10-0000-4000-8000-000000000201")]);
        anyhow::Ok((of("present"), of("lost"), lost, powers.count()))
    };
    assert_eq!(states().await?, (2.0, 0.0, 0.0, 2));
    mock.set(&format!("{healthy}lost = true\n"))?;
    eventually("one of two is lost", async || Ok(states().await? == (1.0, 1.0, 1.0, 1))).await?;
    ensure!(agent.metrics().await?.sum("darter_nvml_errors_total", &[("code", "15")]) >= 1.0);
    // NVML is started again to look for it, and finds it lost still: it keeps its name.
    let started = async || Ok(agent.metrics().await?.sum("darter_nvml_init_total", &[]) >= 2.0);
    eventually("NVML was started again", started).await?;
    eventually("it is lost still", async || Ok(states().await? == (1.0, 1.0, 1.0, 1))).await?;
    mock.set(healthy)?;
    eventually("it is back", async || Ok(states().await? == (2.0, 0.0, 0.0, 2))).await
}
