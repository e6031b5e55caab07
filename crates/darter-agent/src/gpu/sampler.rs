//! The thread that asks NVML: starts it, asks in rounds, and starts it again when the driver or a GPU is lost.
//!
//! NVML stays open for the life of the agent: without persistence each start takes seconds and wakes every
//! GPU. What a start finds is a session; its handles are good until something is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use tracing::{debug, info, warn};

use super::calls::{Caller, Calls, Loss};
use super::exposition::number;
use super::read::{Peaks, Profiler};
use super::sample::{Driver, Fast, Gpu, Identity, Round, Snapshot, Versions};
use super::{Shared, Wake, host, library, lock, read, root};
use crate::config::{self, DcgmNames};
use crate::metrics::Metrics;

/// How soon NVML is tried again after it was not there, or lost something; twice as long each time, up to
/// the latter. A driver that a pod installs comes minutes after this agent.
const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// The longest time between two starts of NVML that look for a lost GPU: each wakes all others.
const SEARCH_MAX: Duration = Duration::from_secs(600);
/// How long it takes at most until it is looked whether there are as many GPUs as before; else two of the slow
/// intervals.
const COUNT_EVERY: Duration = Duration::from_secs(60);
/// GPUs of one node. Past this NVML's count is wrong.
const GPUS_MAX: u32 = 64;

/// Asks until told to stop.
pub(super) fn run(shared: &Shared, metrics: &Metrics, orders: &Receiver<Wake>) {
    let mut thread = Thread { shared, metrics, orders, known: BTreeMap::new(), generation: 0, searches: 1 };
    let mut wait = AGAIN.0;
    let mut said = None;
    loop {
        if shared.is_driver_taken() {
            if !matches!(said, Some(Driver::Released)) {
                info!("NVML is not asked while GPU Operator replaces the driver");
            }
            shared.publish(Snapshot { driver: Driver::Released, gpus: thread.unread(), round: None });
            (said, wait) = (Some(Driver::Released), AGAIN.0);
            if thread.stops_within(AGAIN.0) {
                return;
            }
            continue;
        }
        // Not held while this waits: whoever clears it takes the lock too.
        let turned_off = lock(&shared.crashes).has_turned_off();
        if let Some(times) = turned_off {
            shared.publish(Snapshot { driver: Driver::Crashes(times), gpus: Vec::new(), round: None });
            // Whoever says that it is to be asked again is not kept waiting.
            if thread.stops_within(AGAIN.0) {
                return;
            }
            continue;
        }
        // A node without a library writes no file each minute for it.
        if !matches!(said, Some(Driver::NoLibrary(_))) {
            lock(&shared.crashes).begin();
        }
        let started = thread.start();
        if started.is_err() {
            lock(&shared.crashes).end();
        }
        match started {
            Ok(nvml) => {
                said = None;
                let began = Instant::now();
                let ended = thread.session(&nvml);
                lock(&shared.crashes).end();
                if began.elapsed() > AGAIN.1 {
                    wait = AGAIN.0;
                }
                // Dropping it shuts NVML down, which is a call like any other.
                let _ = Calls::new(shared, Caller::Rounds, metrics).make("shutdown", || nvml.shutdown());
                match ended {
                    Ended::Stopped => return,
                    Ended::Released => continue,
                    Ended::Lost => {}
                }
            }
            Err(driver) => {
                if said.as_ref() != Some(&driver) {
                    tell(&driver);
                }
                shared.publish(Snapshot { driver: driver.clone(), gpus: thread.lost(), round: None });
                said = Some(driver);
            }
        }
        if thread.stops_within(wait) {
            return;
        }
        wait = (wait * 2).min(AGAIN.1);
    }
}

/// Once for each news: most nodes have no GPU, and one whose driver is away says so every minute else.
fn tell(driver: &Driver) {
    match driver {
        Driver::NoLibrary(reason) => info!(%reason, "no NVML: this node has no GPU, or its driver is still to come"),
        Driver::Failed(code, reason) => warn!(code, %reason, "NVML does not start"),
        _ => {}
    }
}

