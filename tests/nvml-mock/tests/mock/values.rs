//! Every value of every fixture, read back through nvml-wrapper; and the numbers of real GPUs.

use std::collections::BTreeMap;
use std::fmt::Debug;

use nvidia_ml_mock::config::{Clocks, Config, EccErrors, FieldKey, FieldValue, Gpu, MigDevice, Process};
use nvidia_ml_mock::file::FIXTURES;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{
    Clock, EccCounter, MemoryError, PcieUtilCounter, PerformancePolicy, RetirementCause, Sampling, TemperatureSensor,
};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::{GpmSample, gpm_metrics_get};
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::{Device, Nvml};

use crate::Mock;

/// What was read is what the configuration says; where that says nothing, it is not supported.
#[track_caller]
fn same<T: PartialEq + Debug>(what: &str, read: Result<T, NvmlError>, configured: Option<T>) {
    match (read, configured) {
        (Ok(read), Some(configured)) => assert_eq!(read, configured, "{what}"),
        (Err(NvmlError::NotSupported), None) => (),
        (read, configured) => panic!("{what}: {read:?}, and configured is {configured:?}"),
    }
}

#[test]
fn every_value_of_every_fixture_comes_back() {
    let mut machines = 0;
    for (name, _) in FIXTURES {
        let (mock, config) = Mock::fixture(name);
        // Those that fail on purpose have tests of their own.
        if config.init != 0 || !config.overrides.is_empty() {
            continue;
        }
        machines += 1;
        machine(name, &mock, &config);
    }
    assert!(machines >= 15, "{machines}");
}

fn machine(what: &str, mock: &Mock, config: &Config) {
    let nvml = mock.open();
    same(what, nvml.sys_driver_version(), config.driver_version.clone());
    same(what, nvml.sys_nvml_version(), config.nvml_version.clone());
    same(what, nvml.sys_cuda_driver_version(), config.cuda_version);
    for (pid, process) in &config.process_names {
        assert_eq!(nvml.sys_process_name(*pid, 64).unwrap(), *process);
    }
    let count = config.reported_count.unwrap_or_else(|| config.gpus.len().try_into().unwrap());
    assert_eq!(nvml.device_count().unwrap(), count, "{what}");
    assert!(matches!(nvml.device_by_index(count), Err(NvmlError::InvalidArg)), "{what}");
    for (index, gpu) in (0..count).zip(&config.gpus) {
        let device = nvml.device_by_index(index).unwrap();
        assert_eq!(device.index().unwrap(), index);
        identity(&nvml, &device, gpu);
        telemetry(&device, gpu);
        health(&device, gpu);
        processes(&device, [&gpu.compute_processes, &gpu.graphics_processes, &gpu.mps_processes]);
        process_utilization(&device, gpu);
        fields(&device, gpu);
        gpm(&nvml, &device, gpu);
        mig(&nvml, &device, gpu);
    }
}

