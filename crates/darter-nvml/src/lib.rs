//! The few calls into NVML for which nvml-wrapper has no safe function, each as a safe one: the fabric, the
//! margin to the thermal limit, the flag of SRAM errors, the GPU instance of a MIG device, what went over all NVLinks.
//!
//! A library that lacks one of them is a normal state: the answer is that symbol's error. Not here: what follows
//! from an answer, and when to ask.

#![warn(missing_docs)]

use std::ffi::{c_int, c_uint};

use nvml_wrapper::Device;
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlEccSramErrorStatus_v1_t, nvmlFieldValue_t, nvmlGpuFabricInfo_v2_t, nvmlGpuFabricInfo_v3_t,
    nvmlMarginTemperature_v1_t, nvmlReturn_t, nvmlValue_t,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT as UNSIGNED_INT,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG as UNSIGNED_LONG_LONG,
};

/// How a GPU stands in the fabric of its NVSwitches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fabric {
    /// 0 not supported, 1 not started, 2 in progress, 3 completed.
    pub state: u32,
    /// NVML's code of what was completed; 0 is success.
    pub status: u32,
}

/// A function of the library, by which a structure with a version is filled.
type Fills<T> = unsafe extern "C" fn(nvmlDevice_t, *mut T) -> nvmlReturn_t;

/// NVML_ERROR_ARGUMENT_VERSION_MISMATCH, which the wrapper has no name for.
const OTHER_VERSION: u32 = 25;

/// How it stands in the fabric. Errors are NVML's; a GPU that is in none says that it is not supported, or 0.
pub fn fabric(device: &Device<'_>) -> Result<Fabric, NvmlError> {
    let call = symbol("nvmlDeviceGetGpuFabricInfoV", &device.nvml().lib().nvmlDeviceGetGpuFabricInfoV)?;
    let mut info = nvmlGpuFabricInfo_v3_t {
        version: version::<nvmlGpuFabricInfo_v3_t>(3),
        clusterUuid: [0; 16],
        status: 0,
        cliqueId: 0,
        state: 0,
        healthMask: 0,
        healthSummary: 0,
    };
    let mut said = fill(device, call, &mut info);
    if matches!(said, Err(NvmlError::UnexpectedVariant(OTHER_VERSION))) {
        // Drivers before 565. The second version is the first part of the third, and fills no more than that.
        info.version = version::<nvmlGpuFabricInfo_v2_t>(2);
        said = fill(device, call, &mut info);
    }
    said.map(|()| Fabric { state: info.state.into(), status: info.status })
}

/// Whether so many errors of the SRAM could not be corrected that the GPU should be replaced.
pub fn is_sram_threshold_exceeded(device: &Device<'_>) -> Result<bool, NvmlError> {
    let call = symbol("nvmlDeviceGetSramEccErrorStatus", &device.nvml().lib().nvmlDeviceGetSramEccErrorStatus)?;
    let mut status = nvmlEccSramErrorStatus_v1_t {
        version: version::<nvmlEccSramErrorStatus_v1_t>(1),
        aggregateUncParity: 0,
        aggregateUncSecDed: 0,
        aggregateCor: 0,
        volatileUncParity: 0,
        volatileUncSecDed: 0,
        volatileCor: 0,
        aggregateUncBucketL2: 0,
        aggregateUncBucketSm: 0,
        aggregateUncBucketPcie: 0,
        aggregateUncBucketMcu: 0,
        aggregateUncBucketOther: 0,
        bThresholdExceeded: 0,
    };
    fill(device, call, &mut status).map(|()| status.bThresholdExceeded != 0)
}

/// Degrees Celsius until it slows down because of heat (T.limit); 0 and less: it does.
pub fn thermal_margin(device: &Device<'_>) -> Result<i32, NvmlError> {
    let call = symbol("nvmlDeviceGetMarginTemperature", &device.nvml().lib().nvmlDeviceGetMarginTemperature)?;
    let margin: c_int = 0;
    let mut margin =
        nvmlMarginTemperature_v1_t { version: version::<nvmlMarginTemperature_v1_t>(1), marginTemperature: margin };
    fill(device, call, &mut margin).map(|()| margin.marginTemperature)
}

