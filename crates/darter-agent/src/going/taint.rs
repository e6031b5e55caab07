//! The taints of this node, watched: who is going to delete a node says so there first.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;
use tracing::info;

use crate::kubernetes::{AGAIN, Connected, Teller, connect};
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
        let trouble = format!(
            "cannot watch this node ({}); what only it has goes to others when the agent is stopped",
            self.name
        );
        let mut teller = Teller::new(trouble, &self.metrics.node_watch_errors);
        loop {
            match connect(self.kubeconfig.as_deref(), "going.kubeconfig").await {
                Ok(connected) => self.watch(connected, &mut teller, is_tainted).await,
                Err(reason) => teller.fails("credentials", &reason),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Until credentials should be read anew.
    async fn watch(&self, connected: Connected, teller: &mut Teller<'_>, is_tainted: &watch::Sender<bool>) {
        let Connected { client, heard, .. } = connected;
        let rights = format!("a ClusterRole that lets it get, list and watch the node {}", self.name);
        let api: Api<Node> = Api::all(client);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name)).any_semantic();
        let mut events = pin!(watcher(api, config).default_backoff());
        loop {
            let event = tokio::select! {
                () = heard.notified() => {
                    if teller.works() {
                        info!(node = self.name, "watching the taints of this node");
                    }
                    continue;
                }
                event = events.try_next() => event,
            };
            match event {
                Ok(Some(watcher::Event::Apply(node) | watcher::Event::InitApply(node))) => {
                    let taint = taint(&node);
                    let is_news = is_tainted.send_if_modified(|was| std::mem::replace(was, taint.is_some()) != *was);
                    if let Some(taint) = taint.filter(|_| is_news) {
                        info!(taint, "somebody is going to delete this node");
                    }
                }
                // Who is deleted there runs on until it is stopped.
                Ok(Some(watcher::Event::Delete(_) | watcher::Event::Init | watcher::Event::InitDone)) => {}
                Ok(None) => return,
                Err(error) => {
                    if teller.met(&error, &rights) {
                        return;
                    }
                }
            }
        }
    }
}

/// The taint that says that a node is about to go.
fn taint(node: &Node) -> Option<&str> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    taints.iter().map(|taint| taint.key.as_str()).find(|key| TAINTS.contains(key))
}
