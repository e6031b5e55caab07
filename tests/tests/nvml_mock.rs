//! The mock of NVIDIA's library answers what its configuration says, through the real nvml-wrapper.

use anyhow::Result;
use darter_tests::nvml::Mock;
use darter_tests::tools::{Need, can_run};
use nvml_wrapper::Nvml;

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
