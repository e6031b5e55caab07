//! GPM: metrics over the time between two samples, on Hopper and newer.
//!
//! A metric is what the configuration said when the later sample was taken.

use std::collections::BTreeMap;
use std::ffi::c_uint;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvml_wrapper_sys::bindings::*;

use crate::config::Gpm;
use crate::glue::{Out, put, supported};
use crate::state::{self, Code, Device};

#[derive(Default)]
struct Samples {
    /// The last handle that was given out. None is given twice.
    last: usize,
    /// Empty until one is taken.
    samples: BTreeMap<usize, Option<Sample>>,
}

#[derive(Clone)]
struct Sample {
    gpu: usize,
    gpu_instance: Option<u32>,
    metrics: BTreeMap<u32, f64>,
}

static SAMPLES: Mutex<Samples> = Mutex::new(Samples { last: 0, samples: BTreeMap::new() });

fn lock() -> MutexGuard<'static, Samples> {
    SAMPLES.lock().unwrap_or_else(PoisonError::into_inner)
}

exports! {
    fn nvmlGpmQueryDeviceSupport(device: nvmlDevice_t, support: Option<&mut nvmlGpmSupport_t>) {
        let device = Device::begin(SYMBOL, device)?;
        let support = support.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        if support.version != NVML_GPM_SUPPORT_VERSION {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        support.isSupportedDevice = supported(device.gpu()?.gpm.as_ref())?.supported.into();
        Ok(())
    }

    fn nvmlGpmSampleAlloc(sample: Out<'_, nvmlGpmSample_t>) {
        state::begin(SYMBOL, None)?;
        let mut samples = lock();
        samples.last += 1;
        let new = samples.last;
        samples.samples.insert(new, None);
        put(sample, new as nvmlGpmSample_t)
    }

    fn nvmlGpmSampleFree(sample: nvmlGpmSample_t) {
        state::begin(SYMBOL, None)?;
        lock().samples.remove(&(sample as usize)).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        Ok(())
    }

    fn nvmlGpmSampleGet(device: nvmlDevice_t, sample: nvmlGpmSample_t) {
        let device = Device::begin(SYMBOL, device)?;
        let metrics = working(&device)?.metrics.clone();
        take(sample, Sample { gpu: device.index(), gpu_instance: None, metrics })
    }

    fn nvmlGpmMigSampleGet(device: nvmlDevice_t, gpu_instance: c_uint, sample: nvmlGpmSample_t) {
        let device = Device::begin(SYMBOL, device)?;
        let metrics = working(&device)?.instances.get(&gpu_instance);
        let metrics = metrics.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        let metrics = metrics.iter().map(|(id, value)| (id.0, *value)).collect();
        take(sample, Sample { gpu: device.index(), gpu_instance: Some(gpu_instance), metrics })
    }

    // The header's array grows with its versions: only what the caller counts is touched.
    fn nvmlGpmMetricsGet(request: *mut nvmlGpmMetricsGet_t) {
        state::peek()?;
        if request.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        // SAFETY: our caller says that it is a request, whose words before the array are set.
        let (version, count, first, second) =
            unsafe { ((*request).version, (*request).numMetrics, (*request).sample1, (*request).sample2) };
        if version != NVML_GPM_METRICS_GET_VERSION {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let (first, second) = (taken(first)?, taken(second)?);
        if (first.gpu, first.gpu_instance) != (second.gpu, second.gpu_instance) {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        state::begin(SYMBOL, u32::try_from(second.gpu).ok())?;
        // SAFETY: as above; a place is no reference, so the array may be shorter than ours.
        let metrics = unsafe { &raw mut (*request).metrics }.cast::<nvmlGpmMetric_t>();
        for index in 0..count as usize {
            // SAFETY: our caller has `count` of them, with their ids set.
            let id = unsafe { (*metrics.add(index)).metricId };
            let value = second.metrics.get(&id);
            let nothing = ptr::null_mut();
            let metric = nvmlGpmMetric_t {
                metricId: id,
                nvmlReturn: supported(value).err().unwrap_or(nvmlReturn_enum_NVML_SUCCESS),
                value: value.copied().unwrap_or(f64::NAN),
                metricInfo: nvmlGpmMetric_t__bindgen_ty_1 { shortName: nothing, longName: nothing, unit: nothing },
            };
            // SAFETY: as above.
            unsafe { metrics.add(index).write(metric) };
        }
        Ok(())
    }
}

fn working(device: &Device) -> Result<&Gpm, Code> {
    supported(device.gpu()?.gpm.as_ref().filter(|gpm| gpm.supported))
}

/// Fills a sample that was allocated.
fn take(handle: nvmlGpmSample_t, sample: Sample) -> state::Answer {
    let mut samples = lock();
    let place = samples.samples.get_mut(&(handle as usize)).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
    *place = Some(sample);
    Ok(())
}

/// What was filled in.
fn taken(handle: nvmlGpmSample_t) -> Result<Sample, Code> {
    lock().samples.get(&(handle as usize)).cloned().flatten().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)
}
