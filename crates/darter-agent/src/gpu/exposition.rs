//! The GPUs' series of one scrape, made from the last snapshot: never a call into NVML.
//!
//! What a GPU does not say has no series, and what was not read for three rounds has none any more: a value
//! that stands still looks like one that is right.

use std::fmt::Error;
use std::time::UNIX_EPOCH;

use darter_core::gpu::readiness::State;
use darter_core::gpu::{Device, idle};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::sample::{Driver, Fast, Gpu, Memory, Profile, Slow};
use super::xids::{Count, Xids};
use super::{Allocation, Judgement, Now, Pods, View, mig, read};

/// What Prometheus gets.
#[derive(Debug)]
pub struct Exposition(View);

impl Exposition {
    pub(super) const fn new(view: View) -> Self {
        Self(view)
    }
}

/// The labels of one series: names and values.
pub(super) type Labels<'a> = Vec<(&'static str, &'a str)>;

/// What one GPU gives for one metric.
pub(super) type Series<'a, T> = Vec<(Labels<'a>, T)>;

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let now = self.0.now();
        if now.snapshot.driver == Driver::Off {
            return Ok(());
        }
        let mut page = Page { encoder };
        collection(&mut page, &now)?;
        // One that is lost has its name and nothing else.
        info(&mut page, &now)?;
        let (fast, slow) = self.0.patience();
        let gpus: Vec<Shown<'_>> = now
            .snapshot
            .gpus
            .iter()
            .map(|gpu| Shown { gpu, fast: now.young(&gpu.fast, fast), slow: now.young(&gpu.slow, slow) })
            .collect();
        load(&mut page, &gpus)?;
        heat_and_power(&mut page, &gpus)?;
        clocks(&mut page, &gpus)?;
        errors(&mut page, &gpus)?;
        mig::show(&mut page, &gpus)?;
        reported(&mut page, &gpus, &self.0.0.xids)?;
        if let Some(pods) = self.0.pods() {
            allocations(&mut page, &gpus, &pods)?;
        }
        match self.0.judgement() {
            Some(judgement) => verdicts(&mut page, &judgement, &gpus),
            None => Ok(()),
        }
    }
}

/// One GPU with what is known of it now.
pub(super) struct Shown<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) fast: Option<&'a Fast>,
    pub(super) slow: Option<&'a Slow>,
}

pub(super) struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    pub(super) fn gauge(&mut self, name: &str, help: &str, series: Series<'_, f64>) -> Result<(), Error> {
        if series.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        series.iter().try_for_each(|(labels, value)| metric.encode_family(labels)?.encode_gauge(value))
    }

    fn counter(&mut self, name: &str, help: &str, series: Series<'_, u64>) -> Result<(), Error> {
        if series.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        let mut one = |labels: &Labels<'_>, value: &u64| {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(value, None)
        };
        series.iter().try_for_each(|(labels, value)| one(labels, value))
    }

    fn counter_of_parts(&mut self, name: &str, help: &str, series: Series<'_, f64>) -> Result<(), Error> {
        if series.is_empty() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        let mut one = |labels: &Labels<'_>, value: &f64| {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, f64, f64>(value, None)
        };
        series.iter().try_for_each(|(labels, value)| one(labels, value))
    }
}

/// One series for each GPU that says it.
fn each<'a, T>(gpus: &[Shown<'a>], value: impl Fn(&Shown<'a>) -> Option<T>) -> Series<'a, T> {
    split(gpus, |shown| [("", value(shown))], "")
}

/// One series for each GPU and each of several values of the label `by`.
fn split<'a, T, const N: usize>(
    gpus: &[Shown<'a>],
    values: impl Fn(&Shown<'a>) -> [(&'static str, Option<T>); N],
    by: &'static str,
) -> Series<'a, T> {
    let of = |shown: &Shown<'a>| {
        let uuid = shown.gpu.identity.uuid.as_str();
        values(shown).into_iter().filter_map(move |(label, value)| {
            let mut labels = vec![("uuid", uuid)];
            if !by.is_empty() {
                labels.push((by, label));
            }
            Some((labels, value?))
        })
    };
    gpus.iter().flat_map(of).collect()
}

