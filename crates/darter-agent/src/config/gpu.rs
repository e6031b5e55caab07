//! The table `[gpu]`.

use std::path::PathBuf;
use std::time::Duration;

use darter_core::gpu::xid;
use darter_core::units::Seconds;
use serde::{Deserialize, Serialize};

use super::check::{Fault, require};
use super::optional;

/// One call takes the driver's lock: below this, what asks beside us waits.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// So many readings it takes to say that a GPU does nothing.
const IDLE_READINGS: u32 = 12;
/// Past this nobody sees a GPU fail.
const INTERVAL_MAX: Duration = Duration::from_secs(600);
/// Past this nobody waits for a driver.
const GRACE_MAX: Duration = Duration::from_secs(60 * 60);

/// How GPUs are looked at. The keys are described in `default.toml`.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    pub mode: GpuMode,
    #[serde(with = "optional")]
    pub library: Option<PathBuf>,
    #[serde(with = "optional")]
    pub driver_root: Option<PathBuf>,
    pub interval: Seconds,
    pub slow_interval: Seconds,
    pub idle_window: Seconds,
    pub processes: bool,
    pub dcgm_names: DcgmNames,
    pub expected: u32,
    #[serde(with = "optional")]
    pub host_root: Option<PathBuf>,
    pub kmsg: bool,
    #[serde(with = "optional")]
    pub pod_resources: Option<PathBuf>,
    pub device_plugin: bool,
    pub driver_grace: Seconds,
    pub xid_fatal: Vec<u32>,
    pub xid_ignore: Vec<u32>,
}

impl Gpu {
    /// How many GPUs there should be, if that is said.
    pub fn expected(&self) -> Option<u32> {
        Some(self.expected).filter(|count| *count > 0)
    }

    /// What the operator says of errors. A contradiction is refused before anything reads this.
    pub fn xids(&self) -> xid::Policy {
        xid::Policy::new(self.xid_fatal.clone(), self.xid_ignore.clone()).unwrap_or_default()
    }
}

/// Whether anybody asks NVML.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuMode {
    Auto,
    Off,
}

/// Which of dcgm-exporter's names the metrics have besides their own.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DcgmNames {
    Off,
    Legacy,
    V49,
}

pub(super) fn check_gpu(gpu: &Gpu) -> Result<(), Fault> {
    for (key, interval) in [("gpu.interval", gpu.interval), ("gpu.slow_interval", gpu.slow_interval)] {
        require(interval.0 >= INTERVAL_MIN && interval.0 <= INTERVAL_MAX, key, || {
            "must be from 1s to 10m: more often the driver's lock stops others, more seldom nobody sees a GPU fail"
                .to_owned()
        })?;
    }
    require(gpu.idle_window.0 >= gpu.interval.0 * IDLE_READINGS, "gpu.idle_window", || {
        format!("must be at least {IDLE_READINGS} times gpu.interval ({}): fewer readings prove nothing", gpu.interval)
    })?;
    require(gpu.slow_interval.0 >= gpu.interval.0, "gpu.slow_interval", || {
        format!("must not be shorter than gpu.interval ({})", gpu.interval)
    })?;
    require(gpu.driver_grace.0 <= GRACE_MAX, "gpu.driver_grace", || {
        "must be at most 1h: a node whose GPUs cannot be read helps nobody (0s: the agent goes on)".to_owned()
    })?;
    let errors = xid::Policy::new(gpu.xid_fatal.clone(), gpu.xid_ignore.clone());
    require(errors.is_ok(), "gpu.xid_ignore", || errors.err().map(|error| error.to_string()).unwrap_or_default())?;
    require(gpu.library.is_none() || gpu.driver_root.is_none(), "gpu.driver_root", || {
        "give either gpu.library or gpu.driver_root".to_owned()
    })
}
