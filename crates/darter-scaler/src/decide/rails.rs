//! Stage 8: what no decision may do. A rail holds still; it raises nothing and removes nothing.

use std::collections::BTreeMap;

use super::protect::Stays;
use super::scene::{Scene, Seen};
use super::{Action, Class, Decision, Trust};
use crate::reason::{Fact, Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};
use crate::state::Workload;

/// What forbids scale-in now.
pub(super) struct Brakes {
    all: Option<RailHit>,
    pools: BTreeMap<String, RailHit>,
    frozen: bool,
}

impl Brakes {
    pub(super) fn of(scene: &Scene<'_>) -> Self {
        let (rails, state) = (&scene.policy.rails, scene.state);
        let silent = scene.age(state.watched);
        let freeze = state.freeze.as_ref().map(|freeze| scene.age(freeze.since));
        let all = match freeze {
            Some(age) => Some(RailHit { rail: Rail::Freeze, limit: 0, found: age }),
            None if silent > rails.partition_ms => {
                Some(RailHit { rail: Rail::Partition, limit: rails.partition_ms, found: silent })
            }
            None => None,
        };
        let mut counts = BTreeMap::<&str, (u64, u64)>::new();
        for seen in &scene.nodes {
            let (unknown, nodes) = counts.entry(&seen.node.pool).or_default();
            *unknown += u64::from(seen.trust == Trust::Unknown);
            *nodes += 1;
        }
        let pools = counts.into_iter().filter_map(|(pool, (unknown, nodes))| {
            let percent = unknown * 100 / nodes;
            let hit = RailHit { rail: Rail::Unknown, limit: rails.unknown_percent, found: percent };
            (percent > rails.unknown_percent).then(|| (pool.to_owned(), hit))
        });
        Self { all, pools: pools.collect(), frozen: freeze.is_some() }
    }

    /// What forbids scale-in of this pool.
    pub(super) fn on(&self, pool: &str) -> Option<RailHit> {
        self.all.as_ref().or_else(|| self.pools.get(pool)).cloned()
    }

    /// What forbids that it grows.
    pub(super) fn on_growth(&self) -> Option<RailHit> {
        self.all.clone().filter(|_| self.frozen)
    }
}

/// What all workloads ask for together.
pub(super) struct Asked {
    gpus: u64,
    micros_per_hour: u64,
    pools: BTreeMap<String, u64>,
}

impl Asked {
    pub(super) fn of<'w>(scene: &Scene<'_>, answers: impl Iterator<Item = (&'w Workload, u32)>) -> Self {
        let mut asked = Self { gpus: 0, micros_per_hour: 0, pools: BTreeMap::new() };
        for (workload, replicas) in answers {
            asked.add(scene, workload, replicas);
        }
        asked
    }

    fn add(&mut self, scene: &Scene<'_>, workload: &Workload, replicas: u32) {
        let gpus = u64::from(replicas) * u64::from(workload.gpus);
        self.gpus += gpus;
        self.micros_per_hour = self.micros_per_hour.saturating_add(gpus.saturating_mul(price(scene, workload)));
        *self.pools.entry(workload.pool.clone()).or_default() += gpus;
    }

    /// How many of the replicas that are wanted may be asked for.
    pub(super) fn raise(
        &mut self,
        scene: &Scene<'_>,
        brakes: &Brakes,
        workload: &Workload,
        wanted: u32,
        rails: &mut Vec<RailHit>,
    ) -> u32 {
        let more = wanted - workload.answered;
        if let Some(hit) = brakes.on_growth() {
            rails.push(hit);
            return workload.answered;
        }
        let (limits, pool) = (&scene.policy.rails, scene.pool(&workload.pool));
        let gpus_of_one = u64::from(workload.gpus.max(1));
        let in_pool = self.pools.get(&workload.pool).copied().unwrap_or(0);
        let pool_most = u64::from(pool.nodes_most) * u64::from(pool.gpus);
        let price = price(scene, workload).max(1);
        let room = [
            (Rail::Gpus, u64::from(limits.gpus_most), self.gpus, 1),
            (Rail::NodesMost, pool_most, in_pool, 1),
            (Rail::Price, limits.micros_per_hour_most, self.micros_per_hour, price),
        ];
        let mut allowed = more;
        for (rail, limit, used, each) in room {
            let fits = limit.saturating_sub(used) / (gpus_of_one * each);
            if fits < more.into() {
                let found = used.saturating_add(u64::from(more).saturating_mul(gpus_of_one * each));
                rails.push(RailHit { rail, limit, found });
                allowed = allowed.min(u32::try_from(fits).unwrap_or(u32::MAX));
            }
        }
        self.add(scene, workload, allowed);
        workload.answered + allowed
    }
}

/// Micro-dollars an hour of one GPU.
fn price(scene: &Scene<'_>, workload: &Workload) -> u64 {
    let pool = scene.pool(&workload.pool);
    pool.micros_per_hour / u64::from(pool.gpus.max(1))
}

