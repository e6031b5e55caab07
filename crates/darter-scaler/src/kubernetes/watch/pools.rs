//! Karpenter's NodePools, as far as they say what a pool is.

use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use super::super::settings::Settings;
use super::listed::{Listed, Named};
use super::shape::{NodePool, amount};
use crate::fleet::{Fact, Kind, PoolFact};

/// One for each kind of instance that a cluster has, many times over.
const POOLS_MAX: usize = 1000;
/// How many GPUs an instance type has, as a requirement says it.
const INSTANCE_GPUS: &str = "karpenter.k8s.aws/instance-gpu-count";

#[derive(Debug)]
pub(super) struct Pools {
    listed: Listed,
    dropped: u64,
}

impl Pools {
    pub(super) const fn new() -> Self {
        Self { listed: Listed::new(POOLS_MAX), dropped: 0 }
    }

    pub(super) fn on(&mut self, settings: &Settings, event: Event<NodePool>) -> Option<Fact> {
        match event {
            Event::Init => {
                self.listed.begin();
                None
            }
            Event::InitApply(pool) | Event::Apply(pool) => match self.listed.name(&pool.name_any()) {
                Named::Taken => Some(Fact::Pool(fact(settings, &pool))),
                Named::Full => {
                    self.dropped += 1;
                    None
                }
            },
            Event::Delete(pool) => {
                let name = pool.name_any();
                self.listed.remove(&name).then_some(Fact::PoolGone { name })
            }
            Event::InitDone => Some(Fact::Only { kind: Kind::Pool, uids: self.listed.end() }),
        }
    }

    /// How many there was no room for since the last look.
    pub(super) fn dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

fn fact(settings: &Settings, pool: &NodePool) -> PoolFact {
    let requirements = &pool.spec.template.spec.requirements;
    let one = requirements.iter().find(|requirement| {
        requirement.key == INSTANCE_GPUS && requirement.operator == "In" && requirement.values.len() == 1
    });
    // A pool of several kinds of instances has no such number.
    let gpus = one.and_then(|one| one.values[0].parse().ok()).unwrap_or(0);
    let limits = &pool.spec.limits;
    let by_gpus = amount(limits, &settings.gpu_resource).filter(|_| gpus > 0).map(|most| most / gpus);
    let nodes_most = amount(limits, "nodes").into_iter().chain(by_gpus).min();
    // What a node costs no NodePool says.
    PoolFact { name: pool.name_any(), gpus, nodes_most, micros_per_hour: None }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(limits: Value, requirements: Value) -> (u32, Option<u32>) {
        let template = json!({ "spec": { "requirements": requirements } });
        let pool = json!({ "metadata": { "name": "gpu" }, "spec": { "limits": limits, "template": template } });
        let fact = fact(&Settings::default(), &serde_json::from_value(pool).unwrap());
        (fact.gpus, fact.nodes_most)
    }

    #[test]
    fn a_limit_of_gpus_is_one_of_nodes_where_all_nodes_have_the_same_number() {
        let count = |values: Value| json!([{ "key": INSTANCE_GPUS, "operator": "In", "values": values }]);
        assert_eq!(of(json!({ "nvidia.com/gpu": 20 }), count(json!(["8"]))), (8, Some(2)));
        assert_eq!(of(json!({ "nvidia.com/gpu": "20" }), count(json!(["4", "8"]))), (0, None));
        assert_eq!(of(json!({ "nodes": "5", "nvidia.com/gpu": "80" }), count(json!(["8"]))), (8, Some(5)));
        assert_eq!(of(json!({}), json!([])), (0, None));
    }
}
