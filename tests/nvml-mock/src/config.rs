//! What the configuration of the mock can say: one type for each table of the TOML file.
//!
//! A value that is absent is one that the GPU does not support. A key that nobody knows is an error:
//! a test that misspells one must not pass because nothing happened.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// One machine with its driver and its GPUs. `file` says how a file becomes one.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Do not say on stderr, at every init, that this is a mock.
    #[serde(default)]
    pub quiet: bool,
    /// As `590.48.01`: decides how fields 251 to 273 are numbered.
    pub driver_version: Option<String>,
    /// As `13.590.48.01`.
    pub nvml_version: Option<String>,
    /// As 13010 for CUDA 13.1.
    pub cuda_version: Option<i32>,
    /// What init returns, if not 0.
    #[serde(default)]
    pub init: u32,
    /// What GetCount says, where GPUs at the end are not found any more.
    pub reported_count: Option<u32>,
    /// Processes by pid, for SystemGetProcessName.
    #[serde(default, deserialize_with = "numbered")]
    pub process_names: BTreeMap<u32, String>,
    /// Each GPU, in the order of its index.
    #[serde(default)]
    pub gpus: Vec<Gpu>,
    /// Calls that do not do what they do.
    #[serde(default)]
    pub overrides: Vec<Override>,
    /// What event sets hear of.
    #[serde(default)]
    pub events: Vec<Event>,
}

/// One GPU.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// It fell off the bus: every call that names it returns 15.
    #[serde(default)]
    pub lost: bool,
    pub name: Option<String>,
    pub uuid: Option<String>,
    pub serial: Option<String>,
    pub minor: Option<u32>,
    pub vbios: Option<String>,
    /// NVML_DEVICE_ARCH_*: 6 Turing, 7 Ampere, 8 Ada, 9 Hopper.
    pub architecture: Option<u32>,
    /// Major and minor.
    pub compute_capability: Option<[i32; 2]>,
    pub persistence: Option<bool>,
    pub pci: Option<Pci>,
    pub memory: Option<Memory>,
    pub utilization: Option<Utilization>,
    /// Percent.
    pub encoder: Option<u32>,
    /// Percent.
    pub decoder: Option<u32>,
    /// Of the GPU itself, in degrees Celsius. That of the memory is field 82.
    pub temperature: Option<u32>,
    /// Degrees to the limit (T.limit).
    pub temperature_margin: Option<i32>,
    /// In mW.
    pub power: Option<u32>,
    /// In mW.
    pub power_limit: Option<u32>,
    /// In mJ, since the driver was loaded.
    pub energy: Option<u64>,
    /// And it grows by the power over the time, from the first time that somebody asks.
    #[serde(default)]
    pub energy_follows_power: bool,
    #[serde(default)]
    pub clocks: Clocks,
    #[serde(default)]
    pub max_clocks: Clocks,
    /// 0 to 15.
    pub performance_state: Option<u32>,
    /// Bits of nvmlClocksEventReasons.
    pub event_reasons: Option<u64>,
    pub pcie: Option<Pcie>,
    pub ecc: Option<Ecc>,
    pub sram_ecc: Option<SramEcc>,
    pub retired_pages: Option<RetiredPages>,
    pub remapped_rows: Option<RemappedRows>,
    /// By NVML_PERF_POLICY_*.
    #[serde(default, deserialize_with = "numbered")]
    pub violations: BTreeMap<u32, Violation>,
    pub fabric: Option<Fabric>,
    /// Values that only GetFieldValues has; those that another call has too follow from that one.
    #[serde(default)]
    pub fields: BTreeMap<FieldKey, FieldValue>,
    /// By NVML_*_SAMPLES.
    #[serde(default, deserialize_with = "numbered")]
    pub samples: BTreeMap<u32, Vec<Sample>>,
    pub compute_processes: Option<Vec<Process>>,
    pub graphics_processes: Option<Vec<Process>>,
    pub mps_processes: Option<Vec<Process>>,
    pub process_utilization: Option<Vec<ProcessUtilization>>,
    pub mig: Option<Mig>,
    /// nvmlEventType* bits.
    pub supported_events: Option<u64>,
    pub gpm: Option<Gpm>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pci {
    #[serde(default)]
    pub domain: u32,
    pub bus: u32,
    #[serde(default)]
    pub device: u32,
    /// Device in the upper half, vendor in the lower, as `0x233510DE`.
    pub device_id: u32,
    #[serde(default)]
    pub subsystem_id: u32,
}

