//! Stage 7: in which order pods go when there are to be fewer.
//!
//! `controller.kubernetes.io/pod-deletion-cost` is read by the ReplicaSet, which ends the pod that costs
//! least, and by Karpenter. Eight coarse places, so that it is written seldom.

use super::classify::work;
use super::protect::Stays;
use super::scene::{Scene, Seen};
use super::{Action, Class, Decision, Trust};
use crate::Millis;
use crate::reason::{Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};

/// Between two places. The highest is 700,000: far from what would make Karpenter think a pod weightless.
pub(super) const STEP: i32 = 100_000;

pub(super) fn all(scene: &Scene<'_>, stays: &Stays, decision: &mut Decision) {
    let rails = &scene.policy.rails;
    let mut written = 0;
    for (n, seen) in scene.nodes.iter().enumerate() {
        // Of a node that is not fresh nothing new is known.
        if seen.node.pods.is_empty() || seen.trust != Trust::Fresh || seen.class == Class::Draining {
            continue;
        }
        let cost = place(scene, seen, stays.rule(n)) * STEP;
        for pod in seen.node.pods.iter().filter(|pod| pod.workload.is_some() && pod.cost != cost) {
            let verdict = Verdict::Ranked;
            let reason = Reason::new(Subject::Pod(pod.uid.clone()), verdict, Rule::Rank).comparing(
                Quantity::Place,
                unsigned(cost / STEP),
                unsigned(pod.cost / STEP),
            );
            let again: Option<Millis> = pod.ranked.map(|at| at.plus(rails.rank_every_ms));
            let too_soon = again.filter(|again| *again > scene.now);
            if too_soon.is_none() && written < rails.ranks_most {
                written += 1;
                let (node, pod) = (seen.uid.to_owned(), pod.uid.clone());
                decision.actions.push(Action::Rank { node, pod, cost });
                decision.reasons.push(reason);
                continue;
            }
            let at = too_soon.unwrap_or_else(|| scene.now.plus(1000));
            decision.wake(at);
            let hit = RailHit { rail: Rail::Ranks, limit: rails.ranks_most.into(), found: written.into() };
            let held = Reason { verdict: Verdict::Held, ..reason };
            decision.reasons.push(held.against(hit).until(When::Time, None, Some(at)));
        }
    }
}

/// From 0, which goes first, to 7.
fn place(scene: &Scene<'_>, seen: &Seen<'_>, held: Option<Rule>) -> i32 {
    match held {
        Some(Rule::Job) => 7,
        Some(Rule::GpuAtWork | Rule::GpuUnread) => 6,
        Some(Rule::LastCopy) => 5,
        Some(_) => 4,
        None => idle(scene, seen),
    }
}

/// Of those that do nothing: the longer, the sooner; a node that is lost anyway first of all.
fn idle(scene: &Scene<'_>, seen: &Seen<'_>) -> i32 {
    if matches!(seen.class, Class::Doomed { .. } | Class::Sick { .. }) {
        return 0;
    }
    let idle = seen.node.report.as_ref().and_then(work).map_or(0, |last| scene.age(last));
    let proof = scene.policy.idle_proof_ms;
    match idle {
        idle if idle >= proof => 1,
        idle if idle >= proof / 4 => 2,
        _ => 3,
    }
}

fn unsigned(place: i32) -> u64 {
    u64::try_from(place).unwrap_or(0)
}
