//! Stage 3: how many replicas each workload needs.
//!
//! The most of what waits, what will wait after a lead time, and what the clock asks for; then no fewer
//! than are at work, or may be.

use super::scene::Scene;
use crate::Millis;
use crate::reason::{Fact, Input, Rail, RailHit, Rule};
use crate::state::{Sample, Workload};

/// What a workload needs.
pub(super) struct Demand<'a> {
    pub(super) name: &'a str,
    pub(super) workload: &'a Workload,
    /// Replicas; none where nothing fresh is known.
    pub(super) needed: Option<u32>,
    /// Which rule asked for that many.
    pub(super) rule: Rule,
    pub(super) inputs: Vec<Input>,
    pub(super) rails: Vec<RailHit>,
    /// Never fewer than these, whatever waits.
    pub(super) floor: u32,
    /// Of which so many are there because they work.
    pub(super) at_work: u32,
    /// When the clock changes its mind.
    pub(super) clock: Option<Millis>,
}

/// A forecast may double what there is, and add ten where that is more.
const GROWTH: u32 = 10;

pub(super) fn all<'a>(scene: &Scene<'a>) -> Vec<Demand<'a>> {
    scene.state.workloads.iter().map(|(name, workload)| one(scene, name, workload)).collect()
}

fn one<'a>(scene: &Scene<'a>, name: &'a str, workload: &'a Workload) -> Demand<'a> {
    let (scheduled, clock) = scheduled(workload, scene.now);
    let at_work = scene.replicas.get(name).map_or(0, |pods| pods.at_work);
    let mut demand = Demand {
        name,
        workload,
        needed: None,
        rule: Rule::DemandUnknown,
        inputs: Vec::new(),
        rails: Vec::new(),
        floor: scheduled.max(workload.least),
        at_work,
        clock,
    };
    let newest = workload.samples.last();
    if let Some(sample) = newest {
        let age_ms = Some(scene.age(sample.at));
        demand.inputs.push(Input { fact: Fact::Demand, name: None, value: Some(sample.backlog_milli), age_ms });
    }
    let Some(sample) = newest.filter(|sample| scene.age(sample.at) <= scene.policy.demand_lifetime_ms) else {
        return demand;
    };
    let level = workload.level(sample.backlog_milli);
    // Until what was asked for is there, more and more waits for want of it: that says nothing of demand.
    let coming = workload.raised.is_some_and(|raised| scene.age(raised) < workload.lead_ms);
    let ahead = if coming { level } else { workload.level(forecast(&workload.samples, sample, workload.lead_ms)) };
    let growth = workload.answered.saturating_mul(2).max(workload.answered.saturating_add(GROWTH)).max(level);
    if ahead > growth {
        demand.rails.push(RailHit { rail: Rail::Growth, limit: growth.into(), found: ahead.into() });
    }
    let (rule, needed) =
        if ahead.min(growth) > level { (Rule::Forecast, ahead.min(growth)) } else { (Rule::Backlog, level) };
    demand.needed = Some(needed);
    demand.rule = rule;
    if needed < demand.floor && scheduled >= workload.least {
        demand.rule = Rule::Schedule;
    }
    demand
}

/// What will wait after `lead_ms`, in thousandths: never less than now.
///
/// The slope is the median of those between all pairs (Theil and Sen): one sample that is wrong moves it
/// little. What falls is taken to stay: the stage after this one decides how long.
fn forecast(samples: &[Sample], newest: &Sample, lead_ms: u64) -> u64 {
    let span = samples.first().map_or(0, |first| newest.at.since(first.at));
    // What rose for moments says nothing of a lead time.
    if span < lead_ms / 2 {
        return newest.backlog_milli;
    }
    let mut slopes = Vec::with_capacity(samples.len() * samples.len() / 2);
    for (n, later) in samples.iter().enumerate() {
        for earlier in &samples[..n] {
            if let Ok(ms @ 1..) = i64::try_from(later.at.since(earlier.at)) {
                slopes.push(
                    whole(later.backlog_milli).saturating_sub(whole(earlier.backlog_milli)).saturating_mul(1000) / ms,
                );
            }
        }
    }
    // Two samples make one slope, which is a guess.
    if slopes.len() < 3 {
        return newest.backlog_milli;
    }
    // In thousandths a second.
    let middle = slopes.len() / 2;
    let (_, slope, _) = slopes.select_nth_unstable(middle);
    let rise = u64::try_from(*slope).unwrap_or(0).saturating_mul(lead_ms) / 1000;
    newest.backlog_milli.saturating_add(rise)
}

fn whole(milli: u64) -> i64 {
    i64::try_from(milli).unwrap_or(i64::MAX)
}

const MINUTE: u64 = 60_000;
const DAY: u64 = 1440 * MINUTE;

/// What the clock asks for, and when it will ask for something else.
fn scheduled(workload: &Workload, now: Millis) -> (u32, Option<Millis>) {
    let midnight = Millis(now.0 - now.0 % DAY);
    let minute = now.0 % DAY / MINUTE;
    // 1970 began on a Thursday.
    let day = (now.0 / DAY + 3) % 7;
    let mut replicas = 0;
    let mut next: Option<Millis> = None;
    for floor in &workload.floors {
        if floor.days >> day & 1 == 1 && (floor.from_minute.into()..floor.to_minute.into()).contains(&minute) {
            replicas = replicas.max(floor.replicas);
        }
        let edges = [floor.from_minute, floor.to_minute].map(|edge| {
            let edge = midnight.plus(u64::from(edge) * MINUTE);
            if edge > now { edge } else { edge.plus(DAY) }
        });
        next = edges.into_iter().chain(next).min();
    }
    (replicas.min(workload.most), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(points: &[(u64, u64)]) -> Vec<Sample> {
        points.iter().map(|(at, backlog_milli)| Sample { at: Millis(*at), backlog_milli: *backlog_milli }).collect()
    }

    #[test]
    fn a_rise_is_looked_ahead_by_a_lead_time_and_one_wrong_sample_moves_it_little() {
        let rising = samples(&[(0, 0), (10_000, 1000), (20_000, 2000), (30_000, 3000)]);
        assert_eq!(forecast(&rising, &rising[3], 60_000), 9000);
        let wrong = samples(&[(0, 0), (10_000, 1000), (20_000, 900_000), (30_000, 3000)]);
        assert_eq!(forecast(&wrong, &wrong[3], 60_000), 9000);
    }

    #[test]
    fn what_falls_is_taken_to_stay() {
        let falling = samples(&[(0, 9000), (10_000, 6000), (20_000, 3000)]);
        assert_eq!(forecast(&falling, &falling[2], 60_000), 3000);
    }
}
