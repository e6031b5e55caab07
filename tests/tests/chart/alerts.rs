//! The alerts on the scaler, by Prometheus' own checks.

use std::time::Duration;

use anyhow::Result;
use darter_tests::chart::root;
use darter_tests::process;
use darter_tests::prometheus::play;
use darter_tests::tools::{Need, can_run};

/// One leads and one stands by; the leader goes, two lead, and all that it hears gets old.
const STORY: &str = r#"
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'darter_scaler_leads{pod="a"}', values: '1x10 0x10 1x10'}
      - {series: 'darter_scaler_leads{pod="b"}', values: '0x20 1x10'}
      - {series: 'darter_scaler_report_age_seconds{pod="a", node="mute"}', values: '5x5 70+60x20'}
      - {series: 'darter_scaler_report_age_seconds{pod="a", node="well"}', values: '5x30'}
      - {series: 'darter_scaler_queue_sample_age_seconds{pod="a", workload="m/llm"}', values: '10x5 130+60x20'}
      - {series: 'darter_scaler_frozen{pod="a"}', values: '1x100'}
      - {series: 'darter_scaler_actions_total{pod="a", actuator="buffer", outcome="failed"}', values: '0+1x60'}
      - {series: 'darter_scaler_actions_total{pod="a", actuator="buffer", outcome="done"}', values: '0+9x60'}
      - {series: 'darter_scaler_actions_total{pod="a", actuator="remove", outcome="observed"}', values: '0+9x60'}
      - {series: 'darter_scaler_report_refusals_total{pod="a", reason="identity"}', values: '0+1x60'}
    alert_rule_test:
      - {eval_time: 10m, alertname: DarterScalerNobodyLeads, exp_alerts: []}
      - {eval_time: 14m, alertname: DarterScalerNobodyLeads, exp_alerts: [{exp_labels: {severity: critical}}]}
      - {eval_time: 10m, alertname: DarterScalerTwoLead, exp_alerts: []}
      - {eval_time: 25m, alertname: DarterScalerTwoLead, exp_alerts: [{exp_labels: {severity: critical}}]}
      - {eval_time: 25m, alertname: DarterScalerMissing, exp_alerts: []}
      - {eval_time: 60m, alertname: DarterScalerMissing, exp_alerts: [{exp_labels: {severity: critical}}]}
      - {eval_time: 5m, alertname: DarterReportStale, exp_alerts: []}
      - eval_time: 10m
        alertname: DarterReportStale
        exp_alerts: [{exp_labels: {node: mute, severity: warning}}]
      - eval_time: 10m
        alertname: DarterScalerInputStale
        exp_alerts: [{exp_labels: {workload: m/llm, severity: warning}}]
      - {eval_time: 50m, alertname: DarterScalerFrozen, exp_alerts: []}
      - {eval_time: 70m, alertname: DarterScalerFrozen, exp_alerts: [{exp_labels: {severity: warning}}]}
      - eval_time: 30m
        alertname: DarterScalerActionsFail
        exp_alerts: [{exp_labels: {actuator: buffer, severity: warning}}]
      - eval_time: 30m
        alertname: DarterReportsRefused
        exp_alerts: [{exp_labels: {reason: identity, severity: warning}}]
"#;

#[tokio::test]
async fn a_scaler_that_hears_nothing_does_nothing_or_is_not_alone_is_told_of() -> Result<()> {
    if !can_run("a_scaler_that_hears_nothing_does_nothing_or_is_not_alone_is_told_of", &[Need::Prometheus]) {
        return Ok(());
    }
    let file = root().join("deploy/alerts/scaler.yml");
    let mut promtool = process::command("promtool");
    promtool.args(["check", "rules"]).arg(&file);
    process::run_ok("promtool", promtool, Duration::from_secs(30)).await?;
    play(&file, STORY).await
}
