//! What to do about each reason, for whoever is woken by it. None of it is done by darter itself.

use super::{Reason, RecoveryAction, Upgrade};
use crate::gpu::xid::{self, Action};

impl Reason {
    /// What to do about it, for people.
    pub fn advice(self) -> String {
        match self {
            Self::GpuNodeNotObserved => {
                "wait for the first look; if this stays, see that the agent has the host's /sys (gpu.host_root), or \
                 set gpu.expected"
            }
            Self::DriverUpgrading(Upgrade::Failed) => {
                "the driver's upgrade failed: look at GPU Operator's driver pod on this node, and at the node's events"
            }
            Self::DriverUpgrading(_) => {
                "wait: GPU Operator replaces the driver; where that lasts, look at its driver pod on this node, and at \
                 what it waits for (`kubectl get node -L nvidia.com/gpu-driver-upgrade-state`)"
            }
            Self::DriverNotLoaded => {
                "load the driver (`modprobe nvidia`) and read `dmesg | grep NVRM`; where the GPU operator installs \
                 it, look at its driver pod on this node"
            }
            Self::GpusNotVisible => {
                "hand the GPUs to the agent, which cannot judge them before: in the chart set gpu.runtimeClass or \
                 gpu.driverRoot, elsewhere start its container with the runtime `nvidia` and \
                 NVIDIA_VISIBLE_DEVICES=all; where the host has no /dev/nvidiactl either, `nvidia-smi` there makes it"
            }
            Self::LibraryNotFound => {
                "hand the driver's library to the agent, which cannot judge the GPUs before: in the chart set \
                 gpu.runtimeClass or gpu.driverRoot, elsewhere start its container with the runtime `nvidia` and \
                 NVIDIA_DRIVER_CAPABILITIES=utility, or say where libnvidia-ml.so.1 is (gpu.library, gpu.driver_root)"
            }
            Self::NvmlCrashes => {
                "run `nvidia-smi` on the node: if it crashes too, reinstall the driver or drain the node and reboot it; \
                 then, or if it does not, `darter gpu clear` has NVML asked again"
            }
            Self::GpusNotPermitted => {
                "delete the agent's pod: a container loses its devices when systemd is reloaded under it \
                 (`systemctl daemon-reload`), and other pods with GPUs may have lost theirs; gpu.driver_grace has the \
                 agent started anew by itself"
            }
            Self::DriverMismatch => "the driver was updated under the loaded module: drain the node and reboot it",
            Self::NvmlInitFailed => {
                "run `nvidia-smi` on the node and read `dmesg | grep NVRM`; if it fails too, drain the node and \
                 reboot it"
            }
            Self::NvmlUnresponsive => {
                "the driver does not answer: cordon the node; if that lasts for minutes, drain it and reboot it"
            }
            Self::NvmlNotObserved => "wait for the first reading (gpu.interval)",
            Self::GpuCountMismatch => {
                "compare `nvidia-smi -L` with `lspci -d 10de:`: for a GPU that only the bus shows, drain the node and \
                 reboot it; for one that neither shows, replace the node; if there should be fewer, set gpu.expected"
            }
            Self::GpuLost => {
                "drain the node and reboot it: a reset does not reach a GPU that is off the bus; if it is lost again, \
                 replace the node"
            }
            Self::RecoveryActionRequired(action) => return recover(action),
            Self::FatalXid(xid) => return fatal(xid),
            Self::DegradedXid(xid) => return degraded(xid),
            Self::RowRemapFailed => "drain the node and have the card replaced: its memory has no spare rows left",
            Self::RowRemapPending => {
                "reset the GPU when nothing runs on it (`nvidia-smi --gpu-reset -i <GPU>`), or reboot"
            }
            Self::UncorrectableEcc => {
                "drain the node and reboot it: programs may have computed with wrong data; if it comes again, have \
                 the card replaced"
            }
            Self::ThermalSlowdown => "look at the node's fans, its airflow and the air that comes in",
            Self::PowerBrake => "look at the power supplies, and at the power limit of the chassis",
            Self::FabricNotReady => {
                "look at `systemctl status nvidia-fabricmanager`: it has to run, and to have the driver's version"
            }
            Self::DevicePluginNotRegistered => "look at this node's pod of the device plugin, and at its log",
            Self::DevicesUnhealthy { .. } => "the log of the device plugin's pod on this node says which, and why",
            Self::DevicePluginNotObserved => {
                "wait for the kubelet's word; if this stays, see that its socket is mounted"
            }
            Self::AllocatableZero => {
                "`kubectl describe node` shows it; look at this node's pod of the device plugin, which has to \
                 tolerate the startup taint (kubernetes.startup_taint)"
            }
            Self::GfdLabelsMissing => "nothing, unless you schedule by the labels of GPU feature discovery",
            Self::ProcessesNotVisible => {
                "nothing is wrong with the GPUs: start the agent's pod with hostPID (the chart's gpu.processes sets \
                 both), or set gpu.processes = false; until then no GPU is proved empty by its processes"
            }
        }
        .to_owned()
    }
}

