//! Stage 4: what KEDA is told: what is needed, and what is kept although it is not needed now.

use super::demand::Demand;
use super::keep_time::{self, Fleet, KeepTime, cold_start_ms};
use super::rails::{Asked, Brakes};
use super::scene::Scene;
use super::{Action, Decision};
use crate::Millis;
use crate::Policy;
use crate::policy::Keep;
use crate::reason::{Fact, Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};
use crate::state::{Pool, State, Workload};

pub(super) fn all(scene: &Scene<'_>, brakes: &Brakes, demands: &[Demand<'_>], decision: &mut Decision) {
    let mut fleet = Fleet::of(scene.state.workloads.values());
    let mut plans: Vec<_> = demands.iter().map(|demand| Plan::of(scene, brakes, &mut fleet, demand)).collect();
    // What some give up is there for others.
    let mut asked = Asked::of(scene, plans.iter().map(|plan| (plan.demand.workload, plan.answer)));
    for plan in &mut plans {
        if plan.wanted > plan.answer {
            plan.answer = asked.raise(scene, brakes, plan.demand.workload, plan.wanted, &mut plan.rails);
        }
        one(scene, plan, decision);
    }
}

/// What one workload is to be answered.
struct Plan<'a> {
    demand: &'a Demand<'a>,
    kept: Kept,
    rule: Rule,
    rails: Vec<RailHit>,
    wanted: u32,
    answer: u32,
}

impl<'a> Plan<'a> {
    /// Lowers at once what may be lowered; raises come after all of these.
    fn of(scene: &Scene<'_>, brakes: &Brakes, fleet: &mut Fleet, demand: &'a Demand<'a>) -> Self {
        let workload = demand.workload;
        let kept = Kept::of(scene.pool(&workload.pool), workload, fleet, &scene.policy.keep);
        let (wanted, rule) = wanted(demand, kept.replicas(workload, scene.now));
        let mut rails = demand.rails.clone();
        let wanted = within(workload, wanted, demand, &mut rails);
        let brake = brakes.on(&workload.pool).filter(|_| wanted < workload.answered);
        let answer = if brake.is_some() { workload.answered } else { wanted.min(workload.answered) };
        rails.extend(brake);
        Self { demand, kept, rule, rails, wanted, answer }
    }
}

fn one(scene: &Scene<'_>, plan: &Plan<'_>, decision: &mut Decision) {
    let Plan { demand, kept, rule, wanted, answer, .. } = plan;
    let (workload, answer) = (demand.workload, *answer);
    let verdict = match answer.cmp(&workload.answered) {
        std::cmp::Ordering::Less => Verdict::Lowered,
        std::cmp::Ordering::Greater => Verdict::Raised,
        std::cmp::Ordering::Equal if *wanted != answer || demand.needed.is_none() => Verdict::Held,
        std::cmp::Ordering::Equal => Verdict::Unchanged,
    };
    if answer != workload.answered {
        decision.actions.push(Action::Answer { workload: demand.name.to_owned(), replicas: answer });
    }
    let until = kept.until(workload, answer);
    for at in demand.clock.into_iter().chain(until).filter(|at| *at > scene.now) {
        decision.wake(at);
    }
    let mut reason = Reason::new(Subject::Workload(demand.name.to_owned()), verdict, *rule).comparing(
        Quantity::Replicas,
        answer.into(),
        workload.answered.into(),
    );
    reason.inputs.clone_from(&demand.inputs);
    reason.rails.clone_from(&plan.rails);
    decision.reasons.push(changes(scene, demand, reason, kept, (answer, until)));
}

/// How many, and by which rule.
fn wanted(demand: &Demand<'_>, held: u32) -> (u32, Rule) {
    let answered = demand.workload.answered;
    let Some(needed) = demand.needed else {
        // Silence is not idleness.
        return (answered.max(demand.floor), Rule::DemandUnknown);
    };
    // Work that is under way raises nothing: it is there already.
    let at_work = demand.at_work.min(answered);
    let most = needed.max(held).max(at_work).max(demand.floor);
    let rule = match most {
        most if most == needed && needed >= demand.floor => demand.rule,
        most if most == demand.floor => Rule::Schedule,
        most if most == at_work => Rule::AtWork,
        _ => Rule::KeepByGaps,
    };
    (most, rule)
}

fn within(workload: &Workload, wanted: u32, demand: &Demand<'_>, rails: &mut Vec<RailHit>) -> u32 {
    let asked = demand.inputs.first().and_then(|input| input.value).unwrap_or(0);
    let unbounded = asked.div_ceil(workload.target_milli.max(1));
    if unbounded > workload.most.into() {
        rails.push(RailHit { rail: Rail::ReplicasMost, limit: workload.most.into(), found: unbounded });
    }
    // More than the most is only ever there because somebody lowered it: that is theirs to say.
    wanted.min(workload.most)
}

/// For how long the last replica is kept; as if for nothing where nothing is known of its pool.
pub(super) fn kept_ms(state: &State, workload: &Workload, policy: &Policy) -> u64 {
    let mut fleet = Fleet::of(state.workloads.values());
    let pool = state.pools.get(&workload.pool);
    pool.map_or(0, |pool| Kept::of(pool, workload, &mut fleet, &policy.keep).last.ms)
}

