//! What one GPU is asked, tier by tier.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_core::gpu::readiness::Fabric;
use nvml_wrapper::Device;
use nvml_wrapper::enum_wrappers::device::{Clock, PerformanceState, Sampling, TemperatureSensor};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::{GpmSample, gpm_metrics_get};
use nvml_wrapper::structs::device::FieldId;

use super::calls::{Questions, is_unsupported};
use super::mig;
use super::sample::{Fast, Identity, Memory, Profile, Slow};

/// Field ids of nvml.h, as they were numbered before driver 580.82: the wrapper knows the new numbers.
mod field {
    pub(super) const ECC_SINGLE_VOLATILE: u32 = 3;
    pub(super) const ECC_DOUBLE_VOLATILE: u32 = 4;
    pub(super) const ECC_SINGLE_AGGREGATE: u32 = 5;
    pub(super) const ECC_DOUBLE_AGGREGATE: u32 = 6;
    pub(super) const RETIRED_SINGLE: u32 = 29;
    pub(super) const RETIRED_DOUBLE: u32 = 30;
    pub(super) const RETIRED_PENDING: u32 = 31;
    pub(super) const SW_POWER_CAP: u32 = 74;
    pub(super) const SYNC_BOOST: u32 = 76;
    pub(super) const MEMORY_TEMPERATURE: u32 = 82;
    pub(super) const PCIE_REPLAYS: u32 = 94;
    pub(super) const REMAPPED_CORRECTABLE: u32 = 142;
    pub(super) const REMAPPED_UNCORRECTABLE: u32 = 143;
    pub(super) const REMAP_PENDING: u32 = 144;
    pub(super) const REMAP_FAILURE: u32 = 145;
    pub(super) const PCIE_SENT: u32 = 197;
    pub(super) const PCIE_RECEIVED: u32 = 198;
    pub(super) const RECOVERY_ACTION: u32 = 230;
    pub(super) const SW_THERMAL: u32 = 251;
    pub(super) const HW_THERMAL: u32 = 252;
    pub(super) const HW_POWER_BRAKE: u32 = 253;
}

