//! The tool that compares real GPUs with the fixtures (`make test-gpu`), with a mock in the driver's place: it has to
//! find what differs.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::process::{self, Output};
use darter_tests::tools::can_run;

use crate::NEEDS;

async fn compare(mock: &str) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_test-gpu"));
    command.args(["--mock", mock]);
    process::run("test-gpu", command, Duration::from_secs(90)).await
}

#[tokio::test]
async fn a_gpu_that_says_what_its_fixture_says_is_as_expected_and_another_is_not() -> Result<()> {
    if !can_run("a_gpu_that_says_what_its_fixture_says_is_as_expected_and_another_is_not", &NEEDS) {
        return Ok(());
    }
    let output = compare("base = 'h200-busy'").await?;
    let says = |output: &Output, what: &str| output.stdout.lines().any(|line| line.contains(what));
    ensure!(output.status.code() == Some(0), "{}{}", output.stdout, output.stderr);
    ensure!(says(&output, "A MOCK") && says(&output, "NVIDIA H200, expected as in h200-idle"), "{}", output.stdout);
    ensure!(output.stdout.ends_with("== as expected\n"), "{}", output.stdout);
    let odd = "base = 'h200-idle'\nabsent = ['gpu.fields.82']\n[gpu]\npower_limit = 500000\n";
    let output = compare(odd).await?;
    let row = |name: &str, verdict: &str| {
        output.stdout.lines().any(|line| line.trim_start().starts_with(name) && line.ends_with(verdict))
    };
    ensure!(output.status.code() == Some(1), "{}{}", output.stdout, output.stderr);
    ensure!(row("darter_gpu_power_limit_watts{}", "WRONG"), "{}", output.stdout);
    ensure!(row("darter_gpu_temperature_celsius{sensor=memory}", "MISSING"), "{}", output.stdout);
    ensure!(row("darter_gpu_memory_total_bytes{}", "same"), "{}", output.stdout);
    let output = compare("base = 'no-driver'").await?;
    ensure!(output.status.code() == Some(2) && says(&output, "nothing was compared"), "{}", output.stdout);
    Ok(())
}