struct Thread<'a> {
    shared: &'a Shared,
    metrics: &'a Metrics,
    orders: &'a Receiver<Wake>,
    /// Whom NVML gave at each index, so that a lost one has its name.
    known: BTreeMap<u32, Identity>,
    generation: u64,
    /// How much longer than at first a GPU that is lost is waited for before NVML is started again for it.
    searches: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Stopped,
    /// The driver is to be let go.
    Released,
    /// Handles are of no use any more.
    Lost,
}

impl Thread<'_> {
    fn start(&mut self) -> Result<Nvml, Driver> {
        // The loader runs code of the library too: it may hang as well as any call.
        let calls = Calls::new(self.shared, Caller::Rounds, self.metrics);
        let mut found = Err(Driver::Starting);
        let _ = calls.make("init", || {
            found = library::start(&self.shared.settings);
            Ok::<_, NvmlError>(())
        });
        if found.is_ok() {
            self.generation += 1;
            self.metrics.nvml_init.inc();
        }
        found
    }

    /// True: told to stop. Comes back early where there is something to look at.
    fn stops_within(&self, time: Duration) -> bool {
        matches!(self.orders.recv_timeout(time), Err(RecvTimeoutError::Disconnected))
    }

    /// All that were known, while NVML does not answer.
    fn lost(&self) -> Vec<Gpu> {
        self.unread().into_iter().map(|gpu| Gpu { is_lost: true, ..gpu }).collect()
    }

    /// The same, while nobody asks them.
    fn unread(&self) -> Vec<Gpu> {
        let of = |identity: &Identity| Gpu { identity: identity.clone(), is_lost: false, fast: None, slow: None };
        self.known.values().map(of).collect()
    }

    /// Asks in rounds, until NVML has to be started again.
    fn session(&mut self, nvml: &Nvml) -> Ended {
        let mut calls = Calls::new(self.shared, Caller::Rounds, self.metrics);
        let versions = Versions {
            driver: calls.make("driver_version", || nvml.sys_driver_version()).ok(),
            // Loads libcuda, which a container may not have.
            cuda: calls
                .make("cuda_version", || nvml.sys_cuda_driver_version())
                .ok()
                .map(|version| (cuda_driver_version_major(version), cuda_driver_version_minor(version))),
            generation: self.generation,
        };
        // Looked at before NVML is asked: what comes in between is seen as one that came later.
        let files = self.device_files();
        let Some(count) = self.count(&calls, nvml) else { return Ended::Lost };
        let mut gpus: Vec<Seat<'_>> = (0..count).map(|index| self.seat(&mut calls, nvml, index)).collect();
        info!(gpus = count, driver = versions.driver.as_deref().unwrap_or("unknown"), "NVML answers");
        let (xids, is_over) = (&self.shared.xids, &AtomicBool::new(false));
        std::thread::scope(|scope| {
            let heard = Calls::new(self.shared, Caller::Events, self.metrics);
            let listen = move || xids.listen(nvml, count, is_over, &heard);
            if let Err(error) = std::thread::Builder::new().name("nvml-events".to_owned()).spawn_scoped(scope, listen) {
                warn!(%error, "no thread for NVML's events");
            }
            let ended = self.rounds(nvml, &mut calls, &mut gpus, &versions, files);
            is_over.store(true, Ordering::Relaxed);
            ended
        })
    }

    fn rounds<'n>(
        &mut self,
        nvml: &'n Nvml,
        calls: &mut Calls<'_>,
        seats: &mut [Seat<'n>],
        versions: &Versions,
        files: u32,
    ) -> Ended {
        let (settings, sees_processes) = (&self.shared.settings, self.shared.sight.sees());
        let count = u32::try_from(seats.len()).unwrap_or(u32::MAX);
        let count_every = (settings.slow_interval.0 * 2).min(COUNT_EVERY);
        let (mut slow_at, mut count_at) = (Instant::now(), Instant::now() + count_every);
        // A GPU that is lost may come back after a reset; its handle does not.
        let mut again_at = None;
        loop {
            if self.shared.is_driver_taken() {
                return Ended::Released;
            }
            let began = Instant::now();
            let is_slow = began >= slow_at;
            let is_lost =
                seats.iter_mut().filter_map(|seat| seat.round(calls, is_slow, settings, sees_processes)).max();
            if is_slow {
                slow_at = began + settings.slow_interval.0;
            }
            let round = Round { at: SystemTime::now(), ended: Instant::now(), took: began.elapsed() };
            let gpus = seats.iter().map(|seat| seat.gpu.clone()).collect::<Vec<_>>();
            if gpus.iter().any(|gpu| gpu.is_lost) {
                let later = (settings.slow_interval.0 * 2 * self.searches).min(SEARCH_MAX);
                again_at = again_at.or(Some(began + later));
            }
            let driver = Driver::Running(versions.clone());
            self.shared.publish(Snapshot { driver, gpus, round: Some(round) });
            lock(&self.shared.crashes).end();
            if again_at.is_none() {
                self.searches = 1;
            }
            if is_lost == Some(Loss::Driver) {
                return Ended::Lost;
            }
            if again_at.is_some_and(|at| at <= Instant::now()) {
                self.searches = self.searches.saturating_mul(2);
                return Ended::Lost;
            }
            if began >= count_at {
                count_at = began + count_every;
                if self.count(calls, nvml) != Some(count) {
                    info!(was = count, "the number of GPUs has changed");
                    return Ended::Lost;
                }
                // Who found the GPUs when it was started need not look for more by itself. Once for each that comes:
                // the next session begins with its file.
                let now = self.device_files();
                if now > files.max(count) {
                    info!(files = now, was = files, "a device file of a GPU came: NVML is started again to find it");
                    return Ended::Lost;
                }
            }
            if self.stops_within((began + settings.interval.0).saturating_duration_since(Instant::now())) {
                return Ended::Stopped;
            }
        }
    }

    /// Device files of GPUs on the host; none where they cannot be looked at.
    fn device_files(&self) -> u32 {
        host::device_nodes(&root(&self.shared.settings)).unwrap_or(0)
    }

    /// How many GPUs NVML counts. None at all is no count.
    fn count(&self, calls: &Calls<'_>, nvml: &Nvml) -> Option<u32> {
        match calls.make("device_count", || nvml.device_count()) {
            Ok(0) => {
                debug!("NVML counts no GPU");
                self.shared.publish(Snapshot { driver: Driver::NoGpus, gpus: self.lost(), round: None });
                None
            }
            Ok(count) => Some(count.min(GPUS_MAX)),
            Err(error) => {
                warn!(%error, "NVML does not count its GPUs");
                None
            }
        }
    }

    fn seat<'n>(&mut self, calls: &mut Calls<'_>, nvml: &'n Nvml, index: u32) -> Seat<'n> {
        let device = calls.make("device_handle", || nvml.device_by_index(index));
        let read = device.as_ref().ok().map(|device| {
            let mut gpu = calls.of(index);
            (read::identity(index, device, &mut gpu), gpu.loss.is_some())
        });
        let named = read.filter(|(identity, is_lost)| !identity.uuid.is_empty() && !is_lost);
        let is_lost = named.is_none();
        let identity = match named {
            Some((identity, _)) => self.known.entry(index).insert_entry(identity).get().clone(),
            None => {
                warn!(gpu = index, "NVML counts a GPU that does not answer");
                self.known.get(&index).cloned().unwrap_or_else(|| Identity { index, ..Identity::default() })
            }
        };
        let gpu = Gpu { identity, is_lost, fast: None, slow: None };
        Seat {
            device: device.ok().filter(|_| !is_lost),
            profiler: Profiler::default(),
            peaks: Peaks::default(),
            instances: BTreeMap::new(),
            gpu,
        }
    }
}

