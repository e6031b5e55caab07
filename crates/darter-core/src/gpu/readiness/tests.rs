//! The table of checks row by row, and what polls change.

use std::time::Duration;

use super::*;
use crate::gpu::xid::{self, Outstanding};
use crate::gpu::{PciAddress, Time};

mod properties;

const FATAL_XID: u32 = 79;
const DEGRADED_XID: u32 = 94;

fn pci(bus: u8) -> PciAddress {
    PciAddress { domain: 0, bus, device: 0 }
}

fn healthy_gpu(number: u8) -> Gpu {
    Gpu {
        uuid: format!("GPU-{number}"),
        pci: Some(pci(number)),
        is_lost: Some(false),
        recovery_action: Some(0),
        row_remap_failed: Some(false),
        row_remap_pending: Some(false),
        retired_pages_pending: Some(false),
        // An old one, from before the agent started.
        uncorrected_ecc: Some(3),
        uncorrected_ecc_at_start: Some(3),
        sram_threshold_exceeded: Some(false),
        clock_event_reasons: Some(1),
        thermal_slowdown_ns: Some(0),
        power_brake_ns: Some(0),
        thermal_slowdown_persists: None,
        power_brake_persists: None,
        thermal_margin_celsius: Some(58),
        fabric: Some(Fabric { state: 3, status: 0 }),
    }
}

/// A node of two GPUs with NVSwitch, all well.
fn healthy() -> Observation {
    Observation {
        pci_functions: Some(2),
        should_have_gpus: Some(true),
        driver_version_file: Some(true),
        control_node: Some(true),
        control_node_opens: None,
        device_nodes: Some(2),
        nvml: Some(Nvml::Ok),
        nvml_count: Some(2),
        instance_gpus: Some(2),
        learned_gpus: None,
        gpus: Some(vec![healthy_gpu(1), healthy_gpu(2)]),
        xids: Some(Vec::new()),
        plugin_devices: Some(2),
        plugin_expected: Some(2),
        allocatable: Some(2),
        gfd_labels: Some(true),
        sees_processes: Some(true),
        driver_upgrade: Some(Upgrade::None),
    }
}

fn with(change: impl FnOnce(&mut Observation)) -> Observation {
    let mut observation = healthy();
    change(&mut observation);
    observation
}

fn with_gpu(change: impl FnOnce(&mut Gpu)) -> Observation {
    with(|o| {
        if let Some(gpu) = o.gpus.iter_mut().flatten().next() {
            change(gpu);
        }
    })
}

fn against(xid: u32, verdict: xid::Verdict) -> Option<Vec<Outstanding>> {
    Some(vec![Outstanding { pci: pci(1), xid, verdict }])
}

fn said(verdict: &Verdict) -> String {
    let reasons: Vec<_> = verdict.reasons.iter().map(|finding| finding.reason.to_string()).collect();
    format!("{} {}", verdict.state.as_str(), reasons.join(" ")).trim_end().to_owned()
}

fn judged(observation: &Observation) -> String {
    said(&evaluate(observation, &Policy::default()))
}

/// As it is while GPU Operator replaces the driver, or after somebody else unloaded it.
fn without_driver(driver_upgrade: Option<Upgrade>) -> Observation {
    with(|o| {
        (o.driver_version_file, o.control_node, o.device_nodes) = (Some(false), Some(false), Some(0));
        (o.nvml, o.nvml_count, o.gpus) = (Some(Nvml::InitFailed(9)), None, None);
        (o.plugin_devices, o.allocatable, o.driver_upgrade) = (Some(0), Some(0), driver_upgrade);
    })
}

