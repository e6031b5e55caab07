//! Which GPUs there are, and what they are called.

use std::ffi::{CStr, c_char, c_int, c_uint};

use nvml_wrapper_sys::bindings::*;

use crate::config::Pci;
use crate::glue::{Out, chars, put, put_bool, put_text, supported};
use crate::state::{self, Code, Device, handle};

exports! {
    fn nvmlDeviceGetCount_v2(count: Out<'_, c_uint>) {
        let config = state::begin(SYMBOL, None)?;
        put(count, visible(&config)?)
    }

    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: Out<'_, nvmlDevice_t>) {
        let config = state::begin(SYMBOL, Some(index))?;
        if index >= visible(&config)? {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        give(&config, index as usize, device)
    }

    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: Out<'_, nvmlDevice_t>) {
        // SAFETY: as our caller says.
        let uuid = unsafe { text(uuid)? };
        find(SYMBOL, device, |config| {
            let gpu = config.gpus.iter().position(|gpu| gpu.uuid.as_deref() == Some(uuid));
            gpu.map(|index| (index, handle(index))).or_else(|| mig_by_uuid(config, uuid))
        })
    }

    fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: *const c_char, device: Out<'_, nvmlDevice_t>) {
        // SAFETY: as our caller says.
        let wanted = unsafe { text(bus_id)? };
        find(SYMBOL, device, |config| {
            let is_wanted = |pci: &Pci| wanted.eq_ignore_ascii_case(&bus_id_of(pci, 8)) || wanted.eq_ignore_ascii_case(&bus_id_of(pci, 4));
            let index = config.gpus.iter().position(|gpu| gpu.pci.as_ref().is_some_and(is_wanted))?;
            Some((index, handle(index)))
        })
    }

    fn nvmlDeviceGetName(device: nvmlDevice_t, name: *mut c_char, length: c_uint) {
        let device = Device::begin(SYMBOL, device)?;
        let text = device.mig().map_or_else(|| device.parent().name.as_deref(), |mig| mig.name.as_deref());
        // SAFETY: as our caller says.
        unsafe { put_text(name, length, supported(text)?) }
    }

    fn nvmlDeviceGetUUID(device: nvmlDevice_t, uuid: *mut c_char, length: c_uint) {
        let device = Device::begin(SYMBOL, device)?;
        let text = device.mig().map_or_else(|| device.parent().uuid.as_deref(), |mig| mig.uuid.as_deref());
        // SAFETY: as our caller says.
        unsafe { put_text(uuid, length, supported(text)?) }
    }

    // Of a MIG device: that among those of its GPU.
    fn nvmlDeviceGetIndex(device: nvmlDevice_t, index: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        let own = c_uint::try_from(device.index()).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
        put(index, device.mig().map_or(own, |mig| mig.index))
    }

    fn nvmlDeviceGetMinorNumber(device: nvmlDevice_t, minor: Out<'_, c_uint>) {
        put(minor, supported(Device::begin(SYMBOL, device)?.gpu()?.minor)?)
    }

    fn nvmlDeviceGetSerial(device: nvmlDevice_t, serial: *mut c_char, length: c_uint) {
        let device = Device::begin(SYMBOL, device)?;
        // SAFETY: as our caller says.
        unsafe { put_text(serial, length, supported(device.gpu()?.serial.as_deref())?) }
    }

    fn nvmlDeviceGetVbiosVersion(device: nvmlDevice_t, version: *mut c_char, length: c_uint) {
        let device = Device::begin(SYMBOL, device)?;
        // SAFETY: as our caller says.
        unsafe { put_text(version, length, supported(device.gpu()?.vbios.as_deref())?) }
    }

    fn nvmlDeviceGetPciInfo_v3(device: nvmlDevice_t, info: Out<'_, nvmlPciInfo_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let pci = supported(device.gpu()?.pci.as_ref())?;
        put(info, nvmlPciInfo_t {
            busIdLegacy: chars(&bus_id_of(pci, 4)),
            domain: pci.domain,
            bus: pci.bus,
            device: pci.device,
            pciDeviceId: pci.device_id,
            pciSubSystemId: pci.subsystem_id,
            busId: chars(&bus_id_of(pci, 8)),
        })
    }

    fn nvmlDeviceGetArchitecture(device: nvmlDevice_t, architecture: Out<'_, nvmlDeviceArchitecture_t>) {
        put(architecture, supported(Device::begin(SYMBOL, device)?.parent().architecture)?)
    }

    fn nvmlDeviceGetCudaComputeCapability(device: nvmlDevice_t, major: Out<'_, c_int>, minor: Out<'_, c_int>) {
        let values = supported(Device::begin(SYMBOL, device)?.parent().compute_capability)?;
        put(major, values[0])?;
        put(minor, values[1])
    }

    fn nvmlDeviceGetPersistenceMode(device: nvmlDevice_t, mode: Out<'_, nvmlEnableState_t>) {
        put_bool(mode, supported(Device::begin(SYMBOL, device)?.gpu()?.persistence)?)
    }
}

/// How many GPUs the driver finds.
fn visible(config: &crate::config::Config) -> Result<c_uint, Code> {
    let all = c_uint::try_from(config.gpus.len()).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
    Ok(config.reported_count.unwrap_or(all))
}

/// Gives the handle of a GPU that is there.
fn give(config: &crate::config::Config, index: usize, device: Out<'_, nvmlDevice_t>) -> state::Answer {
    if config.gpus[index].lost {
        return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
    }
    put(device, handle(index))
}

/// Gives the handle that `search` finds, with the index of its GPU, among those that the driver finds.
fn find(
    symbol: &str,
    device: Out<'_, nvmlDevice_t>,
    search: impl Fn(&crate::config::Config) -> Option<(usize, nvmlDevice_t)>,
) -> state::Answer {
    // Which GPU the call names is known only once it is found.
    let found = search(&*state::peek()?);
    let gpu = found.and_then(|(index, _)| u32::try_from(index).ok());
    let config = state::begin(symbol, gpu)?;
    let (index, handle) = search(&config).ok_or(nvmlReturn_enum_NVML_ERROR_NOT_FOUND)?;
    if u32::try_from(index).map_or(true, |index| Ok(index) >= visible(&config)) {
        return Err(nvmlReturn_enum_NVML_ERROR_NOT_FOUND);
    }
    if config.gpus[index].lost {
        return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
    }
    put(device, handle)
}

fn mig_by_uuid(config: &crate::config::Config, uuid: &str) -> Option<(usize, nvmlDevice_t)> {
    config.gpus.iter().enumerate().find_map(|(index, gpu)| {
        let mig = gpu.mig.as_ref().filter(|mig| mig.enabled)?;
        let device = mig.devices.iter().find(|device| device.uuid.as_deref() == Some(uuid))?;
        Some((index, state::mig_handle(index, device.index)))
    })
}

/// `00000000:1B:00.0`; the older form has a domain of four digits.
fn bus_id_of(pci: &Pci, digits: usize) -> String {
    format!("{:0digits$X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device)
}

/// # Safety
///
/// `from` is null or a C string that lives as long as the call that was given it.
unsafe fn text<'a>(from: *const c_char) -> Result<&'a str, Code> {
    if from.is_null() {
        return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_| nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)
}
