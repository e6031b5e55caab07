//! What goes wrong on purpose, and when the configuration changes under a program that runs.

use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;

use crate::Mock;

const BASE: &str = "quiet = true\nbase = 'h200-idle'\n";

#[test]
fn init_fails_as_configured() {
    for (fixture, code) in [("no-driver", 9), ("driver-mismatch", 18), ("init-unknown", 999)] {
        let (mock, _) = Mock::fixture(fixture);
        assert_eq!(u32::from(mock.init().unwrap_err()), code, "{fixture}");
        // A driver that is loaded later.
        mock.set(BASE);
        assert_eq!(mock.open().device_count().unwrap(), 1);
    }
}

#[test]
fn gpus_that_are_not_there_are_not_counted() {
    let (none, _) = Mock::fixture("count-0");
    assert_eq!(none.open().device_count().unwrap(), 0);
    let (short, config) = Mock::fixture("count-short");
    let nvml = short.open();
    assert_eq!(nvml.device_count().unwrap(), 7);
    assert!(matches!(nvml.device_by_index(7), Err(NvmlError::InvalidArg)));
    let uuid = config.gpus[7].uuid.as_deref().unwrap();
    assert!(matches!(nvml.device_by_uuid(uuid), Err(NvmlError::NotFound)));
}

#[test]
fn a_gpu_is_lost_while_it_is_in_use_and_still_counted() {
    let base = "quiet = true\nbase = 'h100x8'\n";
    let mock = Mock::new(base);
    let nvml = mock.open();
    let (lost, well) = (nvml.device_by_index(3).unwrap(), nvml.device_by_index(4).unwrap());
    assert_eq!(lost.power_usage().unwrap(), 68600);
    mock.set(&format!("{base}[gpus.3]\nlost = true\n"));
    assert!(matches!(lost.power_usage(), Err(NvmlError::GpuLost)));
    assert!(matches!(lost.uuid(), Err(NvmlError::GpuLost)));
    assert!(matches!(nvml.device_by_index(3), Err(NvmlError::GpuLost)));
    assert_eq!(well.power_usage().unwrap(), 68600);
    assert_eq!(nvml.device_count().unwrap(), 8);
    mock.set(base);
    assert_eq!(lost.power_usage().unwrap(), 68600);
}

#[test]
fn a_gpu_is_lost_after_so_many_calls() {
    let (mock, _) = Mock::fixture("gpu-lost");
    let nvml = mock.open();
    // The handle is the first.
    let (lost, well) = (nvml.device_by_index(3).unwrap(), nvml.device_by_index(2).unwrap());
    for call in 1..200 {
        assert!(lost.power_usage().is_ok(), "{call}");
        assert!(well.power_usage().is_ok(), "{call}");
    }
    assert!(matches!(lost.power_usage(), Err(NvmlError::GpuLost)));
    assert!(matches!(lost.memory_info(), Err(NvmlError::GpuLost)));
    assert!(well.power_usage().is_ok());
    assert_eq!(nvml.device_count().unwrap(), 8);
}

#[test]
fn more_processes_come_between_two_calls() {
    let (mock, _) = Mock::fixture("process-race");
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    assert!(matches!(device.running_compute_processes(), Err(NvmlError::InsufficientSize(_))));
    assert_eq!(device.running_compute_processes().unwrap().len(), 3);
}

#[test]
fn an_override_holds_for_its_calls_only_and_counts_anew_when_it_comes_back() {
    let mock = Mock::new(BASE);
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    let codes = |calls: usize| -> Vec<u32> {
        let call = |_| device.power_usage().err().map_or(0, u32::from);
        (0..calls).map(call).collect()
    };
    let third = format!(
        "{BASE}[[overrides]]\nsymbol = 'nvmlDeviceGetPowerUsage'\nreturn_code = 29\nafter_calls = 2\ncalls = 2\n"
    );
    mock.set(&third);
    assert_eq!(codes(6), [0, 0, 29, 29, 0, 0]);
    assert!(device.memory_info().is_ok());
    mock.set(BASE);
    assert_eq!(codes(1), [0]);
    mock.set(&third);
    assert_eq!(codes(3), [0, 0, 29]);
    // A change of something else does not.
    mock.set(&format!("{third}[gpu]\npower = 1\n"));
    assert_eq!(codes(2), [29, 0]);
}

#[test]
fn a_delay_is_waited_for_and_changes_nothing_else() {
    let mock = Mock::new(&format!("{BASE}[[overrides]]\nsymbol = 'nvmlDeviceGetPowerUsage'\ndelay_ms = 200\n"));
    let nvml = mock.open();
    let begun = Instant::now();
    assert_eq!(nvml.device_by_index(0).unwrap().power_usage().unwrap(), 77700);
    assert!(begun.elapsed() >= Duration::from_millis(200));
}

