//! Stage 5: spare capacity: as many GPUs as demand rises by within a lead time, where having one too few
//! costs more than having one too many (the newsvendor's rule).

use std::collections::BTreeMap;

use super::rails::Brakes;
use super::scene::Scene;
use super::{Action, Class, Decision};
use crate::reason::{Fact, Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};
use crate::state::Pool;

pub(super) fn all(scene: &Scene<'_>, brakes: &Brakes, decision: &mut Decision) {
    let mut nodes = BTreeMap::<&str, Nodes>::new();
    for seen in &scene.nodes {
        let nodes = nodes.entry(&seen.node.pool).or_default();
        // A notice does not become untrue with the age of the report that brought it, and what it takes is
        // missing until the node is gone.
        let noticed = seen.node.report.as_ref().is_some_and(|report| report.notice.is_some());
        nodes.doomed += u32::from(noticed);
        nodes.unknown += u32::from(seen.class == Class::Unknown && !noticed);
    }
    for (name, pool) in &scene.state.pools {
        one(scene, brakes, (name, pool), &nodes.remove(name.as_str()).unwrap_or_default(), decision);
    }
}

#[derive(Default)]
struct Nodes {
    doomed: u32,
    unknown: u32,
}

fn one(scene: &Scene<'_>, brakes: &Brakes, (name, pool): (&str, &Pool), nodes: &Nodes, decision: &mut Decision) {
    let (learnt, rule) = learnt(scene, pool);
    let lost = nodes.doomed.saturating_mul(pool.gpus);
    let most = scene.policy.headroom.most.max(pool.buffer_least);
    let base = learnt.unwrap_or(0).max(pool.buffer_least);
    let raised = base.saturating_add(lost).min(most);
    // Each node of which nothing is known may be one that is about to go; and while it is not known how
    // demand rises, what was found before stays.
    let lowered = match learnt {
        Some(_) => raised.saturating_add(nodes.unknown.saturating_mul(pool.gpus)).min(most),
        None => pool.buffer,
    };
    let mut reason = Reason::new(Subject::Pool(name.to_owned()), Verdict::Unchanged, rule)
        .knowing(Fact::Increments, None, Some(pool.increments.len() as u64), None)
        .knowing(Fact::Notice, None, Some(nodes.doomed.into()), None)
        .comparing(Quantity::SpareGpus, raised.into(), pool.buffer.into());
    if base.saturating_add(lost) > most {
        reason =
            reason.against(RailHit { rail: Rail::Spare, limit: most.into(), found: base.saturating_add(lost).into() });
    }
    let wanted = if raised > pool.buffer { raised } else { pool.buffer.min(lowered) };
    let settling = pool.grew.map(|grew| grew.plus(scene.policy.rails.settle_ms)).filter(|at| *at > scene.now);
    let hit = match wanted.cmp(&pool.buffer) {
        std::cmp::Ordering::Greater => brakes.on_growth(),
        std::cmp::Ordering::Equal => None,
        std::cmp::Ordering::Less => brakes.on(name).or_else(|| {
            let grew = pool.grew.filter(|_| settling.is_some())?;
            Some(RailHit { rail: Rail::Settle, limit: scene.policy.rails.settle_ms, found: scene.age(grew) })
        }),
    };
    if let Some(hit) = hit {
        if let Some(at) = settling {
            decision.wake(at);
        }
        reason.verdict = Verdict::Held;
        decision.reasons.push(reason.against(hit).until(When::Rail, None, settling));
        return;
    }
    if wanted != pool.buffer {
        reason.verdict = if wanted > pool.buffer { Verdict::Raised } else { Verdict::Lowered };
        decision.actions.push(Action::Buffer { pool: name.to_owned(), gpus: wanted });
    } else if raised < pool.buffer {
        reason.verdict = Verdict::Held;
        reason = reason.until(When::Report, Some(nodes.unknown.into()), None);
    }
    decision.reasons.push(reason);
}

/// The smallest number that was enough often enough; none where too little is known.
fn learnt(scene: &Scene<'_>, pool: &Pool) -> (Option<u32>, Rule) {
    let headroom = &scene.policy.headroom;
    let count = pool.increments.len() as u64;
    if count < headroom.increments_least.max(1) {
        return (None, Rule::HeadroomConfigured);
    }
    let mut sorted = pool.increments.clone();
    sorted.sort_unstable();
    // P(increment <= k) >= 1 - price / penalty.
    let penalty = headroom.penalty_percent.max(100);
    let enough = (count * (penalty - 100)).div_ceil(penalty);
    let place = usize::try_from(enough.saturating_sub(1)).unwrap_or(usize::MAX);
    let most = sorted.len() - 1;
    (Some(if enough == 0 { 0 } else { sorted[place.min(most)] }), Rule::HeadroomByIncrements)
}