#[test]
fn every_row_of_the_table() {
    let alone = |fabric| {
        with(|o| {
            (o.pci_functions, o.device_nodes, o.nvml_count, o.instance_gpus) = (Some(1), Some(1), Some(1), Some(1));
            o.gpus = Some(vec![Gpu { fabric, ..healthy_gpu(1) }]);
        })
    };
    let closed = |nvml, opens| with(|o| (o.nvml, o.control_node_opens) = (Some(nvml), opens));
    let rows = [
        (healthy(), "Ready"),
        // 0
        (
            Observation { pci_functions: Some(0), should_have_gpus: Some(false), ..Observation::default() },
            "NotApplicable",
        ),
        (Observation { pci_functions: Some(0), ..Observation::default() }, "NotApplicable"),
        (Observation::default(), "Unknown GpuNodeNotObserved"),
        // 1
        (with(|o| o.driver_version_file = Some(false)), "NotReady DriverNotLoaded"),
        (with(|o| o.control_node = Some(false)), "Unknown GpusNotVisible"),
        (with(|o| o.device_nodes = Some(0)), "Unknown GpusNotVisible"),
        (with(|o| (o.driver_version_file, o.control_node) = (None, Some(false))), "Unknown GpusNotVisible"),
        (with(|o| (o.driver_version_file, o.control_node) = (Some(false), Some(false))), "NotReady DriverNotLoaded"),
        (with(|o| (o.device_nodes, o.pci_functions) = (Some(0), Some(1))), "NotReady GpusNotVisible GpuCountMismatch"),
        (
            with(|o| (o.device_nodes, o.pci_functions, o.instance_gpus) = (Some(0), Some(0), None)),
            "NotReady GpusNotVisible GpuCountMismatch",
        ),
        // 2
        (with(|o| o.nvml = Some(Nvml::LibraryNotFound)), "Unknown LibraryNotFound"),
        (with(|o| (o.nvml, o.device_nodes) = (Some(Nvml::InitFailed(9)), None)), "Unknown NvmlInitFailed"),
        (with(|o| o.nvml = Some(Nvml::DriverMismatch)), "NotReady DriverMismatch"),
        (with(|o| o.nvml = Some(Nvml::InitFailed(999))), "NotReady NvmlInitFailed"),
        (with(|o| o.nvml = Some(Nvml::Unresponsive)), "Unknown NvmlUnresponsive"),
        (with(|o| o.nvml = Some(Nvml::Crashes(3))), "Unknown NvmlCrashes"),
        (closed(Nvml::InitFailed(999), Some(false)), "Unknown GpusNotPermitted"),
        (closed(Nvml::InitFailed(999), Some(true)), "NotReady NvmlInitFailed"),
        // What the agent may not open it does not need while NVML has it open.
        (closed(Nvml::Ok, Some(false)), "Ready"),
        (with(|o| o.nvml = None), "Unknown NvmlNotObserved"),
        // 3
        (with(|o| o.nvml_count = Some(1)), "NotReady GpuCountMismatch"),
        (with(|o| o.device_nodes = Some(1)), "NotReady GpuCountMismatch"),
        (with(|o| o.pci_functions = Some(1)), "NotReady GpuCountMismatch"),
        (with(|o| o.instance_gpus = Some(8)), "NotReady GpuCountMismatch"),
        (with(|o| (o.instance_gpus, o.learned_gpus) = (None, Some(3))), "NotReady GpuCountMismatch"),
        (with_gpu(|gpu| gpu.is_lost = Some(true)), "NotReady GpuLost"),
        // 4
        (with_gpu(|gpu| gpu.recovery_action = Some(1)), "NotReady RecoveryActionRequired(GpuReset)"),
        (with_gpu(|gpu| gpu.recovery_action = Some(2)), "NotReady RecoveryActionRequired(NodeReboot)"),
        (with_gpu(|gpu| gpu.recovery_action = Some(3)), "Degraded RecoveryActionRequired(DrainP2P)"),
        (with_gpu(|gpu| gpu.recovery_action = Some(4)), "NotReady RecoveryActionRequired(DrainAndReset)"),
        (with_gpu(|gpu| gpu.recovery_action = Some(5)), "NotReady RecoveryActionRequired(RecoverImex)"),
        // 5
        (with(|o| o.xids = against(FATAL_XID, xid::Verdict::Fatal)), "NotReady FatalXid(79)"),
        (with(|o| o.xids = against(DEGRADED_XID, xid::Verdict::Degraded)), "Degraded DegradedXid(94)"),
        // 6
        (with_gpu(|gpu| gpu.row_remap_failed = Some(true)), "NotReady RowRemapFailed"),
        (with_gpu(|gpu| gpu.row_remap_pending = Some(true)), "Degraded RowRemapPending"),
        (with_gpu(|gpu| gpu.retired_pages_pending = Some(true)), "Degraded RowRemapPending"),
        // 7
        (with_gpu(|gpu| gpu.uncorrected_ecc = Some(4)), "NotReady UncorrectableEcc"),
        (with_gpu(|gpu| gpu.sram_threshold_exceeded = Some(true)), "NotReady UncorrectableEcc"),
        // 8
        (with_gpu(|gpu| gpu.thermal_slowdown_persists = Some(true)), "Degraded ThermalSlowdown"),
        (with_gpu(|gpu| gpu.thermal_margin_celsius = Some(0)), "Degraded ThermalSlowdown"),
        (with_gpu(|gpu| gpu.power_brake_persists = Some(true)), "Degraded PowerBrake"),
        // 9
        (with_gpu(|gpu| gpu.fabric = Some(Fabric { state: 1, status: 0 })), "NotReady FabricNotReady"),
        (with_gpu(|gpu| gpu.fabric = Some(Fabric { state: 2, status: 0 })), "NotReady FabricNotReady"),
        (with_gpu(|gpu| gpu.fabric = Some(Fabric { state: 3, status: 999 })), "NotReady FabricNotReady"),
        (with_gpu(|gpu| gpu.fabric = Some(Fabric { state: 0, status: 0 })), "Ready"),
        (alone(Some(Fabric { state: 1, status: 0 })), "Ready FabricNotReady"),
        // 10
        (with(|o| o.plugin_devices = Some(0)), "NotReady DevicePluginNotRegistered"),
        (with(|o| (o.plugin_devices, o.plugin_expected) = (Some(9), Some(14))), "NotReady DevicesUnhealthy(5 of 14)"),
        (with(|o| (o.plugin_devices, o.allocatable) = (None, None)), "Unknown DevicePluginNotObserved"),
        (with(|o| o.plugin_devices = None), "Ready"),
        // 11
        (with(|o| o.allocatable = Some(0)), "NotReady AllocatableZero"),
        // 12
        (with(|o| o.gfd_labels = Some(false)), "Ready GfdLabelsMissing"),
        // 13
        (with(|o| o.sees_processes = Some(false)), "Ready ProcessesNotVisible"),
        // 14
        (with(|o| o.driver_upgrade = Some(Upgrade::DrainRequired)), "Unknown DriverUpgrading(drain-required)"),
        (
            with(|o| (o.driver_upgrade, o.nvml_count) = (Some(Upgrade::CordonRequired), Some(1))),
            "NotReady DriverUpgrading(cordon-required) GpuCountMismatch",
        ),
        (without_driver(Some(Upgrade::PodRestartRequired)), "Unknown DriverUpgrading(pod-restart-required)"),
        (without_driver(Some(Upgrade::Failed)), "Unknown DriverUpgrading(upgrade-failed)"),
        (
            Observation {
                xids: against(FATAL_XID, xid::Verdict::Fatal),
                ..without_driver(Some(Upgrade::ValidationRequired))
            },
            "NotReady DriverUpgrading(validation-required) FatalXid(79)",
        ),
    ];
    for (observation, expected) in rows {
        assert_eq!(judged(&observation), expected, "{observation:#?}");
    }
}

