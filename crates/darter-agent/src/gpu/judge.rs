//! From readings to verdicts: each reading goes to the core, which says whether the GPUs can be given work and
//! whether they do any.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_core::gpu::idle::{self, Idle, Idleness};
use darter_core::gpu::readiness::{self, Nvml, Observation, Policy, Readiness, State, Verdict};
use darter_core::gpu::xid::Facts;
use darter_core::gpu::{PciAddress, Time};
use serde::Serialize;

use super::host::Host;
use super::learned::Learned;
use super::sample::{Driver, Fast, Gpu, Slow};
use super::{Now, View};
use crate::config;

/// What is concluded of a node's GPUs.
#[derive(Debug, Clone, Serialize)]
pub struct Judgement {
    /// Whether they can be given work, and why not.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// What each does, by uuid.
    pub idleness: BTreeMap<String, Idleness>,
    /// When; the times above are from there.
    #[serde(skip)]
    pub(super) at: Time,
    /// The same, for its age.
    #[serde(skip)]
    pub(crate) made: Instant,
}

impl Judgement {
    /// For how long a GPU has done nothing, in seconds.
    pub(crate) fn idle_seconds(&self, idleness: &Idleness) -> f64 {
        idleness.idle_since.map_or(0.0, |since| self.at.since(since).as_secs_f64())
    }

    /// How long ago something was, of which the verdict says when.
    pub(crate) fn ago(&self, since: Time) -> Duration {
        self.at.since(since) + self.made.elapsed()
    }
}

/// Looks again and again.
pub(super) struct Judge {
    view: View,
    began: Instant,
    readiness: Readiness,
    gpus: BTreeMap<String, Watched>,
    policy: idle::Policy,
    learned: Learned,
    /// GPUs that have NVLinks: an error of these is none elsewhere.
    linked: BTreeSet<PciAddress>,
}

struct Watched {
    idle: Idle,
    generation: u64,
    /// When what was noted last was read.
    noted: Option<Instant>,
}

impl Judge {
    pub(super) fn new(view: View, settings: &config::Gpu, learned: Learned) -> Self {
        // The kubelet started this agent, if there is one.
        let has_socket = settings.pod_resources.as_ref().is_some_and(|socket| socket.exists());
        let is_with_kubelet = has_socket || view.0.node.is_watched();
        let wants_device_plugin = settings.device_plugin && is_with_kubelet;
        let policy = Policy { expected_gpus: settings.expected(), wants_device_plugin };
        let gap = settings.interval.0 * 3;
        let window = settings.idle_window.0;
        let idle = idle::Policy { gap, window, long_window: window * 8, ..idle::Policy::default() };
        Self {
            view,
            began: Instant::now(),
            readiness: Readiness::new(policy, learned.gpus()),
            gpus: BTreeMap::new(),
            policy: idle,
            learned,
            linked: BTreeSet::new(),
        }
    }

    /// The next look.
    pub(super) fn look(&mut self, host: Host) -> Judgement {
        let now = self.view.now();
        let at = self.time(Instant::now());
        let observation = self.observation(&now, host);
        let verdict = self.readiness.poll(at, observation);
        self.note(&now, at);
        let floors = self.gpus.iter().map(|(uuid, gpu)| (uuid.clone(), gpu.idle.floor()));
        self.learned.keep(self.readiness.learned_gpus(), floors);
        let idleness = self.gpus.iter_mut().map(|(uuid, gpu)| (uuid.clone(), gpu.idle.judge(at))).collect();
        Judgement { verdict, idleness, at, made: Instant::now() }
    }

