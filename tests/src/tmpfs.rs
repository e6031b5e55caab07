//! A small file system of its own, to fill up and to make read-only. Needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::scratch::Scratch;

/// A tmpfs, unmounted when it is dropped: `Scratch` does that, also for runs that were killed.
#[derive(Debug)]
pub struct Tmpfs {
    dir: Scratch,
}

impl Tmpfs {
    /// Mounts one of so many bytes.
    pub fn new(bytes: u64) -> Result<Self> {
        let dir = Scratch::new()?;
        dir.dir("fs")?;
        let tmpfs = Self { dir };
        tmpfs.mount(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])?;
        Ok(tmpfs)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.dir.join("fs")
    }

    /// Refuses writes from now on. No file of it may be open for writing.
    pub fn read_only(&self) -> Result<()> {
        self.mount(&["-o", "remount,ro"])
    }

    /// Takes writes again.
    pub fn read_write(&self) -> Result<()> {
        self.mount(&["-o", "remount,rw"])
    }

    /// Opens no device of it from now on.
    pub fn without_devices(&self) -> Result<()> {
        self.mount(&["-o", "remount,nodev"])
    }

    /// Leaves no byte free.
    pub fn fill(&self) -> Result<()> {
        let written = fs::write(self.filler(), vec![0; 256 << 20]);
        ensure!(written.is_err(), "the file system is larger than what it was to be filled with");
        Ok(())
    }

    /// Gives back what `fill` took.
    pub fn empty(&self) -> Result<()> {
        fs::remove_file(self.filler()).context("cannot remove the filler")
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    fn mount(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new("mount").args(arguments).arg::<&Path>(&self.path()).output()?;
        ensure!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