/// The number of the GPU instance that a MIG device is in. Numbers are given again when instances are made anew.
pub fn gpu_instance(mig: &Device<'_>) -> Result<u32, NvmlError> {
    let call = symbol("nvmlDeviceGetGpuInstanceId", &mig.nvml().lib().nvmlDeviceGetGpuInstanceId)?;
    let mut id: c_uint = 0;
    fill(mig, call, &mut id).map(|()| id)
}

/// Fields of nvml.h: KiB of data that were sent and received over NVLink.
const NVLINK: [c_uint; 2] = [138, 139];
/// The sum of all links; nvml-wrapper asks for link 0 alone.
const ALL_LINKS: c_uint = c_uint::MAX;

/// NVML_ERROR_NOT_SUPPORTED.
const NOT_SUPPORTED: c_uint = 3;

/// KiB sent and received over all NVLinks since the driver was loaded; none of a GPU that has no links.
pub fn nvlink_kib(device: &Device<'_>) -> Result<Option<(u64, u64)>, NvmlError> {
    let call = symbol("nvmlDeviceGetFieldValues", &device.nvml().lib().nvmlDeviceGetFieldValues)?;
    let mut values = NVLINK.map(|field| nvmlFieldValue_t {
        fieldId: field,
        scopeId: ALL_LINKS,
        timestamp: 0,
        latencyUsec: 0,
        valueType: 0,
        nvmlReturn: 0,
        value: nvmlValue_t { ullVal: 0 },
    });
    // SAFETY: the handle goes to the library that gave it, and there are two values, as it is told.
    nvml_try(unsafe { call(device.handle(), 2, values.as_mut_ptr()) })?;
    let number = |value: &nvmlFieldValue_t| match (value.nvmlReturn, value.valueType) {
        // SAFETY: the type says which of the union's fields was written; it was all zeroes before.
        (0, UNSIGNED_INT) => Some(unsafe { value.value.uiVal }.into()),
        // SAFETY: as above.
        (0, UNSIGNED_LONG_LONG) => Some(unsafe { value.value.ullVal }),
        _ => None,
    };
    // Said of each value: then the call itself would say so of a GPU without links, and need not be made again.
    if values.iter().all(|value| value.nvmlReturn == NOT_SUPPORTED) {
        return Err(NvmlError::NotSupported);
    }
    Ok(number(&values[0]).zip(number(&values[1])))
}

/// The number by which NVML tells which version of a structure it is given: its size, and the version's own number.
const fn version<T>(number: u32) -> c_uint {
    // A structure of 16 MiB would not fit; these have about a hundred bytes.
    #[expect(clippy::cast_possible_truncation, reason = "sizes of small structures")]
    let size = size_of::<T>() as u32;
    size | number << 24
}

fn symbol<F: Copy, E>(name: &str, found: &Result<F, E>) -> Result<F, NvmlError> {
    found.as_ref().copied().map_err(|_| NvmlError::FailedToLoadSymbol(name.to_owned()))
}

/// Has the library fill `what`, of which it knows the size: by its version, or because it is a plain number.
fn fill<T>(device: &Device<'_>, call: Fills<T>, what: &mut T) -> Result<(), NvmlError> {
    // SAFETY: the handle is only handed to the library that gave it, which is alive as long as `device`. `call` is
    // that library's, with the signature of its header, and writes no more than the structure that `what` is.
    let code = unsafe { call(device.handle(), what) };
    nvml_try(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words that the driver's own header makes: another one is refused by every driver.
    #[test]
    fn structures_are_as_large_as_nvml_has_them() {
        assert_eq!(version::<nvmlGpuFabricInfo_v2_t>(2), 0x0200_0024);
        assert_eq!(version::<nvmlGpuFabricInfo_v3_t>(3), 0x0300_0028);
        assert_eq!(version::<nvmlEccSramErrorStatus_v1_t>(1), 0x0100_0068);
        assert_eq!(version::<nvmlMarginTemperature_v1_t>(1), 0x0100_0008);
    }
}