#[test]
fn the_operator_says_what_is_judged() {
    let no_plugin = with(|o| (o.plugin_devices, o.allocatable) = (Some(0), Some(0)));
    let policy = Policy { wants_device_plugin: false, ..Policy::default() };
    assert_eq!(said(&evaluate(&no_plugin, &policy)), "Ready");
    let policy = Policy { expected_gpus: Some(4), ..Policy::default() };
    let verdict = evaluate(&healthy(), &policy);
    assert_eq!(said(&verdict), "NotReady GpuCountMismatch");
    assert_eq!(verdict.reasons[0].detail, "2 on the PCI bus, 2 device files, 2 in NVML, 4 expected");
    let empty = Observation { pci_functions: Some(0), ..Observation::default() };
    assert_ne!(evaluate(&empty, &policy).state, State::NotApplicable, "four were expected");
}

#[test]
fn what_is_found_names_the_gpu_and_comes_in_order_each_once() {
    let mut sick = with(|o| o.xids = against(FATAL_XID, xid::Verdict::Fatal));
    for gpu in sick.gpus.iter_mut().flatten() {
        (gpu.row_remap_pending, gpu.is_lost) = (Some(true), Some(true));
    }
    let verdict = evaluate(&sick, &Policy::default());
    assert_eq!(said(&verdict), "NotReady GpuLost FatalXid(79) RowRemapPending");
    let gpus: Vec<_> = verdict.reasons.iter().map(|finding| finding.gpus.len()).collect();
    assert_eq!(gpus, [2, 1, 2]);
    assert_eq!(verdict.first().map(|finding| finding.reason.word()), Some("GpuLost"));
    assert_eq!(verdict.of_gpu("GPU-2"), State::NotReady);
    sick = with_gpu(|gpu| gpu.row_remap_pending = Some(true));
    let verdict = evaluate(&sick, &Policy::default());
    assert_eq!((verdict.of_gpu("GPU-1"), verdict.of_gpu("GPU-2")), (State::Degraded, State::Ready));
}

