//! What the agent could read of a node's GPUs. `None`: not read, not supported, or not there to be read.

use super::Upgrade;
use crate::gpu::PciAddress;
use crate::gpu::xid::Outstanding;

/// How NVML stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nvml {
    /// It answers.
    Ok,
    /// There is no library.
    LibraryNotFound,
    /// Return code 18: the library and the driver differ in version.
    DriverMismatch,
    /// It does not start, for another reason; the return code.
    InitFailed(u32),
    /// A call has been running for longer than it may.
    Unresponsive,
    /// It is not asked any more: so many agents ended while they asked it.
    Crashes(u32),
}

/// How the NVSwitch fabric stands (`nvmlDeviceGetGpuFabricInfoV`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fabric {
    /// 0 not supported, 1 not started, 2 in progress, 3 completed.
    pub state: u32,
    /// The return code of what was completed; 0 is success.
    pub status: u32,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gpu {
    /// Its uuid, as NVML writes it: what is known of it is kept by this.
    pub uuid: String,
    /// Where it is.
    pub pci: Option<PciAddress>,
    /// Whether its handle or a call says that it is gone (return code 15).
    pub is_lost: Option<bool>,
    /// Field 230.
    pub recovery_action: Option<u32>,
    /// Field 145.
    pub row_remap_failed: Option<bool>,
    /// Field 144.
    pub row_remap_pending: Option<bool>,
    /// Field 31, before Ampere.
    pub retired_pages_pending: Option<bool>,
    /// Volatile uncorrected ECC errors. Never the aggregate, which has those of its whole life.
    pub uncorrected_ecc: Option<u64>,
    /// What that was when the agent started. `Readiness` fills it in.
    pub uncorrected_ecc_at_start: Option<u64>,
    /// Whether the errors of its SRAM are past the threshold.
    pub sram_threshold_exceeded: Option<bool>,
    /// The clock event reasons now, as NVML's bits.
    pub clock_event_reasons: Option<u64>,
    /// Nanoseconds of hardware thermal slowdown so far.
    pub thermal_slowdown_ns: Option<u64>,
    /// And of power brake.
    pub power_brake_ns: Option<u64>,
    /// Whether thermal slowdown goes on for minutes. `Readiness` fills it in, from the three above.
    pub thermal_slowdown_persists: Option<bool>,
    /// Whether power brake does.
    pub power_brake_persists: Option<bool>,
    /// Degrees to its limit (T.limit).
    pub thermal_margin_celsius: Option<i32>,
    /// Its fabric.
    pub fabric: Option<Fabric>,
}

/// One look at a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observation {
    /// PCI functions of vendor 10de and class 0300 or 0302.
    pub pci_functions: Option<u32>,
    /// Whether a label or the instance type says that this is a GPU node.
    pub should_have_gpus: Option<bool>,
    /// Whether `/proc/driver/nvidia/version` is there.
    pub driver_version_file: Option<bool>,
    /// Whether `/dev/nvidiactl` is there.
    pub control_node: Option<bool>,
    /// Whether it may be opened; looked at where NVML does not start.
    pub control_node_opens: Option<bool>,
    /// How many `/dev/nvidia[0-9]+` there are.
    pub device_nodes: Option<u32>,
    /// How NVML stands.
    pub nvml: Option<Nvml>,
    /// How many GPUs NVML counts.
    pub nvml_count: Option<u32>,
    /// How many the instance type has.
    pub instance_gpus: Option<u32>,
    /// The most that were ever seen here, by others too. `Readiness` adds what it saw itself.
    pub learned_gpus: Option<u32>,
    /// Each GPU that NVML lists. `None` while NVML does not answer.
    pub gpus: Option<Vec<Gpu>>,
    /// What stands against GPUs (`xid::Record::outstanding`).
    pub xids: Option<Vec<Outstanding>>,
    /// Devices of `nvidia.com/*` that the kubelet lists as healthy (`GetAllocatableResources`), each once, however
    /// many share it.
    pub plugin_devices: Option<u32>,
    /// How many there should be: GPUs without MIG, and MIG devices. Without it only none at all
    /// is too few.
    pub plugin_expected: Option<u32>,
    /// What the API server says the node can give, of `nvidia.com/*`.
    pub allocatable: Option<u64>,
    /// Whether the labels of GPU feature discovery are there and agree with NVML.
    pub gfd_labels: Option<bool>,
    /// How far GPU Operator is with replacing the driver. `None` where no API server is asked.
    pub driver_upgrade: Option<Upgrade>,
    /// Whether the agent sees the processes of the whole host. `None` where nobody wants them counted.
    pub sees_processes: Option<bool>,
}

macro_rules! newest {
    ($new:ident, $old:ident: $($field:ident),+ $(,)?) => {
        $(if $new.$field.is_none() { $new.$field.clone_from(&$old.$field); })+
    };
}

impl Observation {
    /// This one, with what it does not know from an older one.
    pub(super) fn or(mut self, old: &Self) -> Self {
        newest!(self, old: pci_functions, should_have_gpus, driver_version_file, control_node, device_nodes, nvml);
        newest!(self, old: control_node_opens, nvml_count, instance_gpus, learned_gpus, xids, plugin_devices);
        newest!(self, old: plugin_expected, allocatable, gfd_labels, sees_processes, driver_upgrade);
        let Some(gpus) = &mut self.gpus else {
            self.gpus.clone_from(&old.gpus);
            return self;
        };
        for gpu in gpus {
            let known = old.gpus.iter().flatten().find(|known| known.uuid == gpu.uuid);
            known.into_iter().for_each(|known| gpu.or(known));
        }
        self
    }
}

impl Gpu {
    fn or(&mut self, old: &Self) {
        newest!(self, old: pci, is_lost, recovery_action, row_remap_failed, row_remap_pending, retired_pages_pending);
        newest!(self, old: uncorrected_ecc, uncorrected_ecc_at_start, sram_threshold_exceeded, clock_event_reasons);
        newest!(self, old: thermal_slowdown_ns, power_brake_ns, thermal_slowdown_persists, power_brake_persists);
        newest!(self, old: thermal_margin_celsius, fabric);
    }
}
