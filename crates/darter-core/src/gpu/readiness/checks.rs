//! The checks, in their order. Each reads what it needs and says what is wrong; what is `None` says nothing.

use super::{Finding, Gpu, Nvml, Observation, Policy, Reason, RecoveryAction, State};
use crate::gpu::xid;

/// One more than the last check's number.
const CHECKS: usize = 15;

/// What the checks found, and how much they had to go by.
#[derive(Debug, Default)]
pub(super) struct Sheet {
    pub(super) findings: Vec<Finding>,
    /// By check, how many things were known.
    pub(super) known: [u32; CHECKS],
    /// Checks that were not made, because what an earlier one found would make all of them fail.
    pub(super) is_masked: [bool; CHECKS],
    /// The driver is being replaced: what the checks found that need it is not held against the node meanwhile.
    pub(super) is_excused: bool,
}

impl Sheet {
    fn know<T: Clone>(&mut self, check: usize, value: &Option<T>) -> Option<T> {
        self.known[check] += u32::from(value.is_some());
        value.clone()
    }

    fn add(&mut self, reason: Reason, state: State, detail: impl Into<String>) {
        self.findings.push(Finding { reason, state, gpus: Vec::new(), detail: detail.into() });
    }

    /// One finding a reason, with all the GPUs that have it.
    fn add_gpu(&mut self, reason: Reason, state: State, gpu: &str) {
        match self.findings.iter_mut().find(|finding| finding.reason == reason) {
            Some(finding) => {
                finding.state = finding.state.max(state);
                finding.gpus.push(gpu.to_owned());
            }
            None => {
                let (gpus, detail) = (vec![gpu.to_owned()], String::new());
                self.findings.push(Finding { reason, state, gpus, detail });
            }
        }
    }

    fn wrong(&mut self, check: usize, gpu: &Gpu, value: &Option<bool>, reason: Reason, state: State) {
        if self.know(check, value) == Some(true) {
            self.add_gpu(reason, state, &gpu.uuid);
        }
    }
}

/// How many GPUs there should be.
fn expected(o: &Observation, policy: &Policy) -> Option<u32> {
    policy.expected_gpus.or(o.instance_gpus).or(o.learned_gpus).filter(|gpus| *gpus > 0)
}

/// Check 0: whether this is a GPU node. `None`: nobody can tell.
pub(super) fn applies(o: &Observation, policy: &Policy) -> Option<bool> {
    let is_said = o.should_have_gpus == Some(true) || expected(o, policy).is_some();
    if is_said || o.nvml_count.is_some_and(|gpus| gpus > 0) {
        return Some(true);
    }
    o.pci_functions.map(|functions| functions > 0)
}

/// All other checks.
pub(super) fn run(o: &Observation, policy: &Policy) -> Sheet {
    let mut sheet = Sheet::default();
    upgrade(&mut sheet, o);
    if !sheet.is_excused {
        driver(&mut sheet, o);
    }
    let has_driver = o.driver_version_file != Some(false) && !sheet.is_excused;
    if sheet.is_excused {
        NEED_DRIVER.iter().for_each(|check| sheet.is_masked[*check] = true);
    } else if sheet.findings.iter().all(|finding| finding.reason.check() != 1) {
        nvml(&mut sheet, o);
        count(&mut sheet, o, policy, true);
    } else {
        // Without the driver or its devices NVML fails too, and there is no device file to count.
        (sheet.is_masked[2], sheet.is_masked[3]) = (true, true);
        if has_driver {
            count(&mut sheet, o, policy, false);
        }
    }
    xids(&mut sheet, o);
    for gpu in o.gpus.iter().flatten() {
        // What NVML said of a GPU holds for whoever does not see it any more.
        if has_driver {
            sheet.wrong(3, gpu, &gpu.is_lost, Reason::GpuLost, State::NotReady);
        }
        hardware(&mut sheet, gpu);
        if !sheet.is_excused {
            fabric(&mut sheet, gpu, o);
        }
    }
    if policy.wants_device_plugin && !sheet.is_excused {
        device_plugin(&mut sheet, o);
    }
    if sheet.know(12, &o.gfd_labels) == Some(false) {
        sheet.add(Reason::GfdLabelsMissing, State::Ready, "");
    }
    if sheet.know(13, &o.sees_processes) == Some(false) {
        let detail = "the agent is not in the PID namespace of the host";
        sheet.add(Reason::ProcessesNotVisible, State::Ready, detail);
    }
    sheet
}

/// Checks that fail while there is no driver: it is not loaded, NVML does not start, GPUs are not counted, NVSwitch and
/// the device plugin are down with it.
pub(super) const NEED_DRIVER: [usize; 6] = [1, 2, 3, 9, 10, 11];