fn identity(nvml: &Nvml, device: &Device, gpu: &Gpu) {
    same("name", device.name(), gpu.name.clone());
    same("uuid", device.uuid(), gpu.uuid.clone());
    same("serial", device.serial(), gpu.serial.clone());
    same("minor", device.minor_number(), gpu.minor);
    same("vbios", device.vbios_version(), gpu.vbios.clone());
    same("architecture", device.architecture().map(|value| value.as_c()), gpu.architecture);
    let capability = device.cuda_compute_capability().map(|value| [value.major, value.minor]);
    same("compute capability", capability, gpu.compute_capability);
    same("persistence", device.is_in_persistent_mode(), gpu.persistence);
    let read = device.pci_info().map(|pci| {
        let (ids, place) = ((pci.pci_device_id, pci.pci_sub_system_id), (pci.domain, pci.bus, pci.device));
        (pci.bus_id, ids, place)
    });
    let bus_id = gpu.pci.as_ref().map(|pci| format!("{:08X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device));
    let configured = gpu
        .pci
        .as_ref()
        .zip(bus_id.clone())
        .map(|(pci, bus_id)| (bus_id, (pci.device_id, Some(pci.subsystem_id)), (pci.domain, pci.bus, pci.device)));
    same("pci", read, configured);
    let found = [
        gpu.uuid.as_deref().map(|uuid| nvml.device_by_uuid(uuid)),
        bus_id.map(|bus_id| nvml.device_by_pci_bus_id(bus_id)),
    ];
    for found in found.into_iter().flatten() {
        assert_eq!(found.unwrap().index().unwrap(), device.index().unwrap());
    }
}

fn telemetry(device: &Device, gpu: &Gpu) {
    let read = device.memory_info().map(|memory| [memory.total, memory.reserved, memory.used, memory.free]);
    let configured = gpu
        .memory
        .as_ref()
        .map(|memory| [memory.total, memory.reserved, memory.used, memory.total - memory.reserved - memory.used]);
    same("memory", read, configured);
    let read = device.utilization_rates().map(|rates| (rates.gpu, rates.memory));
    same("utilization", read, gpu.utilization.as_ref().map(|utilization| (utilization.gpu, utilization.memory)));
    same("encoder", device.encoder_utilization().map(|info| info.utilization), gpu.encoder);
    same("decoder", device.decoder_utilization().map(|info| info.utilization), gpu.decoder);
    same("temperature", device.temperature(TemperatureSensor::Gpu), gpu.temperature);
    same("power", device.power_usage(), gpu.power);
    same("power limit", device.enforced_power_limit(), gpu.power_limit);
    same("energy", device.total_energy_consumption(), gpu.energy);
    type Pick = fn(&Clocks) -> Option<u32>;
    let pick: [(Clock, Pick); 4] = [
        (Clock::Graphics, |clocks| clocks.graphics),
        (Clock::SM, |clocks| clocks.sm),
        (Clock::Memory, |clocks| clocks.memory),
        (Clock::Video, |clocks| clocks.video),
    ];
    for (domain, pick) in pick {
        same("clock", device.clock_info(domain), pick(&gpu.clocks));
        same("maximum clock", device.max_clock_info(domain), pick(&gpu.max_clocks));
    }
    same("performance state", device.performance_state().map(|state| state.as_c()), gpu.performance_state);
    let reasons = gpu.event_reasons.map(ThrottleReasons::from_bits_truncate);
    same("event reasons", device.current_throttle_reasons(), reasons);
    let pcie = gpu.pcie.clone().unwrap_or_default();
    same("PCIe out", device.pcie_throughput(PcieUtilCounter::Send), pcie.tx);
    same("PCIe in", device.pcie_throughput(PcieUtilCounter::Receive), pcie.rx);
    same("PCIe replays", device.pcie_replay_counter(), pcie.replays);
    for kind in [Sampling::Power, Sampling::GpuUtilization, Sampling::MemoryUtilization] {
        let read = device
            .samples(kind, None)
            .map(|samples| samples.into_iter().map(|sample| (sample.timestamp, sample.value)).collect::<Vec<_>>());
        let configured = gpu
            .samples
            .get(&kind.as_c())
            .map(|samples| samples.iter().map(|sample| (sample.timestamp, SampleValue::U32(sample.value))).collect());
        same("samples", read, configured);
    }
}

fn health(device: &Device, gpu: &Gpu) {
    let read = device.is_ecc_enabled().map(|mode| (mode.currently_enabled, mode.pending_enabled));
    let ecc = gpu.ecc.as_ref();
    same("ECC", read, ecc.map(|ecc| (ecc.enabled, ecc.pending.unwrap_or(ecc.enabled))));
    for (kind, errors) in [
        (MemoryError::Corrected, ecc.and_then(|ecc| ecc.corrected.clone())),
        (MemoryError::Uncorrected, ecc.and_then(|ecc| ecc.uncorrected.clone())),
    ] {
        let count = |pick: fn(EccErrors) -> u64| errors.clone().map(pick);
        let volatile = device.total_ecc_errors(kind, EccCounter::Volatile);
        same("ECC errors", volatile, count(|errors| errors.volatile));
        let aggregate = device.total_ecc_errors(kind, EccCounter::Aggregate);
        same("ECC errors", aggregate, count(|errors| errors.aggregate));
    }
    let retired = gpu.retired_pages.as_ref();
    for (cause, pages) in [
        (RetirementCause::MultipleSingleBitEccErrors, retired.map(|pages| &pages.single_bit)),
        (RetirementCause::DoubleBitEccError, retired.map(|pages| &pages.double_bit)),
    ] {
        let read = device
            .retired_pages(cause)
            .map(|pages| pages.into_iter().map(|page| (page.address, page.timestamp)).collect::<Vec<_>>());
        let configured = pages.map(|pages| pages.iter().map(|page| (page.address, page.timestamp)).collect());
        same("retired pages", read, configured);
    }
    same("pages to retire", device.are_pages_pending_retired(), retired.map(|pages| pages.pending));
    for policy in [PerformancePolicy::Power, PerformancePolicy::Thermal, PerformancePolicy::SyncBoost] {
        let configured = gpu.violations.get(&policy.as_c()).map(|time| (time.reference, time.violation));
        let read = device.violation_status(policy).map(|time| (time.reference_time, time.violation_time));
        same("violation", read, configured);
    }
    let events = gpu.supported_events.map(EventTypes::from_bits_truncate);
    same("events", device.supported_event_types(), events);
}

fn processes(device: &Device, [compute, graphics, mps]: [&Option<Vec<Process>>; 3]) {
    let configured = |list: &Option<Vec<Process>>| {
        let info = |process: &Process| ProcessInfo {
            pid: process.pid,
            used_gpu_memory: process.used.map_or(UsedGpuMemory::Unavailable, UsedGpuMemory::Used),
            gpu_instance_id: process.gpu_instance,
            compute_instance_id: process.compute_instance,
        };
        list.as_ref().map(|list| list.iter().map(info).collect::<Vec<_>>())
    };
    same("compute processes", device.running_compute_processes(), configured(compute));
    same("graphics processes", device.running_graphics_processes(), configured(graphics));
    same("MPS processes", device.mps_running_compute_processes(), configured(mps));
}

fn process_utilization(device: &Device, gpu: &Gpu) {
    let read = device.process_utilization_stats(None).map(|samples| {
        let key = |sample: &nvml_wrapper::struct_wrappers::device::ProcessUtilizationSample| {
            (sample.pid, sample.timestamp, [sample.sm_util, sample.mem_util, sample.enc_util, sample.dec_util])
        };
        samples.iter().map(key).collect::<Vec<_>>()
    });
    let configured = gpu.process_utilization.as_ref().map(|samples| {
        let key = |sample: &nvidia_ml_mock::config::ProcessUtilization| {
            (sample.pid, sample.timestamp, [sample.sm, sample.memory, sample.encoder, sample.decoder])
        };
        samples.iter().map(key).collect::<Vec<_>>()
    });
    if configured.as_deref() == Some(&[]) {
        assert!(matches!(read, Err(NvmlError::NotFound)), "{read:?}");
    } else {
        same("utilization by process", read, configured);
    }
}

/// Of the fields with scope 0: the wrapper asks for no other.
fn fields(device: &Device, gpu: &Gpu) {
    let ids: Vec<u32> = (1..=280).collect();
    let asked: Vec<_> = ids.iter().map(|id| FieldId(*id)).collect();
    let read: BTreeMap<_, _> = ids.into_iter().zip(device.field_values_for(&asked).unwrap()).collect();
    for (id, read) in read {
        let read = read.and_then(|sample| sample.value);
        match gpu.fields.get(&FieldKey { id, scope: 0 }) {
            // Signed and short integers are types that nvml-wrapper does not know.
            Some(FieldValue::I32(_)) => assert!(matches!(read, Err(NvmlError::UnexpectedVariant(5))), "{id}: {read:?}"),
            Some(FieldValue::U16(_)) => assert!(matches!(read, Err(NvmlError::UnexpectedVariant(6))), "{id}: {read:?}"),
            Some(FieldValue::Code(code)) => {
                assert_eq!(format!("{read:?}"), format!("{:?}", Err::<SampleValue, _>(NvmlError::from(*code))));
            }
            Some(FieldValue::F64(value)) => same("field", read, Some(SampleValue::F64(*value))),
            Some(FieldValue::U32(value)) => same(&format!("field {id}"), read, Some(SampleValue::U32(*value))),
            Some(FieldValue::U64(value)) => same(&format!("field {id}"), read, Some(SampleValue::U64(*value))),
            Some(FieldValue::I64(value)) => same(&format!("field {id}"), read, Some(SampleValue::I64(*value))),
            None => same(&format!("field {id}"), read, follows(gpu, id)),
        }
    }
}

/// What another call answers too.
fn follows(gpu: &Gpu, id: u32) -> Option<SampleValue> {
    let (short, long) = (|value: u32| Some(SampleValue::U32(value)), |value: u64| Some(SampleValue::U64(value)));
    let flag = |value: bool| Some(SampleValue::U32(value.into()));
    let length = |items: usize| Some(SampleValue::U32(items.try_into().unwrap()));
    match id {
        1 => flag(gpu.ecc.as_ref()?.enabled),
        2 => flag(gpu.ecc.as_ref()?.pending.unwrap_or(gpu.ecc.as_ref()?.enabled)),
        3 => long(gpu.ecc.as_ref()?.corrected.as_ref()?.volatile),
        4 => long(gpu.ecc.as_ref()?.uncorrected.as_ref()?.volatile),
        5 => long(gpu.ecc.as_ref()?.corrected.as_ref()?.aggregate),
        6 => long(gpu.ecc.as_ref()?.uncorrected.as_ref()?.aggregate),
        29 => length(gpu.retired_pages.as_ref()?.single_bit.len()),
        30 => length(gpu.retired_pages.as_ref()?.double_bit.len()),
        31 => flag(gpu.retired_pages.as_ref()?.pending),
        83 => long(gpu.energy?),
        94 => short(gpu.pcie.as_ref()?.replays?),
        142 => short(gpu.remapped_rows.as_ref()?.corrected),
        143 => short(gpu.remapped_rows.as_ref()?.uncorrected),
        144 => flag(gpu.remapped_rows.as_ref()?.pending),
        145 => flag(gpu.remapped_rows.as_ref()?.failed),
        _ => None,
    }
}

fn gpm(nvml: &Nvml, device: &Device, gpu: &Gpu) {
    same("GPM", device.gpm_support(), gpu.gpm.as_ref().map(|gpm| gpm.supported));
    let Some(gpm) = gpu.gpm.as_ref().filter(|gpm| gpm.supported) else {
        assert!(matches!(device.gpm_sample(), Err(NvmlError::NotSupported)));
        return;
    };
    metrics(nvml, [device.gpm_sample().unwrap(), device.gpm_sample().unwrap()], &gpm.metrics);
    for (instance, configured) in &gpm.instances {
        let sample = || device.gpm_mig_sample(*instance).unwrap();
        metrics(nvml, [sample(), sample()], &configured.iter().map(|(id, value)| (id.0, *value)).collect());
    }
    assert!(matches!(device.gpm_mig_sample(77), Err(NvmlError::InvalidArg)));
}

fn metrics(nvml: &Nvml, [first, second]: [GpmSample<'_>; 2], configured: &BTreeMap<u32, f64>) {
    let ids = [
        GpmMetricId::GraphicsUtil,
        GpmMetricId::SmUtil,
        GpmMetricId::SmOccupancy,
        GpmMetricId::IntegerUtil,
        GpmMetricId::AnyTensorUtil,
        GpmMetricId::DramBwUtil,
        GpmMetricId::PcieTxPerSec,
        GpmMetricId::PcieRxPerSec,
    ];
    let read = gpm_metrics_get(nvml, &first, &second, &ids).unwrap();
    assert_eq!(read.len(), ids.len());
    for (id, read) in ids.into_iter().zip(read) {
        same(&format!("{id:?}"), read.map(|metric| metric.value), configured.get(&id.as_c()).copied());
    }
}

fn mig(nvml: &Nvml, device: &Device, gpu: &Gpu) {
    let mode = device.mig_mode().map(|mode| (mode.current, mode.pending));
    let configured = gpu.mig.as_ref();
    let modes = configured.map(|mig| (mig.enabled.into(), mig.pending.unwrap_or(mig.enabled).into()));
    same("MIG mode", mode, modes);
    same("MIG devices", device.mig_device_count(), configured.map(|mig| mig.max_devices));
    assert!(!device.mig_is_mig_device_handle().unwrap());
    let Some(mig) = configured else { return };
    assert!(matches!(device.mig_device_by_index(mig.max_devices), Err(NvmlError::InvalidArg)));
    for index in 0..mig.max_devices {
        let found = device.mig_device_by_index(index);
        match mig.devices.iter().find(|child| mig.enabled && child.index == index) {
            Some(configured) => mig_device(nvml, device, &found.unwrap(), configured),
            None => assert!(matches!(found, Err(NvmlError::NotFound))),
        }
    }
}

fn mig_device(nvml: &Nvml, parent: &Device, child: &Device, configured: &MigDevice) {
    assert!(child.mig_is_mig_device_handle().unwrap());
    assert_eq!(child.mig_parent_device().unwrap().uuid().unwrap(), parent.uuid().unwrap());
    assert_eq!(child.index().unwrap(), configured.index);
    same("name", child.name(), configured.name.clone());
    same("uuid", child.uuid(), configured.uuid.clone());
    if let Some(uuid) = &configured.uuid {
        assert_eq!(nvml.device_by_uuid(uuid.as_str()).unwrap().uuid().unwrap(), *uuid);
    }
    let memory = child.memory_info().map(|memory| [memory.total, memory.reserved, memory.used]);
    same("memory", memory, configured.memory.as_ref().map(|memory| [memory.total, memory.reserved, memory.used]));
    let read = child.attributes().map(|found| {
        let engines = (found.shared_copy_engine_count, found.shared_decoder_count, found.shared_encoder_count);
        let slices = (found.gpu_instance_slice_count, found.compute_instance_slice_count);
        (found.multiprocessor_count, slices, found.memory_size_mb, engines)
    });
    let attributes = configured.attributes.as_ref().map(|found| {
        let engines = (found.copy_engines, found.decoders, found.encoders);
        (found.multiprocessors, (found.gpu_instance_slices, found.compute_instance_slices), found.memory_mib, engines)
    });
    same("attributes", read, attributes);
    processes(child, [&configured.compute_processes, &configured.graphics_processes, &configured.mps_processes]);
    // The GPU has it; its parts do not.
    same("serial", child.serial(), None);
    same("power", child.power_usage(), None);
    same("temperature", child.temperature(TemperatureSensor::Gpu), None);
    same("utilization", child.utilization_rates().map(|_| ()), None);
    same("clock", child.clock_info(Clock::SM), None);
}

/// What healthy GPUs have none of, and values that differ where those of fixtures are the same.
const RICH: &str = r#"
base = "h200-mig"
quiet = true

[gpu]
utilization = { gpu = 11, memory = 12 }
encoder = 13
decoder = 14
clocks = { graphics = 21, sm = 22, memory = 23, video = 24 }
max_clocks = { graphics = 31, sm = 32, memory = 33, video = 34 }
event_reasons = 0x1ff
pcie = { tx = 41, rx = 42, replays = 43 }
samples = { 0 = [{ timestamp = 5, value = 6 }], 2 = [{ timestamp = 7, value = 8 }, { timestamp = 9, value = 10 }] }
compute_processes = [{ pid = 1 }, { pid = 2, used = 51, gpu_instance = 2, compute_instance = 1 }]
graphics_processes = [{ pid = 3, used = 52 }]
mps_processes = [{ pid = 4, used = 53 }]
process_utilization = [{ pid = 1, timestamp = 61, sm = 62, memory = 63, encoder = 64, decoder = 65 }]

[gpu.ecc]
enabled = true
pending = false
corrected = { volatile = 71, aggregate = 72 }
uncorrected = { volatile = 73, aggregate = 74 }

[gpu.retired_pages]
single_bit = [{ address = 0x81000, timestamp = 82 }, { address = 0x83000, timestamp = 84 }]
double_bit = [{ address = 0x85000, timestamp = 86 }]
pending = true

[gpu.remapped_rows]
corrected = 91
uncorrected = 92
pending = true
failed = true

[gpu.violations]
0 = { reference = 101, violation = 102 }
1 = { reference = 103, violation = 104 }
2 = { reference = 105, violation = 106 }

[gpu.gpm]
metrics = { 1 = 1.5, 2 = 2.5, 3 = 3.5, 4 = 4.5, 5 = 5.5, 10 = 10.5, 20 = 20.5, 21 = 21.5 }
instances = { 2 = { 2 = 22.5 }, 3 = { 2 = 32.5 } }

[[gpu.mig.devices]]
index = 4
name = "a slice"
uuid = "MIG-slice"
memory = { total = 111, reserved = 112, used = 113 }
attributes = { multiprocessors = 1, gpu_instance_slices = 2, compute_instance_slices = 3, memory_mib = 4, copy_engines = 5, decoders = 6, encoders = 7 }
compute_processes = [{ pid = 121 }]
graphics_processes = [{ pid = 122, used = 123 }]
mps_processes = []
"#;

#[test]
fn values_that_no_fixture_has_come_back_too() {
    machine("rich", &Mock::new(RICH), &nvidia_ml_mock::file::parse(RICH).unwrap());
}

#[test]
fn mig_devices_are_there_only_where_mig_is_enabled() {
    let (mock, _) = Mock::fixture("h200-mig");
    let nvml = mock.open();
    let child = nvml.device_by_index(0).unwrap().mig_device_by_index(0).unwrap();
    assert!(child.memory_info().is_ok());
    mock.set("quiet = true\nbase = 'h200-mig'\n[gpu.mig]\nenabled = false");
    assert!(matches!(child.memory_info(), Err(NvmlError::InvalidArg)));
    let again = nvml.device_by_index(0).unwrap().mig_device_by_index(0);
    assert!(matches!(again, Err(NvmlError::NotFound)));
}

#[test]
fn gpm_compares_samples_of_one_gpu_or_of_one_instance() {
    let (mock, _) = Mock::fixture("h200-mig");
    let nvml = mock.open();
    let device = nvml.device_by_index(0).unwrap();
    let (gpu, instance) = (device.gpm_sample().unwrap(), device.gpm_mig_sample(2).unwrap());
    let read = gpm_metrics_get(&nvml, &gpu, &instance, &[GpmMetricId::SmUtil]);
    assert!(matches!(read, Err(NvmlError::InvalidArg)));
}

/// Numbers of real GPUs, as they were captured: they stand here a second time so that a slip in a
/// fixture, or in how a fixture stands on another, is seen.
#[test]
fn fixtures_are_the_gpus_that_they_are_named_for() {
    const MIB: u64 = 1 << 20;
    let gpu = |name: &str| -> Config { Mock::fixture(name).1 };
    type Row<'a> = (&'a str, &'a str, u32, [i32; 2], u64, u64, Option<u32>, Option<u32>);
    let rows: [Row; 7] = [
        ("t4-healthy", "Tesla T4", 0x1EB810DE, [7, 5], 15360 * MIB, 448 * MIB, Some(33500), Some(33)),
        ("a10g", "NVIDIA A10G", 0x223710DE, [8, 6], 23028 * MIB, 517 * MIB, None, None),
        ("a100-mig-mixed", "NVIDIA A100-SXM4-40GB", 0x20B010DE, [8, 0], 40960 * MIB, 518 * MIB, Some(49700), Some(33)),
        ("h100x8", "NVIDIA H100 80GB HBM3", 0x233010DE, [9, 0], 85520809984, 502267904, Some(68600), Some(29)),
        ("h200-idle", "NVIDIA H200", 0x233510DE, [9, 0], 150754820096, 643825664, Some(77700), Some(28)),
        ("h200-busy", "NVIDIA H200", 0x233510DE, [9, 0], 150754820096, 643825664, Some(627400), Some(52)),
        ("h200-mig", "NVIDIA H200", 0x233510DE, [9, 0], 150754820096, 643825664, Some(77700), Some(28)),
    ];
    for (fixture, name, device_id, capability, total, reserved, power, temperature) in rows {
        for gpu in &gpu(fixture).gpus {
            let memory = gpu.memory.as_ref().unwrap();
            let found = (gpu.name.as_deref().unwrap(), gpu.pci.as_ref().unwrap().device_id, gpu.compute_capability);
            assert_eq!(found, (name, device_id, Some(capability)), "{fixture}");
            assert_eq!((memory.total, memory.reserved), (total, reserved), "{fixture}");
            assert_eq!((gpu.power, gpu.temperature), (power, temperature), "{fixture}");
        }
    }
    assert_eq!(gpu("h100x8").gpus.len(), 8);
    let busy = &gpu("h200-busy").gpus[0];
    let used: u64 = busy.compute_processes.iter().flatten().filter_map(|process| process.used).sum();
    assert!(used <= busy.memory.as_ref().unwrap().used);
    let profiles = |name: &str| -> Vec<(u32, u64, u32)> {
        let mig = gpu(name).gpus[0].mig.clone().unwrap();
        let row = |device: &MigDevice| {
            let attributes = device.attributes.as_ref().unwrap();
            assert_eq!(device.memory.as_ref().unwrap().total, attributes.memory_mib * MIB);
            (device.gpu_instance.unwrap(), attributes.memory_mib, attributes.multiprocessors)
        };
        mig.devices.iter().map(row).collect()
    };
    assert_eq!(profiles("h200-mig"), [(2, 71424, 16), (2, 71424, 32), (3, 33280, 32), (9, 16384, 16), (10, 16384, 16)]);
    assert_eq!(profiles("a100-mig-mixed"), [(2, 19968, 42), (3, 9856, 28), (9, 4864, 14), (10, 4864, 14)]);
}

#[test]
fn every_file_among_the_fixtures_is_one() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = files.collect();
    files.sort();
    let names: Vec<_> = FIXTURES.iter().map(|(name, _)| format!("{name}.toml")).collect();
    assert_eq!(files, names);
}
