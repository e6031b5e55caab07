//! What a report says of who has a GPU, and of a driver that hangs.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{Allocation, GpuReadiness, Owner, Report};
use darter_tests::agent::Agent;
use darter_tests::kubelet::Kubelet;
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::reports::Ear;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;

use crate::{NEEDS, SELDOM, TWO, is_ready};

const UUID: &str = "GPU-4a2b6f10-0000-4000-8000-000000000200";

/// Of the second GPU of `TWO`.
const LATE: &str = "GPU-4a2b6f10-0000-4000-8000-000000000201";

fn allocation(report: &Report) -> Option<Allocation> {
    report.gpus.as_ref()?.gpus.first()?.allocation.clone()
}

#[tokio::test]
async fn who_has_a_gpu_is_told_when_the_kubelet_says_so() -> Result<()> {
    if !can_run("who_has_a_gpu_is_told_when_the_kubelet_says_so", &NEEDS) {
        return Ok(());
    }
    let (mock, kubelet, ear) = (Mock::fixture("h200-idle")?, Kubelet::start()?, Ear::start(&Place::Host, None).await?);
    kubelet.set(&[], &[("nvidia.com/gpu", &[UUID])]);
    let options = mock.options(1)?.set("gpu.pod_resources", kubelet.socket().display().to_string());
    let options = options.set("report.scaler", ear.url()).set("report.token_file", "");
    let _agent = Agent::start(options.set("report.interval", SELDOM)).await?;
    // That nobody has it is another thing than that nobody says who has it.
    let nobody = Some(Allocation::default());
    let free = ear.hears(0, "nobody has it", |heard| allocation(&heard.report) == nobody).await?;
    ensure!(ear.heard().iter().any(|heard| allocation(&heard.report).is_none()), "known before the kubelet was asked");
    kubelet.set(&[("team", "train-0", "main", "nvidia.com/gpu", &[UUID])], &[("nvidia.com/gpu", &[UUID])]);
    let owner = Owner {
        namespace: "team".to_owned(),
        pod: "train-0".to_owned(),
        container: "main".to_owned(),
        resource: "nvidia.com/gpu".to_owned(),
    };
    let taken = Some(Allocation { owners: vec![owner] });
    let given = ear.hears(0, "a pod has it", |heard| allocation(&heard.report) == taken).await?;
    ensure!(given.report.sequence > free.report.sequence && given.stream == 1);
    Ok(())
}

#[tokio::test]
async fn a_driver_that_hangs_is_told_and_what_was_read_before_is_not_told_any_more() -> Result<()> {
    if !can_run("a_driver_that_hangs_is_told_and_what_was_read_before_is_not_told_any_more", &NEEDS) {
        return Ok(());
    }
    let (mock, ear) = (Mock::fixture("h200-idle")?, Ear::start(&Place::Host, None).await?);
    let options = mock.options(1)?.set("report.scaler", ear.url()).set("report.token_file", "");
    let _agent = Agent::start(options.set("report.interval", SELDOM)).await?;
    let of = |report: &Report| report.gpus.clone().unwrap_or_default();
    let ready = |report: &Report| of(report).readiness() == GpuReadiness::Ready && of(report).gpus.len() == 1;
    ear.hears(0, "it is ready", |heard| ready(&heard.report)).await?;
    mock.set("base = 'hang-power'")?;
    let hangs = ear.hears(0, "it hangs", |heard| of(&heard.report).hung_ms.is_some()).await?.report;
    ensure!(of(&hangs).hung_ms >= Some(15_000), "{:?}", of(&hangs).hung_ms);
    let unknown = ear.hears(0, "nothing is known", |heard| of(&heard.report).readiness() == GpuReadiness::Unknown);
    let unknown = of(&unknown.await?.report);
    ensure!(unknown.reasons.iter().any(|reason| reason.reason == "NvmlUnresponsive"), "{:?}", unknown.reasons);
    let gpu = unknown.gpus.first().context("it is not forgotten")?;
    assert_eq!((gpu.power_milliwatts, gpu.memory_used_bytes, gpu.sample_ms), (None, None, None), "{gpu:?}");
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_comes_late_has_series_a_verdict_errors_and_a_place_in_the_report() -> Result<()> {
    if !can_run("a_gpu_that_comes_late_has_series_a_verdict_errors_and_a_place_in_the_report", &NEEDS) {
        return Ok(());
    }
    let (mock, ear) = (Mock::fixture("h200-idle")?, Ear::start(&Place::Host, None).await?);
    let options = mock.options(1)?.set("report.scaler", ear.url()).set("report.token_file", "");
    let agent = Agent::start(options.set("report.interval", SELDOM)).await?;
    let of = |report: &Report| report.gpus.clone().unwrap_or_default();
    let alone = |report: &Report| of(report).readiness() == GpuReadiness::Ready && of(report).gpus.len() == 1;
    ear.hears(0, "one is ready", |heard| alone(&heard.report)).await?;
    let started = async || anyhow::Ok(agent.metrics().await?.sum("darter_nvml_init_total", &[]));
    assert_eq!(started().await?, 1.0);
    // The kernel has it, and NVML does not: it is started again, once, in vain.
    mock.host(2)?;
    let lacks = |report: &Report| of(report).reasons.iter().any(|reason| reason.reason == "GpuCountMismatch");
    let missed = ear.hears(0, "one is missed", |heard| lacks(&heard.report)).await?;
    assert_eq!(of(&missed.report).readiness(), GpuReadiness::NotReady);
    eventually("NVML is started again", async || Ok(started().await? == 2.0)).await?;
    let before = ear.heard().len();
    let two = format!("{TWO}pci = {{ bus = 0x2a, device_id = 0x233510DE }}\n");
    mock.set(&two)?;
    ear.hears(before, "both are ready", |heard| is_ready(&heard.report)).await?;
    ensure!(started().await? <= 3.0, "once for the file, and once for the count");
    let late = &[("uuid", LATE)];
    let metrics = agent.metrics().await?;
    ensure!(metrics.sum("darter_gpu_power_watts", late) > 0.0, "no readings");
    assert_eq!(metrics.sum("darter_gpu_ready", late), 1.0);
    assert_eq!(metrics.sum("darter_gpu_state", &[("uuid", LATE), ("state", "unknown")]), 1.0);
    assert_eq!(metrics.sum("darter_node_gpus", &[("state", "present")]), 2.0);
    // It is listened to as well.
    mock.set(&format!("{two}[[events]]\nid = 1\ngpu = 1\ndata = 48\n"))?;
    let fatal = |report: &Report| of(report).reasons.iter().any(|reason| reason.reason == "FatalXid(48)");
    let told = ear.hears(before, "an error of it", |heard| fatal(&heard.report)).await?;
    let gpus = of(&told.report);
    let reason = gpus.reasons.iter().find(|reason| reason.reason == "FatalXid(48)").context("no reason")?;
    assert_eq!(reason.gpus, [LATE]);
    assert_eq!(agent.metrics().await?.sum("darter_gpu_xid_errors_total", late), 1.0);
    Ok(())
}