/// One GPU in a session.
struct Seat<'n> {
    device: Option<Device<'n>>,
    profiler: Profiler<'n>,
    peaks: Peaks,
    /// Of GPU instances, by their numbers.
    instances: BTreeMap<u32, Profiler<'n>>,
    gpu: Gpu,
}

impl Seat<'_> {
    /// One round of questions; what was lost in it.
    fn round(
        &mut self,
        calls: &mut Calls<'_>,
        is_slow: bool,
        settings: &config::Gpu,
        sees_processes: bool,
    ) -> Option<Loss> {
        let device = self.device.as_ref()?;
        let mut questions = calls.of(self.gpu.identity.index);
        let profile = self.profiler.read(device, &mut questions);
        let cut: BTreeSet<u32> = self.gpu.mig_devices().iter().filter_map(|mig| mig.instance).collect();
        let of = |instance: u32| {
            let profiler = self.instances.entry(instance).or_default();
            Some((instance, profiler.read_instance(device, instance, &mut questions)?))
        };
        let instances = cut.into_iter().filter_map(of).collect();
        let asks_codecs = settings.dcgm_names != DcgmNames::Off;
        let fast = read::fast(device, &mut questions, asks_codecs, &mut self.peaks, profile, instances);
        let asks = is_slow && questions.loss.is_none();
        let slow = asks.then(|| read::slow(device, &mut questions, sees_processes));
        let loss = questions.loss;
        if loss.is_some() {
            // What it said before the loss, in the same round, is half a reading.
            (self.device, self.gpu.fast, self.gpu.slow) = (None, None, None);
            (self.profiler, self.instances) = (Profiler::default(), BTreeMap::new());
            self.gpu.is_lost = true;
            warn!(gpu = self.gpu.identity.index, uuid = self.gpu.identity.uuid, "a GPU is lost");
            return loss;
        }
        let now = Instant::now();
        let nvlink_rate = self.gpu.fast.as_ref().and_then(|(at, before)| nvlink_rate(before, &fast, now - *at));
        self.gpu.fast = Some((now, Fast { nvlink_rate, ..fast }));
        if let Some(slow) = slow {
            // Numbers of GPU instances are given again: of what was cut anew nothing is compared.
            if slow.mig.as_deref().unwrap_or_default() != self.gpu.mig_devices() {
                self.instances.clear();
            }
            self.gpu.slow = Some((now, slow));
        }
        None
    }
}

