//! The alerts on nodes, by Prometheus' own checks.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::process;
use darter_tests::prometheus::play;
use darter_tests::tools::{Need, can_run};

const PATIENCE: Duration = Duration::from_secs(30);

/// A node that is late for 12 minutes, and one that takes pods without its images.
const STORY: &str = r#"
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'darter_startup_overdue{instance="late"}', values: '0x5 1x12 0x5'}
      - {series: 'darter_startup_failed_open_total{instance="open", check="images"}', values: '0x5 1x20'}
      - {series: 'darter_startup_failed_open_total{instance="open", check="mirror"}', values: '0x25'}
      - {series: 'darter_node_write_errors_total{instance="mute", reason="forbidden"}', values: '0+2x60'}
    alert_rule_test:
      - {eval_time: 14m, alertname: StartupTaintOverdue, exp_alerts: []}
      - eval_time: 17m
        alertname: StartupTaintOverdue
        exp_alerts: [{exp_labels: {instance: late, severity: critical}}]
      - {eval_time: 20m, alertname: StartupTaintOverdue, exp_alerts: []}
      - eval_time: 10m
        alertname: StartupFailedOpen
        exp_alerts: [{exp_labels: {instance: open, check: images, severity: warning}}]
      - eval_time: 30m
        alertname: NodeNotWritten
        exp_alerts: [{exp_labels: {instance: mute, reason: forbidden, severity: warning}}]
"#;

#[tokio::test]
async fn a_node_that_is_late_and_one_that_took_pods_too_early_are_told_of() -> Result<()> {
    if !can_run("a_node_that_is_late_and_one_that_took_pods_too_early_are_told_of", &[Need::Prometheus]) {
        return Ok(());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let file = root.join("deploy/alerts/nodes.yml").canonicalize()?;
    let promtool = |arguments: &[&str]| {
        let mut command = process::command("promtool");
        command.args(arguments);
        command
    };
    let rules = file.display().to_string();
    process::run_ok("promtool", promtool(&["check", "rules", &rules]), PATIENCE).await?;
    play(&file, STORY).await?;
    // And they ask for what an agent says.
    let metrics = std::fs::read_to_string(root.join("crates/darter-agent/src/metrics.rs"))?;
    let text = std::fs::read_to_string(&file)?;
    let words = text.split(|other: char| !other.is_ascii_alphanumeric() && other != '_');
    let names: BTreeSet<_> = words.filter_map(|word| word.strip_prefix("darter_")).collect();
    ensure!(names.len() >= 3, "{names:?}");
    for name in names {
        let name = name.trim_end_matches("_total");
        ensure!(metrics.contains(&format!("\"{name}\"")), "an alert asks for {name}, which no agent says");
    }
    Ok(())
}
