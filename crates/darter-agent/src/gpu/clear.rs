//! The operator says that GPUs are well again: errors that stood against them until the next boot stand no more, and
//! NVML is asked again where it was not for its crashes.
//!
//! A GPU that was reset on a node that goes on is well, and nothing tells this agent of a reset. Errors are
//! counted still, and the next one stands again.

use std::io;

use darter_core::gpu::PciAddress;
use darter_core::gpu::xid::Outstanding;
use serde::{Deserialize, Serialize};

use super::{View, lock};

/// What is ordered.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Clear {
    /// One GPU, by UUID, PCI address or NVML's index; all of them without.
    #[serde(default)]
    pub gpu: Option<String>,
}

/// What stands no more.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Cleared {
    /// An error of a GPU.
    Error {
        /// Where the GPU is.
        pci: String,
        /// Its UUID, if it answers.
        uuid: Option<String>,
        /// The code.
        xid: u32,
    },
    /// NVML was not asked any more, and is asked again.
    Crashes {
        /// So many agents ended while they asked it.
        nvml_crashes: u32,
    },
}

/// Why nothing was cleared, or not for good.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// No GPU of this node is called so.
    #[error("this node has no GPU {0}: name one by its UUID, PCI address or index, as `darter status` has them")]
    Unknown(String),
    /// A restart of the agent brings them back.
    #[error("cleared, but not stored: what stood stands again when the agent is started again")]
    Store(#[source] io::Error),
}

impl View {
    /// Clears the errors of one GPU, or of all, and has them judged anew. What stood against them.
    ///
    /// # Errors
    /// There is no such GPU, or it cannot be stored.
    pub fn clear(&self, order: &Clear) -> Result<Vec<Cleared>, ClearError> {
        let pci = match &order.gpu {
            Some(name) => Some(self.find(name).ok_or_else(|| ClearError::Unknown(name.clone()))?),
            None => None,
        };
        let stood = self.0.xids.clear(pci).map_err(ClearError::Store)?;
        let crashes = match &order.gpu {
            None => lock(&self.0.crashes).clear().map_err(ClearError::Store)?,
            Some(_) => None,
        };
        self.0.published.notify_one();
        let snapshot = self.now().snapshot;
        let uuid = |pci: PciAddress| {
            let gpu = snapshot.gpus.iter().find(|gpu| gpu.identity.pci() == Some(pci));
            gpu.map(|gpu| gpu.identity.uuid.clone())
        };
        let error = |one: Outstanding| Cleared::Error { pci: one.pci.to_string(), uuid: uuid(one.pci), xid: one.xid };
        let crashes = crashes.map(|nvml_crashes| Cleared::Crashes { nvml_crashes });
        Ok(stood.into_iter().map(error).chain(crashes).collect())
    }

    /// Where a GPU is that an operator names. One that fell off the bus may be named by its address alone.
    fn find(&self, name: &str) -> Option<PciAddress> {
        let snapshot = self.now().snapshot;
        let is_named = |uuid: &str, index: u32| uuid == name || name.parse() == Ok(index);
        let known = snapshot.gpus.iter().find(|gpu| is_named(&gpu.identity.uuid, gpu.identity.index));
        let at = name
            .parse::<PciAddress>()
            .ok()
            .filter(|pci| self.0.xids.knows(*pci) || snapshot.gpus.iter().any(|gpu| gpu.identity.pci() == Some(*pci)));
        known.and_then(|gpu| gpu.identity.pci()).or(at)
    }
}
