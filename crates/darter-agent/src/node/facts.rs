//! What the API server says of this node, read once a change: its taints, its condition, what it can give.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use darter_core::gpu::readiness::condition::{Condition, Status};
use darter_core::gpu::readiness::{Upgrade, upgrade};
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::jiff::Timestamp;

/// The type of the node's condition.
pub(super) const CONDITION: &str = "darter.dev/GpuReady";
/// What device plugins of NVIDIA call what they give out: `nvidia.com/gpu`, `nvidia.com/mig-1g.5gb`.
const DEVICES: &str = "nvidia.com/";
/// Whose GPUs the instance type has, by Karpenter.
const MANUFACTURER: &str = "karpenter.k8s.aws/instance-gpu-manufacturer";
/// And how many it has, whoever made them.
const INSTANCE_COUNT: &str = "karpenter.k8s.aws/instance-gpu-count";
/// By GPU feature discovery: that there is one, how many, and what they are called.
const PRESENT: &str = "nvidia.com/gpu.present";
const COUNT: &str = "nvidia.com/gpu.count";
const PRODUCT: &str = "nvidia.com/gpu.product";
/// Part of that name where it counts MIG devices in the place of GPUs (its strategy `single`).
const PARTS: &str = "-MIG-";

/// A taint, without what does not tell it from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taint {
    /// Such as `darter.dev/not-ready`.
    pub key: String,
    /// Such as `NoSchedule`.
    pub effect: String,
}

/// The node's condition of ours, as it stands there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) condition: Condition,
    /// When its status was another last.
    pub(super) transition: Option<Timestamp>,
    pub(super) heartbeat: Option<Timestamp>,
}

/// What is known of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// Another node of the same name has another.
    pub uid: String,
    /// Of the cloud, such as `aws:///us-east-1a/i-0123456789abcdef0`.
    pub provider_id: Option<String>,
    /// When it was made, by the API server's clock.
    pub created: Option<SystemTime>,
    /// In their order there.
    pub taints: Vec<Taint>,
    /// What the kubelet says it can give of `nvidia.com/*`. Nothing while the kubelet says nothing.
    pub allocatable: Option<u64>,
    /// A label, or what the kubelet ever gave, says that it has GPUs of NVIDIA's.
    pub has_gpus: bool,
    /// So many GPUs it has by the label of GPU feature discovery.
    pub labelled_gpus: Option<u32>,
    /// The same, where these are whole GPUs.
    pub whole_gpus: Option<u32>,
    /// So many GPUs of NVIDIA's its instance type has.
    pub instance_gpus: Option<u32>,
    /// How far GPU Operator is with replacing the driver.
    pub driver_upgrade: Upgrade,
    pub(super) condition: Option<Shown>,
}

impl Facts {
    pub(super) fn of(node: &Node) -> Self {
        let labels = node.metadata.labels.as_ref();
        let label = |name: &str| labels.and_then(|labels| labels.get(name)).map(String::as_str);
        let (spec, status) = (node.spec.as_ref(), node.status.as_ref());
        let taints = spec.and_then(|spec| spec.taints.as_ref()).into_iter().flatten();
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        let count = |name: &str| label(name).and_then(|count| count.parse::<u32>().ok());
        let is_nvidia = label(MANUFACTURER) == Some("nvidia");
        let has_parts = label(PRODUCT).is_some_and(|product| product.contains(PARTS));
        let capacity = devices(status.and_then(|status| status.capacity.as_ref()));
        Self {
            uid: node.metadata.uid.clone().unwrap_or_default(),
            provider_id: spec.and_then(|spec| spec.provider_id.clone()),
            created: node.metadata.creation_timestamp.as_ref().map(|time| time.0.into()),
            taints: taints.map(|taint| Taint { key: taint.key.clone(), effect: taint.effect.clone() }).collect(),
            allocatable: devices(status.and_then(|status| status.allocatable.as_ref())),
            has_gpus: is_nvidia || label(PRESENT) == Some("true") || capacity.is_some_and(|devices| devices > 0),
            labelled_gpus: count(COUNT),
            whole_gpus: count(COUNT).filter(|_| !has_parts),
            instance_gpus: count(INSTANCE_COUNT).filter(|_| is_nvidia),
            driver_upgrade: Upgrade::of(label(upgrade::LABEL)),
            condition: conditions.into_iter().find(|condition| condition.type_ == CONDITION).map(Shown::of),
        }
    }

    /// How old the node is. A clock that is behind makes it new.
    pub(super) fn age(&self) -> Option<Duration> {
        self.created.map(|created| SystemTime::now().duration_since(created).unwrap_or_default())
    }
}

