//! What a node concludes from readings of its GPUs.
//!
//! Readings and the time come in, verdicts go out. Missing knowledge may only keep things as they are: what
//! could not be read is `None`, and `None` never makes a GPU ready, broken or idle.
//! Not here: NVML, sysfs, the kernel's log, the kubelet; `darter-agent` reads them.

mod device_id;
pub mod fit;
pub mod idle;
mod pci;
pub mod readiness;
pub mod xid;

pub use crate::swarm::Time;
pub use device_id::{Device, DeviceId};
pub use pci::{NotPci, PciAddress};
