//! Calls that nvml-wrapper does not make, or makes in one way only: versions of structs, scopes of
//! fields, lists that do not fit.

use std::ffi::CStr;
use std::ptr;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper_sys::bindings::*;

use crate::Mock;

fn handle(nvml: &Nvml) -> nvmlDevice_t {
    let mut device = ptr::null_mut();
    // SAFETY: a place for a handle.
    assert_eq!(unsafe { nvml.lib().nvmlDeviceGetHandleByIndex_v2(0, &raw mut device) }, 0);
    assert_eq!(device as usize, 1);
    device
}

#[test]
fn a_struct_of_the_wrong_version_is_refused_and_not_touched() {
    let (mock, _) = Mock::fixture("h200-idle");
    let nvml = mock.open();
    let (lib, device) = (nvml.lib(), handle(&nvml));
    // SAFETY: structs of these very types, whose fields may be zero.
    unsafe {
        for (version, code) in [(0x0200_0028, 0), (0x0100_0028, 25), (0x0200_0020, 25), (0, 25)] {
            let mut memory = nvmlMemory_v2_t { version, total: 1, reserved: 1, free: 1, used: 1 };
            assert_eq!(lib.nvmlDeviceGetMemoryInfo_v2(device, &raw mut memory), code, "{version:#x}");
            assert_eq!(memory.total, if code == 0 { 150_754_820_096 } else { 1 });
        }
        for (version, code) in [(0x0100_0008, 0), (8, 25)] {
            let mut margin = nvmlMarginTemperature_t { version, marginTemperature: 1 };
            assert_eq!(lib.nvmlDeviceGetMarginTemperature(device, &raw mut margin), code);
            assert_eq!(margin.marginTemperature, if code == 0 { 59 } else { 1 });
        }
        for (version, code) in [(0x0100_0068, 0), (0x0200_0068, 25)] {
            let mut status: nvmlEccSramErrorStatus_t = std::mem::zeroed();
            status.version = version;
            status.bThresholdExceeded = 7;
            assert_eq!(lib.nvmlDeviceGetSramEccErrorStatus(device, &raw mut status), code);
            assert_eq!(status.bThresholdExceeded, if code == 0 { 0 } else { 7 });
        }
        for (version, code) in [(1, 0), (0x0100_0008, 25)] {
            let mut support = nvmlGpmSupport_t { version, isSupportedDevice: 7 };
            assert_eq!(lib.nvmlGpmQueryDeviceSupport(device, &raw mut support), code);
            assert_eq!(support.isSupportedDevice, if code == 0 { 1 } else { 7 });
        }
        let mut request: Box<nvmlGpmMetricsGet_t> = Box::new(std::mem::zeroed());
        assert_eq!(lib.nvmlGpmMetricsGet(&raw mut *request), 25);
        request.version = 1;
        // No samples.
        assert_eq!(lib.nvmlGpmMetricsGet(&raw mut *request), 2);
    }
}

#[test]
fn fabric_info_of_either_version_is_written_no_further_than_it_goes() {
    let (mock, _) = Mock::fixture("h200-mig");
    let nvml = mock.open();
    for (version, code) in [(0x0200_0024, 0), (0x0300_0028, 0), (0x0200_0028, 25), (0x0300_0024, 25)] {
        // Words of what may follow the struct.
        let mut words = [0xAAAA_AAAA_u32; 12];
        words[0] = version;
        // SAFETY: there is room for the longer of both.
        let found = unsafe { nvml.lib().nvmlDeviceGetGpuFabricInfoV(handle(&nvml), words.as_mut_ptr().cast()) };
        assert_eq!(found, code, "{version:#x}");
        let size = if code == 0 { (version & 0xffff) as usize / 4 } else { 1 };
        assert!(words[size..].iter().all(|word| *word == 0xAAAA_AAAA), "{version:#x}: {words:x?}");
        if code == 0 {
            // version, clusterUuid (4), status, cliqueId, state in the first byte of a word.
            assert_eq!((words[5], words[6], words[7] & 0xff), (0, 0, 3), "{version:#x}");
        }
    }
}