/// Bytes a second over all NVLinks between two readings. Counters that fell were reset: they say nothing this once.
fn nvlink_rate(before: &Fast, after: &Fast, time: Duration) -> Option<f64> {
    let sum = |fast: &Fast| fast.nvlink.map(|(sent, received)| sent.saturating_add(received));
    let kib = sum(after)?.checked_sub(sum(before)?)?;
    Some(number(kib) * 1024.0 / time.as_secs_f64()).filter(|rate| rate.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_over_nvlink_is_that_of_both_directions_and_none_where_a_counter_fell() {
        let of = |nvlink| Fast { nvlink, ..Fast::default() };
        let rate = |before, after| nvlink_rate(&of(before), &of(after), Duration::from_secs(5));
        assert_eq!(rate(Some((1000, 2000)), Some((1500, 4500))), Some(3000.0 * 1024.0 / 5.0));
        assert_eq!(rate(Some((1000, 2000)), Some((1000, 2000))), Some(0.0));
        assert_eq!(rate(Some((1000, 2000)), Some((0, 10))), None);
        assert_eq!((rate(None, Some((1, 1))), rate(Some((1, 1)), None)), (None, None));
        assert_eq!(nvlink_rate(&of(Some((1, 1))), &of(Some((2, 2))), Duration::ZERO), None);
    }
}