/// Polls every 5 s.
struct Node {
    readiness: Readiness,
    polls: u32,
}

impl Node {
    fn new() -> Self {
        Self { readiness: Readiness::new(Policy::default(), None), polls: 0 }
    }

    fn poll(&mut self, observation: Observation) -> String {
        self.polls += 1;
        said(&self.readiness.poll(Time::ZERO + Duration::from_secs(5) * self.polls, observation))
    }
}

#[test]
fn hardware_faults_count_at_once_and_recovery_takes_two_polls() {
    let mut node = Node::new();
    assert_eq!(node.poll(healthy()), "Ready");
    assert_eq!(node.poll(with(|o| o.nvml_count = Some(1))), "NotReady GpuCountMismatch");
    assert_eq!(node.poll(healthy()), "NotReady GpuCountMismatch");
    assert_eq!(node.poll(with(|o| o.nvml_count = Some(1))), "NotReady GpuCountMismatch");
    assert_eq!(node.poll(healthy()), "NotReady GpuCountMismatch", "counted anew");
    assert_eq!(node.poll(healthy()), "Ready");
}

#[test]
fn a_node_that_turns_out_to_be_a_gpu_node_is_not_ready_before_its_driver_is_seen() {
    let bare = |should_have_gpus| Observation {
        pci_functions: Some(0),
        driver_version_file: Some(false),
        should_have_gpus,
        ..Observation::default()
    };
    let mut node = Node::new();
    assert!(node.poll(bare(None)).starts_with("NotApplicable"));
    let polls: Vec<_> = (0..3).map(|_| node.poll(bare(Some(true)))).collect();
    assert!(polls[..2].iter().all(|said| said.starts_with("Unknown")), "{polls:?}");
    assert!(polls[2].starts_with("NotReady"), "{polls:?}");
}