#[test]
fn a_field_has_a_value_for_each_scope() {
    let mock = Mock::new(
        "quiet = true\nbase = 'h200-idle'\n[gpu.fields]\n'138/0' = { u64 = 7 }\n'138/all' = { u64 = 126 }\n\
         '186/1' = { u32 = 90000 }\n193 = { i32 = -8 }\n196 = { u16 = 2 }\n82 = { code = 4 }",
    );
    let nvml = mock.open();
    let ask = |field: u32, scope: u32| {
        // SAFETY: one field value, whose fields may be zero.
        unsafe {
            let mut value: nvmlFieldValue_t = std::mem::zeroed();
            (value.fieldId, value.scopeId, value.value.ullVal) = (field, scope, 5);
            assert_eq!(nvml.lib().nvmlDeviceGetFieldValues(handle(&nvml), 1, &raw mut value), 0);
            assert!(value.timestamp > 1_700_000_000_000_000);
            (value.nvmlReturn, value.valueType, value.value.ullVal)
        }
    };
    assert_eq!(ask(138, 0), (0, 3, 7));
    assert_eq!(ask(138, u32::MAX), (0, 3, 126));
    assert_eq!(ask(138, 1), (3, 0, 5));
    assert_eq!(ask(186, 1), (0, 1, 90_000));
    assert_eq!(ask(186, 0), (0, 1, 77_700));
    assert_eq!(ask(193, 0), (0, 5, 0xffff_fff8));
    assert_eq!(ask(196, 0), (0, 6, 2));
    assert_eq!(ask(82, 0), (4, 0, 5));
    // Energy, which another call has too, and in scope 0 only.
    assert_eq!(ask(83, 0), (0, 3, 1_000_000_000));
    assert_eq!(ask(83, 1), (3, 0, 5));
}

#[test]
fn fields_251_to_273_are_where_the_driver_has_them() {
    for (fixture, first) in [("driver-580-65", 251), ("driver-580-82", 269)] {
        let (mock, _) = Mock::fixture(fixture);
        let nvml = mock.open();
        // SAFETY: field values, whose fields may be zero.
        let values = unsafe {
            let mut values: [nvmlFieldValue_t; 30] = std::mem::zeroed();
            for (id, value) in (248..).zip(&mut values) {
                value.fieldId = id;
            }
            assert_eq!(nvml.lib().nvmlDeviceGetFieldValues(handle(&nvml), 30, values.as_mut_ptr()), 0);
            values.map(|value| (value.fieldId, value.nvmlReturn, value.value.ullVal))
        };
        let found: Vec<_> = values.into_iter().filter(|(_, code, _)| *code == 0).collect();
        let expected = [1_000_000_251, 1_000_000_252, 1_000_000_253];
        assert_eq!(found, [(first, 0, expected[0]), (first + 1, 0, expected[1]), (first + 2, 0, expected[2])]);
        // nvml-wrapper translates.
        let device = nvml.device_by_index(0).unwrap();
        let values = device.field_values_for(&[251, 252, 253].map(nvml_wrapper::structs::device::FieldId)).unwrap();
        for (value, expected) in values.into_iter().zip(expected) {
            let value = value.unwrap().value.unwrap();
            assert_eq!(value, nvml_wrapper::enums::device::SampleValue::U64(expected), "{fixture}");
        }
    }
}

#[test]
fn what_nvml_wrapper_lacks_is_there() {
    let (mock, _) = Mock::fixture("h200-mig");
    let nvml = mock.open();
    let (lib, device) = (nvml.lib(), handle(&nvml));
    let (mut cuda, mut reasons, mut gpu_instance, mut compute_instance) = (0, 0, 0, 0);
    let mut child = ptr::null_mut();
    // SAFETY: places for what is asked for; the text lives as long as the library.
    unsafe {
        assert_eq!(lib.nvmlSystemGetCudaDriverVersion(&raw mut cuda), 0);
        assert_eq!(lib.nvmlDeviceGetCurrentClocksEventReasons(device, &raw mut reasons), 0);
        assert_eq!(lib.nvmlDeviceGetGpuInstanceId(device, &raw mut gpu_instance), 2);
        assert_eq!(lib.nvmlDeviceGetMigDeviceHandleByIndex(device, 1, &raw mut child), 0);
        assert_eq!(child as usize, 0x1001);
        assert_eq!(lib.nvmlDeviceGetGpuInstanceId(child, &raw mut gpu_instance), 0);
        assert_eq!(lib.nvmlDeviceGetComputeInstanceId(child, &raw mut compute_instance), 0);
        // Nobody gave these out.
        for unknown in [0, 2, 0x1007, 0x1010, usize::MAX] {
            assert_eq!(lib.nvmlDeviceGetPowerUsage(unknown as nvmlDevice_t, &raw mut gpu_instance), 2, "{unknown:#x}");
        }
        assert_eq!(lib.nvmlDeviceGetPowerUsage(device, ptr::null_mut()), 2);
        for (code, text) in [(0, c"The operation was successful"), (15, c"GPU is lost"), (999, c"Unknown Error")] {
            assert_eq!(CStr::from_ptr(lib.nvmlErrorString(code)), text);
        }
    }
    assert_eq!((cuda, reasons, gpu_instance, compute_instance), (13010, 1, 2, 1));
    let (mock, _) = Mock::fixture("remap-failed");
    let nvml = mock.open();
    let mut rows = [9; 4];
    let [corrected, uncorrected, pending, failed] = &mut rows;
    // SAFETY: places for four numbers.
    let code = unsafe { nvml.lib().nvmlDeviceGetRemappedRows(handle(&nvml), corrected, uncorrected, pending, failed) };
    assert_eq!((code, rows), (0, [0, 8, 0, 1]));
}

