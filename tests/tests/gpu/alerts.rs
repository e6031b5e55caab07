//! The alerts on GPUs, played by Prometheus itself: what fires, when, and what does not.

use std::path::Path;

use anyhow::Result;
use darter_tests::prometheus::play;
use darter_tests::tools::{Need, can_run};

/// One node each for what may happen to GPUs, and one where nothing is wrong all the time.
const STORY: &str = r#"
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'darter_node_gpu_ready{instance="well", state="Ready", reason=""}', values: '1x90'}
      - {series: 'darter_node_gpu_ready{instance="look", state="Degraded", reason="RowRemapPending"}', values: '1x90'}
      - {series: 'darter_node_gpu_ready{instance="lost", state="Ready", reason=""}', values: '1x9 _x81'}
      - {series: 'darter_node_gpu_ready{instance="lost", state="NotReady", reason="GpuLost"}', values: '_x9 0x20 _x61'}
      - {series: 'darter_node_gpu_ready{instance="hangs", state="Unknown", reason="NvmlUnresponsive"}', values: '0x90'}
      - {series: 'darter_gpu_xid_errors_total{instance="well", uuid="W", xid="79"}', values: '0x90'}
      - {series: 'darter_gpu_xid_errors_total{instance="lost", uuid="L", xid="79"}', values: '0x9 1x81'}
      - {series: 'darter_gpu_xid_errors_total{instance="user", uuid="U", xid="13"}', values: '0x9 5x81'}
      - {series: 'darter_gpu_xid_errors_total{instance="first", uuid="F", xid="94"}', values: '_x19 1x71'}
      - {series: 'darter_gpu_xid_errors_total{instance="again", uuid="A", xid="94"}', values: '3x39 4x51'}
      - {series: 'darter_gpu_xid_errors_total{instance="anew", uuid="N", xid="94"}', values: '_x20 2x25 _x16 2x28'}
      - {series: 'darter_gpu_recovery_action{instance="well", uuid="W"}', values: '0x90'}
      - {series: 'darter_gpu_recovery_action{instance="lost", uuid="L"}', values: '0x9 2x20 0x61'}
      - {series: 'darter_gpu_ecc_errors_total{instance="ecc", uuid="E", kind="uncorrected", scope="volatile"}', values: '0x9 2x81'}
      - {series: 'darter_gpu_ecc_errors_total{instance="ecc", uuid="E", kind="corrected", scope="volatile"}', values: '0+9x90'}
      - {series: 'darter_gpu_row_remap_failed{instance="ecc", uuid="E"}', values: '0x9 1x81'}
      - {series: 'darter_gpu_row_remap_pending{instance="ecc", uuid="E"}', values: '0x9 1x81'}
      - {series: 'darter_gpu_retired_pages_pending{instance="old", uuid="O"}', values: '1x90'}
      - {series: 'darter_gpu_clock_event_seconds_total{instance="hot", uuid="H", reason="hw_thermal_slowdown"}', values: '0+12x90'}
      - {series: 'darter_gpu_clock_event_seconds_total{instance="warm", uuid="V", reason="hw_thermal_slowdown"}', values: '0+2x90'}
      - {series: 'darter_gpu_clock_event_seconds_total{instance="capped", uuid="C", reason="sw_power_cap"}', values: '0+60x90'}
      - {series: 'darter_gpu_clock_event_seconds_total{instance="moment", uuid="M", reason="hw_power_brake_slowdown"}', values: '0x30 3x59'}
      - {series: 'darter_gpu_collect_success{instance="well"}', values: '1x90'}
      - {series: 'darter_gpu_collect_success{instance="hangs"}', values: '1x9 0x81'}
    alert_rule_test:
      - {eval_time: 10m, alertname: GpuNodeNotReady, exp_alerts: []}
      - eval_time: 13m
        alertname: GpuNodeNotReady
        exp_alerts: [{exp_labels: {instance: lost, reason: GpuLost, severity: critical}}]
      - {eval_time: 40m, alertname: GpuNodeNotReady, exp_alerts: []}
      - {eval_time: 14m, alertname: GpuNodeUnknown, exp_alerts: []}
      - eval_time: 16m
        alertname: GpuNodeUnknown
        exp_alerts: [{exp_labels: {instance: hangs, reason: NvmlUnresponsive, severity: warning}}]
      - {eval_time: 9m, alertname: GpuFatalXid, exp_alerts: []}
      - eval_time: 12m
        alertname: GpuFatalXid
        exp_alerts: [{exp_labels: {instance: lost, uuid: L, xid: 79, severity: critical}}]
      - {eval_time: 30m, alertname: GpuFatalXid, exp_alerts: []}
      - {eval_time: 18m, alertname: GpuContainedMemoryError, exp_alerts: []}
      - eval_time: 22m
        alertname: GpuContainedMemoryError
        exp_alerts:
          - {exp_labels: {instance: first, uuid: F, xid: 94, severity: warning}}
          - {exp_labels: {instance: anew, uuid: N, xid: 94, severity: warning}}
      - {eval_time: 31m, alertname: GpuContainedMemoryError, exp_alerts: []}
      - {eval_time: 38m, alertname: GpuContainedMemoryError, exp_alerts: []}
      - eval_time: 43m
        alertname: GpuContainedMemoryError
        exp_alerts: [{exp_labels: {instance: again, uuid: A, xid: 94, severity: warning}}]
      - {eval_time: 60m, alertname: GpuContainedMemoryError, exp_alerts: []}
      # What came before the agent was started again is not new.
      - {eval_time: 65m, alertname: GpuContainedMemoryError, exp_alerts: []}
      - {eval_time: 9m, alertname: GpuRecoveryActionRequired, exp_alerts: []}
      - eval_time: 12m
        alertname: GpuRecoveryActionRequired
        exp_alerts: [{exp_labels: {instance: lost, uuid: L, severity: critical}}]
      - {eval_time: 40m, alertname: GpuRecoveryActionRequired, exp_alerts: []}
      - {eval_time: 9m, alertname: GpuUncorrectableEcc, exp_alerts: []}
      - eval_time: 12m
        alertname: GpuUncorrectableEcc
        exp_alerts: [{exp_labels: {instance: ecc, uuid: E, kind: uncorrected, scope: volatile, severity: critical}}]
      - {eval_time: 9m, alertname: GpuRowRemapFailed, exp_alerts: []}
      - eval_time: 12m
        alertname: GpuRowRemapFailed
        exp_alerts: [{exp_labels: {instance: ecc, uuid: E, severity: critical}}]
      - eval_time: 62m
        alertname: GpuRowRemapPending
        exp_alerts: [{exp_labels: {instance: old, uuid: O, severity: warning}}]
      - eval_time: 75m
        alertname: GpuRowRemapPending
        exp_alerts:
          - {exp_labels: {instance: ecc, uuid: E, severity: warning}}
          - {exp_labels: {instance: old, uuid: O, severity: warning}}
      - {eval_time: 4m, alertname: GpuHeldBack, exp_alerts: []}
      - eval_time: 20m
        alertname: GpuHeldBack
        exp_alerts: [{exp_labels: {instance: hot, uuid: H, reason: hw_thermal_slowdown, severity: warning}}]
      - eval_time: 33m
        alertname: GpuHeldBack
        exp_alerts: [{exp_labels: {instance: hot, uuid: H, reason: hw_thermal_slowdown, severity: warning}}]
      - {eval_time: 13m, alertname: GpuNotRead, exp_alerts: []}
      - eval_time: 16m
        alertname: GpuNotRead
        exp_alerts: [{exp_labels: {instance: hangs, severity: warning}}]
"#;

#[tokio::test]
async fn each_alert_fires_for_what_it_is_named_after_and_for_nothing_else() -> Result<()> {
    if !can_run("each_alert_fires_for_what_it_is_named_after_and_for_nothing_else", &[Need::Prometheus]) {
        return Ok(());
    }
    play(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/alerts/gpus.yml"), STORY).await
}
