//! GPUs and the EC2 instance types that have them, as data.
//!
//! NVML and EC2 name different sizes for the same board. What fits is reckoned with NVML's, which is what a
//! program gets; nodes that do not exist yet are selected by EC2's, which is what Karpenter knows of them.

use serde::Serialize;

/// One kind of GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gpu {
    /// Our name for it.
    pub name: &'static str,
    /// NVML's total memory, which is also the label `nvidia.com/gpu.memory`, in MiB.
    pub total_mib: u32,
    /// What the driver keeps of it, in MiB.
    pub reserved_mib: u32,
    /// What EC2 says (`DescribeInstanceTypes`), in MiB.
    pub provider_mib: u32,
    /// Karpenter's `instance-gpu-name`.
    pub provider_name: &'static str,
    /// The label `nvidia.com/gpu.product`, without sharing and MIG.
    pub product: &'static str,
    /// Whether it computes in fp8. Others keep fp8 weights and compute in 16 bits, or take int8.
    pub has_fp8: bool,
    /// Whether all of the row was read from a board. Else a number is near, and was read elsewhere.
    pub is_verified: bool,
}

const fn gpu(name: &'static str, sizes: [u32; 3], names: [&'static str; 2], has_fp8: bool, is_verified: bool) -> Gpu {
    let [total_mib, reserved_mib, provider_mib] = sizes;
    let [provider_name, product] = names;
    Gpu { name, total_mib, reserved_mib, provider_mib, provider_name, product, has_fp8, is_verified }
}

/// All kinds, by memory. Total and reserved from `nvidia-smi -q` of idle boards, with the driver in brackets.
pub const GPUS: [Gpu; 8] = [
    // [595.91.07]
    gpu("T4", [15_360, 448, 16_384], ["t4", "Tesla-T4"], false, true),
    // Reserved: of an A10.
    gpu("A10G", [23_028, 517, 22_888], ["a10g", "NVIDIA-A10G"], false, false),
    // Reserved: 471 to 556 in captures; EC2's size as that of the A10G.
    gpu("L4", [23_034, 556, 22_888], ["l4", "NVIDIA-L4"], true, false),
    // [570.148.08]
    gpu("A100-40", [40_960, 518, 40_960], ["a100", "NVIDIA-A100-SXM4-40GB"], false, true),
    gpu("L40S", [46_068, 609, 45_776], ["l40s", "NVIDIA-L40S"], true, true),
    // [590.48.01]; with 580.105.08 one MiB more is reserved.
    gpu("H100", [81_559, 479, 81_920], ["h100", "NVIDIA-H100-80GB-HBM3"], true, true),
    // Reserved: 557 to 834 in captures.
    gpu("A100-80", [81_920, 600, 81_920], ["a100", "NVIDIA-A100-SXM4-80GB"], false, false),
    // [590.48.01]
    gpu("H200", [143_771, 614, 144_384], ["h200", "NVIDIA-H200"], true, true),
];

/// One EC2 instance type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its name.
    pub name: &'static str,
    /// Which GPU it has.
    pub gpu: &'static str,
    /// And how many.
    pub count: u32,
}

/// Families, with their sizes by number of GPUs.
const FAMILIES: &[(&str, u32, &[&str])] = &[
    ("T4", 1, &["g4dn.xlarge", "g4dn.2xlarge", "g4dn.4xlarge", "g4dn.8xlarge", "g4dn.16xlarge"]),
    ("T4", 4, &["g4dn.12xlarge"]),
    ("T4", 8, &["g4dn.metal"]),
    ("A10G", 1, &["g5.xlarge", "g5.2xlarge", "g5.4xlarge", "g5.8xlarge", "g5.16xlarge"]),
    ("A10G", 4, &["g5.12xlarge", "g5.24xlarge"]),
    ("A10G", 8, &["g5.48xlarge"]),
    ("L4", 1, &["g6.xlarge", "g6.2xlarge", "g6.4xlarge", "g6.8xlarge", "g6.16xlarge"]),
    ("L4", 4, &["g6.12xlarge", "g6.24xlarge"]),
    ("L4", 8, &["g6.48xlarge"]),
    ("L40S", 1, &["g6e.xlarge", "g6e.2xlarge", "g6e.4xlarge", "g6e.8xlarge", "g6e.16xlarge"]),
    ("L40S", 4, &["g6e.12xlarge", "g6e.24xlarge"]),
    ("L40S", 8, &["g6e.48xlarge"]),
    ("A100-40", 8, &["p4d.24xlarge"]),
    ("A100-80", 8, &["p4de.24xlarge"]),
    ("H100", 1, &["p5.4xlarge"]),
    ("H100", 8, &["p5.48xlarge"]),
    ("H200", 8, &["p5e.48xlarge", "p5en.48xlarge"]),
];

/// All instance types that are known here.
pub fn instances() -> impl Iterator<Item = Instance> + Clone {
    let types = |(gpu, count, names): &(&'static str, u32, &'static [&'static str])| {
        let (gpu, count) = (*gpu, *count);
        names.iter().map(move |name| Instance { name, gpu, count })
    };
    FAMILIES.iter().flat_map(types)
}

/// The instance types that have so many of a GPU, or as few more as there are.
pub fn instances_with(gpu: &str, count: u32) -> Vec<Instance> {
    let enough = instances().filter(|instance| instance.gpu == gpu && instance.count >= count);
    let least = enough.clone().map(|instance| instance.count).min();
    enough.filter(|instance| Some(instance.count) == least).collect()
}

/// How many GPUs an instance type has: for the readiness of a node of that type.
pub fn gpus_of(instance: &str) -> Option<u32> {
    instances().find(|known| known.name == instance).map(|known| known.count)
}

/// The kinds of that name; `a100` is both of them.
pub fn named(name: &str) -> Vec<Gpu> {
    let name = name.to_ascii_uppercase();
    let is_named =
        |gpu: &&Gpu| gpu.name == name || gpu.name.strip_prefix(&*name).is_some_and(|rest| rest.starts_with('-'));
    GPUS.iter().filter(is_named).copied().collect()
}
