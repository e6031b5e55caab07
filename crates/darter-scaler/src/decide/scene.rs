//! What all stages look at: the state, the time, and what each node is worth believing and doing.

use std::collections::BTreeMap;

use super::{Class, Trust, classify, trust};
use crate::state::{Node, Pool};
use crate::{Millis, Policy, State};

/// One node, judged.
pub(super) struct Seen<'a> {
    pub(super) uid: &'a str,
    pub(super) node: &'a Node,
    pub(super) trust: Trust,
    pub(super) class: Class,
}

/// All of it.
pub(super) struct Scene<'a> {
    pub(super) state: &'a State,
    pub(super) policy: &'a Policy,
    pub(super) now: Millis,
    /// By UID.
    pub(super) nodes: Vec<Seen<'a>>,
    /// Of each workload with pods: how many are at work or may be, and how many there are.
    pub(super) replicas: BTreeMap<&'a str, Replicas>,
    none: Pool,
}

/// Pods of one workload.
#[derive(Default)]
pub(super) struct Replicas {
    /// At work, or not known to be idle.
    pub(super) at_work: u32,
    pub(super) all: u32,
}

impl<'a> Scene<'a> {
    pub(super) fn new(state: &'a State, policy: &'a Policy, now: Millis) -> Self {
        let nodes = state.nodes.iter().map(|(uid, node)| {
            let trust = trust::of(node, policy, now);
            Seen { uid, node, trust, class: classify::of(node, trust, policy, now) }
        });
        let nodes: Vec<_> = nodes.collect();
        let mut replicas = BTreeMap::<&str, Replicas>::new();
        for seen in &nodes {
            let idle = seen.trust == Trust::Fresh && matches!(seen.class, Class::OccupiedIdle { .. });
            for workload in seen.node.pods.iter().filter_map(|pod| pod.workload.as_deref()) {
                let pods = replicas.entry(workload).or_default();
                pods.all += 1;
                pods.at_work += u32::from(!idle);
            }
        }
        Self { state, policy, now, nodes, replicas, none: Pool::default() }
    }

    /// A pool; one of which nothing is known where it is not there.
    pub(super) fn pool(&self, name: &str) -> &Pool {
        self.state.pools.get(name).unwrap_or(&self.none)
    }

    /// How long ago.
    pub(super) const fn age(&self, at: Millis) -> u64 {
        self.now.since(at)
    }
}
