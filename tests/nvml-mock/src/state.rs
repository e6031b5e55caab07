//! What the library keeps between calls: the configuration as it was last read, how often it was
//! initialised, what calls were counted. And what every call does first.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings::*;

use crate::config::{Config, Gpu, MigDevice, Override};
use crate::file;

/// The variable that names the file.
pub(crate) const CONFIG: &str = "MOCK_NVML_CONFIG";

/// How often a call that hangs looks whether it still should, and a wait whether something happened.
pub(crate) const LOOK: Duration = Duration::from_millis(10);

/// Handles of MIG devices begin here: `0x1000 | gpu << 4 | index`.
const MIG: usize = 0x1000;

pub(crate) type Code = nvmlReturn_t;
pub(crate) type Answer = Result<(), Code>;

#[derive(Default)]
struct State {
    inits: u32,
    started: Option<Instant>,
    file: Option<PathBuf>,
    stamp: Option<Stamp>,
    /// None where the file is wrong.
    config: Option<Arc<Config>>,
    /// How many calls each override has seen.
    calls: Option<HashMap<Override, u64>>,
}

/// What tells one content of a file from the next: when it was written, how long it is, and, as it is
/// replaced and not rewritten, its inode.
#[derive(PartialEq, Eq)]
struct Stamp {
    seconds: i64,
    nanoseconds: i64,
    size: u64,
    inode: u64,
}

static STATE: Mutex<State> =
    Mutex::new(State { inits: 0, started: None, file: None, stamp: None, config: None, calls: None });

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The configuration as the file says now.
    fn current(&mut self) -> Result<Arc<Config>, Code> {
        let path = self.file.as_ref().ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)?;
        // Looked at before it is read: what is written in between is seen by the next call.
        let stamp = stamp(path);
        if stamp.is_none() || stamp != self.stamp {
            self.config =
                match fs::read_to_string(path).map_err(|error| error.to_string()).and_then(|s| file::parse(&s)) {
                    Ok(config) => Some(Arc::new(config)),
                    Err(error) => {
                        say(&format!("{}: {error}", path.display()));
                        None
                    }
                };
            self.stamp = stamp;
            // An override that goes and comes back counts from the beginning.
            let config = self.config.as_deref();
            let known = |entry: &Override| config.is_some_and(|config| config.overrides.contains(entry));
            self.calls.get_or_insert_default().retain(|entry, _| known(entry));
        }
        self.config.clone().ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)
    }

    /// The first override that holds for this call. All that could are counted.
    fn overriding(&mut self, config: &Config, symbol: &str, gpu: Option<u32>) -> Option<Override> {
        let calls = self.calls.get_or_insert_default();
        let mut found = None;
        for entry in &config.overrides {
            let named = entry.symbol == symbol || entry.symbol == "*";
            if !named || (entry.gpu.is_some() && entry.gpu != gpu) {
                continue;
            }
            let count = calls.entry(entry.clone()).or_default();
            *count += 1;
            let past = count.checked_sub(entry.after_calls).filter(|past| *past > 0);
            if past.is_some_and(|past| entry.calls.is_none_or(|calls| past <= calls)) {
                found = found.or_else(|| Some(entry.clone()));
            }
        }
        found
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = fs::metadata(path).ok()?;
    Some(Stamp { seconds: meta.mtime(), nanoseconds: meta.mtime_nsec(), size: meta.size(), inode: meta.ino() })
}

fn say(line: &str) {
    eprintln!("mock libnvidia-ml.so: {line}");
}

/// `$MOCK_NVML_CONFIG`, or the file of this library's own name that ends in .toml.
fn find() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(CONFIG) {
        return Some(path.into());
    }
    let here = find as *const () as usize;
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    // start-end permissions offset device inode path
    let path = maps.lines().find_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        range.contains(&here).then(|| line.find('/').map(|at| PathBuf::from(&line[at..])))?
    })?;
    Some(path.with_extension("toml")).filter(|path| path.is_file())
}

