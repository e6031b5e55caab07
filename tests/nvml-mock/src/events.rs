//! Event sets: XIDs and the like, to whoever registered for them.
//!
//! An event of the configuration happens once in the life of a process, when its time has come and a
//! set is registered for it: all such sets get it. Until then it waits, so a test need not hit the
//! moment; a set that is made later does not hear of it again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{c_uint, c_ulonglong};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings::*;

use crate::config::{Config, Event};
use crate::glue::{Out, put, supported};
use crate::state::{self, Device, LOOK, handle};

#[derive(Default)]
struct Sets {
    /// The last handle that was given out. None is given twice.
    last: usize,
    sets: BTreeMap<usize, Set>,
    happened: BTreeSet<u64>,
}

#[derive(Default)]
struct Set {
    /// GPUs, and the types of events that were asked for.
    registered: Vec<(usize, u64)>,
    /// Bounded by the events of the configuration: each comes once.
    waiting: VecDeque<Event>,
}

static SETS: Mutex<Sets> = Mutex::new(Sets { last: 0, sets: BTreeMap::new(), happened: BTreeSet::new() });

fn lock() -> MutexGuard<'static, Sets> {
    SETS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Set {
    fn is_for(&self, event: &Event) -> bool {
        let wants = |(gpu, kinds): &(usize, u64)| u32::try_from(*gpu) == Ok(event.gpu) && kinds & event.kind != 0;
        self.registered.iter().any(wants)
    }
}

impl Sets {
    /// Lets happen what is due `age` after the first init.
    fn happen(&mut self, config: &Config, age: Duration) {
        for event in config.events.iter().filter(|event| age >= Duration::from_millis(event.after_ms)) {
            if self.happened.contains(&event.id) {
                continue;
            }
            for set in self.sets.values_mut().filter(|set| set.is_for(event)) {
                set.waiting.push_back(event.clone());
                self.happened.insert(event.id);
            }
        }
    }
}

exports! {
    fn nvmlEventSetCreate(set: Out<'_, nvmlEventSet_t>) {
        state::begin(SYMBOL, None)?;
        let mut sets = lock();
        sets.last += 1;
        let new = sets.last;
        sets.sets.insert(new, Set::default());
        put(set, new as nvmlEventSet_t)
    }

    fn nvmlEventSetFree(set: nvmlEventSet_t) {
        state::begin(SYMBOL, None)?;
        lock().sets.remove(&(set as usize)).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        Ok(())
    }

    fn nvmlDeviceGetSupportedEventTypes(device: nvmlDevice_t, kinds: Out<'_, c_ulonglong>) {
        put(kinds, supported(Device::begin(SYMBOL, device)?.gpu()?.supported_events)?)
    }

    fn nvmlDeviceRegisterEvents(device: nvmlDevice_t, kinds: c_ulonglong, set: nvmlEventSet_t) {
        let device = Device::begin(SYMBOL, device)?;
        if kinds & !supported(device.gpu()?.supported_events)? != 0 {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED);
        }
        let mut sets = lock();
        let set = sets.sets.get_mut(&(set as usize)).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        set.registered.push((device.index(), kinds));
        Ok(())
    }

    fn nvmlEventSetWait_v2(set: nvmlEventSet_t, data: Out<'_, nvmlEventData_t>, timeout_ms: c_uint) {
        state::begin(SYMBOL, None)?;
        let deadline = Instant::now() + Duration::from_millis(timeout_ms.into());
        loop {
            // A set hears of a file that changes while it waits.
            let config = state::peek()?;
            let mut sets = lock();
            sets.happen(&config, state::age());
            let set = sets.sets.get_mut(&(set as usize)).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
            if let Some(event) = set.waiting.pop_front() {
                return put(data, nvmlEventData_t {
                    device: handle(event.gpu as usize),
                    eventType: event.kind,
                    eventData: event.data,
                    gpuInstanceId: event.gpu_instance.unwrap_or(u32::MAX),
                    computeInstanceId: event.compute_instance.unwrap_or(u32::MAX),
                });
            }
            if set.registered.iter().any(|(gpu, _)| config.gpus.get(*gpu).is_none_or(|gpu| gpu.lost)) {
                return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
            }
            drop(sets);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(nvmlReturn_enum_NVML_ERROR_TIMEOUT);
            }
            thread::sleep(left.min(LOOK));
        }
    }
}