fn collection(page: &mut Page<'_>, now: &Now) -> Result<(), Error> {
    let is_running = matches!(now.snapshot.driver, Driver::Running(_)) && now.hung.is_none();
    // A node without a driver fails at nothing, and neither does one whose driver is being replaced.
    if !matches!(now.snapshot.driver, Driver::NoLibrary(_) | Driver::Starting | Driver::Released) {
        let success = f64::from(u8::from(is_running));
        page.gauge("gpu_collect_success", "1 while NVML answers", vec![(Vec::new(), success)])?;
    }
    if is_running {
        let count =
            |is_lost: bool| number(now.snapshot.gpus.iter().filter(|gpu| gpu.is_lost == is_lost).count() as u64);
        let of = |state: &'static str, count: f64| (vec![("state", state)], count);
        let states = vec![of("present", count(false)), of("lost", count(true))];
        page.gauge("node_gpus", "GPUs of this node that answer, and that were counted and do not", states)?;
    }
    let Some(round) = now.snapshot.round else { return Ok(()) };
    let took = vec![(Vec::new(), round.took.as_secs_f64())];
    page.gauge("gpu_collect_duration_seconds", "What the last round of questions to all GPUs took", took)?;
    let at = round.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    page.gauge("gpu_collect_timestamp_seconds", "When that round ended", vec![(Vec::new(), at)])
}

fn info(page: &mut Page<'_>, now: &Now) -> Result<(), Error> {
    let versions = match &now.snapshot.driver {
        Driver::Running(versions) => versions.clone(),
        _ => Default::default(),
    };
    let pair = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    let of = |gpu: &Gpu| {
        let identity = &gpu.identity;
        let known = [
            ("name", identity.name.clone()),
            ("pci_bus_id", identity.pci_bus_id.clone()),
            ("minor", identity.minor.map(|minor| minor.to_string())),
            ("serial", identity.serial.clone()),
            ("vbios", identity.vbios.clone()),
            ("architecture", identity.architecture.clone()),
            ("compute_capability", identity.compute_capability.map(pair)),
            ("driver_version", versions.driver.clone()),
            ("cuda_version", versions.cuda.map(pair)),
        ];
        let known = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let always = [("uuid", identity.uuid.clone()), ("gpu", identity.index.to_string())];
        always.into_iter().chain(known).collect::<Vec<_>>()
    };
    let gpus = now.snapshot.gpus.iter().filter(|gpu| !gpu.identity.uuid.is_empty());
    let labels: Vec<_> = gpus.clone().map(of).collect();
    if labels.is_empty() {
        return Ok(());
    }
    let help = "What does not change of a GPU";
    let mut metric = page.encoder.encode_descriptor("gpu_info", help, None, MetricType::Gauge)?;
    labels.iter().try_for_each(|labels| metric.encode_family(labels)?.encode_gauge(&1.0_f64))?;
    if now.hung.is_some() {
        return Ok(());
    }
    let lost = gpus.map(|gpu| (vec![("uuid", gpu.identity.uuid.as_str())], f64::from(u8::from(gpu.is_lost))));
    page.gauge("gpu_lost", "1 for a GPU that was here and does not answer", lost.collect())
}

