//! Names and directories that belong to one run of the tests and can be told from those of another.
//!
//! Every name carries the pid of its run. A run that was killed leaves names of a dead pid behind,
//! and the next run takes them away: `sweep` for directories here, the same for network namespaces
//! in `net`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// What every name made by the harness begins with.
const PREFIX: &str = "darter-";

/// A name that no other test and no other run on this machine has: `darter-<pid>-<number>`.
pub fn unique() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    format!("{PREFIX}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Whether `name` was made by a run that is over. To be asked before this run makes any: a name with
/// its own pid is then one of a run that had the same.
pub fn is_left_over(name: &str) -> bool {
    let Some((pid, number)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else { return false };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // A process that has ended and was not waited for still has a directory, but no command line.
    let is_alive = || fs::read(Path::new("/proc").join(pid).join("cmdline")).is_ok_and(|line| !line.is_empty());
    let is_other = || pid != std::process::id().to_string() && is_alive();
    is_number(pid) && is_number(number) && !is_other()
}

/// Bytes that directories of tests can still take on their disk.
pub fn room() -> io::Result<u64> {
    let disk = rustix::fs::statvfs(std::env::temp_dir())?;
    Ok(disk.f_bavail * disk.f_frsize)
}

/// A directory for one test, removed at its end. `DARTER_KEEP=1` keeps it and says where it is.
///
/// Its path is short: a unix socket below it must fit in 108 bytes.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes the directory, and once in a run takes away what killed runs left.
    pub fn new() -> io::Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let path = std::env::temp_dir().join(unique());
        fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path inside it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory inside it.
    pub fn dir(&self, name: impl AsRef<Path>) -> io::Result<PathBuf> {
        let path = self.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("DARTER_KEEP").is_some() {
            crate::tools::say(&format!("kept: {}", self.path.display()));
        } else {
            remove(&self.path);
        }
    }
}

/// Unmounts what is mounted below a directory and removes it.
///
/// containerd mounts in a mount namespace of its own (see `containerd`), so there is normally
/// nothing to unmount.
fn remove(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| Path::new(at).starts_with(path));
    for at in below.collect::<Vec<_>>().into_iter().rev() {
        let _ = std::process::Command::new("umount").args(["--lazy", at]).status();
    }
    let _ = fs::remove_dir_all(path);
}

fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten().filter(|entry| is_left_over(&entry.file_name().to_string_lossy())) {
        remove(&entry.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_runs_are_left_over() {
        assert!(is_left_over("darter-4194999-1") && is_left_over(&unique()));
        for name in ["darter-1-1", "darter-agent", "darter-agent-1", "darter--", "other-4194999-1"] {
            assert!(!is_left_over(name), "{name}");
        }
    }
}