#[test]
fn what_comes_late_counts_after_three_polls() {
    for (late, reason) in [
        (with(|o| o.driver_version_file = Some(false)), "DriverNotLoaded"),
        (with(|o| o.plugin_devices = Some(0)), "DevicePluginNotRegistered"),
        (with(|o| o.plugin_devices = Some(1)), "DevicesUnhealthy(1 of 2)"),
        (with(|o| o.allocatable = Some(0)), "AllocatableZero"),
    ] {
        let mut node = Node::new();
        let polls: Vec<_> = (0..3).map(|_| node.poll(late.clone())).collect();
        let (waits, fails) = (format!("Unknown {reason}"), format!("NotReady {reason}"));
        assert_eq!(polls, [waits.clone(), waits, fails.clone()], "a node that starts");
        let mut node = Node::new();
        node.poll(healthy());
        let polls: Vec<_> = (0..3).map(|_| node.poll(late.clone())).collect();
        let waits = format!("Ready {reason}");
        assert_eq!(polls, [waits.clone(), waits, fails], "a node that was ready");
        let mut node = Node::new();
        node.poll(late.clone());
        node.poll(healthy());
        node.poll(late.clone());
        assert!(!node.poll(late).starts_with("NotReady"), "not three on end");
    }
}

#[test]
fn a_driver_that_is_not_there_hides_what_follows_from_it() {
    let mut node = Node::new();
    let none = with(|o| {
        (o.driver_version_file, o.control_node, o.device_nodes) = (Some(false), Some(false), Some(0));
        (o.nvml, o.nvml_count, o.gpus) = (Some(Nvml::InitFailed(9)), None, None);
    });
    assert_eq!(node.poll(none.clone()), "Unknown DriverNotLoaded");
    assert_eq!(node.poll(none), "Unknown DriverNotLoaded");
    assert_eq!(node.poll(healthy()), "Ready");
}

#[test]
fn a_driver_that_is_replaced_makes_a_node_unknown_and_never_not_ready() {
    let upgrade = Upgrade::PodRestartRequired;
    let is_unknown = |said: &str| said.starts_with("Unknown DriverUpgrading(pod-restart-required)");
    // Whether the label is seen first, or an agent starts in the middle of it and hears of it late.
    for late in [0, 4] {
        let mut node = Node::new();
        node.poll(healthy());
        let polls: Vec<_> = (0..late).map(|_| node.poll(without_driver(None))).collect();
        assert!(polls.last().is_none_or(|said| said.starts_with("NotReady DriverNotLoaded")), "{polls:?}");
        let polls: Vec<_> = (0..10).map(|_| node.poll(without_driver(Some(upgrade)))).collect();
        assert!(polls.iter().all(|said| is_unknown(said)), "{late}: {polls:?}");
        // What is not heard for a while stays so.
        assert!(is_unknown(&node.poll(without_driver(None))));
        assert!(is_unknown(&node.poll(healthy_while(upgrade))));
        node.poll(healthy());
        assert_eq!(node.poll(healthy()), "Ready", "{late}: two good looks");
        // What is missing after it is missing.
        let polls: Vec<_> = (0..3).map(|_| node.poll(without_driver(Some(Upgrade::None)))).collect();
        assert!(polls[2].starts_with("NotReady DriverNotLoaded"), "{late}: {polls:?}");
    }
}

fn healthy_while(upgrade: Upgrade) -> Observation {
    with(|o| o.driver_upgrade = Some(upgrade))
}

#[test]
fn an_agent_that_was_not_handed_the_gpus_says_so_and_never_that_they_are_broken() {
    let blind = || {
        with(|o| {
            (o.control_node, o.device_nodes) = (Some(false), Some(0));
            (o.nvml, o.nvml_count, o.gpus) = (Some(Nvml::LibraryNotFound), None, None);
            (o.plugin_devices, o.plugin_expected) = (None, None);
        })
    };
    let mut node = Node::new();
    for _ in 0..10 {
        assert_eq!(node.poll(blind()), "Unknown GpusNotVisible");
    }
    let verdict = evaluate(&blind(), &Policy::default());
    assert_eq!(
        verdict.reasons[0].detail,
        "the driver is loaded, and the agent does not see /dev/nvidiactl, /dev/nvidia0"
    );
    // The devices without the library, as without `utility`.
    let no_library = || with(|o| (o.nvml, o.nvml_count, o.gpus) = (Some(Nvml::LibraryNotFound), None, None));
    let mut node = Node::new();
    for _ in 0..10 {
        assert_eq!(node.poll(no_library()), "Unknown LibraryNotFound");
    }
    // What is known of the GPUs by others holds.
    let mut node = Node::new();
    node.poll(with_gpu(|gpu| gpu.is_lost = Some(true)));
    assert!(node.poll(blind()).starts_with("NotReady"));
    let mut node = Node::new();
    let silent = (0..3).map(|_| node.poll(Observation { allocatable: Some(0), ..blind() })).last();
    assert_eq!(silent.as_deref(), Some("NotReady GpusNotVisible AllocatableZero"), "no pod gets one either");
}