/// In bytes. What is free follows.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    pub total: u64,
    pub reserved: u64,
    pub used: u64,
}

/// In percent.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Utilization {
    pub gpu: u32,
    pub memory: u32,
}

/// In MHz.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clocks {
    pub graphics: Option<u32>,
    pub sm: Option<u32>,
    pub memory: Option<u32>,
    pub video: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pcie {
    /// KiB/s.
    pub tx: Option<u32>,
    /// KiB/s.
    pub rx: Option<u32>,
    pub replays: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ecc {
    pub enabled: bool,
    /// After the next reset; the same if absent.
    pub pending: Option<bool>,
    pub corrected: Option<EccErrors>,
    pub uncorrected: Option<EccErrors>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EccErrors {
    pub volatile: u64,
    pub aggregate: u64,
}

/// EccSramErrorStatus, version 1.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SramEcc {
    pub aggregate_uncorrected_parity: u64,
    pub aggregate_uncorrected_secded: u64,
    pub aggregate_corrected: u64,
    pub volatile_uncorrected_parity: u64,
    pub volatile_uncorrected_secded: u64,
    pub volatile_corrected: u64,
    pub threshold_exceeded: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetiredPages {
    pub single_bit: Vec<RetiredPage>,
    pub double_bit: Vec<RetiredPage>,
    pub pending: bool,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetiredPage {
    pub address: u64,
    /// In us since 1970.
    pub timestamp: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemappedRows {
    pub corrected: u32,
    pub uncorrected: u32,
    pub pending: bool,
    pub failed: bool,
}

/// In ns.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Violation {
    pub reference: u64,
    pub violation: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fabric {
    /// 0 not supported, 1 not started, 2 in progress, 3 completed.
    pub state: u8,
    /// A return code.
    #[serde(default)]
    pub status: u32,
    #[serde(default)]
    pub clique_id: u32,
    #[serde(default)]
    pub cluster_uuid: [u8; 16],
    #[serde(default)]
    pub health_mask: u32,
    /// Version 3 only.
    #[serde(default)]
    pub health_summary: u8,
    /// The driver is of before version 3.
    #[serde(default)]
    pub is_old: bool,
}

/// `83`, or with a scope `138/0`, `138/all` (all links: u32::MAX). No scope is scope 0.
///
/// Fields 251 to 273 are meant as drivers before 580.82 number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldKey {
    pub id: u32,
    pub scope: u32,
}

impl<'de> Deserialize<'de> for FieldKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (id, scope) = text.split_once('/').unwrap_or((&text, "0"));
        let scope = if scope == "all" { Ok(u32::MAX) } else { scope.parse() };
        match (id.parse(), scope) {
            (Ok(id), Ok(scope)) => Ok(Self { id, scope }),
            _ => Err(D::Error::custom(format!("`{text}` is no field: an id, or id/scope"))),
        }
    }
}

/// `{ u32 = 32 }`: the type is part of what the driver answers.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FieldValue {
    F64(f64),
    U32(u32),
    U64(u64),
    I64(i64),
    I32(i32),
    U16(u16),
    /// No value but a return code.
    Code(u32),
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// In us since 1970.
    pub timestamp: u64,
    pub value: u32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    pub pid: u32,
    /// In bytes; absent where the driver cannot tell (u64::MAX).
    pub used: Option<u64>,
    pub gpu_instance: Option<u32>,
    pub compute_instance: Option<u32>,
}

