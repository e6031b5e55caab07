//! What device plugins call a GPU: the ids that the kubelet lists as given to a pod.

use std::num::ParseIntError;

/// What an id names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// `GPU-<uuid>`.
    Gpu(String),
    /// `MIG-<uuid>`: a MIG device, whose GPU the id does not say.
    Mig(String),
    /// `MIG-GPU-<uuid>/<gi>/<ci>`, the older form: the GPU's uuid.
    MigOf(String),
    /// `nvidia<n>`, also `nvidia<n>/gi<m>` and `nvidia<n>/vgpu<m>`, on GKE: the number of the device node.
    Node(u32),
}

/// A device, and which replica of it where several pods share it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceId {
    /// The device.
    pub device: Device,
    /// The replica: `GPU-<uuid>::<n>` of time-slicing and MPS; the instance on GKE.
    pub replica: Option<String>,
}

impl DeviceId {
    /// Reads an id. `None`: not of a form that is known.
    pub fn parse(id: &str) -> Option<Self> {
        let (name, replica) = match id.split_once("::") {
            Some((name, replica)) if !replica.is_empty() => (name, Some(replica.to_owned())),
            Some(_) => return None,
            None => (id, None),
        };
        if let Some(older) = name.strip_prefix("MIG-GPU-") {
            let uuid = older.split('/').next().filter(|uuid| !uuid.is_empty())?;
            return Some(Self { device: Device::MigOf(format!("GPU-{uuid}")), replica });
        }
        if name.strip_prefix("MIG-").is_some_and(|uuid| !uuid.is_empty()) {
            return Some(Self { device: Device::Mig(name.to_owned()), replica });
        }
        if name.strip_prefix("GPU-").is_some_and(|uuid| !uuid.is_empty()) {
            return Some(Self { device: Device::Gpu(name.to_owned()), replica });
        }
        let (node, instance) = match name.strip_prefix("nvidia")?.split_once('/') {
            Some((node, instance)) => (node, Some(instance.to_owned())),
            None => (name.strip_prefix("nvidia")?, None),
        };
        let number: Result<u32, ParseIntError> = node.parse();
        Some(Self { device: Device::Node(number.ok()?), replica: replica.or(instance) })
    }

    /// An id without its replica: what is left is the same for all who share the device. Any text is an id.
    pub fn shared(id: &str) -> &str {
        let name = id.split_once("::").map_or(id, |(name, _)| name);
        name.split_once("/vgpu").map_or(name, |(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_shares_a_device_has_the_same_id_but_for_the_replica_and_parts_of_a_gpu_are_devices() {
        for (id, shared) in [
            ("GPU-4a2b", "GPU-4a2b"),
            ("GPU-4a2b::3", "GPU-4a2b"),
            ("MIG-77::0", "MIG-77"),
            ("MIG-GPU-4a2b/7/0", "MIG-GPU-4a2b/7/0"),
            ("nvidia0/vgpu1", "nvidia0"),
            ("nvidia0/gi3", "nvidia0/gi3"),
            ("nvidia0/gi3/vgpu1", "nvidia0/gi3"),
            ("another", "another"),
        ] {
            assert_eq!(DeviceId::shared(id), shared, "{id}");
        }
    }

    #[test]
    fn every_form_of_an_id_is_read() {
        let id = |text: &str| DeviceId::parse(text).map(|id| (id.device, id.replica));
        let gpu = |uuid: &str| Device::Gpu(uuid.to_owned());
        assert_eq!(id("GPU-4a2b"), Some((gpu("GPU-4a2b"), None)));
        assert_eq!(id("GPU-4a2b::3"), Some((gpu("GPU-4a2b"), Some("3".into()))));
        assert_eq!(id("MIG-77"), Some((Device::Mig("MIG-77".into()), None)));
        assert_eq!(id("MIG-77::0"), Some((Device::Mig("MIG-77".into()), Some("0".into()))));
        assert_eq!(id("MIG-GPU-4a2b/7/0"), Some((Device::MigOf("GPU-4a2b".into()), None)));
        assert_eq!(id("nvidia0"), Some((Device::Node(0), None)));
        assert_eq!(id("nvidia12/gi3"), Some((Device::Node(12), Some("gi3".into()))));
        assert_eq!(id("nvidia1/vgpu0"), Some((Device::Node(1), Some("vgpu0".into()))));
        for wrong in ["", "GPU-", "MIG-", "MIG-GPU-", "nvidia", "nvidiactl", "GPU-4a2b::", "tpu0", "/dev/nvidia0"] {
            assert_eq!(id(wrong), None, "{wrong}");
        }
    }
}
