//! The processes on a GPU, or on a MIG device.

use std::ffi::{c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::*;

use crate::config::{Gpu, MigDevice, Process};
use crate::glue::{put_list, supported};
use crate::state::{Answer, Device};

exports! {
    fn nvmlDeviceGetComputeRunningProcesses_v3(
        device: nvmlDevice_t,
        count: Option<&mut c_uint>,
        infos: *mut nvmlProcessInfo_t,
    ) {
        // SAFETY: as our caller says.
        unsafe { list(SYMBOL, device, count, infos, |gpu| &gpu.compute_processes, |mig| &mig.compute_processes) }
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        device: nvmlDevice_t,
        count: Option<&mut c_uint>,
        infos: *mut nvmlProcessInfo_t,
    ) {
        // SAFETY: as our caller says.
        unsafe { list(SYMBOL, device, count, infos, |gpu| &gpu.graphics_processes, |mig| &mig.graphics_processes) }
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: nvmlDevice_t,
        count: Option<&mut c_uint>,
        infos: *mut nvmlProcessInfo_t,
    ) {
        // SAFETY: as our caller says.
        unsafe { list(SYMBOL, device, count, infos, |gpu| &gpu.mps_processes, |mig| &mig.mps_processes) }
    }

    // Those that are newer than `last_seen`; NOT_FOUND if none is.
    fn nvmlDeviceGetProcessUtilization(
        device: nvmlDevice_t,
        samples: *mut nvmlProcessUtilizationSample_t,
        count: Option<&mut c_uint>,
        last_seen: c_ulonglong,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let known = supported(device.gpu()?.process_utilization.as_ref())?;
        let newer = known.iter().filter(|sample| sample.timestamp > last_seen);
        let items: Vec<_> = newer
            .map(|sample| nvmlProcessUtilizationSample_t {
                pid: sample.pid,
                timeStamp: sample.timestamp,
                smUtil: sample.sm,
                memUtil: sample.memory,
                encUtil: sample.encoder,
                decUtil: sample.decoder,
            })
            .collect();
        if items.is_empty() {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_FOUND);
        }
        if samples.is_null() {
            // Asks for their number, whatever the count came as.
            let count = count.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
            *count = c_uint::try_from(items.len()).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
            return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
        }
        // SAFETY: as our caller says.
        unsafe { put_list(count, samples, &items) }
    }
}

/// # Safety
///
/// `infos` is null or has room for `count`.
unsafe fn list(
    symbol: &str,
    device: nvmlDevice_t,
    mut count: Option<&mut c_uint>,
    infos: *mut nvmlProcessInfo_t,
    of_gpu: impl Fn(&Gpu) -> &Option<Vec<Process>>,
    of_mig: impl Fn(&MigDevice) -> &Option<Vec<Process>>,
) -> Answer {
    let device = Device::begin(symbol, device).inspect_err(|code| {
        // An override plays the race of a list that grows: one more is there than there was room for.
        if *code == nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE
            && let Some(count) = count.as_deref_mut()
        {
            *count = count.saturating_add(1);
        }
    })?;
    let processes = device.mig().map_or_else(|| of_gpu(device.parent()), of_mig);
    let items: Vec<_> = supported(processes.as_ref())?
        .iter()
        .map(|process| nvmlProcessInfo_t {
            pid: process.pid,
            usedGpuMemory: process.used.unwrap_or(u64::MAX),
            gpuInstanceId: process.gpu_instance.unwrap_or(u32::MAX),
            computeInstanceId: process.compute_instance.unwrap_or(u32::MAX),
        })
        .collect();
    // SAFETY: as our caller says.
    unsafe { put_list(count, infos, &items) }
}
