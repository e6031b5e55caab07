//! One reading of all GPUs. `None` is what a GPU does not say, or could not be asked: never a zero.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use darter_core::gpu::PciAddress;
use darter_core::gpu::readiness::Fabric;

/// What was read last. Never changes; the next reading is another one.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// How the driver is.
    pub driver: Driver,
    /// In the order of NVML's indices.
    pub gpus: Vec<Gpu>,
    /// When the last round ended and how long it took.
    pub round: Option<Round>,
}

/// One round of questions.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// When it ended, by the clock.
    pub at: SystemTime,
    /// The same, for its age.
    pub ended: Instant,
    /// How long it took.
    pub took: Duration,
}

/// How the driver is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Driver {
    /// Nobody asks (`gpu.mode = "off"`).
    Off,
    /// Not asked yet.
    Starting,
    /// There is no NVML here: a node without GPUs, or a driver that is still to come.
    NoLibrary(String),
    /// NVML is here and does not start; its code, and its words.
    Failed(u32, String),
    /// NVML is not asked any more: so many agents ended while they asked it.
    Crashes(u32),
    /// NVML is shut down and not asked: GPU Operator replaces the driver, which nobody may have open.
    Released,
    /// It answers, and counts none. A driver that is still setting up says so too.
    NoGpus,
    /// It answers.
    Running(Versions),
}

/// What the driver says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    /// Such as `590.48.01`.
    pub driver: Option<String>,
    /// The newest CUDA that the driver knows: major, minor.
    pub cuda: Option<(i32, i32)>,
    /// How often NVML was started in this life of the agent.
    pub generation: u64,
}

/// One GPU.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// What does not change.
    pub identity: Identity,
    /// It fell off the bus, or NVML counts it and gives no handle of it.
    pub is_lost: bool,
    /// Read every `gpu.interval`.
    pub fast: Option<(Instant, Fast)>,
    /// Read every `gpu.slow_interval`.
    pub slow: Option<(Instant, Slow)>,
}

/// What does not change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// NVML's index: another one after a reboot, and after a GPU is lost.
    pub index: u32,
    /// `GPU-…`: the key of everything that is said of it. Empty if it was lost before it was known.
    pub uuid: String,
    /// Such as `NVIDIA H200`.
    pub name: Option<String>,
    /// Such as `00000000:53:00.0`.
    pub pci_bus_id: Option<String>,
    /// The number in `/dev/nvidia<n>`.
    pub minor: Option<u32>,
    /// The board's.
    pub serial: Option<String>,
    /// Version of the firmware.
    pub vbios: Option<String>,
    /// Such as `Hopper`.
    pub architecture: Option<String>,
    /// CUDA compute capability: major, minor.
    pub compute_capability: Option<(i32, i32)>,
    /// It was in MIG mode when the session began; see [`Gpu::is_mig`].
    pub is_mig: bool,
}

/// A part of a GPU in MIG mode that programs and the device plugin take for a GPU: a compute instance of a GPU
/// instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MigDevice {
    /// `MIG-…`: what the kubelet gives out.
    pub uuid: String,
    /// Such as `1g.18gb`: slices, and memory rounded.
    pub profile: Option<String>,
    /// Streaming multiprocessors.
    pub multiprocessors: Option<u32>,
    /// The number of its GPU instance, which may have other compute instances too.
    pub instance: Option<u32>,
    /// Bytes of its GPU instance, which it may share with other compute instances: not to be added up.
    pub memory: Option<Memory>,
}

impl Identity {
    /// Where it is on the bus.
    pub fn pci(&self) -> Option<PciAddress> {
        self.pci_bus_id.as_deref()?.parse().ok()
    }
}

impl Gpu {
    /// Whether it is cut into MIG devices. From Hopper on that changes without a reset.
    pub fn is_mig(&self) -> bool {
        self.slow.as_ref().map_or(self.identity.is_mig, |(_, slow)| slow.mig.is_some())
    }

    /// Into which ones, as far as is known.
    pub fn mig_devices(&self) -> &[MigDevice] {
        self.slow.as_ref().and_then(|(_, slow)| slow.mig.as_deref()).unwrap_or_default()
    }
}

