//! What hosts.toml files and containerd's configuration mean for readiness, in words for people.

use std::fmt;
use std::path::PathBuf;

use darter_core::containerd_config::Severity;
use darter_core::ready;

use super::site::{How, Undone};
use super::{HostsState, Preflight};

/// Where containerd keeps blobs, below its root directory.
const CONTENT_STORE: &str = "io.containerd.content.v1.content/blobs/sha256";

impl HostsState {
    /// How the check `hosts_toml` stands for this registry.
    pub const fn check(&self) -> ready::State {
        match self {
            Self::Written | Self::Closed => ready::State::Ok,
            // What somebody chose, or what will be over in a moment.
            Self::Drifted | Self::NotWritten { .. } | Self::Foreign { .. } => ready::State::Degraded,
            // Pulls of this node go past us.
            Self::Absent { .. } | Self::Uninstalled | Self::Failed { .. } => ready::State::Failed,
        }
    }
}

impl fmt::Display for HostsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Written => f.write_str("in force"),
            Self::Closed => f.write_str("closed: access = \"off\""),
            Self::Absent { reason } => write!(f, "absent: {reason}"),
            Self::Uninstalled => {
                f.write_str("given up by `darter uninstall`; darter agent writes it again when it is started again")
            }
            Self::Drifted => f.write_str("changed by somebody, and about to be put right"),
            Self::NotWritten { should_be } => {
                write!(f, "not written (certs_d.write = false); it should be:\n{should_be}")
            }
            Self::Failed { reason } => write!(f, "cannot be written: {reason}"),
            Self::Foreign { by } => write!(f, "{by:?} has this address in it: certs_d.adopt = true takes it out"),
        }
    }
}

impl Preflight {
    /// The worst of what keeps containerd, or some of its pulls, from the mirror.
    pub fn problem(&self) -> Option<String> {
        self.problems().next()
    }

    /// All that keeps containerd, or some of its pulls, from the mirror, the worst first.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let serious = self.judgement.verdicts.iter().filter(|verdict| verdict.severity > Severity::Note);
        serious.map(|verdict| format!("{}; {}", verdict.message, verdict.way_out))
    }

    /// The directory of containerd's blobs, where it keeps layers at all.
    pub fn content_store(&self) -> Option<PathBuf> {
        let root = self.judgement.content_root.as_ref().filter(|_| !self.judgement.discards_layers)?;
        Some(root.join(CONTENT_STORE))
    }
}

impl fmt::Display for Undone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.how {
            How::Restored => "the file that was there before is back",
            How::Removed => "removed; there was no file before",
            How::EditsKept => "taken out of a file that somebody has edited since; the rest stays",
            How::Cleared => "hosts.toml was not darter's; leftovers cleared",
        };
        write!(f, "{}: {how}", self.dir.display())?;
        for kept in &self.kept {
            write!(f, "\n  left beside it: {}", kept.display())?;
        }
        Ok(())
    }
}
