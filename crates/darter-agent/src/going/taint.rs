//! The taints of this node: who is going to delete a node says so there first.

use tokio::sync::watch;
use tracing::info;

use crate::node::{Facts, View};

/// Karpenter's, and the cluster autoscaler's.
const TAINTS: [&str; 2] = ["karpenter.sh/disrupted", "ToBeDeletedByClusterAutoscaler"];

/// Tells whether the node has such a taint. Never ends.
pub(super) async fn heed(mut node: View, is_tainted: &watch::Sender<bool>) {
    loop {
        // Who is deleted there runs on until it is stopped.
        let Some(facts) = node.next().await else { continue };
        let taint = taint(&facts);
        let is_news = is_tainted.send_if_modified(|was| std::mem::replace(was, taint.is_some()) != *was);
        if let Some(taint) = taint.filter(|_| is_news) {
            info!(taint, "somebody is going to delete this node");
        }
    }
}

/// The taint that says that a node is about to go.
fn taint(facts: &Facts) -> Option<&str> {
    facts.taints.iter().map(|taint| taint.key.as_str()).find(|key| TAINTS.contains(key))
}
