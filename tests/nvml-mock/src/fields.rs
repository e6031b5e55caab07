//! GetFieldValues: many values in one call, each with a return code of its own.
//!
//! What another call answers too follows from the same configuration: both always agree, as in the
//! driver. The rest stands under `fields`.

use std::ffi::c_int;
use std::slice;
use std::time::{SystemTime, UNIX_EPOCH};

use nvml_wrapper_sys::bindings::*;

use crate::config::{EccErrors, FieldKey, FieldValue, Gpu};
use crate::state::{Code, Device};
use crate::telemetry::energy;

exports! {
    fn nvmlDeviceGetFieldValues(device: nvmlDevice_t, count: c_int, values: *mut nvmlFieldValue_t) {
        let device = Device::begin(SYMBOL, device)?;
        let gpu = device.gpu()?;
        let count = usize::try_from(count).map_err(|_| nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if values.is_null() || count == 0 {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        let renumbered = renumbers(device.config.driver_version.as_deref());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        // SAFETY: our caller has so many, and in each the id and the scope are set.
        for entry in unsafe { slice::from_raw_parts_mut(values, count) } {
            let key = FieldKey { id: old_id(entry.fieldId, renumbered), scope: entry.scopeId };
            entry.timestamp = i64::try_from(now).unwrap_or(i64::MAX);
            entry.latencyUsec = 0;
            let found = gpu.fields.get(&key).copied().map_or_else(|| derived(&device, gpu, key), value);
            // An error leaves type and value as they came.
            entry.nvmlReturn = match found {
                Ok((kind, value)) => {
                    entry.valueType = kind;
                    entry.value = value;
                    nvmlReturn_enum_NVML_SUCCESS
                }
                Err(code) => code,
            };
        }
        Ok(())
    }
}

/// Whether a driver numbers fields 251 to 273 anew: from 580.82.
fn renumbers(driver: Option<&str>) -> bool {
    let mut parts = driver.unwrap_or_default().split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (580, 82)
}

/// What drivers before 580.82 call the field: there 256 to 273 come after 251 to 255.
fn old_id(id: u32, renumbered: bool) -> u32 {
    match id {
        269..=273 if renumbered => id - 18,
        251..=268 if renumbered => id + 5,
        _ => id,
    }
}

fn value(value: FieldValue) -> Result<(nvmlValueType_t, nvmlValue_t), Code> {
    Ok(match value {
        FieldValue::F64(value) => (nvmlValueType_enum_NVML_VALUE_TYPE_DOUBLE, nvmlValue_t { dVal: value }),
        FieldValue::U32(value) => {
            (nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT, nvmlValue_t { ullVal: value.into() })
        }
        FieldValue::U64(value) => {
            (nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, nvmlValue_t { ullVal: value })
        }
        FieldValue::I64(value) => (nvmlValueType_enum_NVML_VALUE_TYPE_SIGNED_LONG_LONG, nvmlValue_t { sllVal: value }),
        FieldValue::I32(value) => {
            let bits = value.cast_unsigned().into();
            (nvmlValueType_enum_NVML_VALUE_TYPE_SIGNED_INT, nvmlValue_t { ullVal: bits })
        }
        FieldValue::U16(value) => {
            (nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_SHORT, nvmlValue_t { ullVal: value.into() })
        }
        FieldValue::Code(code) => return Err(code),
    })
}

/// A value that another call has too.
fn derived(device: &Device, gpu: &Gpu, key: FieldKey) -> Result<(nvmlValueType_t, nvmlValue_t), Code> {
    let ecc = gpu.ecc.as_ref();
    let corrected = |pick: fn(&EccErrors) -> u64| ecc.and_then(|ecc| ecc.corrected.as_ref()).map(pick);
    let uncorrected = |pick: fn(&EccErrors) -> u64| ecc.and_then(|ecc| ecc.uncorrected.as_ref()).map(pick);
    let retired = gpu.retired_pages.as_ref();
    let rows = gpu.remapped_rows.as_ref();
    let length = |items: usize| u32::try_from(items).unwrap_or(u32::MAX);
    let long = |value: Option<u64>| value.map(FieldValue::U64);
    let short = |value: Option<u32>| value.map(FieldValue::U32);
    let found = match (key.id, key.scope) {
        (1, 0) => short(ecc.map(|ecc| ecc.enabled.into())),
        (2, 0) => short(ecc.map(|ecc| ecc.pending.unwrap_or(ecc.enabled).into())),
        (3, 0) => long(corrected(|errors| errors.volatile)),
        (4, 0) => long(uncorrected(|errors| errors.volatile)),
        (5, 0) => long(corrected(|errors| errors.aggregate)),
        (6, 0) => long(uncorrected(|errors| errors.aggregate)),
        (29, 0) => short(retired.map(|pages| length(pages.single_bit.len()))),
        (30, 0) => short(retired.map(|pages| length(pages.double_bit.len()))),
        (31, 0) => short(retired.map(|pages| pages.pending.into())),
        (83, 0) => long(energy(device.index(), gpu)),
        (94, 0) => short(gpu.pcie.as_ref().and_then(|pcie| pcie.replays)),
        (142, 0) => short(rows.map(|rows| rows.corrected)),
        (143, 0) => short(rows.map(|rows| rows.uncorrected)),
        (144, 0) => short(rows.map(|rows| rows.pending.into())),
        (145, 0) => short(rows.map(|rows| rows.failed.into())),
        _ => None,
    };
    found.map_or(Err(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_251_to_273_are_numbered_by_the_driver() {
        for (driver, renumbered) in [
            (Some("570.148.08"), false),
            (Some("580.65.06"), false),
            (Some("580.82.07"), true),
            (Some("580.105.08"), true),
            (Some("590.48.01"), true),
            (None, false),
        ] {
            assert_eq!(renumbers(driver), renumbered, "{driver:?}");
        }
        let old: Vec<_> = (250..=274).map(|id| old_id(id, true)).collect();
        let expected: Vec<_> = [250].into_iter().chain(256..=273).chain(251..=255).chain([274]).collect();
        assert_eq!(old, expected);
        assert!((250..=274).all(|id| old_id(id, false) == id));
    }
}