#[test]
fn a_list_or_text_that_does_not_fit_is_not_written() {
    let (mock, _) = Mock::fixture("h200-busy");
    let nvml = mock.open();
    let (lib, device) = (nvml.lib(), handle(&nvml));
    // SAFETY: there is room for as many as `count` says; zero is a process.
    unsafe {
        for (room, code, written) in [(0, 7, 0), (2, 7, 0), (3, 0, 3), (8, 0, 3)] {
            let mut processes: [nvmlProcessInfo_t; 8] = std::mem::zeroed();
            let mut count = room;
            let found = lib.nvmlDeviceGetComputeRunningProcesses_v3(device, &raw mut count, processes.as_mut_ptr());
            assert_eq!((found, count), (code, 3), "{room}");
            assert_eq!(processes.iter().filter(|process| process.pid != 0).count(), written, "{room}");
        }
        let mut name = [b'x'.cast_signed(); 16];
        // NVIDIA H200 and a zero are 12 bytes.
        assert_eq!(lib.nvmlDeviceGetName(device, name.as_mut_ptr(), 11), 7);
        assert!(name.iter().all(|byte| *byte == b'x'.cast_signed()));
        assert_eq!(lib.nvmlDeviceGetName(device, name.as_mut_ptr(), 12), 0);
        assert_eq!(CStr::from_ptr(name.as_ptr()), c"NVIDIA H200");
        assert!(name[12..].iter().all(|byte| *byte == b'x'.cast_signed()));
    }
}

#[test]
fn nothing_works_before_init_and_after_shutdown() {
    let (mock, _) = Mock::fixture("h200-idle");
    let nvml = mock.open();
    let device = handle(&nvml);
    let mut power = 0;
    // SAFETY: a place for a number.
    unsafe {
        assert_eq!(nvml.lib().nvmlInit_v2(), 0);
        assert_eq!(nvml.lib().nvmlShutdown(), 0);
        assert_eq!(nvml.lib().nvmlDeviceGetPowerUsage(device, &raw mut power), 0);
        assert_eq!(nvml.lib().nvmlShutdown(), 0);
        assert_eq!(nvml.lib().nvmlDeviceGetPowerUsage(device, &raw mut power), 1);
        assert_eq!(nvml.lib().nvmlShutdown(), 1);
        assert_eq!(nvml.lib().nvmlInitWithFlags(3), 0);
        assert_eq!(nvml.lib().nvmlDeviceGetPowerUsage(device, &raw mut power), 0);
    }
    assert!(matches!(nvml.device_by_uuid("GPU-none"), Err(NvmlError::NotFound)));
}

#[test]
fn of_gpm_only_what_is_counted_is_written() {
    let (mock, _) = Mock::fixture("h200-busy");
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    let (first, second) = (device.gpm_sample().unwrap(), device.gpm_sample().unwrap());
    // SAFETY: a request may be zero; the samples live.
    let request = unsafe {
        let mut request: Box<nvmlGpmMetricsGet_t> = Box::new(std::mem::zeroed());
        (request.version, request.numMetrics) = (1, 2);
        (request.sample1, request.sample2) = (first.handle(), second.handle());
        for (metric, id) in request.metrics.iter_mut().zip([2, 4, 10]) {
            (metric.metricId, metric.value, metric.nvmlReturn) = (id, 7.0, 7);
        }
        assert_eq!(nvml.lib().nvmlGpmMetricsGet(&raw mut *request), 0);
        request
    };
    let found = request.metrics[..4].iter().map(|metric| (metric.metricId, metric.nvmlReturn, metric.value));
    let found: Vec<_> = found.collect();
    assert_eq!(found[0], (2, 0, 96.0));
    assert_eq!((found[1].0, found[1].1), (4, 3));
    assert_eq!(found[2..], [(10, 7, 7.0), (0, 0, 0.0)]);
}
