//! Whether a list of processes by NVML says anything: it has those of the PID namespaces that this agent can see.
//!
//! Outside the host's namespace a GPU full of programs has an empty list, which proves nothing. Not here: the
//! lists (`read`), and what follows from them (`darter_core::gpu::idle`).

use std::path::Path;

use tracing::warn;

use crate::config;

/// The inode of the first PID namespace, which the kernel gives no other (PROC_PID_INIT_INO).
const HOST: &str = "pid:[4026531836]";

/// What this agent can know of the processes on GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sight {
    /// Nobody wants them counted.
    Unwanted,
    /// Those of the whole host.
    Host,
    /// Those of a container at most: nothing is believed.
    Container,
}

impl Sight {
    /// Below `root`: `/`, or where the host is mounted. Says once what stands against counting. A process stays in
    /// its namespace for life, so one look is enough.
    pub(super) fn look(settings: &config::Gpu, root: &Path) -> Self {
        if !settings.processes {
            return Self::Unwanted;
        }
        let path = root.join("proc/self/ns/pid");
        let link = std::fs::read_link(&path);
        match link.as_ref().map(|link| is_of_host(&link.to_string_lossy())) {
            Ok(true) => Self::Host,
            Ok(false) => {
                let namespace = link.map(|link| link.display().to_string()).unwrap_or_default();
                warn!(
                    namespace,
                    host = HOST,
                    "{NOT_COUNTED}: this agent is not in the PID namespace of the host; start it with hostPID"
                );
                Self::Container
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "{NOT_COUNTED}: it cannot be told which PID namespace this is");
                Self::Container
            }
        }
    }

    /// Whether the lists count.
    pub(super) const fn sees(self) -> bool {
        matches!(self, Self::Host)
    }

    /// The same for the verdict: nothing where nobody asks.
    pub(super) const fn judged(self) -> Option<bool> {
        match self {
            Self::Unwanted => None,
            Self::Host => Some(true),
            Self::Container => Some(false),
        }
    }
}

const NOT_COUNTED: &str = "processes on GPUs are not counted (gpu.processes)";

/// By the text of the link `/proc/self/ns/pid`.
fn is_of_host(link: &str) -> bool {
    link == HOST
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_the_first_namespace_of_the_kernel_is_the_hosts() {
        assert!(is_of_host("pid:[4026531836]"));
        for other in ["pid:[4026532519]", "pid:[40265318360]", "mnt:[4026531836]", "pid:4026531836", ""] {
            assert!(!is_of_host(other), "{other}");
        }
    }

    #[test]
    fn what_nobody_wants_is_not_judged_and_what_cannot_be_told_is_not_believed() {
        let root = tempfile::tempdir().unwrap();
        let mut settings = config::Config::embedded().gpu;
        assert_eq!(Sight::look(&settings, root.path()), Sight::Unwanted);
        settings.processes = true;
        assert_eq!(Sight::look(&settings, root.path()), Sight::Container, "no link to read");
        let link = root.path().join("proc/self/ns/pid");
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink("pid:[4026532519]", &link).unwrap();
        assert_eq!(Sight::look(&settings, root.path()), Sight::Container);
        std::fs::remove_file(&link).unwrap();
        symlink(HOST, &link).unwrap();
        assert_eq!(Sight::look(&settings, root.path()), Sight::Host);
        let judged = [Sight::Unwanted, Sight::Host, Sight::Container].map(|sight| (sight.sees(), sight.judged()));
        assert_eq!(judged, [(false, None), (true, Some(true)), (false, Some(false))]);
    }
}