fn load(page: &mut Page<'_>, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let memory = |of: fn(Memory) -> u64| each(gpus, |shown| shown.fast?.memory.map(of).map(number));
    page.gauge("gpu_memory_total_bytes", "Framebuffer", memory(|memory| memory.total))?;
    page.gauge("gpu_memory_reserved_bytes", "Framebuffer that the driver keeps", memory(|memory| memory.reserved))?;
    page.gauge("gpu_memory_used_bytes", "Framebuffer that processes have", memory(|memory| memory.used))?;
    page.gauge("gpu_memory_free_bytes", "Framebuffer that nobody has", memory(|memory| memory.free))?;
    page.gauge(
        "gpu_utilization_ratio",
        "Share of the last sample period in which a kernel was resident; says nothing of how much of the GPU it used",
        each(gpus, |shown| Some(f64::from(shown.fast?.utilization?.0) / 100.0)),
    )?;
    page.gauge(
        "gpu_memory_bandwidth_utilization_ratio",
        "Share of the last sample period in which memory was read or written",
        each(gpus, |shown| Some(f64::from(shown.fast?.utilization?.1) / 100.0)),
    )?;
    let profiled = |of: fn(&Profile) -> Option<f64>| each(gpus, |shown| of(shown.fast?.profile.as_ref()?));
    let sm = profiled(|profile| profile.sm);
    page.gauge("gpu_sm_active_ratio", "Share of time that the streaming multiprocessors worked", sm)?;
    let tensor = profiled(|profile| profile.tensor);
    page.gauge("gpu_tensor_active_ratio", "Share of time that the tensor cores worked", tensor)?;
    let dram = profiled(|profile| profile.dram);
    page.gauge("gpu_dram_active_ratio", "Share of time that the interface to the memory worked", dram)?;
    let processes = |shown: &Shown<'_>| {
        let of = |at: usize| Some(number(shown.slow?.processes?[at]));
        [("compute", of(0)), ("graphics", of(1)), ("mps", of(2))]
    };
    page.gauge("gpu_processes", "Processes that have a context (gpu.processes)", split(gpus, processes, "type"))?;
    let moved = |shown: &Shown<'_>| {
        [
            ("sent", shown.fast.and_then(|fast| fast.pcie_sent)),
            ("received", shown.fast.and_then(|fast| fast.pcie_received)),
        ]
    };
    page.counter("gpu_pcie_bytes", "Bytes over PCIe", split(gpus, moved, "direction"))?;
    let linked = |shown: &Shown<'_>| {
        let (sent, received) = shown.fast.and_then(|fast| fast.nvlink).unzip();
        [("sent", sent), ("received", received)].map(|(label, kib)| (label, kib.map(|kib| kib.saturating_mul(1024))))
    };
    page.counter("gpu_nvlink_bytes", "Bytes of data over all NVLinks", split(gpus, linked, "direction"))
}

fn heat_and_power(page: &mut Page<'_>, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let temperature = |shown: &Shown<'_>| {
        let fast = shown.fast;
        let gpu = fast.and_then(|fast| fast.temperature).map(f64::from);
        [("gpu", gpu), ("memory", fast.and_then(|fast| fast.memory_temperature).map(number))]
    };
    page.gauge("gpu_temperature_celsius", "Temperature", split(gpus, temperature, "sensor"))?;
    page.gauge(
        "gpu_thermal_margin_celsius",
        "Degrees until heat slows it down",
        each(gpus, |shown| shown.fast?.thermal_margin.map(f64::from)),
    )?;
    let watts = |milliwatts: u32| f64::from(milliwatts) / 1000.0;
    page.gauge("gpu_power_watts", "Power that the card takes", each(gpus, |shown| shown.fast?.power.map(watts)))?;
    page.gauge(
        "gpu_power_limit_watts",
        "Power that the card may take",
        each(gpus, |shown| shown.slow?.power_limit.map(watts)),
    )?;
    page.counter_of_parts(
        "gpu_energy_joules",
        "Energy since the driver was loaded",
        each(gpus, |shown| shown.fast?.energy.map(|millijoules| number(millijoules) / 1000.0)),
    )
}

fn clocks(page: &mut Page<'_>, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let hertz = |mhz: u32| f64::from(mhz) * 1e6;
    let clock = |shown: &Shown<'_>| {
        let fast = shown.fast;
        let sm = fast.and_then(|fast| fast.sm_clock).map(hertz);
        [("sm", sm), ("memory", fast.and_then(|fast| fast.memory_clock).map(hertz))]
    };
    page.gauge("gpu_clock_hertz", "Clock", split(gpus, clock, "domain"))?;
    page.gauge(
        "gpu_performance_state",
        "0 is the fastest; says nothing of load",
        each(gpus, |shown| shown.fast?.performance_state.map(f64::from)),
    )?;
    let active = |shown: &Shown<'_>| {
        let bits = shown.fast.and_then(|fast| fast.clock_events);
        read::CLOCK_EVENTS.map(|(bit, name)| (name, bits.map(|bits| f64::from(u8::from(bits & bit != 0)))))
    };
    page.gauge("gpu_clock_event_active", "1 while this holds the clocks", split(gpus, active, "reason"))?;
    let held = |shown: &Shown<'_>| {
        let times = shown.fast.map(|fast| fast.clock_event_times).unwrap_or_default();
        let mut named = read::CLOCK_EVENT_TIMES.map(|name| (name, None));
        for (held, time) in named.iter_mut().zip(times) {
            held.1 = time.map(|nanoseconds| number(nanoseconds) / 1e9);
        }
        named
    };
    page.counter_of_parts("gpu_clock_event_seconds", "For how long this held the clocks", split(gpus, held, "reason"))
}

