//! The errors (XIDs) that the driver reports of GPUs: heard from NVML's events and from the kernel's log, kept for
//! this boot.
//!
//! NVML tells of what happens while this agent listens; the kernel's log has what came before, and what
//! happens while NVML is dead, and takes a right to be read (`gpu.kmsg`). What was heard is stored: a restart
//! neither forgets a fatal error nor raises one again that was cleared by a reboot.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_core::gpu::xid::{self, Event, Facts, Outstanding, Record};
use darter_core::gpu::{PciAddress, Time};
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::{Device, Nvml};
use rustix::time::{ClockId, clock_gettime};
use tracing::{debug, info, warn};

use super::calls::Calls;
use super::lock;
use crate::config;
use crate::files;
use crate::log::chain;

/// How long one wait for an event takes at most: the end of a session waits for it.
const WAIT: Duration = Duration::from_secs(1);
/// Waits that fail in a row before nobody listens any more until NVML is started again.
const FAILURES_MAX: u32 = 10;
/// A record of the kernel's log has 1 KiB, with its dictionary 8.
const RECORD_MAX: usize = 8192;

/// What was heard.
#[derive(Debug)]
pub(super) struct Xids {
    record: Mutex<Record>,
    policy: xid::Policy,
    /// Codes that are fatal, the operator's own included: each has a series before it comes.
    fatal: Vec<u32>,
    file: PathBuf,
    /// Somebody listens to NVML, or did until its session ended: that nothing was heard means something.
    is_heard: AtomicBool,
    /// And to the kernel.
    is_read: AtomicBool,
}

/// One code of one GPU.
pub(super) struct Count {
    pub(super) xid: String,
    pub(super) times: u64,
    /// Seconds since 1970.
    pub(super) last: Option<f64>,
}

impl Xids {
    /// What an earlier agent stored in this boot.
    pub(super) fn open(settings: &config::Gpu, data: &Path) -> Self {
        let boot = boot_id();
        let file = data.join("xids.json");
        let stored = stored(&file);
        let record = match stored {
            Some(stored) => Record::restore(stored, &boot),
            None => Record::new(boot),
        };
        let policy = settings.xids();
        let known = xid::catalogue().into_iter().map(|entry| entry.xid);
        let known = known.chain(settings.xid_fatal.iter().copied());
        let fatal = known.filter(|xid| policy.worst(*xid) == xid::Verdict::Fatal).collect();
        Self {
            record: Mutex::new(record),
            policy,
            fatal,
            file,
            is_heard: AtomicBool::new(false),
            is_read: AtomicBool::new(false),
        }
    }

    /// Notes an error, and says so if it is new.
    fn note(&self, event: &Event) {
        let times = {
            let mut record = lock(&self.record);
            if !record.note(event, &self.policy) {
                return;
            }
            let known = record.noted().iter().find(|noted| (noted.pci, noted.xid) == (event.pci, event.xid));
            // It is gone again where there are too many that are worse.
            known.map_or(1, |noted| noted.count)
        };
        // A GPU that says the same for hours says it in a few lines.
        if times.is_power_of_two() {
            let means = self.policy.worst(event.xid);
            warn!(pci = %event.pci, xid = event.xid, ?means, times, "the driver reports an error of a GPU");
        }
        if let Err(error) = self.store() {
            warn!(file = %self.file.display(), error = %chain(&error), "an error of a GPU is not stored: a restart forgets it");
        }
    }