    fn time(&self, at: Instant) -> Time {
        Time::from_micros(u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX))
    }

    fn observation(&mut self, now: &Now, host: Host) -> Observation {
        let (nvml, gpus) = match (&now.snapshot.driver, now.hung) {
            (Driver::Off | Driver::Starting, _) => (None, None),
            (_, Some(_)) => (Some(Nvml::Unresponsive), None),
            // Nobody asks: what was known stays, as far as it does not need the driver.
            (Driver::Released, _) => (None, None),
            (Driver::Crashes(times), _) => (Some(Nvml::Crashes(*times)), None),
            (Driver::NoLibrary(_), _) => (Some(Nvml::LibraryNotFound), None),
            (Driver::Failed(18, _), _) => (Some(Nvml::DriverMismatch), None),
            // Of those that there were nothing is known any more.
            (Driver::NoGpus, _) => (Some(Nvml::Ok), None),
            (Driver::Failed(code, _), _) => (Some(Nvml::InitFailed(*code)), None),
            (Driver::Running(_), None) => {
                let (fast, slow) = self.view.patience();
                let read = |gpu: &Gpu| observed(gpu, now.young(&gpu.fast, fast), now.young(&gpu.slow, slow));
                (Some(Nvml::Ok), Some(now.snapshot.gpus.iter().map(read).collect::<Vec<_>>()))
            }
        };
        let count = gpus.as_ref().and_then(|gpus| u32::try_from(gpus.len()).ok());
        let counted = if now.snapshot.driver == Driver::NoGpus { Some(0) } else { count };
        let node = self.view.0.node.facts();
        self.linked.extend(now.snapshot.gpus.iter().filter(|gpu| has_nvlink(gpu)).filter_map(|gpu| gpu.identity.pci()));
        let facts = |gpu: &readiness::Gpu| {
            let pci = gpu.pci?;
            // Once it was seen it is there, whatever is read now.
            let has_nvlink = self.linked.contains(&pci).then_some(true);
            Some((pci, Facts { has_nvlink, recovery_action: gpu.recovery_action }))
        };
        let known = gpus.iter().flatten().filter_map(facts).collect();
        Observation {
            plugin_devices: self.view.pods().and_then(|pods| pods.devices),
            xids: self.view.0.xids.outstanding(&known),
            pci_functions: host.pci_functions,
            driver_version_file: host.driver_version_file,
            control_node: host.control_node,
            control_node_opens: host.control_node_opens,
            device_nodes: host.device_nodes,
            nvml,
            nvml_count: counted,
            plugin_expected: count.filter(|_| now.snapshot.gpus.iter().all(|gpu| !gpu.is_mig())),
            gpus,
            should_have_gpus: node.as_ref().and_then(|node| node.has_gpus.then_some(true)),
            instance_gpus: node.as_ref().and_then(|node| node.instance_gpus),
            // It counts what NVML has now: no more than a witness of what was here.
            learned_gpus: node.as_ref().and_then(|node| node.whole_gpus),
            allocatable: node.as_ref().and_then(|node| node.allocatable),
            driver_upgrade: node.as_ref().map(|node| node.driver_upgrade),
            sees_processes: self.view.0.sight.judged(),
            gfd_labels: node.zip(counted).map(|(node, gpus)| node.labelled_gpus == Some(gpus)),
        }
    }

    /// Takes what was read since the last look.
    fn note(&mut self, now: &Now, at: Time) {
        let Driver::Running(versions) = &now.snapshot.driver else { return };
        let pods = self.view.pods();
        for gpu in now.snapshot.gpus.iter().filter(|gpu| !gpu.identity.uuid.is_empty()) {
            let policy = self.policy;
            let watched = self.gpus.entry(gpu.identity.uuid.clone()).or_insert_with(|| Watched {
                idle: Idle::new(at, policy, self.learned.floor(&gpu.identity.uuid)),
                generation: versions.generation,
                noted: None,
            });
            if watched.generation != versions.generation {
                watched.generation = versions.generation;
                watched.idle.initialised(at);
            }
            let Some((read, fast)) = &gpu.fast else { continue };
            if watched.noted == Some(*read) {
                continue;
            }
            watched.noted = Some(*read);
            let slow = now.young(&gpu.slow, self.view.patience().1);
            let since = read.saturating_duration_since(self.began);
            let at = Time::from_micros(u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
            let is_allocated = pods.as_ref().and_then(|pods| pods.has(gpu, &now.snapshot.gpus));
            watched.idle.note(idle::Sample { is_allocated, ..sample(at, gpu, fast, slow) });
        }
        // A GPU that is gone for good, or has another name since it was cut up.
        let known = |uuid: &String| now.snapshot.gpus.iter().any(|gpu| gpu.identity.uuid == *uuid);
        self.gpus.retain(|uuid, _| known(uuid));
    }
}