fn errors(page: &mut Page<'_>, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let ecc = |shown: &Shown<'_>| {
        let slow = shown.slow;
        let volatile = slow.map(|slow| slow.ecc_volatile).unwrap_or_default();
        let aggregate = slow.map(|slow| slow.ecc_aggregate).unwrap_or_default();
        [
            (("corrected", "volatile"), volatile.0),
            (("uncorrected", "volatile"), volatile.1),
            (("corrected", "aggregate"), aggregate.0),
            (("uncorrected", "aggregate"), aggregate.1),
        ]
    };
    let series = gpus.iter().flat_map(|shown| {
        let uuid = shown.gpu.identity.uuid.as_str();
        ecc(shown).into_iter().filter_map(move |((kind, scope), value)| {
            Some((vec![("uuid", uuid), ("kind", kind), ("scope", scope)], value?))
        })
    });
    page.counter("gpu_ecc_errors", "Memory errors; volatile ones since the driver was loaded", series.collect())?;
    let rows = |shown: &Shown<'_>| {
        let (correctable, uncorrectable) = shown.slow.map(|slow| slow.remapped_rows).unwrap_or_default();
        [("correctable", correctable), ("uncorrectable", uncorrectable)]
    };
    page.counter("gpu_row_remaps", "Rows of memory that were replaced", split(gpus, rows, "cause"))?;
    let flag = |is: Option<bool>| is.map(|is| f64::from(u8::from(is)));
    page.gauge(
        "gpu_row_remap_pending",
        "1 if a row is replaced at the next reset",
        each(gpus, |shown| flag(shown.slow?.remap_pending)),
    )?;
    page.gauge(
        "gpu_row_remap_failed",
        "1 if a row could not be replaced",
        each(gpus, |shown| flag(shown.slow?.remap_failed)),
    )?;
    let pages = |shown: &Shown<'_>| {
        let (single, double) = shown.slow.map(|slow| slow.retired_pages).unwrap_or_default();
        [("single_bit", single), ("double_bit", double)]
    };
    page.counter("gpu_retired_pages", "Pages of memory that are used no more", split(gpus, pages, "cause"))?;
    page.gauge(
        "gpu_retired_pages_pending",
        "1 if pages are retired at the next reboot",
        each(gpus, |shown| flag(shown.slow?.retired_pending)),
    )?;
    page.gauge(
        "gpu_sram_threshold_exceeded",
        "1 if so many errors of the SRAM could not be corrected that the GPU should be replaced",
        each(gpus, |shown| flag(shown.slow?.sram_exceeded)),
    )?;
    page.gauge(
        "gpu_fabric_state",
        "NVSwitch: 0 not supported, 1 not started, 2 in progress, 3 completed",
        each(gpus, |shown| shown.slow?.fabric.map(|fabric| f64::from(fabric.state))),
    )?;
    page.counter("gpu_pcie_replays", "Packets sent again over PCIe", each(gpus, |shown| shown.slow?.pcie_replays))?;
    page.gauge(
        "gpu_recovery_action",
        "What the driver asks for: 0 nothing, 1 a reset, 2 a reboot, 3 a drain, 4 a drain and a reset, 5 the IMEX domain",
        each(gpus, |shown| shown.fast?.recovery_action.map(number)),
    )
}