#[test]
fn a_call_hangs_until_the_configuration_lets_it_go_and_holds_up_no_other() {
    let (mock, _) = Mock::fixture("hang-power");
    // Nobody waits for a thread that hangs for ever: this test fails then, and ends.
    let nvml: &'static Nvml = Box::leak(Box::new(mock.open()));
    let device = nvml.device_by_index(0).unwrap();
    for _ in 0..3 {
        assert!(device.power_usage().is_ok());
    }
    let (done, came_back) = mpsc::channel();
    thread::spawn(move || done.send(nvml.device_by_index(0).unwrap().power_usage()));
    assert!(matches!(came_back.recv_timeout(Duration::from_millis(300)), Err(RecvTimeoutError::Timeout)));
    let (done, others) = mpsc::channel();
    thread::spawn(move || done.send(nvml.device_by_index(0).unwrap().memory_info().is_ok()));
    assert_eq!(others.recv_timeout(Duration::from_secs(30)), Ok(true));
    // A wrong file does not let it go.
    mock.set("hung = true");
    assert!(matches!(came_back.recv_timeout(Duration::from_millis(100)), Err(RecvTimeoutError::Timeout)));
    mock.set(&format!("{BASE}[gpu]\npower = 5\n"));
    assert_eq!(came_back.recv_timeout(Duration::from_secs(30)).unwrap().unwrap(), 5);
}

#[test]
fn a_gpu_that_tells_only_its_name_supports_nothing_else() {
    let (mock, _) = Mock::fixture("unsupported");
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    assert!(device.name().is_ok() && device.uuid().is_ok());
    assert!(matches!(device.memory_info(), Err(NvmlError::NotSupported)));
    assert!(matches!(device.power_usage(), Err(NvmlError::NotSupported)));
    assert!(matches!(device.mig_mode(), Err(NvmlError::NotSupported)));
}

const CHILD: &str = "DARTER_TEST_NVML_CHILD";

/// Does nothing unless [`says`] starts it, in a process of its own.
#[test]
fn a_child_that_loads_the_library() {
    let Some(library) = std::env::var_os(CHILD) else { return };
    let init = Nvml::builder().lib_path(&library).init();
    println!("init: {}", init.err().map_or(0, u32::from));
}

/// What init returns, and what stderr says, in a process with `$MOCK_NVML_CONFIG`.
fn says(mock: &Mock, config: Option<&std::path::Path>) -> (String, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "faults::a_child_that_loads_the_library", "--nocapture"]).env(CHILD, mock.library());
    match config {
        Some(config) => command.env("MOCK_NVML_CONFIG", config),
        None => command.env_remove("MOCK_NVML_CONFIG"),
    };
    let output = command.output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let init = stdout.lines().find_map(|line| line.split_once("init: ")).unwrap_or_else(|| panic!("{stdout}"));
    (init.1.to_owned(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn it_says_that_it_is_a_mock_and_what_is_wrong_with_its_file() {
    let mock = Mock::new("base = 'h200-idle'");
    let (init, said) = says(&mock, None);
    assert_eq!(init, "0");
    assert!(said.contains("mock") && said.contains("no GPU is behind"), "{said}");
    let other = mock.dir.path().join("other.toml");
    for (text, init, expected) in [
        ("quiet = true\nbase = 't4-healthy'", "0", None),
        ("base = 't4-healthy'\nquite = true", "999", Some("quite")),
        ("base = 't4-healthy'\n[gpu]\nfan = 3", "999", Some("fan")),
        ("base = ", "999", Some("no TOML")),
    ] {
        std::fs::write(&other, text).unwrap();
        let (code, said) = says(&mock, Some(&other));
        assert_eq!(code, init, "{text}: {said}");
        assert_eq!(expected.is_some(), said.contains("mock libnvidia-ml.so"), "{text}: {said}");
        assert!(expected.is_none_or(|expected| said.contains(expected)), "{text}: {said}");
    }
    let (code, said) = says(&mock, Some(&mock.dir.path().join("none.toml")));
    assert!(code == "999" && said.contains("none.toml"), "{code} {said}");
    std::fs::remove_file(mock.library().with_extension("toml")).unwrap();
    let (code, said) = says(&mock, None);
    assert!(code == "999" && said.contains("MOCK_NVML_CONFIG"), "{code} {said}");
}

#[test]
fn a_file_that_turns_wrong_is_an_unknown_error_until_it_is_right_again() {
    let mock = Mock::new(BASE);
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    mock.set("count = 1\npower = 3");
    assert!(matches!(device.power_usage(), Err(NvmlError::Unknown)));
    mock.set(BASE);
    assert_eq!(device.power_usage().unwrap(), 77700);
}

#[test]
fn energy_that_follows_power_is_power_over_time() {
    // 1000 W are 1000 mJ a ms.
    let mock = Mock::new(&format!("{BASE}[gpu]\nenergy = 5000\npower = 1000000\nenergy_follows_power = true"));
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    let before = Instant::now();
    let first = device.total_energy_consumption().unwrap();
    assert!(first >= 5000);
    let between = Instant::now();
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(20));
        assert!(device.total_energy_consumption().unwrap() > first);
    }
    let (lower, second) = (between.elapsed(), device.total_energy_consumption().unwrap());
    let upper = before.elapsed();
    let grown = u128::from(second - first);
    // A mJ is lost to rounding on each side.
    assert!(grown + 1 >= lower.as_millis() * 1000 && grown <= upper.as_micros() + 1, "{lower:?} {grown} {upper:?}");
    let field = device.field_values_for(&[FieldId(83)]).unwrap().remove(0).unwrap().value.unwrap();
    let SampleValue::U64(field) = field else { panic!("{field:?}") };
    assert!(field >= second && device.total_energy_consumption().unwrap() >= field);
    // What the power was before a change is not reckoned anew.
    mock.set(&format!("{BASE}[gpu]\nenergy = 5000\npower = 0\nenergy_follows_power = true"));
    let third = device.total_energy_consumption().unwrap();
    assert!(third >= field);
    assert_eq!(device.total_energy_consumption().unwrap(), third);
}
