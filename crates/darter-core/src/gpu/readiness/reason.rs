//! Why GPUs are not ready: stable words, in the order in which causes come before their consequences.

use std::fmt;

use serde::{Serialize, Serializer};

use super::Upgrade;

/// One reason. Ordered as the checks are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Check 0: nobody can tell whether there should be GPUs.
    GpuNodeNotObserved,
    /// Check 14, before all others, as it makes them fail: GPU Operator replaces the driver.
    DriverUpgrading(Upgrade),
    /// Check 1: the driver is not loaded.
    DriverNotLoaded,
    /// It is, and this agent was not handed its devices: nothing can be said of the GPUs from here.
    GpusNotVisible,
    /// Check 2: no `libnvidia-ml.so.1` here. As little is known then.
    LibraryNotFound,
    /// The library took agents down with it, and is not asked any more.
    NvmlCrashes,
    /// NVML does not start, and this agent may not open the driver's devices: as little is known as without them.
    GpusNotPermitted,
    /// The library is of another version than the driver.
    DriverMismatch,
    /// NVML does not start.
    NvmlInitFailed,
    /// A call into NVML does not come back.
    NvmlUnresponsive,
    /// NVML was not asked yet.
    NvmlNotObserved,
    /// Check 3: the PCI bus, the device files, NVML and what should be there differ.
    GpuCountMismatch,
    /// A GPU does not answer any more.
    GpuLost,
    /// Check 4: the driver asks for something to be done.
    RecoveryActionRequired(RecoveryAction),
    /// Check 5: a fatal error since the boot, not cleared.
    FatalXid(u32),
    /// Or one that is not fatal.
    DegradedXid(u32),
    /// Check 6: a memory row could not be remapped.
    RowRemapFailed,
    /// A row will be remapped, or a page retired, at the next reset.
    RowRemapPending,
    /// Check 7: an ECC error that could not be corrected, since the agent started.
    UncorrectableEcc,
    /// Check 8: too hot, for minutes.
    ThermalSlowdown,
    /// Held back by its power supply, for minutes.
    PowerBrake,
    /// Check 9: NVSwitch.
    FabricNotReady,
    /// Check 10: the kubelet knows no GPU.
    DevicePluginNotRegistered,
    /// It knows fewer than there should be.
    DevicesUnhealthy {
        /// So many are missing.
        unhealthy: u32,
        /// Of so many.
        of: u32,
    },
    /// Nobody said yet what the device plugin gives out.
    DevicePluginNotObserved,
    /// Check 11: the API server says that the node has no GPU to give.
    AllocatableZero,
    /// Check 12: GPU feature discovery, which is optional.
    GfdLabelsMissing,
    /// Check 13: processes are to be counted, and this agent does not see those of the host.
    ProcessesNotVisible,
}

