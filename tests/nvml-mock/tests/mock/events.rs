//! Event sets: who hears of an XID, when, and how long a wait is.

use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{EventSet, Nvml};
use nvml_wrapper_sys::bindings::nvmlEventData_t;

use crate::Mock;

const XIDS: EventTypes = EventTypes::CRITICAL_XID_ERROR;

fn listen<'a>(nvml: &'a Nvml, gpu: u32, kinds: EventTypes) -> EventSet<'a> {
    let set = nvml.create_event_set().unwrap();
    nvml.device_by_index(gpu).unwrap().register_events(kinds, set).map_err(|error| error.error).unwrap()
}

/// The index of the GPU and the XID.
fn heard(set: &EventSet<'_>, timeout_ms: u32) -> Result<(u32, u64), NvmlError> {
    let data = set.wait(timeout_ms)?;
    let Some(XidError::Value(xid)) = data.event_data else { panic!("{data:?}") };
    Ok((data.device.index()?, xid))
}

#[test]
fn a_wait_in_which_nothing_happens_takes_its_time() {
    let (mock, _) = Mock::fixture("h200-idle");
    let nvml = mock.open();
    let set = listen(&nvml, 0, XIDS);
    let begun = Instant::now();
    assert!(matches!(heard(&set, 150), Err(NvmlError::Timeout)));
    assert!(begun.elapsed() >= Duration::from_millis(150));
}

#[test]
fn the_xids_of_the_fixtures_come_when_it_is_their_time() {
    for (fixture, xid) in [("xid-79", 79), ("xid-94", 94), ("xid-63", 63)] {
        let (mock, _) = Mock::fixture(fixture);
        let begun = Instant::now();
        let nvml = mock.open();
        let set = listen(&nvml, 0, XIDS);
        assert_eq!(heard(&set, 20_000).unwrap(), (0, xid));
        assert!(begun.elapsed() >= Duration::from_millis(450));
        assert!(matches!(heard(&set, 20), Err(NvmlError::Timeout)), "once");
    }
}

#[test]
fn an_event_reaches_every_set_that_is_registered_for_it_then_and_no_other() {
    let base = "quiet = true\nbase = 'h100x8'\n";
    let mock = Mock::new(base);
    let nvml = mock.open();
    let (own, same, other) = (listen(&nvml, 2, XIDS), listen(&nvml, 2, XIDS), listen(&nvml, 3, XIDS));
    let ecc = listen(&nvml, 2, EventTypes::DOUBLE_BIT_ECC_ERROR);
    // A set may move to another thread, and is not shared with one.
    let own = thread::scope(|scope| {
        let waiting = scope.spawn(move || (heard(&own, 20_000), own));
        mock.set(&format!("{base}[[events]]\nid = 1\ngpu = 2\ndata = 48\n"));
        let (heard, own) = waiting.join().unwrap();
        assert_eq!(heard.unwrap(), (2, 48));
        own
    });
    assert_eq!(heard(&same, 0).unwrap(), (2, 48));
    for set in [&own, &same, &other, &ecc] {
        assert!(matches!(heard(set, 0), Err(NvmlError::Timeout)));
    }
    let late = listen(&nvml, 2, XIDS);
    assert!(matches!(heard(&late, 0), Err(NvmlError::Timeout)));
    drop((own, same, late));
    // Nobody listens to GPU 2 for XIDs now: the next waits for who does.
    mock.set(&format!("{base}[[events]]\nid = 2\ngpu = 2\ndata = 95\n"));
    assert!(matches!(heard(&other, 0), Err(NvmlError::Timeout)));
    assert_eq!(heard(&listen(&nvml, 2, XIDS), 0).unwrap(), (2, 95));
}

#[test]
fn types_that_nvml_wrapper_does_not_know_and_instances_arrive_raw() {
    let mock = Mock::new(
        "quiet = true\nbase = 'h200-mig'\ngpu = { supported_events = 0x8008 }\n[[events]]\nid = 1\ngpu = 0\n\
         kind = 0x8000\ndata = 2\ngpu_instance = 9\ncompute_instance = 0\n",
    );
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    // SAFETY: handles of this library, and a place for an event; zero is one.
    let data = unsafe {
        let mut set = std::ptr::null_mut();
        assert_eq!(nvml.lib().nvmlEventSetCreate(&raw mut set), 0);
        assert_eq!(nvml.lib().nvmlDeviceRegisterEvents(device.handle(), 0x10, set), 3);
        assert_eq!(nvml.lib().nvmlDeviceRegisterEvents(device.handle(), 0x8000, set), 0);
        let mut data: nvmlEventData_t = std::mem::zeroed();
        assert_eq!(nvml.lib().nvmlEventSetWait_v2(set, &raw mut data, 0), 0);
        assert_eq!(nvml.lib().nvmlEventSetFree(set), 0);
        assert_eq!(nvml.lib().nvmlEventSetFree(set), 2);
        data
    };
    assert_eq!((data.eventType, data.eventData, data.gpuInstanceId, data.computeInstanceId), (0x8000, 2, 9, 0));
}

#[test]
fn a_set_of_a_lost_gpu_tells_what_happened_and_then_that_it_is_lost() {
    let base = "quiet = true\nbase = 'h100x8'\n";
    let mock = Mock::new(base);
    let nvml = mock.open();
    let set = listen(&nvml, 5, XIDS);
    mock.set(&format!("{base}[gpus.5]\nlost = true\n[[events]]\nid = 1\ngpu = 5\ndata = 79\n"));
    let data = set.wait(0).unwrap();
    assert!(matches!(data.event_data, Some(XidError::Value(79))));
    assert!(matches!(data.device.index(), Err(NvmlError::GpuLost)));
    assert!(matches!(set.wait(20_000), Err(NvmlError::GpuLost)));
}

#[test]
fn a_wait_is_one_call_however_long_it_is() {
    let mock = Mock::new(
        "quiet = true\nbase = 'h200-idle'\n[[overrides]]\nsymbol = 'nvmlEventSetWait_v2'\nreturn_code = 999\n\
         after_calls = 2",
    );
    let nvml = mock.open();
    let set = listen(&nvml, 0, XIDS);
    for _ in 0..2 {
        assert!(matches!(set.wait(100), Err(NvmlError::Timeout)));
    }
    assert!(matches!(set.wait(0), Err(NvmlError::Unknown)));
}
