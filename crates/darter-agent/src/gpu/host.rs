//! What the host shows of its GPUs without NVML: PCI functions, the driver, device nodes.

use std::fs;
use std::path::Path;

/// NVIDIA's number among PCI vendors.
const VENDOR: &str = "0x10de";
/// Classes of PCI functions that are GPUs: VGA and 3D controllers; the rest is the revision.
const CLASSES: [&str; 2] = ["0x0300", "0x0302"];

/// One look. `None`: it could not be read, which says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) pci_functions: Option<u32>,
    pub(super) driver_version_file: Option<bool>,
    pub(super) control_node: Option<bool>,
    /// Only where it was tried: the driver counts who has it open.
    pub(super) control_node_opens: Option<bool>,
    pub(super) device_nodes: Option<u32>,
}

impl Host {
    /// Below `root`: `/`, or where the host is mounted. Tries to open the driver's device if it `may_open` it.
    pub(super) fn look(root: &Path, may_open: bool) -> Self {
        let dev = root.join("dev");
        Self {
            pci_functions: pci_functions(&root.join("sys/bus/pci/devices")),
            driver_version_file: there(&root.join("proc/driver/nvidia/version")),
            control_node: there(&dev.join("nvidiactl")),
            control_node_opens: may_open.then(|| opens(&dev.join("nvidiactl"))).flatten(),
            device_nodes: device_nodes(root),
        }
    }
}

/// How many files `/dev/nvidia<n>` there are.
pub(super) fn device_nodes(root: &Path) -> Option<u32> {
    let entries = fs::read_dir(root.join("dev")).ok()?;
    u32::try_from(entries.flatten().filter(|entry| is_gpu_node(&entry.file_name())).count()).ok()
}

/// Whether a file is there, where its directory's file system can be looked at.
fn there(path: &Path) -> Option<bool> {
    path.try_exists().ok()
}

/// Whether the kernel lets this process open a device, which is closed at once. What else may be wrong with it says
/// nothing of that.
fn opens(device: &Path) -> Option<bool> {
    match fs::File::open(device) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Some(false),
        Err(_) => None,
    }
}

fn is_gpu_node(name: &std::ffi::OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix("nvidia"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A machine without PCI has no such directory, and a container without /sys neither: nothing is known then.
fn pci_functions(devices: &Path) -> Option<u32> {
    let entries = fs::read_dir(devices).ok()?;
    let is_gpu = |device: &Path| {
        let read = |file: &str| fs::read_to_string(device.join(file)).unwrap_or_default();
        read("vendor").trim() == VENDOR && CLASSES.iter().any(|class| read("class").starts_with(class))
    };
    u32::try_from(entries.flatten().filter(|entry| is_gpu(&entry.path())).count()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_shows_is_counted_and_what_it_hides_is_not_known() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(
            Host::look(&root.path().join("gone"), true),
            Host { driver_version_file: Some(false), control_node: Some(false), ..Host::default() }
        );
        let device = |name: &str, vendor: &str, class: &str| {
            let dir = root.path().join("sys/bus/pci/devices").join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(dir.join("class"), format!("{class}\n")).unwrap();
        };
        device("0000:1b:00.0", "0x10de", "0x030200");
        device("0000:1c:00.0", "0x10de", "0x030000");
        device("0000:1d:00.0", "0x10de", "0x068000");
        device("0000:1e:00.0", "0x8086", "0x030000");
        fs::create_dir_all(root.path().join("dev")).unwrap();
        for node in ["nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia", "null"] {
            fs::write(root.path().join("dev").join(node), "").unwrap();
        }
        let wanted = Host {
            pci_functions: Some(2),
            driver_version_file: Some(false),
            control_node: Some(true),
            control_node_opens: None,
            device_nodes: Some(2),
        };
        assert_eq!(Host::look(root.path(), false), wanted);
        assert_eq!(Host::look(root.path(), true), Host { control_node_opens: Some(true), ..wanted });
    }
}