fn has_nvlink(gpu: &Gpu) -> bool {
    gpu.fast.as_ref().is_some_and(|(_, fast)| fast.nvlink.is_some())
}

fn observed(gpu: &Gpu, fast: Option<&Fast>, slow: Option<&Slow>) -> readiness::Gpu {
    let [_, _, _, thermal, brake] = fast.map(|fast| fast.clock_event_times).unwrap_or_default();
    readiness::Gpu {
        uuid: gpu.identity.uuid.clone(),
        pci: gpu.identity.pci(),
        is_lost: Some(gpu.is_lost),
        recovery_action: fast.and_then(|fast| fast.recovery_action).and_then(|action| u32::try_from(action).ok()),
        row_remap_failed: slow.and_then(|slow| slow.remap_failed),
        row_remap_pending: slow.and_then(|slow| slow.remap_pending),
        retired_pages_pending: slow.and_then(|slow| slow.retired_pending),
        uncorrected_ecc: slow.and_then(|slow| slow.ecc_volatile.1),
        sram_threshold_exceeded: slow.and_then(|slow| slow.sram_exceeded),
        thermal_margin_celsius: fast.and_then(|fast| fast.thermal_margin),
        fabric: slow.and_then(|slow| slow.fabric),
        clock_event_reasons: fast.and_then(|fast| fast.clock_events),
        thermal_slowdown_ns: thermal,
        power_brake_ns: brake,
        ..readiness::Gpu::default()
    }
}

fn sample(at: Time, gpu: &Gpu, fast: &Fast, slow: Option<&Slow>) -> idle::Sample {
    let bytes = fast.pcie_sent.zip(fast.pcie_received).map(|(sent, received)| sent.wrapping_add(received));
    let processes = slow.and_then(|slow| slow.processes).map(|[compute, graphics, mps]| compute + graphics + mps);
    idle::Sample {
        at,
        utilization_percent: fast.utilization.and_then(|(percent, _)| u8::try_from(percent).ok()),
        utilization_max_percent: fast.utilization_peak.and_then(|percent| u8::try_from(percent).ok()),
        // With MIG the highest of its instances.
        sm_active_ratio: fast
            .profile
            .and_then(|profile| profile.sm)
            .into_iter()
            .chain(fast.instances.values().filter_map(|profile| profile.sm))
            .reduce(f64::max),
        is_idle_bit_set: fast.clock_events.map(|bits| bits & 0x1 != 0),
        energy_millijoules: fast.energy,
        power_milliwatts: fast.power.map(u64::from),
        pcie_bytes: bytes,
        memory_used_bytes: fast.memory.map(|memory| memory.used),
        processes: processes.and_then(|count| u32::try_from(count).ok()),
        is_allocated: None,
        has_mig: gpu.is_mig(),
    }
}

/// How a verdict stands among the checks of `/readyz`. Never failed: a node whose GPUs are broken still
/// mirrors, and who judges GPUs reads the verdict itself.
pub(super) fn check(judgement: &Judgement) -> (darter_core::ready::State, String) {
    let Judgement { verdict, idleness, .. } = judgement;
    let reason = verdict.first().map(|finding| {
        let of = if finding.gpus.is_empty() { String::new() } else { format!(" ({})", finding.gpus.join(", ")) };
        let detail = if finding.detail.is_empty() { String::new() } else { format!(": {}", finding.detail) };
        format!("{}{of}{detail}", finding.reason)
    });
    let reason = reason.unwrap_or_default();
    match verdict.state {
        State::NotApplicable => (darter_core::ready::State::Ok, "no GPU on this node".to_owned()),
        State::Ready => (darter_core::ready::State::Ok, format!("{} ready", idleness.len())),
        state => (darter_core::ready::State::Degraded, format!("{}: {reason}", state.as_str())),
    }
}
