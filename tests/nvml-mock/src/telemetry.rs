//! What changes all the time: memory, utilisation, temperature, power, clocks, PCIe.

use std::collections::BTreeMap;
use std::ffi::{c_uint, c_ulonglong};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nvml_wrapper_sys::bindings::*;

use crate::config::{Clocks, Gpu};
use crate::glue::{Out, put, put_list, supported};
use crate::state::{Answer, Device};

/// How long the window of encoders and decoders is, in us.
const WINDOW: c_uint = 167_000;

exports! {
    fn nvmlDeviceGetMemoryInfo_v2(device: nvmlDevice_t, info: Option<&mut nvmlMemory_v2_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let info = info.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if info.version != version::<nvmlMemory_v2_t>(2) {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let memory = device.mig().map_or_else(|| device.parent().memory.as_ref(), |mig| mig.memory.as_ref());
        let memory = supported(memory)?;
        info.total = memory.total;
        info.reserved = memory.reserved;
        info.used = memory.used;
        info.free = memory.total.saturating_sub(memory.reserved).saturating_sub(memory.used);
        Ok(())
    }

    fn nvmlDeviceGetUtilizationRates(device: nvmlDevice_t, rates: Out<'_, nvmlUtilization_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let utilization = supported(device.gpu()?.utilization.as_ref())?;
        put(rates, nvmlUtilization_t { gpu: utilization.gpu, memory: utilization.memory })
    }

    fn nvmlDeviceGetEncoderUtilization(device: nvmlDevice_t, percent: Out<'_, c_uint>, window: Out<'_, c_uint>) {
        put(percent, supported(Device::begin(SYMBOL, device)?.gpu()?.encoder)?)?;
        put(window, WINDOW)
    }

    fn nvmlDeviceGetDecoderUtilization(device: nvmlDevice_t, percent: Out<'_, c_uint>, window: Out<'_, c_uint>) {
        put(percent, supported(Device::begin(SYMBOL, device)?.gpu()?.decoder)?)?;
        put(window, WINDOW)
    }

    fn nvmlDeviceGetTemperature(device: nvmlDevice_t, sensor: nvmlTemperatureSensors_t, celsius: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        if sensor != nvmlTemperatureSensors_enum_NVML_TEMPERATURE_GPU {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        put(celsius, supported(device.gpu()?.temperature)?)
    }

    fn nvmlDeviceGetMarginTemperature(device: nvmlDevice_t, margin: Option<&mut nvmlMarginTemperature_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let margin = margin.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if margin.version != version::<nvmlMarginTemperature_t>(1) {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        margin.marginTemperature = supported(device.gpu()?.temperature_margin)?;
        Ok(())
    }

    fn nvmlDeviceGetPowerUsage(device: nvmlDevice_t, milliwatts: Out<'_, c_uint>) {
        put(milliwatts, supported(Device::begin(SYMBOL, device)?.gpu()?.power)?)
    }

    fn nvmlDeviceGetEnforcedPowerLimit(device: nvmlDevice_t, milliwatts: Out<'_, c_uint>) {
        put(milliwatts, supported(Device::begin(SYMBOL, device)?.gpu()?.power_limit)?)
    }

    fn nvmlDeviceGetTotalEnergyConsumption(device: nvmlDevice_t, millijoules: Out<'_, c_ulonglong>) {
        let device = Device::begin(SYMBOL, device)?;
        put(millijoules, supported(energy(device.index(), device.gpu()?))?)
    }

    fn nvmlDeviceGetClockInfo(device: nvmlDevice_t, domain: nvmlClockType_t, megahertz: Out<'_, c_uint>) {
        put_clock(&Device::begin(SYMBOL, device)?.gpu()?.clocks, domain, megahertz)
    }

    fn nvmlDeviceGetMaxClockInfo(device: nvmlDevice_t, domain: nvmlClockType_t, megahertz: Out<'_, c_uint>) {
        put_clock(&Device::begin(SYMBOL, device)?.gpu()?.max_clocks, domain, megahertz)
    }

    fn nvmlDeviceGetPerformanceState(device: nvmlDevice_t, state: Out<'_, nvmlPstates_t>) {
        put(state, supported(Device::begin(SYMBOL, device)?.gpu()?.performance_state)?)
    }

    fn nvmlDeviceGetCurrentClocksThrottleReasons(device: nvmlDevice_t, reasons: Out<'_, c_ulonglong>) {
        put(reasons, supported(Device::begin(SYMBOL, device)?.gpu()?.event_reasons)?)
    }

    fn nvmlDeviceGetCurrentClocksEventReasons(device: nvmlDevice_t, reasons: Out<'_, c_ulonglong>) {
        put(reasons, supported(Device::begin(SYMBOL, device)?.gpu()?.event_reasons)?)
    }

    fn nvmlDeviceGetPcieThroughput(device: nvmlDevice_t, counter: nvmlPcieUtilCounter_t, rate: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        let pcie = supported(device.gpu()?.pcie.as_ref())?;
        let value = match counter {
            nvmlPcieUtilCounter_enum_NVML_PCIE_UTIL_TX_BYTES => pcie.tx,
            nvmlPcieUtilCounter_enum_NVML_PCIE_UTIL_RX_BYTES => pcie.rx,
            _ => return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
        };
        put(rate, supported(value)?)
    }

    fn nvmlDeviceGetPcieReplayCounter(device: nvmlDevice_t, count: Out<'_, c_uint>) {
        let device = Device::begin(SYMBOL, device)?;
        put(count, supported(device.gpu()?.pcie.as_ref().and_then(|pcie| pcie.replays))?)
    }

    // Those that are newer than `last_seen`; NOT_FOUND if none is.
    fn nvmlDeviceGetSamples(
        device: nvmlDevice_t,
        kind: nvmlSamplingType_t,
        last_seen: c_ulonglong,
        value_type: Out<'_, nvmlValueType_t>,
        count: Option<&mut c_uint>,
        samples: *mut nvmlSample_t,
    ) {
        let device = Device::begin(SYMBOL, device)?;
        let known = supported(device.gpu()?.samples.get(&kind))?;
        let newer: Vec<_> = known.iter().filter(|sample| sample.timestamp > last_seen).collect();
        if newer.is_empty() {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_FOUND);
        }
        put(value_type, nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT)?;
        if samples.is_null() {
            // Asks for their number, which is no error here.
            let count = count.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
            *count = c_uint::try_from(newer.len()).map_err(|_| nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
            return Ok(());
        }
        let items: Vec<_> = newer
            .into_iter()
            .map(|sample| nvmlSample_t { timeStamp: sample.timestamp, sampleValue: value(sample.value) })
            .collect();
        // SAFETY: as our caller says.
        unsafe { put_list(count, samples, &items) }
    }
}

/// When each GPU was last asked for its energy, and how much of it had come by then, in nJ.
static ENERGY: Mutex<BTreeMap<usize, (Instant, u128)>> = Mutex::new(BTreeMap::new());

/// The energy of a GPU, in mJ. Where it follows the power, what came since the last question is reckoned
/// with the power of now: whoever changes the power asks before and after.
pub(crate) fn energy(index: usize, gpu: &Gpu) -> Option<u64> {
    let start = gpu.energy?;
    if !gpu.energy_follows_power {
        return Some(start);
    }
    let mut all = ENERGY.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let (last, grown) = all.entry(index).or_insert((now, 0));
    // mW times us are nJ.
    *grown += u128::from(gpu.power.unwrap_or(0)) * now.saturating_duration_since(*last).as_micros();
    *last = now;
    start.checked_add(u64::try_from(*grown / 1_000_000).ok()?)
}

/// What a caller writes into the first word of a struct that has versions.
pub(crate) const fn version<T>(number: u32) -> u32 {
    // No struct of NVML is near 16 MiB.
    #[allow(clippy::cast_possible_truncation)]
    let size = size_of::<T>() as u32;
    size | number << 24
}

/// A union whose bytes past the value are zero.
fn value(value: c_uint) -> nvmlValue_t {
    nvmlValue_t { ullVal: value.into() }
}

fn put_clock(clocks: &Clocks, domain: nvmlClockType_t, megahertz: Out<'_, c_uint>) -> Answer {
    let value = match domain {
        nvmlClockType_enum_NVML_CLOCK_GRAPHICS => clocks.graphics,
        nvmlClockType_enum_NVML_CLOCK_SM => clocks.sm,
        nvmlClockType_enum_NVML_CLOCK_MEM => clocks.memory,
        nvmlClockType_enum_NVML_CLOCK_VIDEO => clocks.video,
        _ => return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
    };
    put(megahertz, supported(value)?)
}
