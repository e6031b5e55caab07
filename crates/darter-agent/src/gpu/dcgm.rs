//! The same readings under dcgm-exporter's names, for dashboards and alerts that know those.
//!
//! Plain text of our own: an encoder of OpenMetrics gives counters a `_total` that these names do not have, so
//! they go out without a type. Names and units as dcgm-exporter's default counters have them: up to 4.8
//! (`legacy`), and since 4.9 with DCGM 4.7 (`v49`), where it is known. Not here: profiling before Hopper, which
//! NVML does not read, and nothing is put in its place.

use std::fmt::{Display, Write as _};

use darter_core::gpu::Device;

use super::exposition::number;
use super::sample::{Driver, Fast, Gpu, Slow};
use super::{Allocation, View};
use crate::config::DcgmNames;

/// One metric of dcgm-exporter.
struct Row {
    legacy: &'static str,
    /// The name since 4.9, and what the value is to be multiplied with; nothing: not known, so not said.
    v49: Option<(&'static str, f64)>,
    help: &'static str,
    is_counter: bool,
    value: fn(&Reading<'_>) -> Option<f64>,
}

/// What is known of one GPU.
struct Reading<'a> {
    fast: Option<&'a Fast>,
    slow: Option<&'a Slow>,
    /// The code of the last error; 0 where there was none, as dcgm-exporter says.
    xid: Option<u32>,
}

const fn gauge(
    legacy: &'static str,
    v49: Option<(&'static str, f64)>,
    help: &'static str,
    value: fn(&Reading<'_>) -> Option<f64>,
) -> Row {
    Row { legacy, v49, help, is_counter: false, value }
}

const fn counter(
    legacy: &'static str,
    v49: Option<(&'static str, f64)>,
    help: &'static str,
    value: fn(&Reading<'_>) -> Option<f64>,
) -> Row {
    Row { legacy, v49, help, is_counter: true, value }
}

/// Its value is a code, and one of its labels too.
const XID_ERRORS: &str = "DEV_XID_ERRORS";
const MIB: f64 = 1_048_576.0;
const PERCENT: f64 = 0.01;

/// In the order of dcgm-exporter's file. Values are in the units of the legacy names.
const ROWS: [Row; 27] = [
    gauge("DEV_SM_CLOCK", Some(("DEV_SM_CLOCK_HERTZ", 1e6)), "SM clock (in MHz)", |gpu| {
        Some(gpu.fast?.sm_clock?.into())
    }),
    gauge("DEV_MEM_CLOCK", Some(("DEV_MEMORY_CLOCK_HERTZ", 1e6)), "Memory clock (in MHz)", |gpu| {
        Some(gpu.fast?.memory_clock?.into())
    }),
    gauge("DEV_MEMORY_TEMP", Some(("DEV_MEMORY_TEMP_CELSIUS", 1.0)), "Memory temperature (in C)", |gpu| {
        Some(number(gpu.fast?.memory_temperature?))
    }),
    gauge("DEV_GPU_TEMP", Some(("DEV_GPU_TEMP_CELSIUS", 1.0)), "GPU temperature (in C)", |gpu| {
        Some(gpu.fast?.temperature?.into())
    }),
    gauge("DEV_POWER_USAGE", Some(("DEV_BOARD_POWER_WATTS", 1.0)), "Power draw (in W)", |gpu| {
        Some(f64::from(gpu.fast?.power?) / 1000.0)
    }),
    counter(
        "DEV_TOTAL_ENERGY_CONSUMPTION",
        Some(("DEV_GPU_ENERGY_JOULES_TOTAL", 0.001)),
        "Energy since the driver was loaded (in mJ)",
        |gpu| Some(number(gpu.fast?.energy?)),
    ),
    counter("DEV_PCIE_REPLAY_COUNTER", Some(("DEV_PCIE_REPLAY_TOTAL", 1.0)), "PCIe packets sent again", |gpu| {
        Some(number(gpu.slow?.pcie_replays?))
    }),
    gauge("DEV_GPU_UTIL", Some(("DEV_GPU_UTIL_RATIO", PERCENT)), "GPU utilization (in %)", |gpu| {
        Some(gpu.fast?.utilization?.0.into())
    }),
    gauge("DEV_MEM_COPY_UTIL", None, "Memory utilization (in %)", |gpu| Some(gpu.fast?.utilization?.1.into())),
    gauge("DEV_ENC_UTIL", None, "Encoder utilization (in %)", |gpu| Some(gpu.fast?.codecs.0?.into())),
    gauge("DEV_DEC_UTIL", None, "Decoder utilization (in %)", |gpu| Some(gpu.fast?.codecs.1?.into())),
    gauge(XID_ERRORS, Some(("DEV_XID_ERROR", 1.0)), "The last XID error", |gpu| Some(gpu.xid?.into())),
    gauge("DEV_FB_FREE", None, "Framebuffer that is free (in MiB)", |gpu| Some(number(gpu.fast?.memory?.free) / MIB)),
    gauge("DEV_FB_USED", None, "Framebuffer that is used (in MiB)", |gpu| Some(number(gpu.fast?.memory?.used) / MIB)),
    gauge("DEV_FB_RESERVED", None, "Framebuffer that the driver keeps (in MiB)", |gpu| {
        Some(number(gpu.fast?.memory?.reserved) / MIB)
    }),
    gauge("DEV_FB_TOTAL", Some(("DEV_FB_CAPACITY_BYTES", MIB)), "Framebuffer (in MiB)", |gpu| {
        Some(number(gpu.fast?.memory?.total) / MIB)
    }),
    counter(
        "DEV_UNCORRECTABLE_REMAPPED_ROWS",
        Some(("DEV_ROW_REMAP_UNCORRECTABLE_TOTAL", 1.0)),
        "Rows remapped for uncorrectable errors",
        |gpu| Some(number(gpu.slow?.remapped_rows.1?)),
    ),
    counter(
        "DEV_CORRECTABLE_REMAPPED_ROWS",
        Some(("DEV_ROW_REMAP_CORRECTABLE_TOTAL", 1.0)),
        "Rows remapped for correctable errors",
        |gpu| Some(number(gpu.slow?.remapped_rows.0?)),
    ),
    gauge("DEV_ROW_REMAP_FAILURE", Some(("DEV_ROW_REMAP_FAILED", 1.0)), "Whether a row could not be remapped", |gpu| {
        Some(f64::from(u8::from(gpu.slow?.remap_failed?)))
    }),
    // A rate under a counter's name, as it is there. Its newer name is not known for sure.
    counter("DEV_NVLINK_BANDWIDTH_TOTAL", None, "Data over all NVLinks now (in MB/s)", |gpu| {
        Some(gpu.fast?.nvlink_rate? / 1e6)
    }),
    gauge("PROF_GR_ENGINE_ACTIVE", Some(("PROF_GR_ENGINE_UTIL_RATIO", 1.0)), "Share of time: graphics engine", |gpu| {
        gpu.fast?.profile?.graphics
    }),
    gauge("PROF_SM_ACTIVE", Some(("PROF_SM_UTIL_RATIO", 1.0)), "Share of time: multiprocessors", |gpu| {
        gpu.fast?.profile?.sm
    }),
    gauge("PROF_SM_OCCUPANCY", Some(("PROF_SM_OCCUPANCY_RATIO", 1.0)), "Share of resident warps", |gpu| {
        gpu.fast?.profile?.sm_occupancy
    }),
    gauge("PROF_PIPE_TENSOR_ACTIVE", Some(("PROF_TENSOR_UTIL_RATIO", 1.0)), "Share of time: tensor cores", |gpu| {
        gpu.fast?.profile?.tensor
    }),
    gauge("PROF_DRAM_ACTIVE", Some(("PROF_DRAM_UTIL_RATIO", 1.0)), "Share of time: memory interface", |gpu| {
        gpu.fast?.profile?.dram
    }),
    gauge("PROF_PCIE_TX_BYTES", Some(("PROF_PCIE_TX_BYTES", 1.0)), "Bytes a second sent over PCIe", |gpu| {
        gpu.fast?.profile?.pcie.0
    }),
    gauge("PROF_PCIE_RX_BYTES", Some(("PROF_PCIE_RX_BYTES", 1.0)), "Bytes a second received over PCIe", |gpu| {
        gpu.fast?.profile?.pcie.1
    }),
];

impl View {
    /// Adds the series before the end of an OpenMetrics text, if they are wanted.
    pub fn add_dcgm(&self, text: &mut String) {
        const END: &str = "# EOF\n";
        let names = self.0.settings.dcgm_names;
        let now = self.now();
        let Driver::Running(versions) = &now.snapshot.driver else { return };
        if names == DcgmNames::Off {
            return;
        }
        let driver = versions.driver.as_deref();
        let (fast, slow) = self.patience();
        let pods = self.pods();
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy();
        let gpus = now.snapshot.gpus.iter().filter(|gpu| !gpu.is_lost);
        let parts: Vec<_> = gpus.clone().flat_map(|gpu| instances(gpu, now.young(&gpu.fast, fast))).collect();
        let of_parts = parts.iter().map(|part| {
            let owner = pods.as_ref().and_then(|pods| pods.of(part.gpu).filter(|one| part.has(one)).last().cloned());
            let mut labels = labels(part.gpu, &host, driver, names, owner);
            let profile = part.profile.as_deref().map(|profile| format!(",GPU_I_PROFILE=\"{}\"", escaped(profile)));
            labels.push_str(&profile.unwrap_or_default());
            let _ = write!(labels, ",GPU_I_ID=\"{}\"", part.instance);
            (labels, Reading { fast: Some(&part.fast), slow: None, xid: None })
        });
        let known: Vec<_> = gpus
            .map(|gpu| {
                let xid = gpu.identity.pci().and_then(|pci| self.0.xids.last(pci));
                let reading = Reading { fast: now.young(&gpu.fast, fast), slow: now.young(&gpu.slow, slow), xid };
                let owner = pods.as_ref().and_then(|pods| {
                    // As dcgm-exporter: the last of those who share it. Who has a part has not its power and heat.
                    let whole = |one: &&Allocation| !matches!(one.id.device, Device::Mig(_) | Device::MigOf(_));
                    pods.of(gpu).filter(whole).last().cloned()
                });
                (labels(gpu, &host, driver, names, owner), reading)
            })
            .chain(of_parts)
            .collect();
        let is_ended = text.ends_with(END);
        text.truncate(text.len() - if is_ended { END.len() } else { 0 });
        ROWS.iter().for_each(|row| add(text, row, names, &known));
        text.push_str(if is_ended { END } else { "" });
    }
}

/// A GPU instance: what DCGM takes for a GPU where one is cut up. Power, heat and errors are those of the GPU.
struct Part<'a> {
    gpu: &'a Gpu,
    instance: u32,
    /// Of the GPU instance: `3g.71gb`, of which `1c.3g.71gb` is a compute instance.
    profile: Option<String>,
    /// As far as it has such readings of its own.
    fast: Fast,
}

impl Part<'_> {
    /// Whether somebody has a compute instance in it.
    fn has(&self, allocation: &Allocation) -> bool {
        let Device::Mig(uuid) = &allocation.id.device else { return false };
        self.gpu.mig_devices().iter().any(|mig| mig.instance == Some(self.instance) && mig.uuid == *uuid)
    }
}

/// What a GPU is cut into: one for each GPU instance, however many compute instances it has.
fn instances<'a>(gpu: &'a Gpu, fast: Option<&Fast>) -> Vec<Part<'a>> {
    let mut parts: Vec<Part<'a>> = Vec::new();
    for mig in gpu.mig_devices() {
        let Some(instance) = mig.instance.filter(|number| parts.iter().all(|part| part.instance != *number)) else {
            continue;
        };
        let profile = mig.profile.as_deref().map(|profile| match profile.split_once('.') {
            Some((compute, rest)) if compute.ends_with('c') => rest.to_owned(),
            _ => profile.to_owned(),
        });
        let profiled = fast.and_then(|fast| fast.instances.get(&instance).copied());
        let fast = Fast { memory: mig.memory, profile: profiled, ..Fast::default() };
        parts.push(Part { gpu, instance, profile, fast });
    }
    parts
}

fn add(text: &mut String, row: &Row, names: DcgmNames, gpus: &[(String, Reading<'_>)]) {
    let named = if names == DcgmNames::V49 { row.v49 } else { Some((row.legacy, 1.0)) };
    let Some((name, factor)) = named else { return };
    let values: Vec<_> = gpus.iter().filter_map(|(labels, gpu)| Some((labels, (row.value)(gpu)? * factor))).collect();
    if values.is_empty() {
        return;
    }
    let kind = if row.is_counter { "unknown" } else { "gauge" };
    // The help is that of the legacy unit; the newer names say theirs.
    let help = if names == DcgmNames::V49 { row.help.split(" (").next().unwrap_or(row.help) } else { row.help };
    line(text, format_args!("# HELP DCGM_FI_{name} {help}."));
    line(text, format_args!("# TYPE DCGM_FI_{name} {kind}"));
    // The text that dcgm-exporter has beside it (err_msg) is its own.
    let has_code = name == XID_ERRORS;
    for (labels, value) in values {
        let code = if has_code { format!(",err_code=\"{value}\"") } else { String::new() };
        line(text, format_args!("DCGM_FI_{name}{{{labels}{code}}} {value}"));
    }
}

fn line(text: &mut String, said: impl Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{said}");
}

fn labels(gpu: &Gpu, host: &str, driver: Option<&str>, names: DcgmNames, owner: Option<Allocation>) -> String {
    let identity = &gpu.identity;
    let is_v49 = names == DcgmNames::V49;
    let (container, namespace, pod) = match owner {
        Some(owner) => (Some(owner.container), Some(owner.namespace), Some(owner.pod)),
        None => (None, None, None),
    };
    let device = identity.minor.map(|minor| format!("nvidia{minor}"));
    let labels = [
        ("gpu", Some(identity.index.to_string())),
        ("UUID", Some(identity.uuid.clone())),
        ("pci_bus_id", identity.pci_bus_id.clone()),
        ("device", device),
        ("modelName", identity.name.clone()),
        (if is_v49 { "hostname" } else { "Hostname" }, Some(host.to_owned())),
        (if is_v49 { "DCGM_FI_SYSTEM_DRIVER_VERSION" } else { "DCGM_FI_DRIVER_VERSION" }, driver.map(str::to_owned)),
        ("container", container),
        ("namespace", namespace),
        ("pod", pod),
    ];
    let known = labels.into_iter().filter_map(|(name, value)| Some(format!("{name}=\"{}\"", escaped(&value?))));
    known.collect::<Vec<_>>().join(",")
}

/// As the text format asks for in label values.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