/// Why a node should go by our own hand.
fn cause(scene: &Scene<'_>, seen: &Seen<'_>) -> Option<(Rule, bool, u64)> {
    let (remove, warm) = (&scene.policy.remove, &scene.policy.warm);
    match seen.class {
        Class::Doomed { at } => Some((Rule::Doomed, remove.doomed, at.since(scene.now))),
        Class::Warming { deadline } if deadline <= scene.now => {
            Some((Rule::Stuck, remove.stuck, scene.age(seen.node.created)))
        }
        Class::Sick { since } if scene.age(since) >= warm.deadline_ms => {
            Some((Rule::Sick, remove.sick, scene.age(since)))
        }
        _ => None,
    }
}

/// What was removed of a pool, by zone, within the window.
#[derive(Default)]
struct Gone {
    zones: BTreeMap<String, u64>,
    all: u64,
}

/// Nodes that go by our own hand: those whose cause is known, allowed and not held by anything.
pub(super) fn removals(scene: &Scene<'_>, brakes: &Brakes, stays: &Stays, decision: &mut Decision) {
    let rails = &scene.policy.rails;
    let mut gone = BTreeMap::<&str, Gone>::new();
    for removal in scene.state.removals.iter().filter(|removal| scene.age(removal.at) < rails.removals_window_ms) {
        let pool = gone.entry(&removal.pool).or_default();
        *pool.zones.entry(removal.zone.clone()).or_default() += 1;
        pool.all += 1;
    }
    let mut nodes = BTreeMap::<&str, u64>::new();
    for seen in scene.nodes.iter().filter(|seen| seen.class != Class::Draining) {
        *nodes.entry(&seen.node.pool).or_default() += 1;
    }
    for (n, seen) in scene.nodes.iter().enumerate() {
        let found = cause(scene, seen);
        let gone = gone.entry(&seen.node.pool).or_default();
        let all = nodes.get(seen.node.pool.as_str()).copied().unwrap_or(0);
        // One of which nothing is known takes the place that it might need: what is heard of it later must
        // not make this decision one removal too many.
        let takes = seen.class == Class::Unknown || found.is_some_and(|(_, allowed, _)| allowed);
        let zone = gone.zones.get(&seen.node.zone).copied().unwrap_or(0);
        let before = (zone, gone.all);
        if takes {
            *gone.zones.entry(seen.node.zone.clone()).or_default() += 1;
            gone.all += 1;
        }
        let Some((rule, allowed, age_ms)) = found else { continue };
        let name = Subject::Node(seen.node.name.clone());
        let mut reason = Reason::new(name, Verdict::Held, rule)
            .knowing(Fact::Node, None, None, Some(scene.age(seen.node.created)))
            .comparing(Quantity::Removals, before.1, victims(rails.victims_percent, all));
        reason.inputs[0].value = Some(age_ms);
        let hit = match () {
            () if !allowed => Some((RailHit { rail: Rail::Off, limit: 0, found: 0 }, When::Allowed)),
            () if stays.holds(n) || leased(scene, seen) => None,
            () => forbids(scene, brakes, seen, before, all).map(|hit| (hit, When::Rail)),
        };
        if let Some((hit, when)) = hit {
            decision.reasons.push(reason.against(hit).until(when, None, None));
        } else if seen.trust != Trust::Fresh {
            decision.reasons.push(reason.until(When::Report, None, None));
        } else if stays.holds(n) || leased(scene, seen) {
            let holds = decision.reasons.iter().find(|other| other.subject == reason.subject).cloned();
            reason.because.extend(holds);
            decision.reasons.push(reason.until(When::Time, None, seen.node.lease.map(|lease| lease.until)));
        } else {
            reason.verdict = Verdict::Removed;
            decision.actions.push(Action::Remove { node: seen.uid.to_owned() });
            decision.reasons.push(reason);
        }
    }
}

fn leased(scene: &Scene<'_>, seen: &Seen<'_>) -> bool {
    seen.node.lease.is_some_and(|lease| lease.until > scene.now)
}

/// Nodes of a pool that may go within the window: never fewer than one.
fn victims(percent: u64, nodes: u64) -> u64 {
    (nodes * percent / 100).max(1)
}

fn forbids(
    scene: &Scene<'_>,
    brakes: &Brakes,
    seen: &Seen<'_>,
    (in_zone, in_pool): (u64, u64),
    nodes: u64,
) -> Option<RailHit> {
    let (rails, pool) = (&scene.policy.rails, scene.pool(&seen.node.pool));
    if let Some(hit) = brakes.on(&seen.node.pool) {
        return Some(hit);
    }
    let grew = pool.grew.map(|at| scene.age(at)).filter(|age| *age < rails.settle_ms);
    if let Some(age) = grew {
        return Some(RailHit { rail: Rail::Settle, limit: rails.settle_ms, found: age });
    }
    let limits = [
        (Rail::Removals, u64::from(rails.removals_most), in_zone + 1),
        (Rail::Victims, victims(rails.victims_percent, nodes), in_pool + 1),
    ];
    if let Some((rail, limit, found)) = limits.into_iter().find(|(_, limit, found)| found > limit) {
        return Some(RailHit { rail, limit, found });
    }
    let (least, left) = (u64::from(pool.nodes_least), nodes.saturating_sub(in_pool + 1));
    (left < least).then_some(RailHit { rail: Rail::NodesLeast, limit: least, found: left })
}
