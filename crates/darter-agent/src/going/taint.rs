//! The taints of this node, watched: who is going to delete a node says so there first.

use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::kubernetes::{Teller, Told, Watch, follow};
use crate::metrics::Metrics;

/// Karpenter's, and the cluster autoscaler's.
const TAINTS: [&str; 2] = ["karpenter.sh/disrupted", "ToBeDeletedByClusterAutoscaler"];

/// One node, and how it is watched.
pub(super) struct NodeWatch {
    /// Its name in Kubernetes.
    pub(super) name: String,
    /// Where the API server is and who asks it; none: as every pod is told.
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) metrics: Arc<Metrics>,
}

impl NodeWatch {
    /// Tells whether the node has such a taint. Never ends.
    pub(super) async fn run(&self, is_tainted: &watch::Sender<bool>) {
        let name = &self.name;
        let trouble =
            format!("cannot watch this node ({name}); what only it has goes to others when the agent is stopped");
        let watch = |client, _| Watch {
            api: Api::<Node>::all(client),
            config: watcher::Config::default().fields(&format!("metadata.name={name}")),
            rights: format!("a ClusterRole that lets it get, list and watch the node {name}"),
        };
        let mut is_there = false;
        let tell = |told| match told {
            Told::Works => info!(node = name, "watching the taints of this node"),
            Told::Event(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                is_there = true;
                let taint = taint(&node);
                let is_news = is_tainted.send_if_modified(|was| std::mem::replace(was, taint.is_some()) != *was);
                if let Some(taint) = taint.filter(|_| is_news) {
                    info!(taint, "somebody is going to delete this node");
                }
            }
            Told::Event(watcher::Event::Init) => is_there = false,
            Told::Event(watcher::Event::InitDone) if !is_there => {
                warn!(node = name, "there is no such node; is kubernetes.node its name in Kubernetes (spec.nodeName)?");
            }
            // Who is deleted there runs on until it is stopped.
            Told::Event(watcher::Event::Delete(_) | watcher::Event::InitDone) => {}
        };
        let teller = Teller::new(trouble, &self.metrics.node_watch_errors);
        follow(self.kubeconfig.as_deref(), teller, watch, tell).await;
    }
}

/// The taint that says that a node is about to go.
fn taint(node: &Node) -> Option<&str> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    taints.iter().map(|taint| taint.key.as_str()).find(|key| TAINTS.contains(key))
}