    fn store(&self) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(&*lock(&self.record))?;
        files::replace(&self.file, &text)
    }

    /// Whether a GPU had an error in this boot.
    pub(super) fn knows(&self, pci: PciAddress) -> bool {
        lock(&self.record).noted().iter().any(|noted| noted.pci == pci)
    }

    /// What came until now stands no more against a GPU, or against any. What did stand.
    pub(super) fn clear(&self, pci: Option<PciAddress>) -> std::io::Result<Vec<Outstanding>> {
        let stood = {
            let mut record = lock(&self.record);
            let mut stood = record.outstanding(&self.policy, |_| Facts::default());
            stood.retain(|one| pci.is_none_or(|pci| one.pci == pci));
            record.clear(since_boot(), pci);
            stood
        };
        for Outstanding { pci, xid, .. } in &stood {
            info!(%pci, xid, "the operator says that this GPU is well again");
        }
        self.store().map(|()| stood)
    }

    /// Whether anybody listens.
    fn hears(&self) -> bool {
        self.is_heard.load(Ordering::Relaxed) || self.is_read.load(Ordering::Relaxed)
    }

    /// What stands against GPUs; nothing where nobody listens. `known` of each: what an error depends on.
    pub(super) fn outstanding(&self, known: &BTreeMap<PciAddress, Facts>) -> Option<Vec<Outstanding>> {
        let facts = |pci| known.get(&pci).copied().unwrap_or_default();
        let record = lock(&self.record);
        let is_heard = self.hears() || !record.noted().is_empty();
        is_heard.then(|| record.outstanding(&self.policy, facts))
    }

    /// Of one GPU: each code with how often it came. Fatal codes that never came with 0 times, so that their
    /// first one is seen as a rise.
    pub(super) fn counts(&self, pci: PciAddress) -> Vec<Count> {
        if !self.hears() {
            return Vec::new();
        }
        let mut counts: BTreeMap<_, _> = self.fatal.iter().map(|xid| (*xid, (0, None))).collect();
        let (now, booted) = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), since_boot());
        for noted in lock(&self.record).noted().iter().filter(|noted| noted.pci == pci) {
            let at = now.saturating_sub(booted.since(noted.last)).as_secs_f64();
            counts.insert(noted.xid, (noted.count, Some(at)));
        }
        counts.into_iter().map(|(xid, (times, last))| Count { xid: xid.to_string(), times, last }).collect()
    }

    /// The code of the last error of a GPU; 0: none was heard. Nothing where nobody listens.
    pub(super) fn last(&self, pci: PciAddress) -> Option<u32> {
        let record = lock(&self.record);
        let last = record.noted().iter().filter(|noted| noted.pci == pci).max_by_key(|noted| noted.last);
        last.map(|noted| noted.xid).or_else(|| self.hears().then_some(0))
    }

    /// Listens to NVML until told to stop. Never ends in an error: who cannot hear has no events, and says so.
    pub(super) fn listen(&self, nvml: &Nvml, gpus: u32, stop: &AtomicBool, calls: &Calls<'_>) {
        let handle = |index| calls.make("device_handle", || nvml.device_by_index(index)).ok();
        let devices: Vec<_> = (0..gpus).filter_map(handle).collect();
        let set = registered(nvml, &devices, calls);
        self.is_heard.store(set.is_some(), Ordering::Relaxed);
        let Some(mut set) = set else {
            return debug!("no GPU tells of events");
        };
        let mut failures = 0;
        while !stop.load(Ordering::Relaxed) && failures < FAILURES_MAX {
            let most = u32::try_from(WAIT.as_millis()).unwrap_or(u32::MAX);
            match calls.wait("event_wait", WAIT, || set.wait(most)) {
                Ok(event) => {
                    failures = 0;
                    let Some(event) = event else { continue };
                    let Some(XidError::Value(code)) = event.event_data else { continue };
                    let pci = calls.make("pci_info", || event.device.pci_info()).ok();
                    let pci = pci.and_then(|pci| pci.bus_id.parse().ok());
                    let (Some(pci), Ok(xid)) = (pci, u32::try_from(code)) else { continue };
                    self.note(&Event { at: since_boot(), pci, xid, link: None });
                }
                Err(error) => {
                    failures += 1;
                    debug!(%error, "no event of a GPU could be waited for");
                    // It may fail at once, again and again.
                    std::thread::sleep(WAIT);
                    // One that is lost takes the set of all with it: the others are listened to without it.
                    if matches!(error, NvmlError::GpuLost) {
                        let Some(others) = registered(nvml, &devices, calls) else { break };
                        free(std::mem::replace(&mut set, others), calls);
                    }
                }
            }
        }
        free(set, calls);
        if !stop.load(Ordering::Relaxed) {
            self.is_heard.store(false, Ordering::Relaxed);
            warn!(
                "NVML tells of no errors (XIDs) any more until it is started again; the kernel's log does (gpu.kmsg)"
            );
        }
    }

    /// Reads the kernel's log for ever: a read of it cannot be cancelled.
    pub(super) fn read_kernel_log(&self, path: &Path) {
        let mut log = match File::open(path) {
            Ok(log) => log,
            Err(error) => {
                warn!(path = %path.display(), %error, "the kernel's log cannot be read (gpu.kmsg): mount it, with CAP_SYSLOG");
                return;
            }
        };
        self.is_read.store(true, Ordering::Relaxed);
        let mut buffer = vec![0; RECORD_MAX];
        loop {
            match log.read(&mut buffer) {
                // A log has no end; a pipe of a test has.
                Ok(0) => return info!("the kernel's log has ended"),
                Ok(count) => String::from_utf8_lossy(&buffer[..count]).lines().for_each(|line| self.take(line)),
                // Records were overwritten before they were read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe || error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return warn!(%error, "the kernel's log cannot be read on"),
            }
        }
    }

    fn take(&self, record: &str) {
        let Some((at, text)) = xid::kmsg(record) else { return };
        let Some(xid::Line { pci, xid, link }) = xid::parse(text) else { return };
        self.note(&Event { at, pci, xid, link });
    }
}

/// What an earlier agent stored; one that cannot be read is said, as it may have had a fatal error in it.
fn stored(file: &Path) -> Option<Record> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(file = %file.display(), %error, "errors of GPUs that an earlier agent stored cannot be read: they are forgotten");
            return None;
        }
    };
    serde_json::from_slice(&text)
        .inspect_err(|error| {
            warn!(file = %file.display(), %error, "errors of GPUs that an earlier agent stored are no record: they are forgotten");
        })
        .ok()
}

/// A set in which all GPUs are that take part. One that does not takes the set with it: then it is made anew.
fn registered<'n>(nvml: &'n Nvml, devices: &[Device<'n>], calls: &Calls<'_>) -> Option<EventSet<'n>> {
    let mut silent = Vec::new();
    'anew: loop {
        let mut set = calls.make("event_set_create", || nvml.create_event_set()).ok()?;
        for (at, device) in devices.iter().enumerate().filter(|(at, _)| !silent.contains(at)).collect::<Vec<_>>() {
            let register = || device.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error);
            match calls.make("event_register", register) {
                Ok(with) => set = with,
                Err(error) => {
                    debug!(%error, gpu = at, "a GPU tells of no events");
                    silent.push(at);
                    continue 'anew;
                }
            }
        }
        return (silent.len() < devices.len()).then_some(set);
    }
}

/// Dropping it would make the same call, and nobody would know how long that takes.
fn free(set: EventSet<'_>, calls: &Calls<'_>) {
    if let Err(error) = calls.make("event_set_free", || set.release_events()) {
        debug!(%error, "NVML keeps a set of events");
    }
}

/// The kernel's name of this boot; empty where it has none.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The time since the boot, as the kernel's log has it.
fn since_boot() -> Time {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = Duration::from_secs(u64::try_from(now.tv_sec).unwrap_or(0));
    let part = Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0));
    Time::ZERO + seconds + part
}