#[test]
fn nvml_that_hangs_makes_a_ready_node_unknown_and_a_broken_one_no_better() {
    let hangs = || Observation { nvml: Some(Nvml::Unresponsive), ..Observation::default() };
    let mut node = Node::new();
    node.poll(healthy());
    assert_eq!(node.poll(hangs()), "Unknown NvmlUnresponsive");
    assert_eq!(node.poll(healthy()), "Unknown NvmlUnresponsive");
    assert_eq!(node.poll(healthy()), "Ready");
    node.poll(with_gpu(|gpu| gpu.row_remap_failed = Some(true)));
    assert_eq!(node.poll(hangs()), "NotReady NvmlUnresponsive RowRemapFailed");
    let mut log = hangs();
    log.xids = against(FATAL_XID, xid::Verdict::Fatal);
    let mut node = Node::new();
    node.poll(healthy());
    assert_eq!(node.poll(log), "NotReady NvmlUnresponsive FatalXid(79)", "the kernel's log needs no NVML");
}

#[test]
fn ecc_errors_count_from_the_start_of_the_agent_and_from_a_reload_of_the_driver() {
    let errors = |errors| with_gpu(|gpu| (gpu.uncorrected_ecc, gpu.uncorrected_ecc_at_start) = (Some(errors), None));
    let mut node = Node::new();
    assert_eq!(node.poll(errors(7)), "Ready");
    assert_eq!(node.poll(errors(8)), "NotReady UncorrectableEcc");
    assert_eq!(node.poll(errors(0)), "NotReady UncorrectableEcc");
    assert_eq!(node.poll(errors(0)), "Ready");
    assert_eq!(node.poll(errors(1)), "NotReady UncorrectableEcc");
}

#[test]
fn a_gpu_that_once_was_here_is_missed() {
    let fewer = |gpus| {
        with(|o| {
            (o.pci_functions, o.device_nodes, o.nvml_count, o.instance_gpus) =
                (Some(gpus), Some(gpus), Some(gpus), None);
        })
    };
    let mut node = Node::new();
    assert_eq!(node.poll(fewer(2)), "Ready");
    assert_eq!(node.poll(fewer(1)), "NotReady GpuCountMismatch");
    let stored = node.readiness.learned_gpus();
    assert_eq!(stored, Some(2));
    let mut node = Node { readiness: Readiness::new(Policy::default(), stored), polls: 0 };
    assert_eq!(node.poll(fewer(1)), "NotReady GpuCountMismatch", "while no agent ran");
}

#[test]
fn slowdown_counts_when_it_lasts() {
    // Bits: thermal, power brake with the general one, the general one alone, software thermal.
    for (bits, expected) in [
        (0x40, "Degraded ThermalSlowdown"),
        (0x88, "Degraded PowerBrake"),
        (0x8, "Degraded ThermalSlowdown"),
        (0x20, "Ready"),
    ] {
        let mut node = Node::new();
        let slow = || with_gpu(|gpu| gpu.clock_event_reasons = Some(bits));
        let polls: Vec<_> = (0..70).map(|_| node.poll(slow())).collect();
        assert_eq!(polls[10], "Ready", "{bits:#x}");
        assert_eq!(polls[69], expected, "{bits:#x}");
    }
}
