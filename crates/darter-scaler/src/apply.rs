//! What a state is once a decision was carried out: for the simulator, and for tests that ask whether
//! deciding again finds something to do.

use crate::decide::Action;
use crate::state::{Lease, Pod, Removal};
use crate::{Decision, Millis, State};

/// Carries out everything at once.
pub fn apply(state: &mut State, decision: &Decision, now: Millis) {
    for action in &decision.actions {
        one(state, action, now);
    }
}

fn one(state: &mut State, action: &Action, now: Millis) {
    match action {
        Action::Answer { workload, replicas } => {
            let Some(workload) = state.workloads.get_mut(workload) else { return };
            if workload.tell(*replicas, now)
                && let Some(pool) = state.pools.get_mut(&workload.pool)
            {
                pool.grew = Some(now);
            }
        }
        Action::Protect { node, until } => {
            let Some(node) = state.nodes.get_mut(node) else { return };
            let since = node.lease.filter(|lease| lease.until > now).map_or(now, |lease| lease.since);
            node.lease = Some(Lease { since, until: *until });
        }
        Action::Rank { node, pod, cost } => {
            let pods = state.nodes.get_mut(node).into_iter().flat_map(|node| &mut node.pods);
            for found in pods.filter(|found| found.uid == *pod) {
                *found = Pod { cost: *cost, ranked: Some(now), ..found.clone() };
            }
        }
        Action::Buffer { pool, gpus } => {
            let Some(pool) = state.pools.get_mut(pool) else { return };
            if *gpus > pool.buffer {
                pool.grew = Some(now);
            }
            pool.buffer = *gpus;
        }
        Action::Copy { node, image } => {
            let Some(node) = state.nodes.get_mut(node) else { return };
            node.asked.push(*image);
        }
        Action::Remove { node } => {
            let Some(node) = state.nodes.get_mut(node) else { return };
            node.deleting = true;
            state.removals.push(Removal { at: now, pool: node.pool.clone(), zone: node.zone.clone() });
        }
    }
}