/// `nvmlInit_v2` and `nvmlInitWithFlags`.
pub(crate) fn init(symbol: &str) -> Answer {
    let mut state = lock();
    if state.inits == 0 {
        state.file = find();
        state.stamp = None;
    }
    let Some(path) = state.file.clone() else {
        say(&format!("a mock, and {CONFIG} is not set"));
        return Err(nvmlReturn_enum_NVML_ERROR_UNKNOWN);
    };
    let config = state.current()?;
    if !config.quiet {
        say(&format!("this is a mock: no GPU is behind what it says. {} does", path.display()));
    }
    let entry = state.overriding(&config, symbol, None);
    drop(state);
    let config = carry_out(entry, config)?;
    if config.init != 0 {
        return Err(config.init);
    }
    let mut state = lock();
    state.inits += 1;
    state.started.get_or_insert_with(Instant::now);
    Ok(())
}

/// `nvmlShutdown`.
pub(crate) fn shutdown(symbol: &str) -> Answer {
    begin(symbol, None)?;
    let mut state = lock();
    state.inits = state.inits.checked_sub(1).ok_or(nvmlReturn_enum_NVML_ERROR_UNINITIALIZED)?;
    Ok(())
}

/// What every call does first: refuse where the library is not initialised, and what an override says.
/// `gpu` is the one that the call names.
pub(crate) fn begin(symbol: &str, gpu: Option<u32>) -> Result<Arc<Config>, Code> {
    let mut state = lock();
    if state.inits == 0 {
        return Err(nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
    }
    let config = state.current()?;
    let entry = state.overriding(&config, symbol, gpu);
    // Other threads must not wait for one that is delayed or hangs.
    drop(state);
    carry_out(entry, config)
}

fn carry_out(entry: Option<Override>, mut config: Arc<Config>) -> Result<Arc<Config>, Code> {
    let Some(entry) = entry else { return Ok(config) };
    if entry.delay_ms > 0 {
        thread::sleep(Duration::from_millis(entry.delay_ms));
        config = lock().current()?;
    }
    if entry.crash {
        std::process::abort();
    }
    while entry.hang && config.overrides.contains(&entry) {
        thread::sleep(LOOK);
        // In a file that is wrong nothing says that the call may go on.
        if let Ok(now) = lock().current() {
            config = now;
        }
    }
    entry.return_code.map_or(Ok(config), Err)
}

/// What a handle names.
pub(crate) struct Device {
    pub(crate) config: Arc<Config>,
    index: usize,
    mig: Option<usize>,
}

impl Device {
    /// Begins a call that names a device by its handle.
    pub(crate) fn begin(symbol: &str, handle: nvmlDevice_t) -> Result<Self, Code> {
        let (index, mig) = match handle as usize {
            0 => return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
            handle if handle < MIG => (handle - 1, None),
            handle => ((handle - MIG) >> 4, Some(handle & 0xf)),
        };
        let gpu = u32::try_from(index).map_err(|_| nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
        let config = begin(symbol, Some(gpu))?;
        let lost = config.gpus.get(index).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?.lost;
        let device = Self { config, index, mig };
        if lost {
            return Err(nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
        }
        if mig.is_some() && device.mig().is_none() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        Ok(device)
    }

    /// The GPU, or that of the MIG device.
    pub(crate) fn parent(&self) -> &Gpu {
        &self.config.gpus[self.index]
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// The GPU, for what a MIG device does not have.
    pub(crate) fn gpu(&self) -> Result<&Gpu, Code> {
        if self.mig.is_none() { Ok(self.parent()) } else { Err(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED) }
    }

    /// The MIG device, if it is one.
    pub(crate) fn mig(&self) -> Option<&MigDevice> {
        let index = self.mig?;
        let devices = self.parent().mig.as_ref().filter(|mig| mig.enabled).map(|mig| mig.devices.as_slice());
        devices.unwrap_or_default().iter().find(|device| usize::try_from(device.index) == Ok(index))
    }
}

/// The handle of a GPU.
pub(crate) fn handle(index: usize) -> nvmlDevice_t {
    (index + 1) as nvmlDevice_t
}

/// The handle of a MIG device.
pub(crate) fn mig_handle(gpu: usize, index: u32) -> nvmlDevice_t {
    (MIG | gpu << 4 | index as usize) as nvmlDevice_t
}

/// The configuration as it is, where the library is initialised; no call is counted.
pub(crate) fn peek() -> Result<Arc<Config>, Code> {
    let mut state = lock();
    if state.inits == 0 {
        return Err(nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
    }
    state.current()
}

/// How long ago the library was first initialised.
pub(crate) fn age() -> Duration {
    lock().started.map_or(Duration::ZERO, |started| started.elapsed())
}
