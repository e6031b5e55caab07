//! GPUs for a test: the mock of NVIDIA's library, with its configuration, in a directory of their own.
//!
//! Each [`Mock`] is a library of its own for the loader, as it is a copy: one process can load several.
//! What it says can be changed while it is in use. See `tests/nvml-mock` for what a configuration can say.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use nvidia_ml_mock::config::Config;
use nvidia_ml_mock::file;

use crate::agent::Options;
use crate::net::Place;
use crate::scratch::Scratch;
use crate::tools;

/// The file name under which the library is loaded.
const LIBRARY: &str = "libnvidia-ml-mock.so";

/// A mock of `libnvidia-ml.so.1` and what it says.
#[derive(Debug)]
pub struct Mock {
    dir: Scratch,
}

impl Mock {
    /// One that says what the TOML text `config` says.
    pub fn new(config: &str) -> Result<Self> {
        let mock = Self { dir: Scratch::new()? };
        let built = tools::mock_nvml()?;
        // A copy: the loader takes two links to one file for one library.
        fs::copy(&built, mock.library()).with_context(|| format!("cannot copy {}", built.display()))?;
        mock.set(config)?;
        Ok(mock)
    }

    /// One that says what a fixture says: `h200-idle`.
    pub fn fixture(name: &str) -> Result<Self> {
        Self::new(&format!("base = '{name}'"))
    }

    /// Changes what it says, all at once. An error if that makes no sense; then nothing changes.
    pub fn set(&self, config: &str) -> Result<Config> {
        let parsed = file::parse(config).map_err(|error| anyhow!("{error}, in:\n{config}"))?;
        self.write(config)?;
        Ok(parsed)
    }

    /// Changes its file, whether that makes sense or not.
    pub fn write(&self, text: &str) -> Result<()> {
        let new = self.dir.path().join("new");
        fs::write(&new, text)?;
        fs::rename(&new, self.config())?;
        Ok(())
    }

    /// The library, to be loaded by this path.
    pub fn library(&self) -> PathBuf {
        self.dir.path().join(LIBRARY)
    }

    /// The file with what it says. The library finds it beside itself.
    pub fn config(&self) -> PathBuf {
        self.library().with_extension("toml")
    }

    /// A host with so many GPUs, as PCI, the driver and the device nodes show them: for `gpu.host_root`.
    pub fn host(&self, gpus: u32) -> Result<PathBuf> {
        let root = self.dir.path().join("host");
        let devices = root.join("sys/bus/pci/devices");
        for dir in [&devices, &root.join("dev"), &root.join("proc/driver/nvidia")] {
            fs::create_dir_all(dir)?;
        }
        for gpu in 0..gpus {
            let device = devices.join(format!("0000:{gpu:02x}:00.0"));
            fs::create_dir_all(&device)?;
            fs::write(device.join("vendor"), "0x10de\n")?;
            fs::write(device.join("class"), "0x030200\n")?;
            fs::write(root.join(format!("dev/nvidia{gpu}")), "")?;
        }
        fs::write(root.join("dev/nvidiactl"), "")?;
        fs::write(root.join("proc/driver/nvidia/version"), "NVRM version: a mock\n")?;
        // As an agent with hostPID reads it, wherever the test itself runs. No file has that name: it is the text
        // that counts, as of the kernel's own.
        let namespaces = root.join("proc/self/ns");
        if !namespaces.exists() {
            fs::create_dir_all(&namespaces)?;
            symlink("pid:[4026531836]", namespaces.join("pid"))?;
        }
        Ok(root)
    }

    /// An agent on a host with so many GPUs, which it asks every second.
    pub fn options(&self, gpus: u32) -> Result<Options> {
        let options = Options::new(&Place::Host)
            .plain_registry("registry.example", "http://127.0.0.1:9")
            .set("gpu.library", self.library().display().to_string())
            .set("gpu.interval", "1s")
            .set("gpu.slow_interval", "1s")
            .set("gpu.processes", true)
            .set("gpu.pod_resources", "")
            .set("gpu.host_root", self.host(gpus)?.display().to_string());
        Ok(options)
    }

    /// Environment for an agent that is to load it.
    pub fn env(&self) -> [(&'static str, PathBuf); 2] {
        [("DARTER_NVML_PATH", self.library()), ("MOCK_NVML_CONFIG", self.config())]
    }

    /// Where both are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}
