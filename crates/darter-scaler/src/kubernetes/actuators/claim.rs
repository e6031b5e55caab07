//! Removes a node, by deleting Karpenter's claim on it. It cannot be taken back, so it is looked at once more, at
//! the API server itself: whether it is the same claim, and whether anybody said that it must not go.
//!
//! Karpenter then drains it as ever. A drain that cannot end would keep a GPU for nothing: a budget that lets
//! nobody go is respected before, not after.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Preconditions};
use kube::core::{Selector, SelectorExt as _};
use kube::{Api, Client, ResourceExt as _};

use super::Wrong;
use crate::fleet::Claim;
use crate::kubernetes::events::{About, Said};
use crate::kubernetes::settings::Settings;

/// Somebody says that a node or a pod must not be disturbed.
const DO_NOT_DISRUPT: &str = "karpenter.sh/do-not-disrupt";
/// A kubelet runs 110 pods, or a few hundred.
const PODS_MOST: u32 = 1000;
/// Budgets of one namespace.
const BUDGETS_MOST: u32 = 1000;
const RIGHTS: &str = "a ClusterRole that lets it get and delete nodeclaims (karpenter.sh), get nodes, list pods and \
                      list poddisruptionbudgets (policy) (off: actuators.remove)";

/// Which node.
pub(super) struct Node<'a> {
    pub(super) name: &'a str,
    pub(super) claim: Option<&'a Claim>,
}

/// The Event of a removal.
pub(super) fn said(name: &str, uid: &str, reason: &str) -> Said {
    let note = format!("Its NodeClaim is deleted: {reason}");
    Said { about: About::node(name, uid), is_warning: true, reason: "Removed", action: "Remove", note }
}

pub(super) async fn remove(client: &Client, settings: &Settings, node: &Node<'_>) -> Result<(), Wrong> {
    let Some(claim) = node.claim else {
        return Err(Wrong::Failed(
            "not_found",
            format!("node {} has no NodeClaim: Karpenter did not make it", node.name),
        ));
    };
    let wrong = |error: kube::Error| Wrong::of(&error, RIGHTS);
    let kind = GroupVersionKind::gvk("karpenter.sh", "v1", "NodeClaim");
    let claims =
        Api::<DynamicObject>::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&kind, "nodeclaims"));
    let found = claims.get(&claim.name).await.map_err(wrong)?;
    if found.uid().as_deref() != Some(&claim.uid) {
        return Err(Wrong::Conflict(format!("NodeClaim {} is another one by now", claim.name)));
    }
    if found.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let nodes = Api::<v1::Node>::all(client.clone());
    let own = nodes.get_metadata_opt(node.name).await.map_err(wrong)?;
    let says_no = |annotations: &std::collections::BTreeMap<String, String>| {
        annotations.get(DO_NOT_DISRUPT).is_some_and(|value| value == "true")
    };
    if says_no(found.annotations()) || own.is_some_and(|own| says_no(own.annotations())) {
        return Err(held(node.name, format!("it has the annotation {DO_NOT_DISRUPT}=true")));
    }
    if let Some(why) = who_stays(client, settings, node.name, says_no).await.map_err(wrong)? {
        return Err(held(node.name, why));
    }
    let preconditions = Preconditions { uid: Some(claim.uid.clone()), resource_version: None };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    claims.delete(&claim.name, &params).await.map(drop).map_err(wrong)
}

fn held(node: &str, why: String) -> Wrong {
    Wrong::Failed("held", format!("node {node} is not removed: {why}"))
}

/// Why the drain of a node would not end; none if it would.
async fn who_stays(
    client: &Client,
    settings: &Settings,
    node: &str,
    says_no: impl Fn(&std::collections::BTreeMap<String, String>) -> bool,
) -> kube::Result<Option<String>> {
    let here = ListParams::default().fields(&format!("spec.nodeName={node}")).limit(PODS_MOST);
    let pods = Api::<v1::Pod>::all(client.clone()).list_metadata(&here).await?;
    if pods.metadata.continue_.as_ref().is_some_and(|more| !more.is_empty()) {
        return Ok(Some(format!("it has more than {PODS_MOST} pods")));
    }
    // Pods of DaemonSets, ours among them, are not drained.
    let drained = pods.items.iter().filter(|pod| {
        let of_node = pod.owner_references().iter().any(|owner| matches!(owner.kind.as_str(), "DaemonSet" | "Node"));
        !of_node && !settings.is_agent(pod.metadata.labels.as_ref())
    });
    let drained: Vec<_> = drained.collect();
    if let Some(pod) = drained.iter().find(|pod| says_no(pod.annotations())) {
        let name = pod.name_any();
        return Ok(Some(format!(
            "pod {name} in namespace {} has {DO_NOT_DISRUPT}=true",
            pod.namespace().unwrap_or_default()
        )));
    }
    let namespaces: BTreeSet<_> = drained.iter().filter_map(|pod| pod.namespace()).collect();
    for namespace in namespaces {
        let api = Api::<PodDisruptionBudget>::namespaced(client.clone(), &namespace);
        for budget in api.list(&ListParams::default().limit(BUDGETS_MOST)).await?.items {
            let allowed = budget.status.as_ref().map_or(0, |status| status.disruptions_allowed);
            let selector = budget.spec.as_ref().and_then(|spec| spec.selector.clone());
            // One without a selector is for nobody, and one that cannot be read is for all.
            let selector = selector.map(Selector::try_from);
            let is_for = |labels| selector.as_ref().is_some_and(|of| of.as_ref().map_or(true, |of| of.matches(labels)));
            let here = || drained.iter().filter(|pod| pod.namespace().as_deref() == Some(&*namespace));
            if allowed <= 0 && here().any(|pod| is_for(pod.labels())) {
                let name = budget.name_any();
                return Ok(Some(format!(
                    "PodDisruptionBudget {name} in namespace {namespace} lets none of its pods go"
                )));
            }
        }
    }
    Ok(None)
}