/// In percent.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessUtilization {
    pub pid: u32,
    /// In us since 1970.
    pub timestamp: u64,
    #[serde(default)]
    pub sm: u32,
    #[serde(default)]
    pub memory: u32,
    #[serde(default)]
    pub encoder: u32,
    #[serde(default)]
    pub decoder: u32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mig {
    pub enabled: bool,
    /// After the next reset; the same if absent.
    pub pending: Option<bool>,
    /// Indices go from 0 to this, with holes.
    pub max_devices: u32,
    #[serde(default)]
    pub devices: Vec<MigDevice>,
}

/// One MIG device: a compute instance of a GPU instance.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigDevice {
    pub index: u32,
    pub name: Option<String>,
    pub uuid: Option<String>,
    pub gpu_instance: Option<u32>,
    pub compute_instance: Option<u32>,
    /// Of the GPU instance, whose compute instances share it.
    pub memory: Option<Memory>,
    pub attributes: Option<Attributes>,
    pub compute_processes: Option<Vec<Process>>,
    pub graphics_processes: Option<Vec<Process>>,
    pub mps_processes: Option<Vec<Process>>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attributes {
    pub multiprocessors: u32,
    pub gpu_instance_slices: u32,
    pub compute_instance_slices: u32,
    pub memory_mib: u64,
    #[serde(default)]
    pub copy_engines: u32,
    #[serde(default)]
    pub decoders: u32,
    #[serde(default)]
    pub encoders: u32,
    #[serde(default)]
    pub jpeg: u32,
    #[serde(default)]
    pub ofa: u32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpm {
    pub supported: bool,
    /// By NVML_GPM_METRIC_*.
    #[serde(default, deserialize_with = "numbered")]
    pub metrics: BTreeMap<u32, f64>,
    /// The same of each GPU instance.
    #[serde(default, deserialize_with = "numbered")]
    pub instances: BTreeMap<u32, BTreeMap<GpmMetricId, f64>>,
}

/// A key of a table, as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GpmMetricId(pub u32);

impl<'de> Deserialize<'de> for GpmMetricId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        number(&String::deserialize(deserializer)?).map(Self).map_err(D::Error::custom)
    }
}

/// A call that does not do what it does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// As `nvmlDeviceGetPowerUsage`; `*` is any that names the GPU, or any at all without one.
    pub symbol: String,
    /// Only calls that name this GPU, or a MIG device of it.
    pub gpu: Option<u32>,
    /// What it returns instead.
    pub return_code: Option<u32>,
    /// So many calls are as ever, first.
    #[serde(default)]
    pub after_calls: u64,
    /// And only so many are not, then.
    pub calls: Option<u64>,
    /// It waits first.
    #[serde(default)]
    pub delay_ms: u64,
    /// It does not return, as long as the configuration says so.
    #[serde(default)]
    pub hang: bool,
    /// It ends the process, as a fault in the library does.
    #[serde(default)]
    pub crash: bool,
}

/// Something that happens to a GPU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Tells events apart: each happens once in the life of a process.
    pub id: u64,
    pub gpu: u32,
    /// An nvmlEventType* bit; an XID if absent.
    #[serde(default = "xid")]
    pub kind: u64,
    /// The XID.
    pub data: u64,
    /// Since the first init.
    #[serde(default)]
    pub after_ms: u64,
    pub gpu_instance: Option<u32>,
    pub compute_instance: Option<u32>,
}

fn xid() -> u64 {
    nvml_wrapper_sys::bindings::nvmlEventTypeXidCriticalError.into()
}

/// Keys of TOML tables are text.
fn numbered<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, T>, D::Error> {
    let table = BTreeMap::<String, T>::deserialize(deserializer)?;
    table.into_iter().map(|(key, value)| Ok((number(&key).map_err(D::Error::custom)?, value))).collect()
}

fn number(text: &str) -> Result<u32, String> {
    u32::from_str(text).map_err(|error| format!("`{text}` is no number: {error}"))
}
