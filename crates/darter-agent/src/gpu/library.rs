//! Where NVML is, and how it starts.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::calls::code;
use super::sample::Driver;
use crate::config;

/// Found by the loader in the usual directories, or where the container toolkit mounts it.
const SONAME: &str = "libnvidia-ml.so.1";

/// Where a driver keeps it below its root: Debian's and Ubuntu's directories, Amazon Linux's, others'.
const DIRECTORIES: [&str; 5] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/lib/nvidia/tesla"];

/// Loads and starts NVML. What it says is what is told of the driver until the next try.
pub(super) fn start(settings: &config::Gpu) -> Result<Nvml, Driver> {
    let path = find(settings)?;
    Nvml::builder().lib_path(&path).init().map_err(|error| match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => {
            Driver::NoLibrary(format!("cannot load {}: {error}", path.to_string_lossy()))
        }
        error => Driver::Failed(code(&error), error.to_string()),
    })
}

fn find(settings: &config::Gpu) -> Result<std::ffi::OsString, Driver> {
    if let Some(path) = &settings.library {
        return Ok(path.clone().into_os_string());
    }
    let Some(root) = &settings.driver_root else { return Ok(OsStr::new(SONAME).to_owned()) };
    let missing = || Driver::NoLibrary(format!("no {SONAME} below {} (gpu.driver_root)", root.display()));
    below(root).map(PathBuf::into_os_string).ok_or_else(missing)
}

fn below(root: &Path) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|directory| root.join(directory).join(SONAME)).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> config::Gpu {
        config::Config::embedded().gpu
    }

    #[test]
    fn a_file_that_is_named_comes_first_then_what_is_below_the_drivers_root() {
        let root = tempfile::tempdir().unwrap();
        let mut settings = settings();
        assert_eq!(find(&settings), Ok(SONAME.into()));
        settings.driver_root = Some(root.path().to_owned());
        let said = find(&settings).unwrap_err();
        assert!(matches!(&said, Driver::NoLibrary(reason) if reason.contains("gpu.driver_root")), "{said:?}");
        let there = root.path().join("usr/lib64");
        std::fs::create_dir_all(&there).unwrap();
        std::fs::write(there.join(SONAME), "").unwrap();
        assert_eq!(find(&settings), Ok(there.join(SONAME).into_os_string()));
        settings.library = Some("/opt/nvml.so".into());
        assert_eq!(find(&settings), Ok("/opt/nvml.so".into()));
    }

    #[test]
    fn a_node_without_a_driver_has_no_library_and_what_is_no_library_is_told_as_such() {
        let mut settings = settings();
        settings.library = Some("/nonexistent/libnvidia-ml.so.1".into());
        let said = start(&settings).unwrap_err();
        assert!(matches!(&said, Driver::NoLibrary(reason) if reason.contains("/nonexistent/")), "{said:?}");
    }
}
