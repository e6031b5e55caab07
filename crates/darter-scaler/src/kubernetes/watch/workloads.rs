//! What KEDA scales by our word: a ScaledObject with a trigger that names this scaler, joined with the pods that
//! its Deployment makes.

use std::collections::BTreeMap;

use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use super::super::settings::Settings;
use super::listed::{Listed, Named};
use super::nodes::pool;
use super::shape::{Deployment, ScaledObject, Trigger};
use crate::fleet::{Fact, Kind, WorkloadFact};
use crate::state::WORKLOADS_MAX;

/// KEDA's, where a ScaledObject says none.
const REPLICAS_MOST: u32 = 100;
/// Kinds of trigger that ask a scaler.
const KINDS: [&str; 2] = ["external-push", "external"];

/// What a Deployment's pods are like.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Template {
    gpus: u32,
    pool: Option<String>,
}

#[derive(Debug)]
pub(super) struct Workloads {
    /// ScaledObjects, and Deployments with GPUs, by `namespace/name`.
    scaled: BTreeMap<String, WorkloadFact>,
    templates: BTreeMap<String, Template>,
    scaled_listed: Listed,
    templates_listed: Listed,
    said: BTreeMap<String, WorkloadFact>,
    dropped: u64,
}

impl Workloads {
    pub(super) const fn new() -> Self {
        Self {
            scaled: BTreeMap::new(),
            templates: BTreeMap::new(),
            scaled_listed: Listed::new(WORKLOADS_MAX),
            templates_listed: Listed::new(WORKLOADS_MAX),
            said: BTreeMap::new(),
            dropped: 0,
        }
    }

    /// How many there was no room for since the last look.
    pub(super) fn dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    pub(super) fn scaled(&mut self, settings: &Settings, event: Event<ScaledObject>) -> Vec<Fact> {
        match event {
            Event::Init => {
                self.scaled_listed.begin();
                Vec::new()
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let key = key(&object);
                match fact(settings, &object) {
                    Some(_) if self.scaled_listed.name(&key) == Named::Full => {
                        self.dropped += 1;
                        Vec::new()
                    }
                    Some(fact) => {
                        // It may scale another one than before.
                        let before = self.scaled.insert(key, fact.clone()).map(|before| before.name);
                        let mut facts =
                            before.filter(|name| *name != fact.name).map_or_else(Vec::new, |name| self.tell(&name));
                        facts.extend(self.tell(&fact.name));
                        facts
                    }
                    None => self.unscaled(&key),
                }
            }
            Event::Delete(object) => self.unscaled(&key(&object)),
            Event::InitDone => {
                let there = self.scaled_listed.end();
                let gone: Vec<_> = self.scaled.keys().filter(|key| !there.contains(*key)).cloned().collect();
                let mut facts: Vec<_> = gone.iter().flat_map(|key| self.unscaled(key)).collect();
                facts.push(Fact::Only { kind: Kind::Workload, uids: self.said.keys().cloned().collect() });
                facts
            }
        }
    }

    pub(super) fn deployment(&mut self, settings: &Settings, event: Event<Deployment>) -> Vec<Fact> {
        match event {
            Event::Init => {
                self.templates_listed.begin();
                Vec::new()
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let (key, spec) = (key(&object), &object.spec.template.spec);
                let gpus = spec.gpus(&settings.gpu_resource);
                if gpus == 0 {
                    return self.untemplated(&key);
                }
                if self.templates_listed.name(&key) == Named::Full {
                    self.dropped += 1;
                    return Vec::new();
                }
                let template = Template { gpus, pool: pool(settings, &spec.node_selector) };
                self.templates.insert(key.clone(), template);
                self.tell(&key)
            }
            Event::Delete(object) => self.untemplated(&key(&object)),
            Event::InitDone => {
                let there = self.templates_listed.end();
                let gone: Vec<_> = self.templates.keys().filter(|key| !there.contains(*key)).cloned().collect();
                gone.iter().flat_map(|key| self.untemplated(key)).collect()
            }
        }
    }

