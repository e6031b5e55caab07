//! Errors that the driver reports (XIDs), from NVML's events and from the kernel's log.

use std::fs::OpenOptions;
use std::io::Write as _;

use anyhow::{Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;

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
