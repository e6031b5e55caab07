//! What goes wrong with a GPU: ECC errors, retired pages, remapped rows, violations, the fabric.

use std::ffi::{c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::*;

use crate::config::{Fabric, RetiredPage, RetiredPages};
use crate::glue::{Out, put, put_bool, put_list, supported};
use crate::state::{Code, Device};
use crate::telemetry::version;

exports! {
    fn nvmlDeviceGetEccMode(
        device: nvmlDevice_t,
        current: Out<'_, nvmlEnableState_t>,
        pending: Out<'_, nvmlEnableState_t>,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let ecc = supported(device.gpu()?.ecc.as_ref())?;
        put_bool(current, ecc.enabled)?;
        put_bool(pending, ecc.pending.unwrap_or(ecc.enabled))
    }

    fn nvmlDeviceGetTotalEccErrors(
        device: nvmlDevice_t,
        kind: nvmlMemoryErrorType_t,
        counter: nvmlEccCounterType_t,
        count: Out<'_, c_ulonglong>,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let ecc = supported(device.gpu()?.ecc.as_ref())?;
        let errors = match kind {
            nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_CORRECTED => &ecc.corrected,
            nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED => &ecc.uncorrected,
            _ => return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
        };
        let errors = supported(errors.as_ref())?;
        put(count, match counter {
            nvmlEccCounterType_enum_NVML_VOLATILE_ECC => errors.volatile,
            nvmlEccCounterType_enum_NVML_AGGREGATE_ECC => errors.aggregate,
            _ => return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
        })
    }

    fn nvmlDeviceGetSramEccErrorStatus(device: nvmlDevice_t, status: Option<&mut nvmlEccSramErrorStatus_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let status = status.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if status.version != version::<nvmlEccSramErrorStatus_t>(1) {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let sram = supported(device.gpu()?.sram_ecc.as_ref())?;
        *status = nvmlEccSramErrorStatus_t {
            version: status.version,
            aggregateUncParity: sram.aggregate_uncorrected_parity,
            aggregateUncSecDed: sram.aggregate_uncorrected_secded,
            aggregateCor: sram.aggregate_corrected,
            volatileUncParity: sram.volatile_uncorrected_parity,
            volatileUncSecDed: sram.volatile_uncorrected_secded,
            volatileCor: sram.volatile_corrected,
            aggregateUncBucketL2: 0,
            aggregateUncBucketSm: 0,
            aggregateUncBucketPcie: 0,
            aggregateUncBucketMcu: 0,
            aggregateUncBucketOther: 0,
            bThresholdExceeded: sram.threshold_exceeded.into(),
        };
        Ok(())
    }

    fn nvmlDeviceGetRetiredPages(
        device: nvmlDevice_t,
        cause: nvmlPageRetirementCause_t,
        count: Option<&mut c_uint>,
        addresses: *mut c_ulonglong,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let pages = retired(supported(device.gpu()?.retired_pages.as_ref())?, cause)?;
        let items: Vec<_> = pages.iter().map(|page| page.address).collect();
        // SAFETY: as our caller says.
        unsafe { put_list(count, addresses, &items) }
    }

    fn nvmlDeviceGetRetiredPages_v2(
        device: nvmlDevice_t,
        cause: nvmlPageRetirementCause_t,
        count: Option<&mut c_uint>,
        addresses: *mut c_ulonglong,
        timestamps: *mut c_ulonglong,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let pages = retired(supported(device.gpu()?.retired_pages.as_ref())?, cause)?;
        let items: Vec<_> = pages.iter().map(|page| page.address).collect();
        let mut room = count.as_deref().copied();
        // SAFETY: as our caller says.
        unsafe { put_list(count, addresses, &items) }?;
        let items: Vec<_> = pages.iter().map(|page| page.timestamp).collect();
        // SAFETY: as our caller says, of as many as of addresses.
        unsafe { put_list(room.as_mut(), timestamps, &items) }
    }

    fn nvmlDeviceGetRetiredPagesPendingStatus(device: nvmlDevice_t, pending: Out<'_, nvmlEnableState_t>) {
        let device = Device::begin(SYMBOL, device)?;
        put_bool(pending, supported(device.gpu()?.retired_pages.as_ref())?.pending)
    }

    fn nvmlDeviceGetRemappedRows(
        device: nvmlDevice_t,
        corrected: Out<'_, c_uint>,
        uncorrected: Out<'_, c_uint>,
        pending: Out<'_, c_uint>,
        failed: Out<'_, c_uint>,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let rows = supported(device.gpu()?.remapped_rows.as_ref())?;
        put(corrected, rows.corrected)?;
        put(uncorrected, rows.uncorrected)?;
        put_bool(pending, rows.pending)?;
        put_bool(failed, rows.failed)
    }

    fn nvmlDeviceGetViolationStatus(
        device: nvmlDevice_t,
        policy: nvmlPerfPolicyType_t,
        time: Out<'_, nvmlViolationTime_t>,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let found = supported(device.gpu()?.violations.get(&policy))?;
        put(time, nvmlViolationTime_t { referenceTime: found.reference, violationTime: found.violation })
    }

    // Two versions are asked for, and the shorter is where the longer begins.
    fn nvmlDeviceGetGpuFabricInfoV(device: nvmlDevice_t, info: *mut nvmlGpuFabricInfoV_t) {
        let device = Device::begin(SYMBOL, device)?;
        if info.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        // SAFETY: a struct of any version begins with that.
        let asked = unsafe { info.cast::<c_uint>().read() };
        if asked == version::<nvmlGpuFabricInfo_v2_t>(2) {
            let fabric = supported(device.gpu()?.fabric.as_ref())?;
            // SAFETY: our caller says that it is one of version 2.
            unsafe { info.cast::<nvmlGpuFabricInfo_v2_t>().write(fabric_v2(fabric, asked)) };
            return Ok(());
        }
        if asked != version::<nvmlGpuFabricInfo_v3_t>(3) {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let fabric = supported(device.gpu()?.fabric.as_ref())?;
        if fabric.is_old {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        // SAFETY: our caller says that it is one of version 3.
        unsafe {
            info.write(nvmlGpuFabricInfo_v3_t {
                version: asked,
                clusterUuid: fabric.cluster_uuid,
                status: fabric.status,
                cliqueId: fabric.clique_id,
                state: fabric.state,
                healthMask: fabric.health_mask,
                healthSummary: fabric.health_summary,
            });
        }
        Ok(())
    }
}

fn retired(pages: &RetiredPages, cause: nvmlPageRetirementCause_t) -> Result<&[RetiredPage], Code> {
    match cause {
        nvmlPageRetirementCause_enum_NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS => Ok(&pages.single_bit),
        nvmlPageRetirementCause_enum_NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR => Ok(&pages.double_bit),
        _ => Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
    }
}

fn fabric_v2(fabric: &Fabric, version: c_uint) -> nvmlGpuFabricInfo_v2_t {
    nvmlGpuFabricInfo_v2_t {
        version,
        clusterUuid: fabric.cluster_uuid,
        status: fabric.status,
        cliqueId: fabric.clique_id,
        state: fabric.state,
        healthMask: fabric.health_mask,
    }
}