    fn unscaled(&mut self, key: &str) -> Vec<Fact> {
        self.scaled_listed.remove(key);
        self.scaled.remove(key).map_or_else(Vec::new, |gone| self.tell(&gone.name))
    }

    fn untemplated(&mut self, key: &str) -> Vec<Fact> {
        self.templates_listed.remove(key);
        self.templates.remove(key).map_or_else(Vec::new, |_| self.tell(key))
    }

    /// Says what there is to say of one target, if that is news.
    fn tell(&mut self, name: &str) -> Vec<Fact> {
        // KEDA refuses a second one for the same target.
        let found = self.scaled.values().find(|scaled| scaled.name == name).cloned();
        let Some(mut fact) = found else {
            return match self.said.remove(name) {
                Some(_) => vec![Fact::WorkloadGone { name: name.to_owned() }],
                None => Vec::new(),
            };
        };
        let template = self.templates.get(name);
        if fact.gpus == 0 {
            // One that nothing is known of takes one GPU at least.
            fact.gpus = template.map_or(1, |template| template.gpus);
        }
        fact.pool = fact.pool.or_else(|| template.and_then(|template| template.pool.clone()));
        if self.said.get(name) == Some(&fact) {
            return Vec::new();
        }
        self.said.insert(name.to_owned(), fact.clone());
        vec![Fact::Workload(fact)]
    }
}

fn key(object: &impl kube::ResourceExt) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// What it says by itself; `gpus` 0 where it does not say. None of one that asks somebody else.
fn fact(settings: &Settings, object: &ScaledObject) -> Option<WorkloadFact> {
    let spec = &object.spec;
    let metadata = spec.triggers.iter().find(|trigger| is_ours(settings, trigger))?.metadata.clone();
    let replicas =
        |count: Option<i64>, usual| count.map_or(usual, |count| u32::try_from(count.max(0)).unwrap_or(u32::MAX));
    Some(WorkloadFact {
        name: format!("{}/{}", object.namespace().unwrap_or_default(), spec.scale_target_ref.name),
        scaled_object: object.name_any(),
        pool: metadata.get("pool").cloned(),
        gpus: metadata.get("gpus").and_then(|gpus| gpus.parse().ok()).unwrap_or(0),
        least: replicas(spec.min_replica_count, 0),
        most: replicas(spec.max_replica_count, REPLICAS_MOST),
        metadata,
    })
}

