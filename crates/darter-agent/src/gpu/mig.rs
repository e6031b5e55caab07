//! GPUs that are cut into MIG devices: what each is asked, and what a scrape shows of them.
//!
//! A MIG device has a name, memory and multiprocessors of its own. Power, heat, clocks and errors are those of
//! its GPU, and so is what follows from them. What the profiling counters say is said of GPU instances, which
//! compute instances share.

use std::fmt::Error;

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::{DeviceAttributes, MemoryInfo};

use super::calls::Questions;
use super::exposition::{Labels, Page, Series, Shown, number};
use super::sample::{Memory, MigDevice, Profile};

/// No GPU can be cut into more than 7; past this NVML's count is wrong.
const DEVICES_MAX: u32 = 64;

/// Whether a GPU is in MIG mode now.
pub(super) fn is_on(device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> bool {
    gpu.ask("mig_mode", || device.mig_mode()).is_some_and(|mode| mode.current != 0)
}

/// What a GPU in MIG mode is cut into; none where nobody has cut it yet.
pub(super) fn devices(device: &Device<'_>, gpu: &mut Questions<'_, '_>) -> Vec<MigDevice> {
    let most = gpu.ask("mig_device_count", || device.mig_device_count()).unwrap_or(0);
    let mut found = Vec::new();
    for index in 0..most.min(DEVICES_MAX) {
        // What is destroyed leaves a hole among the indices.
        let handle = gpu.ask("mig_device_handle", || match device.mig_device_by_index(index) {
            Err(NvmlError::NotFound) => Ok(None),
            answer => answer.map(Some),
        });
        if let Some(mig) = handle.flatten() {
            found.extend(read(&mig, gpu));
        }
    }
    found
}

/// One of them. Without a UUID nothing can be said of it.
fn read(mig: &Device<'_>, gpu: &mut Questions<'_, '_>) -> Option<MigDevice> {
    let uuid = gpu.ask("mig_uuid", || mig.uuid())?;
    let name = gpu.ask("mig_name", || mig.name());
    let attributes: Option<DeviceAttributes> = gpu.ask("mig_attributes", || mig.attributes());
    Some(MigDevice {
        uuid,
        profile: name.as_deref().and_then(profile).map(str::to_owned),
        multiprocessors: attributes.map(|attributes| attributes.multiprocessor_count),
        instance: gpu.ask("mig_gpu_instance", || darter_nvml::gpu_instance(mig)),
        memory: gpu.ask("mig_memory_info", || mig.memory_info()).map(Memory::from),
    })
}

/// The driver's name of a MIG device ends with its profile.
fn profile(name: &str) -> Option<&str> {
    name.rsplit_once(" MIG ").map(|(_, profile)| profile)
}

impl From<MemoryInfo> for Memory {
    fn from(said: MemoryInfo) -> Self {
        let MemoryInfo { total, reserved, used, free, .. } = said;
        Self { total, reserved, used, free }
    }
}

/// What a scrape shows of them.
pub(super) fn show(page: &mut Page<'_>, gpus: &[Shown<'_>]) -> Result<(), Error> {
    let all = || gpus.iter().flat_map(of_gpu);
    let multiprocessors: Vec<_> = all().map(|(_, mig)| mig.multiprocessors.map(|count| count.to_string())).collect();
    let instances: Vec<_> = all().map(|(_, mig)| mig.instance.map(|number| number.to_string())).collect();
    let info = all().zip(multiprocessors.iter().zip(&instances)).map(|((gpu, mig), (multiprocessors, instance))| {
        let mut labels = labels(gpu, mig);
        let known = [
            ("profile", mig.profile.as_deref()),
            ("multiprocessors", multiprocessors.as_deref()),
            ("gpu_instance", instance.as_deref()),
        ];
        labels.extend(known.into_iter().filter_map(|(name, value)| Some((name, value?))));
        (labels, 1.0)
    });
    page.gauge("gpu_mig_info", "What does not change of a MIG device", info.collect())?;
    let memory = |part: fn(Memory) -> u64| -> Series<'_, f64> {
        all().filter_map(|(gpu, mig)| Some((labels(gpu, mig), number(part(mig.memory?))))).collect()
    };
    let total = memory(|memory| memory.total);
    page.gauge("gpu_mig_memory_total_bytes", "Framebuffer of its GPU instance: not to be added up", total)?;
    let used = memory(|memory| memory.used);
    page.gauge("gpu_mig_memory_used_bytes", "Framebuffer of its GPU instance that processes have", used)?;
    let free = memory(|memory| memory.free);
    page.gauge("gpu_mig_memory_free_bytes", "Framebuffer of its GPU instance that nobody has", free)?;
    let profiled = |part: fn(&Profile) -> Option<f64>| -> Series<'_, f64> {
        let of = |shown: &Shown<'_>, mig: &MigDevice| part(shown.fast?.instances.get(&mig.instance?)?);
        let each = |shown| of_gpu(shown).filter_map(move |(gpu, mig)| Some((labels(gpu, mig), of(shown, mig)?)));
        gpus.iter().flat_map(each).collect()
    };
    let sm = profiled(|profile| profile.sm);
    page.gauge("gpu_mig_sm_active_ratio", "Share of time that the multiprocessors of its GPU instance worked", sm)?;
    let tensor = profiled(|profile| profile.tensor);
    page.gauge("gpu_mig_tensor_active_ratio", "Share of time that the tensor cores of its instance worked", tensor)?;
    let dram = profiled(|profile| profile.dram);
    page.gauge("gpu_mig_dram_active_ratio", "Share of time that the memory of its GPU instance worked", dram)
}

/// With the UUID of their GPU.
fn of_gpu<'a>(shown: &Shown<'a>) -> impl Iterator<Item = (&'a str, &'a MigDevice)> + use<'a> {
    let gpu = shown.gpu.identity.uuid.as_str();
    shown.slow.and_then(|slow| slow.mig.as_deref()).unwrap_or_default().iter().map(move |mig| (gpu, mig))
}

fn labels<'a>(gpu: &'a str, mig: &'a MigDevice) -> Labels<'a> {
    vec![("uuid", gpu), ("mig_uuid", &mig.uuid)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_what_the_drivers_name_ends_with() {
        assert_eq!(profile("NVIDIA H200 MIG 1c.3g.71gb"), Some("1c.3g.71gb"));
        assert_eq!(profile("NVIDIA A100-SXM4-40GB MIG 1g.5gb+me"), Some("1g.5gb+me"));
        assert_eq!(profile("NVIDIA H200"), None);
    }
}
