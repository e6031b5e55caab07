//! The harness's hold on the mock of NVIDIA's library. What that answers is tested in `tests/nvml-mock`.

use anyhow::Result;
use darter_tests::nvml::Mock;
use darter_tests::tools::{Need, can_run};
use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

fn open(mock: &Mock) -> Result<Nvml> {
    Ok(Nvml::builder().lib_path(mock.library().as_os_str()).init()?)
}

#[test]
fn two_mocks_in_one_process_are_two_machines() -> Result<()> {
    if !can_run("two_mocks_in_one_process_are_two_machines", &[Need::MockNvml]) {
        return Ok(());
    }
    let (h200, t4) = (Mock::fixture("h200-idle")?, Mock::fixture("t4-healthy")?);
    let (h200, t4) = (open(&h200)?, open(&t4)?);
    assert_eq!(h200.device_by_index(0)?.name()?, "NVIDIA H200");
    assert_eq!(t4.device_by_index(0)?.name()?, "Tesla T4");
    Ok(())
}

#[test]
fn a_mock_changes_while_it_is_in_use_and_not_into_nonsense() -> Result<()> {
    if !can_run("a_mock_changes_while_it_is_in_use_and_not_into_nonsense", &[Need::MockNvml]) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let nvml = open(&mock)?;
    let device = nvml.device_by_index(0)?;
    mock.set("base = 'h200-busy'")?;
    assert_eq!(device.utilization_rates()?.gpu, 100);
    let error = mock.set("base = 'h200-busy'\n[gpu]\nlots = true").unwrap_err();
    assert!(error.to_string().contains("lots"), "{error}");
    assert_eq!(device.utilization_rates()?.gpu, 100);
    mock.set("base = 'h200-idle'\ngpu = { lost = true }")?;
    assert!(matches!(device.utilization_rates(), Err(NvmlError::GpuLost)));
    // What a test of errors writes on purpose.
    mock.write("base = 'h300'")?;
    assert!(matches!(nvml.device_count(), Err(NvmlError::Unknown)));
    Ok(())
}
