//! What is called how in this cluster.

use std::path::PathBuf;
use std::time::Duration;

use crate::config;

/// All of it. What the configuration does not have is as it is by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How to reach the API server; without one as every pod is told.
    pub kubeconfig: Option<PathBuf>,
    /// This pod, for people who ask who leads.
    pub identity: String,
    /// The Lease by which one of several scalers leads, in this pod's namespace.
    pub lease: String,
    /// For how long the lease is somebody's after each renewal, in whole seconds.
    pub lease_seconds: u64,
    /// Its holder stops acting when it could not renew for so long.
    pub renew_within_seconds: u64,
    /// Between two tries.
    pub retry_seconds: u64,
    /// What GPUs are called where pods ask for them.
    pub gpu_resource: String,
    /// The label of a node that names its pool; the first that it has.
    pub pool_labels: Vec<String>,
    /// The taint that a node has until it is warm.
    pub startup_taint: String,
    /// The label, and its value, that the agents' pods have.
    pub agent_label: (String, String),
    /// The Service of this scaler: a trigger whose scalerAddress begins with it is ours.
    pub service: String,
    /// The annotation that says which pod goes first.
    pub cost_annotation: String,
    /// Whether the number of nodes of a pool that has a fixed one may be changed, to keep spare nodes.
    pub static_pools: bool,
    /// Whether all that was written is taken back when this scaler ends.
    pub undo_on_exit: bool,
    /// Where nothing happens the API server is asked so often whether it is there.
    pub heartbeat_ms: u64,
    /// What is not there (a kind that nobody installed) is looked for again after this.
    pub look_again_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            identity: "darter-scaler".to_owned(),
            lease: "darter-scaler".to_owned(),
            lease_seconds: 15,
            renew_within_seconds: 10,
            retry_seconds: 2,
            gpu_resource: "nvidia.com/gpu".to_owned(),
            pool_labels: ["darter.dev/pool", "karpenter.sh/nodepool", "eks.amazonaws.com/nodegroup"]
                .map(ToOwned::to_owned)
                .to_vec(),
            startup_taint: "darter.dev/not-ready".to_owned(),
            agent_label: ("darter.dev/part".to_owned(), "agent".to_owned()),
            service: "darter-scaler".to_owned(),
            cost_annotation: "controller.kubernetes.io/pod-deletion-cost".to_owned(),
            static_pools: false,
            undo_on_exit: false,
            // A third of what a partition is by default.
            heartbeat_ms: 20_000,
            look_again_ms: 60_000,
        }
    }
}

impl From<&config::Kubernetes> for Settings {
    fn from(config: &config::Kubernetes) -> Self {
        Self {
            kubeconfig: config::given(&config.kubeconfig).map(ToOwned::to_owned),
            // A pod's host has its name.
            identity: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            service: config.service.clone(),
            gpu_resource: config.gpu_resource.clone(),
            pool_labels: config.pool_labels.clone(),
            startup_taint: config.startup_taint.clone(),
            cost_annotation: config.cost_annotation.clone(),
            static_pools: config.static_pools,
            undo_on_exit: config.undo_on_exit,
            ..Self::default()
        }
    }
}

impl Settings {
    /// Those of the Lease.
    pub fn times(&self) -> super::Times {
        let seconds = Duration::from_secs;
        super::Times {
            lease: seconds(self.lease_seconds),
            renew_within: seconds(self.renew_within_seconds),
            retry: seconds(self.retry_seconds),
        }
    }

    /// The namespace and the name of the agents' label, as a selector.
    pub(super) fn is_agent(&self, labels: Option<&std::collections::BTreeMap<String, String>>) -> bool {
        let (key, value) = &self.agent_label;
        labels.and_then(|labels| labels.get(key)) == Some(value)
    }
}
