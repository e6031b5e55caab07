//! The mock, loaded as a library by the real nvml-wrapper: it answers what its configuration says.
//!
//! The harness has a `Mock` of its own (`darter_tests::nvml`), for tests of the agent; this one needs
//! nothing that takes minutes to build.

mod events;
mod faults;
mod raw;
mod symbols;
mod values;

use std::fs;
use std::path::{Path, PathBuf};

use nvidia_ml_mock::config::Config;
use nvidia_ml_mock::file;
use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

/// A copy of the library, which the loader takes for one of its own, and its configuration beside it.
struct Mock {
    dir: tempfile::TempDir,
}

impl Mock {
    fn new(text: &str) -> Self {
        let mock = Self { dir: tempfile::tempdir().unwrap() };
        fs::copy(built(), mock.library()).unwrap();
        mock.set(text);
        mock
    }

    fn fixture(name: &str) -> (Self, Config) {
        let text = format!("quiet = true\nbase = '{name}'");
        let config = file::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        (Self::new(&text), config)
    }

    fn set(&self, text: &str) {
        let new = self.dir.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.library().with_extension("toml")).unwrap();
    }

    fn library(&self) -> PathBuf {
        self.dir.path().join("libnvidia-ml-mock.so")
    }

    fn init(&self) -> Result<Nvml, NvmlError> {
        Nvml::builder().lib_path(self.library().as_os_str()).init()
    }

    fn open(&self) -> Nvml {
        self.init().unwrap()
    }
}

/// The library that cargo built for this very program.
fn built() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap_or_else(|| Path::new(".")).join("libnvidia_ml_mock.so")
}