/// For how long each replica is kept.
struct Kept {
    last: KeepTime,
    /// Of replicas above the first nothing is learnt: until they have cost a cold start.
    others_ms: u64,
}

impl Kept {
    fn of(pool: &Pool, workload: &Workload, fleet: &mut Fleet, keep: &Keep) -> Self {
        let price = pool.micros_per_hour.saturating_mul(workload.gpus.into()) / u64::from(pool.gpus.max(1));
        let cold_ms = cold_start_ms(workload.cold_start_micros, price);
        // Where nothing is there to be kept, nothing is worked out.
        let nothing = KeepTime { ms: 0, rule: Rule::KeepBreakEven, gaps: 0, cost_ms: 0, usual_cost_ms: 0 };
        let there = workload.answered > 0;
        let last = if there { keep_time::of(&workload.gaps, fleet, cold_ms, keep) } else { nothing };
        Self { last, others_ms: cold_ms.min(keep.usual_ms).max(keep.least_ms) }
    }

    const fn ms(&self, replicas: u32) -> u64 {
        if replicas > 1 { self.others_ms } else { self.last.ms }
    }

    /// When so many are no longer kept; none where they are not kept at all.
    fn until(&self, workload: &Workload, replicas: u32) -> Option<Millis> {
        if replicas == 0 {
            return None;
        }
        self.lately(workload, replicas).max(self.coming(workload, replicas))
    }

    /// When so many have not been needed for long enough.
    fn lately(&self, workload: &Workload, replicas: u32) -> Option<Millis> {
        let needed = workload.needed.iter().filter(|needed| needed.replicas >= replicas).map(|needed| needed.at);
        // What was needed before we knew the workload is not known: taken to be all that it was told to have.
        let before = (workload.answered >= replicas).then_some(workload.known);
        needed.chain(before).max().map(|at| at.plus(self.ms(replicas)))
    }

    /// When that is given up which was asked for ahead of demand: no earlier than it can have come.
    fn coming(&self, workload: &Workload, replicas: u32) -> Option<Millis> {
        let ahead = workload.ahead.filter(|_| workload.answered >= replicas);
        ahead.map(|at| at.plus(self.coming_ms(workload, replicas)))
    }

    fn coming_ms(&self, workload: &Workload, replicas: u32) -> u64 {
        self.ms(replicas).max(workload.lead_ms)
    }

    fn replicas(&self, workload: &Workload, now: Millis) -> u32 {
        let levels = workload.needed.iter().map(|needed| needed.replicas).chain([workload.answered, 1]);
        let held = levels.filter(|level| self.until(workload, *level).is_some_and(|until| until > now)).max();
        // To keep is not to ask for more.
        held.unwrap_or(0).min(workload.answered)
    }
}

fn changes(
    scene: &Scene<'_>,
    demand: &Demand<'_>,
    mut reason: Reason,
    kept: &Kept,
    (answer, until): (u32, Option<Millis>),
) -> Reason {
    let workload = demand.workload;
    if reason.rule == Rule::DemandUnknown {
        return reason.until(When::Demand, None, None);
    }
    // The replicas that are not needed now: those that are kept, or were and go.
    let last = answer.max(workload.answered);
    if let Some(needed) = demand.needed.filter(|needed| *needed < last) {
        let is_coming = kept.coming(workload, last) > kept.lately(workload, last);
        let rule = match last {
            _ if is_coming => Rule::Coming,
            0 | 1 => kept.last.rule,
            _ => Rule::KeepBreakEven,
        };
        if reason.rule == Rule::KeepByGaps || reason.verdict == Verdict::Lowered {
            reason.rule = rule;
        }
        let needed_at = workload.needed.iter().filter(|needed| needed.replicas >= last).map(|last| last.at).max();
        if let Some(idle) = workload.ahead.filter(|_| is_coming).map(|at| scene.age(at)) {
            reason = reason.knowing(Fact::Ahead, None, Some(last.into()), Some(idle));
            reason = reason.comparing(Quantity::GapMs, idle, kept.coming_ms(workload, last));
        } else if let Some(idle) = needed_at.map(|at| scene.age(at)) {
            reason = reason.knowing(Fact::Needed, None, Some(last.into()), Some(idle));
            reason = reason.comparing(Quantity::GapMs, idle, kept.ms(last));
        }
        if rule == kept.last.rule && kept.last.gaps > 0 {
            reason = reason.knowing(Fact::Gaps, None, Some(kept.last.gaps), None).comparing(
                Quantity::KeepCostMs,
                kept.last.cost_ms,
                kept.last.usual_cost_ms,
            );
        }
        if until.is_some_and(|until| until > scene.now) {
            reason = reason.until(When::Time, Some(needed.max(demand.floor).into()), until);
        }
    }
    if !reason.rails.is_empty() {
        let frozen = reason.rails.iter().any(|hit| hit.rail == Rail::Freeze);
        return reason.until(if frozen { When::Thaw } else { When::Rail }, None, None);
    }
    reason.until(When::BacklogAbove, Some(u64::from(answer) * workload.target_milli), None)
}