fn recover(action: RecoveryAction) -> String {
    match action {
        RecoveryAction::GpuReset => "end what uses it, then reset it: `nvidia-smi --gpu-reset -i <GPU>`",
        RecoveryAction::NodeReboot => "drain the node and reboot it",
        RecoveryAction::DrainP2p => "end the programs that use it together with other GPUs",
        RecoveryAction::DrainAndReset => "drain the node, then reset the GPU: `nvidia-smi --gpu-reset -i <GPU>`",
        RecoveryAction::RecoverImex => {
            "recover the IMEX domain: look at `systemctl status nvidia-imex` on all its nodes"
        }
        RecoveryAction::Other(_) => "the driver is newer than this darter: `nvidia-smi -q` has the action's name",
    }
    .to_owned()
}

/// What the catalogue says to do at once. Nobody hears of a reset, so a reset alone does not end it.
fn fatal(xid: u32) -> String {
    match xid::entry(xid).map(|entry| entry.action) {
        Some(Action::ResetGpu) => {
            format!(
                "drain the node and reboot it, as XID {xid} takes a reset of the GPU; or reset it (`nvidia-smi --gpu-reset \
                 -i <GPU>`) and say so: `darter gpu clear <GPU>`"
            )
        }
        Some(Action::RestartBm) => format!("drain the node and reboot the machine: XID {xid} takes that"),
        Some(Action::RestartVm) => format!("drain the node and restart the virtual machine: XID {xid} takes that"),
        Some(Action::CheckMechanicals) => {
            format!("drain the node and power it off; look at the card's connectors, power and cooling (XID {xid})")
        }
        Some(Action::ContactSupport) => {
            format!("drain the node and replace it; NVIDIA wants to see XID {xid} (`nvidia-bug-report.sh`)")
        }
        Some(Action::Workflow) => {
            format!("drain the node and reboot it; NVIDIA's XID catalogue has a procedure of its own for XID {xid}")
        }
        _ => format!("drain the node and reboot it: your configuration has XID {xid} as fatal (gpu.xid_fatal)"),
    }
}

fn degraded(xid: u32) -> String {
    match xid::entry(xid).map(|entry| entry.action) {
        Some(Action::RestartApp) => format!("start the program again that had XID {xid}; the others are not concerned"),
        Some(Action::Ignore) => format!("nothing at once; XID {xid} stands until the next boot, or `darter gpu clear`"),
        _ => format!("NVIDIA's XID catalogue has a procedure for XID {xid}; it stands until the next boot"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_fell_off_the_bus_takes_a_reboot_and_one_that_may_be_reset_none() {
        for reason in [Reason::GpuLost, Reason::FatalXid(79)] {
            assert!(reason.advice().contains("reboot"), "{}", reason.advice());
        }
        let reset = Reason::RecoveryActionRequired(RecoveryAction::GpuReset).advice();
        assert!(reset.contains("--gpu-reset") && !reset.contains("reboot"), "{reset}");
    }

    #[test]
    fn who_was_not_handed_the_gpus_is_not_told_to_load_a_driver() {
        for reason in [Reason::GpusNotVisible, Reason::LibraryNotFound] {
            let advice = reason.advice();
            assert!(advice.contains("gpu.runtimeClass") && advice.contains("gpu.driverRoot"), "{advice}");
            assert!(!advice.contains("modprobe"), "{advice}");
        }
    }

    #[test]
    fn every_error_that_stands_has_its_own_advice_and_names_its_code() {
        for entry in xid::catalogue() {
            let advice = match entry.verdict {
                xid::Verdict::Fatal => Reason::FatalXid(entry.xid).advice(),
                xid::Verdict::Degraded => Reason::DegradedXid(entry.xid).advice(),
                xid::Verdict::MetricOnly => continue,
            };
            assert!(advice.contains(&format!("XID {}", entry.xid)), "{advice}");
            assert!(!advice.contains("your configuration"), "{}: {advice}", entry.xid);
        }
        assert!(Reason::FatalXid(13).advice().contains("gpu.xid_fatal"), "the operator's own choice");
    }
}
