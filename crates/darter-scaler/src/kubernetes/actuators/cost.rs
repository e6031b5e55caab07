//! The annotation by which a ReplicaSet chooses the pod that goes first.
//!
//! By server-side apply of this one field, with the pod's uid and no resourceVersion: whatever else changes in the
//! pod is no conflict. A value that somebody else wrote stays: people know something that we do not.

use k8s_openapi::api::core::v1;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::Wrong;
use crate::kubernetes::MANAGER;
use crate::kubernetes::settings::Settings;

/// Far from -2^27, from which on Karpenter takes a pod for weightless and its node for empty.
const COST_MOST: i32 = 1_000_000;

/// Which pod.
pub(super) struct Pod<'a> {
    pub(super) uid: &'a str,
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
}

pub(super) async fn rank(client: &Client, settings: &Settings, pod: &Pod<'_>, cost: i32) -> Result<(), Wrong> {
    write(client, settings, pod, Some(within(cost))).await
}

fn within(cost: i32) -> i32 {
    cost.clamp(-COST_MOST, COST_MOST)
}

/// Without a cost: takes ours off.
pub(super) async fn write(client: &Client, settings: &Settings, pod: &Pod<'_>, cost: Option<i32>) -> Result<(), Wrong> {
    let Pod { uid, namespace, name } = *pod;
    let mut metadata = json!({ "name": name, "namespace": namespace, "uid": uid });
    if let Some(cost) = cost {
        metadata["annotations"] = json!({ settings.cost_annotation.as_str(): cost.to_string() });
    }
    let body = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata });
    let api = Api::<v1::Pod>::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(MANAGER);
    let rights = "a ClusterRole that lets it patch pods (off: actuators.deletion_cost)";
    // An apply of what is not there would make it; with a uid it is a conflict.
    let applied = api.patch_metadata(name, &params, &Patch::Apply(&body)).await;
    applied.map(drop).map_err(|error| Wrong::of(&error, rights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pod_is_ever_made_weightless() {
        assert_eq!([i32::MIN, -400, 0, i32::MAX].map(within), [-1_000_000, -400, 0, 1_000_000]);
        assert!(within(i32::MIN) > -(1 << 27));
    }
}
