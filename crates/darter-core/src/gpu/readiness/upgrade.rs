//! How far NVIDIA's GPU Operator is with the replacement of a node's driver, by its label on the node.
//!
//! The words are those of its library for upgrades (k8s-operator-libs, `pkg/upgrade/consts.go`).

/// The label.
pub const LABEL: &str = "nvidia.com/gpu-driver-upgrade-state";

/// What the label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Upgrade {
    /// Nothing is done: there is no label, the upgrade is done, or the node waits for its turn (`upgrade-required`):
    /// of a hundred nodes 99 do, and their GPUs work on.
    #[default]
    None,
    /// The node will get no more pods.
    CordonRequired,
    /// Jobs on it may end first.
    WaitForJobsRequired,
    /// Pods with GPUs are deleted.
    PodDeletionRequired,
    /// The node is drained.
    DrainRequired,
    /// Another operator does what it takes, a reboot too.
    NodeMaintenanceRequired,
    /// The same, after that.
    PostMaintenanceRequired,
    /// The driver's pod is started anew: it unloads one driver and loads another.
    PodRestartRequired,
    /// The new driver is tried.
    ValidationRequired,
    /// It works; the node may have pods again.
    UncordonRequired,
    /// Somebody has to look. The driver's pod may still try.
    Failed,
    /// A word that is newer than this table.
    Other,
}

impl Upgrade {
    /// By the label's value; nothing where there is no label.
    pub fn of(label: Option<&str>) -> Self {
        match label.unwrap_or_default() {
            "" | "upgrade-required" | "upgrade-done" => Self::None,
            "cordon-required" => Self::CordonRequired,
            "wait-for-jobs-required" => Self::WaitForJobsRequired,
            "pod-deletion-required" => Self::PodDeletionRequired,
            "drain-required" => Self::DrainRequired,
            "node-maintenance-required" => Self::NodeMaintenanceRequired,
            "post-maintenance-required" => Self::PostMaintenanceRequired,
            "pod-restart-required" => Self::PodRestartRequired,
            "validation-required" => Self::ValidationRequired,
            "uncordon-required" => Self::UncordonRequired,
            "upgrade-failed" => Self::Failed,
            _ => Self::Other,
        }
    }

    /// As the label has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::CordonRequired => "cordon-required",
            Self::WaitForJobsRequired => "wait-for-jobs-required",
            Self::PodDeletionRequired => "pod-deletion-required",
            Self::DrainRequired => "drain-required",
            Self::NodeMaintenanceRequired => "node-maintenance-required",
            Self::PostMaintenanceRequired => "post-maintenance-required",
            Self::PodRestartRequired => "pod-restart-required",
            Self::ValidationRequired => "validation-required",
            Self::UncordonRequired => "uncordon-required",
            Self::Failed => "upgrade-failed",
            Self::Other => "another",
        }
    }

    /// Whether a pod that comes now would lose its GPUs.
    pub const fn is_under_way(self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether the driver may be unloaded at any moment, which whoever has it open keeps from happening. Before, what
    /// runs on the GPUs may run for days, and is watched.
    pub const fn takes_driver(self) -> bool {
        match self {
            Self::None | Self::CordonRequired | Self::WaitForJobsRequired => false,
            Self::PodDeletionRequired | Self::DrainRequired => false,
            Self::NodeMaintenanceRequired | Self::PostMaintenanceRequired => true,
            Self::PodRestartRequired | Self::ValidationRequired | Self::UncordonRequired => true,
            Self::Failed | Self::Other => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_itself_and_what_nothing_is_done_for_is_no_upgrade() {
        for nothing in [None, Some(""), Some("upgrade-required"), Some("upgrade-done")] {
            assert_eq!(Upgrade::of(nothing), Upgrade::None);
        }
        let drains = ["cordon-required", "wait-for-jobs-required", "pod-deletion-required", "drain-required"];
        let takes = [
            "node-maintenance-required",
            "post-maintenance-required",
            "pod-restart-required",
            "validation-required",
            "uncordon-required",
            "upgrade-failed",
        ];
        for (words, takes_driver) in [(&drains[..], false), (&takes[..], true)] {
            for word in words {
                let upgrade = Upgrade::of(Some(word));
                assert_eq!((upgrade.as_str(), upgrade.is_under_way()), (*word, true));
                assert_eq!(upgrade.takes_driver(), takes_driver, "{word}");
            }
        }
        let newer = Upgrade::of(Some("firmware-required"));
        assert_eq!((newer, newer.is_under_way(), newer.takes_driver()), (Upgrade::Other, true, true));
    }
}