/// What changes all the time and costs little to ask.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fast {
    /// Bytes.
    pub memory: Option<Memory>,
    /// Percent of the last sample period in which a kernel was resident, and in which memory was read or
    /// written. Not with MIG.
    pub utilization: Option<(u32, u32)>,
    /// The highest percent of NVML's own samples since the last round. Asked where nothing is profiled.
    pub utilization_peak: Option<u32>,
    /// Milliwatts.
    pub power: Option<u32>,
    /// Millijoules since the driver was loaded.
    pub energy: Option<u64>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Degrees Celsius of the memory.
    pub memory_temperature: Option<u64>,
    /// MHz of the streaming multiprocessors.
    pub sm_clock: Option<u32>,
    /// MHz of the memory.
    pub memory_clock: Option<u32>,
    /// 0 is the fastest.
    pub performance_state: Option<u8>,
    /// Why the clocks are what they are: NVML's bits.
    pub clock_events: Option<u64>,
    /// Nanoseconds that each of `CLOCK_EVENT_TIMES` held the clocks down.
    pub clock_event_times: [Option<u64>; 5],
    /// Bytes sent over PCIe.
    pub pcie_sent: Option<u64>,
    /// Bytes received over PCIe.
    pub pcie_received: Option<u64>,
    /// KiB sent and received over all NVLinks; nothing where there are none.
    pub nvlink: Option<(u64, u64)>,
    /// Bytes a second over all NVLinks, sent and received together, since the last round.
    pub nvlink_rate: Option<f64>,
    /// 0 none, 1 reset the GPU, 2 reboot, 3 drain peers, 4 drain and reset, 5 recover the IMEX domain.
    pub recovery_action: Option<u64>,
    /// Percent of the encoder and of the decoder; asked where DCGM's names are wanted.
    pub codecs: (Option<u32>, Option<u32>),
    /// Degrees Celsius until heat slows it down.
    pub thermal_margin: Option<i32>,
    /// What the profiling counters say of the time since the last round. From Hopper on.
    pub profile: Option<Profile>,
    /// The same of each GPU instance, by its number, where it is cut into some.
    pub instances: BTreeMap<u32, Profile>,
}

/// Shares of time (0 to 1) between two readings of the profiling counters: nothing is missed between them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Profile {
    /// Any part of the graphics engine.
    pub graphics: Option<f64>,
    /// The streaming multiprocessors, on average.
    pub sm: Option<f64>,
    /// Warps that are resident, of those that fit.
    pub sm_occupancy: Option<f64>,
    /// The tensor cores.
    pub tensor: Option<f64>,
    /// The interface to the memory.
    pub dram: Option<f64>,
    /// Bytes a second over PCIe: sent, received.
    pub pcie: (Option<f64>, Option<f64>),
}

/// Bytes of framebuffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// The driver's.
    pub reserved: u64,
    /// Allocated by processes.
    pub used: u64,
    /// The rest.
    pub free: u64,
}

/// What changes seldom, or costs more to ask.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slow {
    /// Milliwatts that the card may take now.
    pub power_limit: Option<u32>,
    /// Since the driver was loaded: corrected, uncorrected.
    pub ecc_volatile: (Option<u64>, Option<u64>),
    /// In the GPU's life: corrected, uncorrected.
    pub ecc_aggregate: (Option<u64>, Option<u64>),
    /// Rows remapped for correctable and for uncorrectable errors. From Ampere on.
    pub remapped_rows: (Option<u64>, Option<u64>),
    /// A remap waits for the next reset.
    pub remap_pending: Option<bool>,
    /// A row could not be remapped.
    pub remap_failed: Option<bool>,
    /// Pages retired for single and for double bit errors. Before Ampere.
    pub retired_pages: (Option<u64>, Option<u64>),
    /// Pages wait for the next reboot to be retired.
    pub retired_pending: Option<bool>,
    /// So many errors of the SRAM could not be corrected that the GPU should be replaced.
    pub sram_exceeded: Option<bool>,
    /// How it stands in the fabric of its NVSwitches; nothing where there is none.
    pub fabric: Option<Fabric>,
    /// Packets sent again over PCIe. Not zero on healthy cards.
    pub pcie_replays: Option<u64>,
    /// Compute, graphics and MPS processes; nothing where this agent may not see them.
    pub processes: Option<[u64; 3]>,
    /// What it is cut into; nothing where it is in one piece.
    pub mig: Option<Vec<MigDevice>>,
}

impl Snapshot {
    /// Nothing is known yet.
    pub(super) const fn new(is_on: bool) -> Self {
        let driver = if is_on { Driver::Starting } else { Driver::Off };
        Self { driver, gpus: Vec::new(), round: None }
    }
}
