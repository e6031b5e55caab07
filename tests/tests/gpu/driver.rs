//! Drivers that are replaced under the agent, devices that it may not open any more, and libraries that crash it.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::stage::eventually;
use darter_tests::tmpfs::Tmpfs;
use darter_tests::tools::{Need, can_run};

use crate::errors::clear;
use crate::{NEEDS, becomes};

/// The library is the old one, and the driver another.
const REPLACED: &str = "base = 'h200-idle'\ninit = 18\n[[overrides]]\nsymbol = '*'\nreturn_code = 18\n";
/// A call of the first round takes the process down.
const CRASHES: &str = "base = 'h200-idle'\n[[overrides]]\nsymbol = 'nvmlDeviceGetPowerUsage'\ncrash = true\n";

const PATIENCE: Duration = Duration::from_secs(40);

/// Waits until NVML was started, or tried, so often.
async fn tried(agent: &Agent, times: f64) -> Result<()> {
    agent.counted("darter_nvml_call_seconds_count", &[("call", "init")], |sum| sum >= times).await.map(drop)
}

#[tokio::test]
async fn an_agent_whose_driver_was_replaced_ends_in_good_order_and_the_next_one_goes_on() -> Result<()> {
    let name = "an_agent_whose_driver_was_replaced_ends_in_good_order_and_the_next_one_goes_on";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?.set("gpu.driver_grace", "1s")).await?;
    becomes(&agent, "Ready", "").await?;
    mock.set(REPLACED)?;
    let status = agent.process().exit(PATIENCE).await?;
    ensure!(!status.success() && status.signal().is_none(), "{status}");
    let log = agent.log();
    ensure!(log.contains("the driver was replaced under this agent: ending"), "{log}");
    ensure!(log.contains("stopped") && !log.contains("does not let go"), "not in good order: {log}");
    // Where a start anew has not helped, the next would not either: that the library is wrong is all there is to say.
    agent.start_again().await?;
    becomes(&agent, "NotReady", "DriverMismatch").await?;
    tried(&agent, 2.0).await?;
    ensure!(agent.process().exited()?.is_none(), "it ended again: {}", agent.log());
    becomes(&agent, "NotReady", "DriverMismatch").await
}

#[tokio::test]
async fn without_a_grace_an_agent_goes_on_whatever_becomes_of_the_driver() -> Result<()> {
    if !can_run("without_a_grace_an_agent_goes_on_whatever_becomes_of_the_driver", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    mock.set(REPLACED)?;
    becomes(&agent, "NotReady", "DriverMismatch").await?;
    mock.set("base = 'h200-idle'")?;
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn an_agent_that_may_not_open_the_devices_does_not_call_gpus_broken() -> Result<()> {
    let name = "an_agent_that_may_not_open_the_devices_does_not_call_gpus_broken";
    if !can_run(name, &[NEEDS[0], NEEDS[1], Need::Root]) {
        return Ok(());
    }
    let mock = Mock::fixture("init-unknown")?;
    let options = mock.options(1)?;
    let device = mock.host(1)?.join("dev/nvidiactl");
    // A file system without devices in the device cgroup's place: the kernel says no to both in one way.
    let devices = Tmpfs::new(1 << 20)?;
    devices.without_devices()?;
    let closed = devices.path().join("nvidiactl");
    let mut command = process::command("mknod");
    command.arg(&closed).args(["c", "1", "3"]);
    process::run_ok("mknod", command, PATIENCE).await?;
    fs::remove_file(&device)?;
    symlink(&closed, &device)?;
    let agent = Agent::start(options).await?;
    becomes(&agent, "Unknown", "GpusNotPermitted").await?;
    // Where it may, it is NVML that does not start.
    fs::remove_file(&device)?;
    fs::write(&device, "")?;
    becomes(&agent, "NotReady", "NvmlInitFailed").await
}

#[tokio::test]
async fn a_library_that_crashes_the_agent_three_times_is_asked_no_more_until_the_operator_says_so() -> Result<()> {
    let name = "a_library_that_crashes_the_agent_three_times_is_asked_no_more_until_the_operator_says_so";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    agent.stop().await?;
    mock.set(CRASHES)?;
    for time in 1..=3 {
        // It may be ready before it crashes, or not.
        let started = agent.start_again().await;
        let status = agent.process().exit(PATIENCE).await?;
        ensure!(status.signal() == Some(6), "the {time}. time: {status} {started:?}");
    }
    agent.start_again().await?;
    becomes(&agent, "Unknown", "NvmlCrashes").await?;
    ensure!(agent.log().contains("NVML is not asked any more"), "{}", agent.log());
    assert_eq!(agent.metrics().await?.sum("darter_nvml_call_seconds_count", &[]), 0.0, "it was asked");
    // Nor by the next; and what is said of one GPU lifts nothing.
    agent.stop().await?;
    mock.set("base = 'h200-idle'")?;
    agent.start_again().await?;
    becomes(&agent, "Unknown", "NvmlCrashes").await?;
    let (code, said) = clear(&agent, &[]).await?;
    ensure!(code == Some(0) && said.contains("NVML is asked again, over which 3 agents had ended"), "{said}");
    becomes(&agent, "Ready", "").await?;
    let (_, said) = clear(&agent, &[]).await?;
    ensure!(said.contains("nothing to do"), "{said}");
    Ok(())
}

#[tokio::test]
async fn another_driver_has_a_library_asked_again_that_crashed() -> Result<()> {
    if !can_run("another_driver_has_a_library_asked_again_that_crashed", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    agent.stop().await?;
    // As if three had ended.
    let file = agent.dir().join("data/nvml.json");
    let mut known: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
    (known["is_off"], known["crashes"]) = (true.into(), serde_json::json!([1, 2, 3]));
    fs::write(&file, known.to_string())?;
    agent.start_again().await?;
    becomes(&agent, "Unknown", "NvmlCrashes").await?;
    fs::write(mock.host(1)?.join("proc/driver/nvidia/version"), "NVRM version: another mock\n").context("a driver")?;
    eventually("NVML is asked", async || Ok(agent.log().contains("another driver: NVML is asked again"))).await?;
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn a_driver_that_comes_after_the_agent_is_found() -> Result<()> {
    if !can_run("a_driver_that_comes_after_the_agent_is_found", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let away = mock.dir().join("away");
    fs::rename(mock.library(), &away)?;
    let agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Unknown", "LibraryNotFound").await?;
    fs::rename(&away, mock.library())?;
    becomes(&agent, "Ready", "").await
}
