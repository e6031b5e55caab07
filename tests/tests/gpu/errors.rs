//! Errors that the driver reports (XIDs), from NVML's events and from the kernel's log.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::agent::{Agent, darter};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::Method;

use crate::scrapes::{ensure_golden, gpu_series};
use crate::{NEEDS, becomes};

#[tokio::test]
async fn a_fatal_error_stands_until_the_boot_is_over_and_is_counted_once() -> Result<()> {
    if !can_run("a_fatal_error_stands_until_the_boot_is_over_and_is_counted_once", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("xid-79")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "NotReady", "FatalXid(79)").await?;
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_xid_errors_total", &[("xid", "79")]), 1.0);
    // Others that are fatal have a series, so that their first one is a rise.
    let fatal = metrics.series().iter().filter(|(series, _)| series.starts_with("darter_gpu_xid_errors_total"));
    ensure!(fatal.count() > 15 && metrics.sum("darter_gpu_xid_errors_total", &[]) == 1.0);
    ensure!(metrics.sum("darter_gpu_xid_last_timestamp_seconds", &[]) > 1.7e9);
    // Whoever starts again in the same boot has not forgotten it, and the driver does not say it twice.
    mock.set("base = 'h200-idle'")?;
    agent.kill().await?;
    agent.start_again().await?;
    becomes(&agent, "NotReady", "FatalXid(79)").await?;
    assert_eq!(agent.metrics().await?.sum("darter_gpu_xid_errors_total", &[]), 1.0);
    // After a reboot it is over.
    agent.stop().await?;
    let file = agent.dir().join("data/xids.json");
    let stored = std::fs::read_to_string(&file)?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(stored.contains(boot.trim()), "{stored}");
    std::fs::write(&file, stored.replace(boot.trim(), "another-boot"))?;
    agent.start_again().await?;
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn errors_that_are_not_fatal_degrade_a_node_as_the_operator_says() -> Result<()> {
    if !can_run("errors_that_are_not_fatal_degrade_a_node_as_the_operator_says", &NEEDS) {
        return Ok(());
    }
    for fixture in ["xid-63", "xid-94"] {
        let mock = Mock::fixture(fixture)?;
        let agent = Agent::start(mock.options(1)?).await?;
        let reason = format!("DegradedXid({})", fixture.trim_start_matches("xid-"));
        becomes(&agent, "Degraded", &reason).await?;
    }
    let mock = Mock::fixture("xid-94")?;
    let strict = mock.options(1)?.set("gpu.xid_fatal", toml_edit::Array::from_iter([94]));
    becomes(&Agent::start(strict).await?, "NotReady", "FatalXid(94)").await?;
    // A code that the operator calls fatal has a series before it comes, as the others have.
    let healthy = Mock::fixture("h200-idle")?;
    let watchful = Agent::start(healthy.options(1)?.set("gpu.xid_fatal", toml_edit::Array::from_iter([31]))).await?;
    let has_series = async || {
        let metrics = watchful.metrics().await?;
        let of = |(series, _): &(String, f64)| {
            series.starts_with("darter_gpu_xid_errors_total") && series.contains("xid=\"31\"")
        };
        Ok(metrics.series().iter().any(of))
    };
    eventually("31 has a series", has_series).await?;
    let mild = mock.options(1)?.set("gpu.xid_ignore", toml_edit::Array::from_iter([94]));
    let agent = Agent::start(mild).await?;
    let counted = async || Ok(agent.metrics().await?.sum("darter_gpu_xid_errors_total", &[("xid", "94")]) == 1.0);
    eventually("it is counted", counted).await?;
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn a_gpu_that_is_lost_does_not_keep_the_errors_of_the_others_from_being_heard() -> Result<()> {
    if !can_run("a_gpu_that_is_lost_does_not_keep_the_errors_of_the_others_from_being_heard", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::new("base = 'h100x8'\n")?;
    // NVML is not started again meanwhile, to look for the one that is lost.
    let agent = Agent::start(mock.options(8)?.set("gpu.slow_interval", "60s")).await?;
    becomes(&agent, "Ready", "").await?;
    // Later than ten waits that fail: after so many nobody would listen any more.
    mock.set("base = 'h100x8'\n[gpus.3]\nlost = true\n[[events]]\nid = 1\ngpu = 0\ndata = 48\nafter_ms = 25000\n")?;
    becomes(&agent, "NotReady", "GpuLost").await?;
    let heard = async || Ok(agent.metrics().await?.sum("darter_gpu_xid_errors_total", &[("xid", "48")]) == 1.0);
    eventually("the error of another one is heard", heard).await
}

#[tokio::test]
async fn the_kernels_log_tells_of_a_gpu_while_nvml_is_dead() -> Result<()> {
    if !can_run("the_kernels_log_tells_of_a_gpu_while_nvml_is_dead", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let options = mock.options(1)?.set("gpu.kmsg", true);
    // A pipe in place of the device: each line is a record.
    let log = mock.host(1)?.join("dev/kmsg");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::from_raw_mode(0o600))?;
    let mut kernel = OpenOptions::new().read(true).write(true).open(&log)?;
    let agent = Agent::start(options).await?;
    becomes(&agent, "Ready", "").await?;
    writeln!(kernel, "6,1,1000000,-;NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64")?;
    // Not the kernel's own: whoever may write there can say what he likes.
    writeln!(kernel, "14,2,2000000,-;NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.")?;
    writeln!(kernel, "4,3,3000000,-;NVRM: Xid (PCI:0000:1b:00): 48, pid=1, An uncorrectable double bit error")?;
    becomes(&agent, "NotReady", "FatalXid(48)").await?;
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_gpu_xid_errors_total", &[]), 1.0);
    ensure!(agent.log().contains("xid=48"), "{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn a_storm_of_errors_stays_within_bounds_and_does_not_hide_the_fatal_one() -> Result<()> {
    if !can_run("a_storm_of_errors_stays_within_bounds_and_does_not_hide_the_fatal_one", &NEEDS) {
        return Ok(());
    }
    /// What a record keeps: pairs of a GPU and a code.
    const MOST: usize = 512;
    let mock = Mock::fixture("xid-storm")?;
    let mut agent = Agent::start(mock.options(8)?).await?;
    let file = agent.dir().join("data/xids.json");
    let stored = || -> Result<Vec<serde_json::Value>> {
        let Ok(text) = std::fs::read(&file) else { return Ok(Vec::new()) };
        let record: serde_json::Value = serde_json::from_slice(&text)?;
        Ok(record["noted"].as_array().cloned().unwrap_or_default())
    };
    // The last that comes: code 100 of the last GPU.
    let last = "the driver reports an error of a GPU";
    let all = async || Ok(agent.log().matches(last).count() >= 800);
    eventually("all were heard", all).await?;
    assert_eq!(agent.log().matches(last).count(), 800, "each once");
    eventually("the last is stored", async || Ok(stored()?.len() == MOST)).await?;
    becomes(&agent, "NotReady", "FatalXid").await?;
    let fatal = |metrics: &darter_tests::agent::Metrics| metrics.sum("darter_gpu_xid_errors_total", &[("xid", "79")]);
    let metrics = agent.metrics().await?;
    assert_eq!((fatal(&metrics), metrics.sum("darter_gpu_xid_errors_total", &[])), (8.0, 512.0));
    ensure_golden("xid-storm", &gpu_series(&agent).await?)?;
    agent.kill().await?;
    mock.set("base = 'h100x8'")?;
    agent.start_again().await?;
    becomes(&agent, "NotReady", "FatalXid").await?;
    assert_eq!(fatal(&agent.metrics().await?), 8.0, "stored, and not too much to be read again");
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_says_the_same_again_and_again_is_counted_in_full_and_logged_in_a_few_lines() -> Result<()> {
    if !can_run("a_gpu_that_says_the_same_again_and_again_is_counted_in_full_and_logged_in_a_few_lines", &NEEDS) {
        return Ok(());
    }
    const TIMES: u32 = 300;
    let mock = Mock::fixture("h200-idle")?;
    let options = mock.options(1)?.set("gpu.kmsg", true);
    let log = mock.host(1)?.join("dev/kmsg");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::from_raw_mode(0o600))?;
    let mut kernel = OpenOptions::new().read(true).write(true).open(&log)?;
    let agent = Agent::start(options).await?;
    for time in 1..=TIMES {
        // Three seconds apart by the kernel's clock. A read of the pipe is to end with a line, as one of the device
        // does: so each has 128 bytes.
        let line =
            format!("4,{time},{},-;NVRM: Xid (PCI:0000:1b:00): 31, pid=1, MMU Fault", u64::from(time) * 3_000_000);
        kernel.write_all(format!("{line:<127}\n").as_bytes())?;
    }
    let counted =
        async || Ok(agent.metrics().await?.sum("darter_gpu_xid_errors_total", &[("xid", "31")]) == f64::from(TIMES));
    eventually("each is counted", counted).await?;
    // The 1st, 2nd, 4th and so on.
    assert_eq!(agent.log().matches("the driver reports an error of a GPU").count(), 9);
    becomes(&agent, "Ready", "").await
}

#[tokio::test]
async fn an_uncorrectable_ecc_error_counts_when_it_comes_and_not_when_it_was_there_before() -> Result<()> {
    if !can_run("an_uncorrectable_ecc_error_counts_when_it_comes_and_not_when_it_was_there_before", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "Ready", "").await?;
    let errors = async |agent: &Agent| {
        let of = [("kind", "uncorrected"), ("scope", "volatile")];
        anyhow::Ok(agent.metrics().await?.sum("darter_gpu_ecc_errors_total", &of))
    };
    eventually("its counters were read", async || {
        Ok(agent.metrics().await?.sum("darter_gpu_power_limit_watts", &[]) > 0.0)
    })
    .await?;
    assert_eq!(errors(&agent).await?, 0.0);
    mock.set("base = 'ecc'")?;
    becomes(&agent, "NotReady", "UncorrectableEcc").await?;
    assert_eq!(errors(&agent).await?, 1.0);
    // Corrected ones are what ECC is for.
    let healthy = Mock::new("base = 'ecc'\n[gpu.ecc]\ncorrected = { volatile = 4, aggregate = 4 }\n")?;
    let agent = Agent::start(healthy.options(1)?).await?;
    eventually("its counters were read", async || Ok(errors(&agent).await? == 1.0)).await?;
    becomes(&agent, "Ready", "").await?;
    healthy.set("base = 'ecc'\n[gpu.ecc]\ncorrected = { volatile = 9, aggregate = 9 }\n")?;
    let read = async || Ok(agent.metrics().await?.sum("darter_gpu_ecc_errors_total", &[("kind", "corrected")]) > 9.0);
    eventually("more were corrected", read).await?;
    becomes(&agent, "Ready", "").await
}

/// `darter gpu clear` with these arguments, to this agent.
pub(crate) async fn clear(agent: &Agent, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = darter(&Place::Host)?;
    command.args(["gpu", "clear"]).args(arguments).arg("--config").arg(agent.dir().join("darter.toml"));
    let output = process::run("darter gpu clear", command, Duration::from_secs(20)).await?;
    Ok((output.status.code(), output.stdout + &output.stderr))
}

#[tokio::test]
async fn an_error_of_a_gpu_that_was_reset_stands_no_more_once_the_operator_says_so() -> Result<()> {
    if !can_run("an_error_of_a_gpu_that_was_reset_stands_no_more_once_the_operator_says_so", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("xid-79")?;
    let mut agent = Agent::start(mock.options(1)?).await?;
    becomes(&agent, "NotReady", "FatalXid(79)").await?;
    // Not by whoever reaches the port, and of no GPU that is not here.
    let tcp = format!("http://{}/v1/gpus/clear", agent.admin_address());
    assert_eq!(agent.client().call(Method::POST, &tcp, &[]).await?.status, 403);
    let (code, said) = clear(&agent, &["GPU-of-another-node"]).await?;
    ensure!(code == Some(1) && said.contains("this node has no GPU GPU-of-another-node"), "{said}");
    becomes(&agent, "NotReady", "FatalXid(79)").await?;
    let (code, said) = clear(&agent, &["0"]).await?;
    ensure!(code == Some(0) && said.contains("cleared XID 79 of the GPU at 0000:1b:00"), "{said}");
    becomes(&agent, "Ready", "").await?;
    let (code, said) = clear(&agent, &[]).await?;
    ensure!(code == Some(0) && said.contains("nothing to do"), "{said}");
    // It happened all the same, and whoever starts again knows that it is over.
    assert_eq!(agent.metrics().await?.sum("darter_gpu_xid_errors_total", &[("xid", "79")]), 1.0);
    mock.set("base = 'h200-idle'")?;
    agent.kill().await?;
    agent.start_again().await?;
    becomes(&agent, "Ready", "").await?;
    // The next one stands again.
    mock.set("base = 'h200-idle'\n[[events]]\nid = 2\ngpu = 0\ndata = 48\n")?;
    becomes(&agent, "NotReady", "FatalXid(48)").await?;
    agent.stop().await?;
    let (code, said) = clear(&agent, &[]).await?;
    ensure!(code == Some(1) && said.contains("no agent answers at"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_goes_while_no_agent_runs_is_missed_by_the_next_one() -> Result<()> {
    if !can_run("a_gpu_that_goes_while_no_agent_runs_is_missed_by_the_next_one", &NEEDS) {
        return Ok(());
    }
    let two = "base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\n";
    let mock = Mock::new(two)?;
    let mut agent = Agent::start(mock.options(2)?).await?;
    becomes(&agent, "Ready", "").await?;
    let learned = agent.dir().join("data/gpus.json");
    eventually("it has learned that there are two", async || {
        Ok(std::fs::read_to_string(&learned).is_ok_and(|text| text.contains("\"gpus\": 2")))
    })
    .await?;
    agent.kill().await?;
    // Neither the bus nor the driver has it any more.
    let host = mock.host(0)?;
    std::fs::remove_dir_all(host.join("sys/bus/pci/devices/0000:01:00.0"))?;
    std::fs::remove_file(host.join("dev/nvidia1"))?;
    mock.set("base = 'h200-idle'")?;
    agent.start_again().await?;
    becomes(&agent, "NotReady", "GpuCountMismatch").await
}
