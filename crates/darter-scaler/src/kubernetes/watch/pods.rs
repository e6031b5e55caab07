//! Pods that have or want GPUs, and the agents' own. All others are looked at once and forgotten.

use std::collections::BTreeMap;

use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use super::super::settings::Settings;
use super::listed::{Listed, Named};
use super::shape::Pod;
use crate::fleet::{Fact, Kind, PodFact};
use crate::state::NODES_MAX;

/// A node has at most 16 GPUs, each pod at least one of them, and one agent.
const PODS_MAX: usize = NODES_MAX * 17;
/// The label by which a ReplicaSet's pods are told from those of the same Deployment's others.
const TEMPLATE_HASH: &str = "pod-template-hash";

#[derive(Debug)]
pub(super) struct Pods {
    listed: Listed,
    dropped: u64,
}

impl Pods {
    pub(super) const fn new() -> Self {
        Self { listed: Listed::new(PODS_MAX), dropped: 0 }
    }

    pub(super) fn on(&mut self, settings: &Settings, event: Event<Pod>) -> Option<Fact> {
        match event {
            Event::Init => {
                self.listed.begin();
                None
            }
            Event::InitApply(pod) | Event::Apply(pod) => match fact(settings, &pod) {
                Some(fact) if self.listed.name(&fact.uid) == Named::Full => {
                    self.dropped += 1;
                    None
                }
                Some(fact) => Some(Fact::Pod(fact)),
                None => self.gone(&pod),
            },
            Event::Delete(pod) => self.gone(&pod),
            Event::InitDone => Some(Fact::Only { kind: Kind::Pod, uids: self.listed.end() }),
        }
    }

    /// How many there was no room for since the last look.
    pub(super) fn dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn gone(&mut self, pod: &Pod) -> Option<Fact> {
        let uid = pod.uid()?;
        self.listed.remove(&uid).then_some(Fact::PodGone { uid })
    }
}

/// None of a pod that is of no interest.
fn fact(settings: &Settings, pod: &Pod) -> Option<PodFact> {
    let gpus = pod.spec.gpus(&settings.gpu_resource);
    let agent = settings.is_agent(pod.metadata.labels.as_ref());
    if gpus == 0 && !agent {
        return None;
    }
    let namespace = pod.namespace().unwrap_or_default();
    let cost = pod.annotations().get(&settings.cost_annotation).and_then(|cost| cost.parse().ok());
    Some(PodFact {
        uid: pod.uid().unwrap_or_default(),
        name: pod.name_any(),
        node: pod.spec.node_name.clone().filter(|node| !node.is_empty()),
        workload: workload(pod.labels(), pod.owner_references()).map(|name| format!("{namespace}/{name}")),
        gpus,
        cost: cost.unwrap_or(0),
        agent,
        namespace,
    })
}

/// The Deployment or StatefulSet whose replica it is. A ReplicaSet of a Deployment is named after it and the hash of
/// its template, so that no ReplicaSet has to be watched.
fn workload(
    labels: &BTreeMap<String, String>,
    owners: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference],
) -> Option<String> {
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = labels.get(TEMPLATE_HASH)?;
            owner.name.strip_suffix(hash.as_str())?.strip_suffix('-').map(ToOwned::to_owned)
        }
        "StatefulSet" => Some(owner.name.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, change: &Value) -> Pod {
        let mut pod = json!({
            "metadata": { "name": uid, "namespace": "team", "uid": uid },
            "spec": { "nodeName": "n", "containers": [{ "resources": { "limits": { "nvidia.com/gpu": "2" } } }] },
        });
        for (path, value) in change.as_object().unwrap() {
            let (parent, key) = path.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn of(change: Value) -> Option<PodFact> {
        fact(&Settings::default(), &pod("u", &change))
    }

    fn owned(kind: &str, name: &str, labels: Value) -> Option<String> {
        let owners = json!([{ "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": "o", "controller": true }]);
        of(json!({ "/metadata/ownerReferences": owners, "/metadata/labels": labels })).unwrap().workload
    }

    #[test]
    fn only_pods_with_gpus_and_agents_are_kept() {
        assert_eq!(of(json!({})).map(|pod| (pod.gpus, pod.agent)), Some((2, false)));
        assert_eq!(of(json!({ "/spec/containers": [{ "resources": { "requests": { "cpu": "1" } } }] })), None);
        let agent = json!({ "/spec/containers": [{}], "/metadata/labels": { "darter.dev/part": "agent" } });
        assert_eq!(of(agent).map(|pod| (pod.gpus, pod.agent)), Some((0, true)));
    }

    #[test]
    fn containers_run_together_and_those_before_them_one_by_one() {
        let want = |gpus: &str| json!({ "resources": { "requests": { "nvidia.com/gpu": gpus } } });
        let gpus = |before: &[&str], together: &[&str]| {
            let list = |list: &[&str]| Value::Array(list.iter().map(|gpus| want(gpus)).collect());
            of(json!({ "/spec/initContainers": list(before), "/spec/containers": list(together) })).unwrap().gpus
        };
        assert_eq!((gpus(&["1", "1"], &["1", "2"]), gpus(&["4", "1"], &["1", "2"])), (3, 4));
    }

    #[test]
    fn a_replica_is_that_of_its_deployment_or_stateful_set_and_of_nothing_else() {
        let hash = json!({ "pod-template-hash": "5d4f" });
        assert_eq!(owned("ReplicaSet", "serve-5d4f", hash.clone()).as_deref(), Some("team/serve"));
        assert_eq!(owned("ReplicaSet", "serve-5d4f", json!({})), None, "a ReplicaSet of its own");
        assert_eq!(owned("ReplicaSet", "other", hash.clone()), None);
        assert_eq!(owned("StatefulSet", "serve", json!({})).as_deref(), Some("team/serve"));
        assert_eq!(owned("Job", "train", hash), None);
        assert_eq!(of(json!({})).unwrap().workload, None, "a pod without a controller");
    }

    #[test]
    fn a_cost_that_is_no_number_is_none_and_one_that_nobody_set_is_zero() {
        let cost = |text: &str| {
            let annotations = json!({ "controller.kubernetes.io/pod-deletion-cost": text });
            of(json!({ "/metadata/annotations": annotations })).unwrap().cost
        };
        assert_eq!((cost("-400"), cost("much")), (-400, 0));
    }

    #[test]
    fn a_pod_that_ended_is_gone_once_and_a_stranger_is_never_gone() {
        let (mut pods, settings) = (Pods::new(), Settings::default());
        let u = || pod("u", &json!({}));
        assert!(matches!(pods.on(&settings, Event::Apply(u())), Some(Fact::Pod(_))));
        assert_eq!(pods.on(&settings, Event::Delete(u())), Some(Fact::PodGone { uid: "u".to_owned() }));
        assert_eq!(pods.on(&settings, Event::Delete(u())), None);
    }
}