impl Shown {
    fn of(condition: &NodeCondition) -> Self {
        Self {
            condition: Condition {
                status: Status::read(&condition.status),
                reason: condition.reason.clone().unwrap_or_default(),
                message: condition.message.clone().unwrap_or_default(),
            },
            transition: condition.last_transition_time.as_ref().map(|time| time.0),
            heartbeat: condition.last_heartbeat_time.as_ref().map(|time| time.0),
        }
    }
}

/// How many of NVIDIA's devices are in there. A kubelet that says anything says at least its processors.
fn devices(resources: Option<&BTreeMap<String, Quantity>>) -> Option<u64> {
    let resources = resources.filter(|resources| !resources.is_empty())?;
    let devices = resources.iter().filter(|(name, _)| name.starts_with(DEVICES));
    Some(devices.filter_map(|(_, quantity)| quantity.0.parse::<u64>().ok()).fold(0, u64::saturating_add))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(node: Value) -> Facts {
        Facts::of(&serde_json::from_value(node).unwrap())
    }

    #[test]
    fn what_a_node_can_give_is_counted_over_all_of_nvidias_names_and_silence_is_not_zero() {
        let of = |allocatable: Value| facts(json!({ "status": { "allocatable": allocatable } })).allocatable;
        assert_eq!(of(json!({ "cpu": "8", "nvidia.com/gpu": "2", "nvidia.com/mig-1g.5gb": "7" })), Some(9));
        assert_eq!(of(json!({ "cpu": "8", "nvidia.com/gpu": "0" })), Some(0));
        assert_eq!(of(json!({ "cpu": "8", "amd.com/gpu": "4" })), Some(0));
        assert_eq!(of(json!({})), None);
        assert_eq!(facts(json!({})).allocatable, None);
    }

    #[test]
    fn a_label_or_what_it_could_ever_give_makes_it_a_gpu_node() {
        let label = |name: &str, value: &str| facts(json!({ "metadata": { "labels": { name: value } } }));
        assert!(label(MANUFACTURER, "nvidia").has_gpus && !label(MANUFACTURER, "amd").has_gpus);
        assert!(label(PRESENT, "true").has_gpus && !label(PRESENT, "false").has_gpus);
        assert_eq!((label(COUNT, "8").labelled_gpus, label(COUNT, "many").labelled_gpus), (Some(8), None));
        assert!(facts(json!({ "status": { "capacity": { "nvidia.com/gpu": "8" } } })).has_gpus);
        assert!(!facts(json!({ "status": { "capacity": { "cpu": "8", "nvidia.com/gpu": "0" } } })).has_gpus);
        assert_eq!(label(upgrade::LABEL, "drain-required").driver_upgrade, Upgrade::DrainRequired);
        assert_eq!(facts(json!({})).driver_upgrade, Upgrade::None);
    }

    #[test]
    fn how_many_gpus_there_should_be_is_said_by_the_instance_type_and_not_by_counts_of_others_or_of_parts() {
        let labels = |labels: Value| facts(json!({ "metadata": { "labels": labels } }));
        let of = |maker: &str, count: &str| labels(json!({ MANUFACTURER: maker, INSTANCE_COUNT: count })).instance_gpus;
        assert_eq!((of("nvidia", "8"), of("nvidia", "some"), of("amd", "4")), (Some(8), None, None));
        assert_eq!(labels(json!({ INSTANCE_COUNT: "8" })).instance_gpus, None, "whose?");
        let of = |product: &str| {
            let facts = labels(json!({ COUNT: "7", PRODUCT: product }));
            (facts.labelled_gpus, facts.whole_gpus)
        };
        assert_eq!(of("NVIDIA-H200-SHARED"), (Some(7), Some(7)));
        assert_eq!(of("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"), (Some(7), None));
    }

    #[test]
    fn taints_and_our_own_condition_are_read_and_others_left_alone() {
        let condition = json!({ "type": CONDITION, "status": "False", "reason": "GpuLost", "message": "gone",
            "lastTransitionTime": "2026-01-01T00:00:00Z" });
        let facts = facts(json!({
            "metadata": { "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "taints": [{ "key": "a", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" }] },
            "status": { "conditions": [{ "type": "Ready", "status": "True" }, condition] },
        }));
        assert_eq!(facts.taints, [Taint { key: "a".to_owned(), effect: "NoExecute".to_owned() }]);
        let shown = facts.condition.as_ref().unwrap();
        assert_eq!((shown.condition.status, shown.condition.reason.as_str()), (Status::False, "GpuLost"));
        assert_eq!(shown.transition.unwrap().to_string(), "2026-01-01T00:00:00Z");
        assert!(shown.heartbeat.is_none() && facts.uid == "u" && facts.age().unwrap() > Duration::ZERO);
    }
}