/// Who has which GPU: to be joined with what is said of the hardware, by the uuid.
fn allocations(page: &mut Page<'_>, gpus: &[Shown<'_>], pods: &Pods) -> Result<(), Error> {
    let series = pods.allocations.iter().map(|allocation| {
        let owner = gpus.iter().find(|shown| pods.of(shown.gpu).any(|own| own == allocation));
        let Allocation { id, resource, namespace, pod, container } = allocation;
        let uuid = owner.map(|shown| shown.gpu.identity.uuid.as_str());
        let mig = if let Device::Mig(uuid) = &id.device { Some(uuid.as_str()) } else { None };
        let known = [("uuid", uuid), ("mig_uuid", mig), ("replica", id.replica.as_deref())];
        let mut labels: Labels<'_> = known.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        labels.extend([
            ("namespace", namespace.as_str()),
            ("pod", pod),
            ("container", container),
            ("resource", resource),
        ]);
        (labels, 1.0)
    });
    page.gauge(
        "gpu_allocation_info",
        "1 for each device that a container has, by the kubelet's word",
        series.collect(),
    )?;
    let Some(devices) = pods.devices else { return Ok(()) };
    let allocatable = vec![(Vec::new(), f64::from(devices))];
    page.gauge(
        "node_gpu_devices_allocatable",
        "Healthy devices of the device plugin, each once, however many share it",
        allocatable,
    )
}

/// Errors that the driver reported.
fn reported(page: &mut Page<'_>, gpus: &[Shown<'_>], xids: &Xids) -> Result<(), Error> {
    let counts = gpus
        .iter()
        .filter_map(|shown| Some((shown.gpu.identity.uuid.as_str(), xids.counts(shown.gpu.identity.pci()?))));
    let counts: Vec<(&str, Vec<Count>)> = counts.collect();
    let all = counts.iter().flat_map(|(uuid, counts)| counts.iter().map(move |count| (*uuid, count)));
    let series = all.map(|(uuid, count)| (vec![("uuid", uuid), ("xid", count.xid.as_str())], count.times));
    page.counter("gpu_xid_errors", "Errors that the driver reported in this boot", series.collect())?;
    let last = counts.iter().filter_map(|(uuid, counts)| {
        let last = counts.iter().filter_map(|count| count.last).reduce(f64::max)?;
        Some((vec![("uuid", *uuid)], last))
    });
    page.gauge("gpu_xid_last_timestamp_seconds", "When the driver reported an error last", last.collect())
}

/// What is concluded of them. A node that has no GPU and should have none has no verdict.
fn verdicts(page: &mut Page<'_>, judgement: &Judgement, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let Judgement { verdict, idleness, .. } = judgement;
    if verdict.state == State::NotApplicable {
        return Ok(());
    }
    let is_ready = |state: State| f64::from(u8::from(state <= State::Degraded));
    let first = verdict.first().filter(|finding| finding.state > State::Ready);
    let reason = first.map_or("", |finding| finding.reason.word());
    page.gauge(
        "node_gpu_ready",
        "1 if the GPUs of this node can be given work; the first reason if not, or why somebody should look",
        vec![(vec![("state", verdict.state.as_str()), ("reason", reason)], is_ready(verdict.state))],
    )?;
    let of = |shown: &Shown<'_>| Some(is_ready(verdict.of_gpu(&shown.gpu.identity.uuid)));
    page.gauge("gpu_ready", "1 if nothing stands against this GPU by itself", each(gpus, of))?;
    let state = |shown: &Shown<'_>| {
        let is = idleness.get(&shown.gpu.identity.uuid).map(|idleness| idleness.state);
        let one = |state: idle::State| is.map(|is| f64::from(u8::from(is == state)));
        [
            ("empty", one(idle::State::Empty)),
            ("loaded_idle", one(idle::State::LoadedIdle)),
            ("busy", one(idle::State::Busy)),
            ("unknown", one(idle::State::Unknown)),
        ]
    };
    page.gauge(
        "gpu_state",
        "1 for what a GPU does, by two witnesses where it does nothing",
        split(gpus, state, "state"),
    )?;
    let known = |shown: &Shown<'_>| idleness.get(&shown.gpu.identity.uuid);
    page.gauge(
        "gpu_idle_seconds",
        "For how long a GPU has done nothing",
        each(gpus, |shown| Some(judgement.idle_seconds(known(shown)?))),
    )?;
    page.gauge(
        "gpu_busy_ratio_window",
        "Share of the long window in which a GPU was at work",
        each(gpus, |shown| known(shown)?.busy_ratio),
    )
}

/// Exact up to 2⁵³: a value of Prometheus is a double.
#[allow(clippy::cast_precision_loss, reason = "a value of Prometheus is a double")]
pub(super) const fn number(value: u64) -> f64 {
    value as f64
}