impl Reason {
    /// The word alone, for labels and conditions: their number has a bound.
    pub const fn word(self) -> &'static str {
        match self {
            Self::GpuNodeNotObserved => "GpuNodeNotObserved",
            Self::DriverUpgrading(_) => "DriverUpgrading",
            Self::DriverNotLoaded => "DriverNotLoaded",
            Self::GpusNotVisible => "GpusNotVisible",
            Self::LibraryNotFound => "LibraryNotFound",
            Self::NvmlCrashes => "NvmlCrashes",
            Self::GpusNotPermitted => "GpusNotPermitted",
            Self::DriverMismatch => "DriverMismatch",
            Self::NvmlInitFailed => "NvmlInitFailed",
            Self::NvmlUnresponsive => "NvmlUnresponsive",
            Self::NvmlNotObserved => "NvmlNotObserved",
            Self::GpuCountMismatch => "GpuCountMismatch",
            Self::GpuLost => "GpuLost",
            Self::RecoveryActionRequired(_) => "RecoveryActionRequired",
            Self::FatalXid(_) => "FatalXid",
            Self::DegradedXid(_) => "DegradedXid",
            Self::RowRemapFailed => "RowRemapFailed",
            Self::RowRemapPending => "RowRemapPending",
            Self::UncorrectableEcc => "UncorrectableEcc",
            Self::ThermalSlowdown => "ThermalSlowdown",
            Self::PowerBrake => "PowerBrake",
            Self::FabricNotReady => "FabricNotReady",
            Self::DevicePluginNotRegistered => "DevicePluginNotRegistered",
            Self::DevicesUnhealthy { .. } => "DevicesUnhealthy",
            Self::DevicePluginNotObserved => "DevicePluginNotObserved",
            Self::AllocatableZero => "AllocatableZero",
            Self::GfdLabelsMissing => "GfdLabelsMissing",
            Self::ProcessesNotVisible => "ProcessesNotVisible",
        }
    }

    /// The check that finds it.
    pub(super) const fn check(self) -> usize {
        match self {
            Self::GpuNodeNotObserved => 0,
            Self::DriverNotLoaded | Self::GpusNotVisible => 1,
            Self::LibraryNotFound | Self::DriverMismatch | Self::NvmlInitFailed => 2,
            Self::NvmlCrashes | Self::GpusNotPermitted => 2,
            Self::NvmlUnresponsive | Self::NvmlNotObserved => 2,
            Self::GpuCountMismatch | Self::GpuLost => 3,
            Self::RecoveryActionRequired(_) => 4,
            Self::FatalXid(_) | Self::DegradedXid(_) => 5,
            Self::RowRemapFailed | Self::RowRemapPending => 6,
            Self::UncorrectableEcc => 7,
            Self::ThermalSlowdown | Self::PowerBrake => 8,
            Self::FabricNotReady => 9,
            Self::DevicePluginNotRegistered | Self::DevicesUnhealthy { .. } | Self::DevicePluginNotObserved => 10,
            Self::AllocatableZero => 11,
            Self::GfdLabelsMissing => 12,
            Self::ProcessesNotVisible => 13,
            Self::DriverUpgrading(_) => 14,
        }
    }

    /// That nothing was heard yet: not a fault that comes and goes, and over with the first word.
    pub(super) const fn is_silence(self) -> bool {
        matches!(self, Self::GpuNodeNotObserved | Self::NvmlNotObserved | Self::DevicePluginNotObserved)
    }

    /// The same fault, whatever its numbers are now.
    pub(super) const fn fault(self) -> Self {
        match self {
            Self::DevicesUnhealthy { .. } => Self::DevicesUnhealthy { unhealthy: 0, of: 0 },
            Self::DriverUpgrading(_) => Self::DriverUpgrading(Upgrade::Other),
            other => other,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        match self {
            Self::RecoveryActionRequired(action) => write!(f, "({action})"),
            Self::DriverUpgrading(upgrade) => write!(f, "({})", upgrade.as_str()),
            Self::FatalXid(xid) | Self::DegradedXid(xid) => write!(f, "({xid})"),
            Self::DevicesUnhealthy { unhealthy, of } => write!(f, "({unhealthy} of {of})"),
            _ => Ok(()),
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What the driver asks for (NVML field 230), where it asks for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecoveryAction {
    /// 1: reset the GPU.
    GpuReset,
    /// 2: reboot the node.
    NodeReboot,
    /// 3: end what talks to other GPUs.
    DrainP2p,
    /// 4: end everything on it, and reset it.
    DrainAndReset,
    /// 5: recover the IMEX domain.
    RecoverImex,
    /// Something that newer drivers ask for.
    Other(u32),
}

impl RecoveryAction {
    /// From the field's value. `None` is none.
    pub const fn from_field(value: u32) -> Option<Self> {
        match value {
            0 => None,
            1 => Some(Self::GpuReset),
            2 => Some(Self::NodeReboot),
            3 => Some(Self::DrainP2p),
            4 => Some(Self::DrainAndReset),
            5 => Some(Self::RecoverImex),
            other => Some(Self::Other(other)),
        }
    }
}

impl fmt::Display for RecoveryAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GpuReset => f.write_str("GpuReset"),
            Self::NodeReboot => f.write_str("NodeReboot"),
            Self::DrainP2p => f.write_str("DrainP2P"),
            Self::DrainAndReset => f.write_str("DrainAndReset"),
            Self::RecoverImex => f.write_str("RecoverImex"),
            Self::Other(value) => write!(f, "{value}"),
        }
    }
}
