//! GPUs that are cut into MIG devices. Memory, names and processes of those are where those of GPUs are.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings::*;

use crate::glue::{Out, put, put_bool, supported};
use crate::state::{Device, handle, mig_handle};

exports! {
    fn nvmlDeviceGetMigMode(device: nvmlDevice_t, current: Out<'_, c_uint>, pending: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        let mig = supported(device.gpu()?.mig.as_ref())?;
        put_bool(current, mig.enabled)?;
        put_bool(pending, mig.pending.unwrap_or(mig.enabled))
    }

    fn nvmlDeviceGetMaxMigDeviceCount(device: nvmlDevice_t, count: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        put(count, supported(device.gpu()?.mig.as_ref())?.max_devices)
    }

    // A hole is NOT_FOUND.
    fn nvmlDeviceGetMigDeviceHandleByIndex(device: nvmlDevice_t, index: c_uint, mig_device: Out<'_, nvmlDevice_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let mig = supported(device.gpu()?.mig.as_ref())?;
        if index >= mig.max_devices {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        if !mig.enabled || mig.devices.iter().all(|device| device.index != index) {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_FOUND);
        }
        put(mig_device, mig_handle(device.index(), index))
    }

    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig_device: nvmlDevice_t, device: Out<'_, nvmlDevice_t>) {
        let child = Device::begin(SYMBOL, mig_device)?;
        child.mig().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        put(device, handle(child.index()))
    }

    fn nvmlDeviceIsMigDeviceHandle(device: nvmlDevice_t, is_mig: Out<'_, c_uint>) {
        put_bool(is_mig, Device::begin(SYMBOL, device)?.mig().is_some())
    }

    fn nvmlDeviceGetAttributes_v2(device: nvmlDevice_t, attributes: Out<'_, nvmlDeviceAttributes_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let found = supported(device.mig().and_then(|mig| mig.attributes.as_ref()))?;
        put(attributes, nvmlDeviceAttributes_t {
            multiprocessorCount: found.multiprocessors,
            sharedCopyEngineCount: found.copy_engines,
            sharedDecoderCount: found.decoders,
            sharedEncoderCount: found.encoders,
            sharedJpegCount: found.jpeg,
            sharedOfaCount: found.ofa,
            gpuInstanceSliceCount: found.gpu_instance_slices,
            computeInstanceSliceCount: found.compute_instance_slices,
            memorySizeMB: found.memory_mib,
        })
    }

    fn nvmlDeviceGetGpuInstanceId(device: nvmlDevice_t, id: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        let mig = device.mig().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        put(id, supported(mig.gpu_instance)?)
    }

    fn nvmlDeviceGetComputeInstanceId(device: nvmlDevice_t, id: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        let mig = device.mig().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        put(id, supported(mig.compute_instance)?)
    }
}