/// Whether a trigger asks this scaler: `darter-scaler.kube-system.svc:4010`, `http://darter-scaler:4010`.
fn is_ours(settings: &Settings, trigger: &Trigger) -> bool {
    let Some(address) = trigger.metadata.get("scalerAddress") else { return false };
    let host = address.rsplit_once("//").map_or(address.as_str(), |(_, rest)| rest);
    let first = host.split(['.', ':', '/']).next();
    KINDS.contains(&trigger.kind.as_str()) && first == Some(&settings.service)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    struct Cluster(Workloads, Settings);

    impl Cluster {
        fn new() -> Self {
            Self(Workloads::new(), Settings::default())
        }

        fn scaled(&mut self, event: Event<Value>) -> Vec<Fact> {
            self.0.scaled(&self.1, typed(event))
        }

        fn deployment(&mut self, event: Event<Value>) -> Vec<Fact> {
            self.0.deployment(&self.1, typed(event))
        }
    }

    fn typed<T: serde::de::DeserializeOwned>(event: Event<Value>) -> Event<T> {
        let read = |value| serde_json::from_value(value).unwrap();
        match event {
            Event::Init => Event::Init,
            Event::InitDone => Event::InitDone,
            Event::InitApply(value) => Event::InitApply(read(value)),
            Event::Apply(value) => Event::Apply(read(value)),
            Event::Delete(value) => Event::Delete(read(value)),
        }
    }

    fn scaled(name: &str, target: &str, address: &str) -> Value {
        let metadata = json!({ "scalerAddress": address, "target": "5" });
        json!({ "metadata": { "namespace": "team", "name": name }, "spec": {
            "scaleTargetRef": { "name": target }, "maxReplicaCount": 20,
            "triggers": [{ "type": "cron", "metadata": {} }, { "type": "external-push", "metadata": metadata }] } })
    }

    fn deployment(name: &str, gpus: &str) -> Value {
        let pod = json!({ "nodeSelector": { "karpenter.sh/nodepool": "gpu" },
            "containers": [{ "resources": { "limits": { "nvidia.com/gpu": gpus } } }] });
        json!({ "metadata": { "namespace": "team", "name": name }, "spec": { "template": { "spec": pod } } })
    }

    const OURS: &str = "darter-scaler.gpu.svc:4010";

    fn serve(gpus: u32, pool: Option<&str>) -> WorkloadFact {
        let metadata = [("scalerAddress", OURS), ("target", "5")];
        WorkloadFact {
            name: "team/serve".to_owned(),
            scaled_object: "so".to_owned(),
            pool: pool.map(ToOwned::to_owned),
            gpus,
            least: 0,
            most: 20,
            metadata: metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect(),
        }
    }

    #[test]
    fn a_workload_is_ours_by_a_trigger_that_names_us_and_its_gpus_are_those_of_its_pods() {
        let mut cluster = Cluster::new();
        assert_eq!(cluster.scaled(Event::Apply(scaled("other", "x", "somebody.gpu.svc:4010"))), []);
        assert_eq!(cluster.scaled(Event::Apply(scaled("so", "serve", OURS))), [Fact::Workload(serve(1, None))]);
        let found = cluster.deployment(Event::Apply(deployment("serve", "4")));
        assert_eq!(found, [Fact::Workload(serve(4, Some("gpu")))]);
        assert_eq!(cluster.deployment(Event::Apply(deployment("serve", "4"))), [], "a status is no news");
        assert_eq!(cluster.deployment(Event::Apply(deployment("unscaled", "4"))), []);
        let gone = Fact::WorkloadGone { name: "team/serve".to_owned() };
        assert_eq!(cluster.scaled(Event::Delete(scaled("so", "serve", OURS))), [gone]);
    }

    #[test]
    fn one_that_asks_somebody_else_from_now_on_or_scales_another_is_gone() {
        let mut cluster = Cluster::new();
        cluster.scaled(Event::Apply(scaled("so", "serve", OURS)));
        let gone = || Fact::WorkloadGone { name: "team/serve".to_owned() };
        assert_eq!(cluster.scaled(Event::Apply(scaled("so", "serve", "somebody:4010"))), [gone()]);
        cluster.scaled(Event::Apply(scaled("so", "serve", OURS)));
        let other = Fact::Workload(WorkloadFact { name: "team/train".to_owned(), ..serve(1, None) });
        assert_eq!(cluster.scaled(Event::Apply(scaled("so", "train", OURS))), [gone(), other]);
    }

    #[test]
    fn what_a_new_list_does_not_name_is_gone() {
        let mut cluster = Cluster::new();
        cluster.scaled(Event::Apply(scaled("so", "serve", OURS)));
        cluster.scaled(Event::Init);
        let gone = Fact::WorkloadGone { name: "team/serve".to_owned() };
        let only = Fact::Only { kind: Kind::Workload, uids: Default::default() };
        assert_eq!(cluster.scaled(Event::InitDone), [gone, only]);
    }

    #[test]
    fn an_address_is_ours_by_the_first_word_of_its_host() {
        let settings = Settings::default();
        let is_ours = |address: &str, kind: &str| {
            let metadata = BTreeMap::from([("scalerAddress".to_owned(), address.to_owned())]);
            is_ours(&settings, &Trigger { kind: kind.to_owned(), metadata })
        };
        for address in [OURS, "darter-scaler:4010", "https://darter-scaler.x:1", "dns:///darter-scaler.x:4010"] {
            assert!(is_ours(address, "external-push") && is_ours(address, "external"), "{address}");
        }
        assert!(!is_ours(OURS, "prometheus") && !is_ours("darter-scaler-2:4010", "external"));
    }
}