/// No pod should come now, and nothing is broken.
fn upgrade(sheet: &mut Sheet, o: &Observation) {
    let Some(upgrade) = sheet.know(14, &o.driver_upgrade).filter(|upgrade| upgrade.is_under_way()) else { return };
    sheet.add(Reason::DriverUpgrading(upgrade), State::Unknown, "GPU Operator replaces the driver");
    sheet.is_excused = upgrade.takes_driver();
}

/// /proc is the kernel's, in a container too; device files are those that the container was handed. So only the
/// first tells that the driver is not loaded, and without the others nobody knows.
fn driver(sheet: &mut Sheet, o: &Observation) {
    let is_gone = sheet.know(1, &o.driver_version_file) == Some(false);
    let missing = [
        (is_gone, "/proc/driver/nvidia/version"),
        (sheet.know(1, &o.control_node) == Some(false), "/dev/nvidiactl"),
        (sheet.know(1, &o.device_nodes) == Some(0), "/dev/nvidia0"),
    ];
    let missing: Vec<_> = missing.iter().filter(|(is_missing, _)| *is_missing).map(|(_, file)| *file).collect();
    if is_gone {
        sheet.add(Reason::DriverNotLoaded, State::NotReady, format!("not there: {}", missing.join(", ")));
    } else if !missing.is_empty() {
        let loaded = if o.driver_version_file.is_some() { "the driver is loaded, and " } else { "" };
        let detail = format!("{loaded}the agent does not see {}", missing.join(", "));
        sheet.add(Reason::GpusNotVisible, State::Unknown, detail);
    }
}

/// The worst that NVML and counts can say: not that GPUs are broken, where nobody knows whether NVML has devices.
fn at_worst(o: &Observation) -> State {
    let is_handed = o.control_node == Some(true) && o.device_nodes.is_some_and(|nodes| nodes > 0);
    let has_devices = is_handed && o.control_node_opens != Some(false);
    if has_devices { State::NotReady } else { State::Unknown }
}

fn nvml(sheet: &mut Sheet, o: &Observation) {
    match sheet.know(2, &o.nvml) {
        Some(Nvml::Ok) if o.nvml_count.is_some() && o.gpus.is_some() => (),
        Some(Nvml::Ok) => sheet.add(Reason::NvmlNotObserved, State::Unknown, "it did not list the GPUs yet"),
        None => sheet.add(Reason::NvmlNotObserved, State::Unknown, ""),
        // Pods get theirs from the container runtime, and the device plugin tells if it has none: what the agent
        // lacks says nothing of them.
        Some(Nvml::LibraryNotFound) => sheet.add(Reason::LibraryNotFound, State::Unknown, ""),
        Some(Nvml::DriverMismatch) => sheet.add(Reason::DriverMismatch, at_worst(o), ""),
        // The device cgroup says no, as it may after a reload of systemd. Whoever has them works on.
        Some(Nvml::InitFailed(code)) if o.control_node_opens == Some(false) => {
            let detail = format!("code {code}, and the agent may not open /dev/nvidiactl");
            sheet.add(Reason::GpusNotPermitted, State::Unknown, detail);
        }
        Some(Nvml::Crashes(times)) => {
            let detail = format!("{times} agents ended while they asked it");
            sheet.add(Reason::NvmlCrashes, State::Unknown, detail);
        }
        Some(Nvml::InitFailed(code)) => sheet.add(Reason::NvmlInitFailed, at_worst(o), format!("code {code}")),
        Some(Nvml::Unresponsive) => sheet.add(Reason::NvmlUnresponsive, State::Unknown, ""),
    }
}

/// The bus is the kernel's, as /proc is: it is believed by whoever sees no GPU, too.
fn count(sheet: &mut Sheet, o: &Observation, policy: &Policy, sees_gpus: bool) {
    let here = |count: &Option<u32>| count.filter(|_| sees_gpus);
    // One at the least, where nobody says how many.
    let promised = (o.should_have_gpus == Some(true) && o.pci_functions == Some(0)).then_some(1);
    let expected = expected(o, policy).or(promised);
    let counts = [
        (sheet.know(3, &o.pci_functions), "on the PCI bus"),
        (sheet.know(3, &here(&o.device_nodes)), "device files"),
        (sheet.know(3, &here(&o.nvml_count)), "in NVML"),
        (expected, "expected"),
    ];
    let known: Vec<_> = counts.iter().filter_map(|(count, what)| Some(((*count)?, *what))).collect();
    if known.windows(2).any(|pair| pair[0].0 != pair[1].0) {
        let detail: Vec<_> = known.iter().map(|(count, what)| format!("{count} {what}")).collect();
        let is_off_the_bus = o.pci_functions.zip(expected).is_some_and(|(there, expected)| there != expected);
        let state = if is_off_the_bus { State::NotReady } else { at_worst(o) };
        sheet.add(Reason::GpuCountMismatch, state, detail.join(", "));
    }
}