/// Why clocks are held down, where NVML counts for how long: the label, and the bit of each.
pub(super) const CLOCK_EVENT_TIMES: [&str; 5] =
    ["sw_power_cap", "sync_boost", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"];

/// Why clocks are what they are: the bit, and the label.
pub(super) const CLOCK_EVENTS: [(u64, &str); 9] = [
    (0x1, "gpu_idle"),
    (0x2, "applications_clocks_setting"),
    (0x4, "sw_power_cap"),
    (0x8, "hw_slowdown"),
    (0x10, "sync_boost"),
    (0x20, "sw_thermal_slowdown"),
    (0x40, "hw_thermal_slowdown"),
    (0x80, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
];

/// How often a list of processes that grew meanwhile is asked for again.
const LISTED_AGAIN: u32 = 3;

const FAST: [u32; 9] = [
    field::SW_POWER_CAP,
    field::SYNC_BOOST,
    field::SW_THERMAL,
    field::HW_THERMAL,
    field::HW_POWER_BRAKE,
    field::MEMORY_TEMPERATURE,
    field::PCIE_SENT,
    field::PCIE_RECEIVED,
    field::RECOVERY_ACTION,
];

const SLOW: [u32; 12] = [
    field::ECC_SINGLE_VOLATILE,
    field::ECC_DOUBLE_VOLATILE,
    field::ECC_SINGLE_AGGREGATE,
    field::ECC_DOUBLE_AGGREGATE,
    field::RETIRED_SINGLE,
    field::RETIRED_DOUBLE,
    field::RETIRED_PENDING,
    field::REMAPPED_CORRECTABLE,
    field::REMAPPED_UNCORRECTABLE,
    field::REMAP_PENDING,
    field::REMAP_FAILURE,
    field::PCIE_REPLAYS,
];

/// Who it is. Without a UUID nothing can be said of it.
pub(super) fn identity(index: u32, device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> Identity {
    Identity {
        index,
        uuid: gpu.ask("uuid", || device.uuid()).unwrap_or_default(),
        name: gpu.ask("name", || device.name()),
        pci_bus_id: gpu.ask("pci_info", || device.pci_info()).map(|pci| pci.bus_id),
        minor: gpu.ask("minor_number", || device.minor_number()),
        serial: gpu.ask("serial", || device.serial()),
        vbios: gpu.ask("vbios_version", || device.vbios_version()),
        architecture: gpu.ask("architecture", || device.architecture()).map(|architecture| format!("{architecture}")),
        compute_capability: gpu
            .ask("compute_capability", || device.cuda_compute_capability())
            .map(|capability| (capability.major, capability.minor)),
        is_mig: mig::is_on(device, gpu),
    }
}

/// What costs little; `profile` and those of its `instances` were read before.
pub(super) fn fast(
    device: &Device<'_>,
    gpu: &mut Questions<'_, '_>,
    asks_codecs: bool,
    peaks: &mut Peaks,
    profile: Option<Profile>,
    instances: BTreeMap<u32, Profile>,
) -> Fast {
    let memory = gpu.ask("memory_info", || device.memory_info());
    let utilization = gpu.ask("utilization_rates", || device.utilization_rates());
    let fields = fields(device, gpu, "fast_fields", &FAST);
    let of = |id: u32| fields.iter().find(|(field, _)| *field == id).map(|(_, value)| *value);
    Fast {
        memory: memory.map(Memory::from),
        utilization: utilization.map(|utilization| (utilization.gpu, utilization.memory)),
        // Profiling misses nothing between two rounds: there is no more to be seen.
        utilization_peak: if profile.is_none() { peaks.read(device, gpu) } else { None },
        power: gpu.ask("power_usage", || device.power_usage()),
        energy: gpu.ask("total_energy_consumption", || device.total_energy_consumption()),
        temperature: gpu.ask("temperature", || device.temperature(TemperatureSensor::Gpu)),
        memory_temperature: of(field::MEMORY_TEMPERATURE),
        sm_clock: gpu.ask("sm_clock", || device.clock_info(Clock::SM)),
        memory_clock: gpu.ask("memory_clock", || device.clock_info(Clock::Memory)),
        performance_state: gpu.ask("performance_state", || device.performance_state()).and_then(number_of),
        clock_events: gpu.ask("clock_events", || device.current_throttle_reasons()).map(|reasons| reasons.bits()),
        clock_event_times: [
            of(field::SW_POWER_CAP),
            of(field::SYNC_BOOST),
            of(field::SW_THERMAL),
            of(field::HW_THERMAL),
            of(field::HW_POWER_BRAKE),
        ],
        pcie_sent: of(field::PCIE_SENT),
        pcie_received: of(field::PCIE_RECEIVED),
        nvlink: gpu.ask("nvlink", || darter_nvml::nvlink_kib(device)).flatten(),
        // It takes two rounds.
        nvlink_rate: None,
        recovery_action: of(field::RECOVERY_ACTION),
        codecs: if asks_codecs { codecs(device, gpu) } else { (None, None) },
        thermal_margin: gpu.ask("thermal_margin", || darter_nvml::thermal_margin(device)),
        profile,
        instances,
    }
}

fn codecs(device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> (Option<u32>, Option<u32>) {
    let encoder = gpu.ask("encoder_utilization", || device.encoder_utilization());
    let decoder = gpu.ask("decoder_utilization", || device.decoder_utilization());
    (encoder.map(|used| used.utilization), decoder.map(|used| used.utilization))
}

/// NVML's own samples of the utilization, several a second, of which a look every few seconds sees one: those that
/// were seen.
#[derive(Default)]
pub(super) struct Peaks {
    /// When the newest of them was taken, by NVML's clock.
    last: Option<u64>,
}

impl Peaks {
    /// The highest percent since the last call. The first says nothing: its samples are of before anybody looked.
    fn read(&mut self, device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> Option<u32> {
        let newer = || match device.samples(Sampling::GpuUtilization, self.last) {
            // None is newer.
            Err(NvmlError::NotFound) => Ok(Vec::new()),
            said => said,
        };
        let samples = gpu.ask("utilization_samples", newer)?;
        let before = self.last;
        self.last = samples.iter().map(|sample| sample.timestamp).max().max(before);
        let percent = samples.iter().filter_map(|sample| match sample.value {
            SampleValue::U32(percent) if percent <= 100 => Some(percent),
            _ => None,
        });
        percent.max().filter(|_| before.is_some())
    }
}

/// The profiling counters of a GPU, as they were last read.
#[derive(Default)]
pub(super) struct Profiler<'n>(Option<(Instant, GpmSample<'n>)>);

impl<'n> Profiler<'n> {
    /// What the counters of a whole GPU say of the time since they were read last. Too little time says nothing yet.
    pub(super) fn read(&mut self, device: &Device<'n>, gpu: &mut Questions<'_, '_>) -> Option<Profile> {
        self.compare(device, gpu, |gpu| gpu.ask("gpm_sample", || device.gpm_sample()))
    }

    /// The same of one GPU instance.
    pub(super) fn read_instance(
        &mut self,
        device: &Device<'n>,
        instance: u32,
        gpu: &mut Questions<'_, '_>,
    ) -> Option<Profile> {
        self.compare(device, gpu, |gpu| gpu.ask("gpm_mig_sample", || device.gpm_mig_sample(instance)))
    }

    fn compare<'q, 'a>(
        &mut self,
        device: &Device<'n>,
        gpu: &mut Questions<'q, 'a>,
        take: impl FnOnce(&mut Questions<'q, 'a>) -> Option<GpmSample<'n>>,
    ) -> Option<Profile> {
        if self.0.as_ref().is_some_and(|(at, _)| at.elapsed() < PROFILE_MIN) {
            return None;
        }
        let sample = take(gpu)?;
        let (at, before) = self.0.replace((Instant::now(), sample))?;
        let (_, after) = self.0.as_ref()?;
        if at.elapsed() > PROFILE_MAX {
            return None;
        }
        let answers = gpu.ask("gpm_metrics", || gpm_metrics_get(device.nvml(), &before, after, &PROFILED))?;
        let mut values = answers.into_iter().map(|answer| answer.ok().map(|answer| answer.value));
        let mut next = || values.next().flatten();
        let share = |percent: Option<f64>| percent.map(|percent| percent / 100.0);
        let bytes = |mib: Option<f64>| mib.map(|mib| mib * 1_048_576.0);
        Some(Profile {
            graphics: share(next()),
            sm: share(next()),
            sm_occupancy: share(next()),
            tensor: share(next()),
            dram: share(next()),
            pcie: (bytes(next()), bytes(next())),
        })
    }
}

/// In the order of the fields of `Profile`.
const PROFILED: [GpmMetricId; 7] = [
    GpmMetricId::GraphicsUtil,
    GpmMetricId::SmUtil,
    GpmMetricId::SmOccupancy,
    GpmMetricId::AnyTensorUtil,
    GpmMetricId::DramBwUtil,
    GpmMetricId::PcieTxPerSec,
    GpmMetricId::PcieRxPerSec,
];

/// What the counters say of a shorter time is noise, and of a longer one not of now.
const PROFILE_MIN: Duration = Duration::from_millis(900);
const PROFILE_MAX: Duration = Duration::from_secs(600);

/// What changes seldom. `sees_processes`: this agent may see those of the whole host; one that may not is told
/// of none, which says nothing.
pub(super) fn slow(device: &Device<'_>, gpu: &mut Questions<'_, '_>, sees_processes: bool) -> Slow {
    let fields = fields(device, gpu, "slow_fields", &SLOW);
    let of = |id: u32| fields.iter().find(|(field, _)| *field == id).map(|(_, value)| *value);
    let is = |id: u32| of(id).map(|value| value != 0);
    Slow {
        power_limit: gpu.ask("enforced_power_limit", || device.enforced_power_limit()),
        ecc_volatile: (of(field::ECC_SINGLE_VOLATILE), of(field::ECC_DOUBLE_VOLATILE)),
        ecc_aggregate: (of(field::ECC_SINGLE_AGGREGATE), of(field::ECC_DOUBLE_AGGREGATE)),
        remapped_rows: (of(field::REMAPPED_CORRECTABLE), of(field::REMAPPED_UNCORRECTABLE)),
        remap_pending: is(field::REMAP_PENDING),
        remap_failed: is(field::REMAP_FAILURE),
        retired_pages: (of(field::RETIRED_SINGLE), of(field::RETIRED_DOUBLE)),
        retired_pending: is(field::RETIRED_PENDING),
        sram_exceeded: gpu.ask("sram_ecc_status", || darter_nvml::is_sram_threshold_exceeded(device)),
        fabric: gpu.ask("fabric_info", || darter_nvml::fabric(device)).map(|fabric| {
            let darter_nvml::Fabric { state, status } = fabric;
            Fabric { state, status }
        }),
        pcie_replays: of(field::PCIE_REPLAYS),
        processes: if sees_processes { processes(device, gpu) } else { None },
        mig: mig::is_on(device, gpu).then(|| mig::devices(device, gpu)),
    }
}

fn processes(device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> Option<[u64; 3]> {
    let compute = gpu.ask("compute_processes", || count(|| device.running_compute_processes()))?;
    // A GPU that knows no such processes has none; one that does not say is not known to have none.
    let graphics = gpu.ask("graphics_processes", || none_if_unknown(count(|| device.running_graphics_processes())))?;
    let mps = gpu.ask("mps_processes", || none_if_unknown(count(|| device.mps_running_compute_processes())))?;
    Some([compute, graphics, mps])
}

fn none_if_unknown(said: Result<u64, NvmlError>) -> Result<u64, NvmlError> {
    match said {
        Err(error) if is_unsupported(&error) => Ok(0),
        said => said,
    }
}

/// The wrapper asks how many there are, then for so many and a few: more may have started in between.
fn count<T>(list: impl Fn() -> Result<Vec<T>, NvmlError>) -> Result<u64, NvmlError> {
    let outgrown = |said: &Result<Vec<T>, NvmlError>| matches!(said, Err(NvmlError::InsufficientSize(_)));
    let mut said = list();
    for _ in 0..LISTED_AGAIN {
        if !outgrown(&said) {
            break;
        }
        said = list();
    }
    said.map(|list| list.len() as u64)
}

/// The values of those fields that this GPU has, in one call.
fn fields(device: &Device<'_>, gpu: &mut Questions<'_, '_>, name: &'static str, ids: &[u32]) -> Vec<(u32, u64)> {
    let asked: Vec<FieldId> = ids.iter().map(|id| FieldId(*id)).collect();
    let answers = gpu.ask(name, || device.field_values_for(&asked)).unwrap_or_default();
    let value = |answer: &SampleValue| match *answer {
        SampleValue::U32(value) => Some(u64::from(value)),
        SampleValue::U64(value) => Some(value),
        SampleValue::I64(value) => u64::try_from(value).ok(),
        SampleValue::F64(_) => None,
    };
    // In the order that they were asked: the answer carries the number of the driver's own scheme.
    let answers = ids.iter().zip(answers);
    answers.filter_map(|(id, answer)| Some((*id, value(answer.ok()?.value.ok().as_ref()?)?))).collect()
}

const fn number_of(state: PerformanceState) -> Option<u8> {
    Some(match state {
        PerformanceState::Zero => 0,
        PerformanceState::One => 1,
        PerformanceState::Two => 2,
        PerformanceState::Three => 3,
        PerformanceState::Four => 4,
        PerformanceState::Five => 5,
        PerformanceState::Six => 6,
        PerformanceState::Seven => 7,
        PerformanceState::Eight => 8,
        PerformanceState::Nine => 9,
        PerformanceState::Ten => 10,
        PerformanceState::Eleven => 11,
        PerformanceState::Twelve => 12,
        PerformanceState::Thirteen => 13,
        PerformanceState::Fourteen => 14,
        PerformanceState::Fifteen => 15,
        PerformanceState::Unknown => return None,
    })
}
