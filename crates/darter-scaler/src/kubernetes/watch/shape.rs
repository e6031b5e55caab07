//! The few fields that are read of each kind. What is not named here is not kept, and a field that is missing is
//! no error: kinds of others change.

use std::collections::BTreeMap;

use kube::api::{ApiResource, GroupVersionKind};
use kube::core::object::Object;
use serde::Deserialize;
use serde_json::Value;

/// How much of each resource.
pub(super) type Amounts = BTreeMap<String, Value>;

pub(super) type Node = Object<NodeSpec, Capacity>;
pub(super) type NodeClaim = Object<ClaimSpec, ClaimStatus>;
pub(super) type NodePool = Object<PoolSpec, Nothing>;
pub(super) type Pod = Object<PodSpec, Nothing>;
pub(super) type Deployment = Object<DeploymentSpec, Nothing>;
pub(super) type ScaledObject = Object<ScaledSpec, Nothing>;

/// A kind, by its API path.
pub(super) fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// A whole number of it; none where that cannot be read.
pub(super) fn amount(amounts: &Amounts, name: &str) -> Option<u32> {
    match amounts.get(name)? {
        Value::String(text) => text.parse().ok(),
        value => value.as_u64().and_then(|number| u32::try_from(number).ok()),
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Nothing {}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeSpec {
    pub(super) taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Taint {
    pub(super) key: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Capacity {
    pub(super) capacity: Amounts,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ClaimSpec {
    pub(super) resources: Resources,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ClaimStatus {
    pub(super) node_name: String,
    pub(super) capacity: Amounts,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Resources {
    pub(super) requests: Amounts,
    pub(super) limits: Amounts,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct PoolSpec {
    pub(super) limits: Amounts,
    pub(super) template: Template<ClaimTemplate>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Template<S: Default> {
    pub(super) spec: S,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ClaimTemplate {
    pub(super) requirements: Vec<Requirement>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Requirement {
    pub(super) key: String,
    pub(super) operator: String,
    pub(super) values: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    pub(super) node_selector: BTreeMap<String, String>,
    pub(super) containers: Vec<Container>,
    pub(super) init_containers: Vec<Container>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Container {
    pub(super) resources: Resources,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct DeploymentSpec {
    pub(super) template: Template<PodSpec>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ScaledSpec {
    pub(super) scale_target_ref: TargetRef,
    pub(super) min_replica_count: Option<i64>,
    pub(super) max_replica_count: Option<i64>,
    pub(super) triggers: Vec<Trigger>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct TargetRef {
    pub(super) name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Trigger {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) metadata: BTreeMap<String, String>,
}

impl PodSpec {
    /// GPUs that such a pod takes: containers run together, those before them one by one.
    pub(super) fn gpus(&self, resource: &str) -> u32 {
        let of = |container: &Container| {
            let Resources { requests, limits } = &container.resources;
            amount(requests, resource).or_else(|| amount(limits, resource)).unwrap_or(0)
        };
        let together = self.containers.iter().map(of).fold(0, u32::saturating_add);
        self.init_containers.iter().map(of).fold(together, u32::max)
    }
}