fn xids(sheet: &mut Sheet, o: &Observation) {
    for found in sheet.know(5, &o.xids).into_iter().flatten() {
        let gpu = o.gpus.iter().flatten().find(|gpu| gpu.pci == Some(found.pci));
        let name = gpu.map_or_else(|| found.pci.to_string(), |gpu| gpu.uuid.clone());
        match found.verdict {
            xid::Verdict::Fatal => sheet.add_gpu(Reason::FatalXid(found.xid), State::NotReady, &name),
            xid::Verdict::Degraded => sheet.add_gpu(Reason::DegradedXid(found.xid), State::Degraded, &name),
            xid::Verdict::MetricOnly => (),
        }
    }
}

/// Checks 4 and 6 to 8.
fn hardware(sheet: &mut Sheet, gpu: &Gpu) {
    if let Some(action) = sheet.know(4, &gpu.recovery_action).and_then(RecoveryAction::from_field) {
        // To end what talks to other GPUs is for whoever drains, and what is newer than this table may be
        // harmless: neither takes the node away by itself.
        let is_fatal = !matches!(action, RecoveryAction::DrainP2p | RecoveryAction::Other(_));
        let state = if is_fatal { State::NotReady } else { State::Degraded };
        sheet.add_gpu(Reason::RecoveryActionRequired(action), state, &gpu.uuid);
    }
    sheet.wrong(6, gpu, &gpu.row_remap_failed, Reason::RowRemapFailed, State::NotReady);
    let pending = [sheet.know(6, &gpu.row_remap_pending), sheet.know(6, &gpu.retired_pages_pending)];
    if pending.contains(&Some(true)) {
        sheet.add_gpu(Reason::RowRemapPending, State::Degraded, &gpu.uuid);
    }
    let errors = sheet.know(7, &gpu.uncorrected_ecc).zip(gpu.uncorrected_ecc_at_start);
    let is_past = sheet.know(7, &gpu.sram_threshold_exceeded) == Some(true);
    if is_past || errors.is_some_and(|(now, start)| now > start) {
        sheet.add_gpu(Reason::UncorrectableEcc, State::NotReady, &gpu.uuid);
    }
    let margin = sheet.know(8, &gpu.thermal_margin_celsius);
    if sheet.know(8, &gpu.thermal_slowdown_persists) == Some(true) || margin.is_some_and(|margin| margin <= 0) {
        sheet.add_gpu(Reason::ThermalSlowdown, State::Degraded, &gpu.uuid);
    }
    sheet.wrong(8, gpu, &gpu.power_brake_persists, Reason::PowerBrake, State::Degraded);
}

/// A GPU alone needs no fabric: it is worth a word.
fn without_fabric(o: &Observation) -> State {
    let gpus = o.gpus.as_ref().map_or(0, Vec::len);
    let is_alone = gpus <= 1 && o.pci_functions.is_none_or(|functions| functions <= 1);
    if is_alone { State::Ready } else { State::NotReady }
}

fn fabric(sheet: &mut Sheet, gpu: &Gpu, o: &Observation) {
    let Some(fabric) = sheet.know(9, &gpu.fabric) else { return };
    let is_well = fabric.state == 0 || fabric.state == 3 && fabric.status == 0;
    if !is_well {
        sheet.add_gpu(Reason::FabricNotReady, without_fabric(o), &gpu.uuid);
    }
}

/// Checks 10 and 11.
fn device_plugin(sheet: &mut Sheet, o: &Observation) {
    let of = o.plugin_expected.unwrap_or(0);
    let (devices, allocatable) = (sheet.know(10, &o.plugin_devices), sheet.know(11, &o.allocatable));
    match devices {
        Some(0) => sheet.add(Reason::DevicePluginNotRegistered, State::NotReady, ""),
        Some(devices) if devices < of => {
            sheet.add(Reason::DevicesUnhealthy { unhealthy: of - devices, of }, State::NotReady, "");
        }
        None if allocatable.is_none() => sheet.add(Reason::DevicePluginNotObserved, State::Unknown, ""),
        _ => (),
    }
    if allocatable == Some(0) {
        sheet.add(Reason::AllocatableZero, State::NotReady, "");
    }
}
