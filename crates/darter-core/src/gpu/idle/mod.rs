//! Whether a GPU does nothing, and whether that is known well enough to take its node away.
//!
//! **Two independent witnesses for idle, one for busy, missing data is busy.** No single number will do: one
//! thread on the GPU shows a utilisation of 100 %, a look every five seconds sees only a part of the time, a
//! server that waits holds all of the memory, and a GPU that no pod asked for may have work all the same.
//! Not here: what a scaler does with it.

mod floor;
#[cfg(test)]
mod tests;
mod window;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gpu::Time;
pub use floor::Floor;
pub use window::Idle;

/// What a GPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Nobody has it, no program is on it, nothing is in its memory, and it does nothing.
    Empty,
    /// It does nothing, and it is not known to be empty: a server that waits, or a list of processes that
    /// cannot be read.
    LoadedIdle,
    /// It works.
    Busy,
    /// That cannot be told: to be taken for busy.
    Unknown,
}

/// One reading of one GPU. `None`: not read, or not supported.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sample {
    /// When.
    pub at: Time,
    /// NVML's utilisation, in percent. `None` with MIG.
    pub utilization_percent: Option<u8>,
    /// The highest of NVML's own samples of it since the last reading.
    pub utilization_max_percent: Option<u8>,
    /// The share of SMs that were active since the last reading (GPM; with MIG the highest of its instances).
    pub sm_active_ratio: Option<f64>,
    /// Clock event reason 0x1.
    pub is_idle_bit_set: Option<bool>,
    /// The energy counter, in millijoules. With MIG that of the whole GPU.
    pub energy_millijoules: Option<u64>,
    /// The power now, in milliwatts: in place of the counter.
    pub power_milliwatts: Option<u64>,
    /// Bytes over PCIe so far, in both directions. The counter may wrap.
    pub pcie_bytes: Option<u64>,
    /// Memory in use, without what the driver reserves.
    pub memory_used_bytes: Option<u64>,
    /// Processes on it. `None` without the right to see those of others: an empty list says nothing then.
    pub processes: Option<u32>,
    /// Whether a pod has it, by the kubelet's word.
    pub is_allocated: Option<bool>,
    /// Whether it is cut up by MIG: then it has no utilisation.
    pub has_mig: bool,
}

/// Who says something about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Witness {
    /// Kernels on the GPU: utilisation, NVML's samples, GPM. The highest ratio of the window.
    Activity,
    /// The driver's idle bit: the share of readings that have it.
    IdleBit,
    /// Watts over the window against the least that this GPU was seen to take.
    Power,
    /// Bytes a second over PCIe. It can say busy and never idle: a kernel that computes copies nothing.
    Pcie,
    /// Bytes of memory in use. It says idle where there is nothing; what is loaded may wait.
    Memory,
    /// Processes. It says idle where there are none.
    Processes,
    /// 1 where a pod has it. It says neither: an allocated GPU may wait, another may be used past the kubelet.
    Allocation,
}

/// What a witness says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Says {
    /// It does nothing.
    Idle,
    /// It works.
    Busy,
    /// Neither, or not known.
    Nothing,
}

/// What one witness says, and why.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evidence {
    /// Who.
    pub witness: Witness,
    /// What.
    pub says: Says,
    /// Its value over the window, in the unit of the witness.
    pub value: Option<f64>,
    /// What the value is compared with.
    pub limit: Option<f64>,
    /// How old its last reading is.
    pub age: Option<Duration>,
}

/// What a GPU does, since when, and by whose word.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Idleness {
    /// What it does.
    pub state: State,
    /// Since when that is the conclusion.
    pub since: Time,
    /// Since when it is Empty or LoadedIdle, whichever of them.
    pub idle_since: Option<Time>,
    /// The share of readings in the long window in which it was at work. `None` without a reading that tells.
    pub busy_ratio: Option<f64>,
    /// Every witness.
    pub evidence: Vec<Evidence>,
}

/// What counts as idle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// All of the evidence is from this long; readings of the whole of it are needed.
    pub window: Duration,
    /// `busy_ratio` is of this long.
    pub long_window: Duration,
    /// Readings that are further apart have a hole between them: three times the interval.
    pub gap: Duration,
    /// So many readings the window needs.
    pub readings_min: usize,
    /// After the driver came up a GPU looks busy for a while, with nothing on it.
    pub settle: Duration,
    /// The share of readings that need the idle bit. Whoever looks wakes it now and then.
    pub idle_bit_ratio: f64,
    /// So much over the least power is still idle.
    pub power_tolerance: f64,
    /// GPM's ratio below which nothing runs.
    pub sm_active_ratio: f64,
    /// Bytes a second over PCIe that are next to none.
    pub pcie_bytes_per_second: f64,
    /// Memory below which nothing is loaded, over `memory_baseline`.
    pub memory_empty_bytes: u64,
    /// What is in use with nothing loaded.
    pub memory_baseline_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(120),
            long_window: Duration::from_secs(900),
            gap: Duration::from_secs(15),
            readings_min: 12,
            settle: Duration::from_secs(30),
            idle_bit_ratio: 0.95,
            power_tolerance: 0.15,
            sm_active_ratio: 0.01,
            pcie_bytes_per_second: 1024.0 * 1024.0,
            memory_empty_bytes: 64 << 20,
            memory_baseline_bytes: 0,
        }
    }
}
