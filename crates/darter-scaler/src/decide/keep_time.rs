//! For how long a replica without work is kept: until that stops paying.
//!
//! Keeping it costs its price for as long as it does nothing; letting it go costs a cold start when work
//! comes back. Of all times the one is taken that would have cost least over the gaps that were seen.
//! Where too few were seen it is kept for as long as the gaps of all workloads make it pay; where these are
//! too few as well, until that has cost a cold start, which is never more than twice what the best choice
//! in hindsight costs.

use std::collections::BTreeMap;

use crate::policy::Keep;
use crate::reason::Rule;
use crate::state::{Gap, Workload};

/// A time, and how it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeepTime {
    pub(super) ms: u64,
    pub(super) rule: Rule,
    /// Gaps that were looked at.
    pub(super) gaps: u64,
    /// What it would have cost over them, and what the usual time would have.
    pub(super) cost_ms: u64,
    pub(super) usual_cost_ms: u64,
}

/// What a cold start is worth in milliseconds of an idle replica.
pub(super) fn cold_start_ms(micros: u64, micros_per_hour: u64) -> u64 {
    let ms = u128::from(micros) * 3_600_000 / u128::from(micros_per_hour.max(1));
    u64::try_from(ms).unwrap_or(u64::MAX)
}

/// What the newest gaps of all workloads say: where one starts of which nothing is known yet.
pub(super) struct Fleet {
    /// By their length.
    gaps: Vec<u64>,
    /// What was worked out, by what a cold start is worth.
    starts: BTreeMap<u64, (u64, bool)>,
}

/// Gaps of the fleet that are looked at, the newest of each workload: they are sorted by each decision.
const FLEET_MOST: usize = 256;
/// Fewer say nothing of a workload that is none of theirs.
const FLEET_LEAST: usize = 30;

impl Fleet {
    pub(super) fn of<'w>(workloads: impl ExactSizeIterator<Item = &'w Workload>) -> Self {
        // One workload is no fleet.
        if workloads.len() < 2 {
            return Self { gaps: Vec::new(), starts: BTreeMap::new() };
        }
        let each = (FLEET_MOST / workloads.len().max(1)).max(1);
        let newest = workloads.flat_map(|workload| workload.gaps.iter().rev().take(each));
        let mut gaps: Vec<_> = newest.map(|gap| gap.ms).collect();
        gaps.sort_unstable();
        Self { gaps, starts: BTreeMap::new() }
    }

    /// The time with which a workload starts, and whether the fleet says it.
    fn start(&mut self, cold_ms: u64, keep: &Keep) -> (u64, bool) {
        if let Some(found) = self.starts.get(&cold_ms) {
            return *found;
        }
        let found = self.work_out(cold_ms, keep);
        self.starts.insert(cold_ms, found);
        found
    }

    fn work_out(&self, cold_ms: u64, keep: &Keep) -> (u64, bool) {
        let usual = keep.clamp(cold_ms.min(keep.usual_ms));
        if self.gaps.len() < FLEET_LEAST {
            return (usual, false);
        }
        let (ms, best) = cheapest(&self.gaps, (usual, keep.doubt), cold_ms, keep);
        let doubted = sum(self.gaps.iter().map(|gap| cost(*gap, usual, cold_ms))) + keep.doubt * usual;
        if above(doubted, best, keep.margin_permille) { (ms, true) } else { (usual, false) }
    }
}

/// For how long the last replica is kept, where a cold start is worth `cold_ms`.
pub(super) fn of(gaps: &[Gap], fleet: &mut Fleet, cold_ms: u64, keep: &Keep) -> KeepTime {
    let (start, by_fleet) = fleet.start(cold_ms, keep);
    let count = u64::try_from(gaps.len()).unwrap_or(u64::MAX);
    let found = |ms, rule, cost_ms, usual_cost_ms| KeepTime { ms, rule, gaps: count, cost_ms, usual_cost_ms };
    if count < keep.gaps_least {
        return found(start, if by_fleet { Rule::KeepByFleet } else { Rule::KeepBreakEven }, 0, 0);
    }
    let usual = keep.clamp(cold_ms.min(keep.usual_ms));
    let over = |kept: u64| sum(gaps.iter().map(|gap| cost(gap.ms, kept, cold_ms)));
    // What was chosen is judged by what it cost, not by what it promised.
    let paid = sum(gaps.iter().map(|gap| cost(gap.ms, gap.kept_ms, cold_ms)));
    if above(paid, over(usual), keep.margin_permille) {
        return found(usual, Rule::KeepUsual, paid, over(usual));
    }
    let mut sorted: Vec<u64> = gaps.iter().map(|gap| gap.ms).collect();
    sorted.sort_unstable();
    let (ms, best) = cheapest(&sorted, (start, keep.doubt), cold_ms, keep);
    let doubted = over(start).saturating_add(keep.doubt.saturating_mul(start));
    if above(doubted, best, keep.margin_permille) {
        found(ms, Rule::KeepByGaps, best, doubted)
    } else {
        found(start, if by_fleet { Rule::KeepByFleet } else { Rule::KeepUsual }, best, doubted)
    }
}

/// Whether `a` is more than so many thousandths over `b`.
fn above(a: u64, b: u64, permille: u64) -> bool {
    u128::from(a) * 1000 > u128::from(b) * u128::from(1000 + permille)
}

fn sum(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

/// What a gap costs where the replica is kept for `kept_ms`.
pub(super) fn cost(gap_ms: u64, kept_ms: u64, cold_ms: u64) -> u64 {
    if gap_ms <= kept_ms { gap_ms } else { kept_ms.saturating_add(cold_ms) }
}

/// The time that would have cost least, the shortest of those that cost the same.
///
/// Few gaps promise more than they keep. So many more are taken to have been there that the usual time
/// just covered: the fewer there are, the more that speaks for it.
fn cheapest(sorted: &[u64], (usual, doubt): (u64, u64), cold_ms: u64, keep: &Keep) -> (u64, u64) {
    let count = u64::try_from(sorted.len()).unwrap_or(u64::MAX);
    let total = |kept: u64, covered: usize, covered_ms: u64| {
        let missed = count - u64::try_from(covered).unwrap_or(count);
        let total = covered_ms.saturating_add(missed.saturating_mul(kept.saturating_add(cold_ms)));
        (total.saturating_add(doubt.saturating_mul(cost(usual, kept, cold_ms))), kept)
    };
    let covered = sorted.partition_point(|gap| *gap <= usual);
    let mut best = total(usual, covered, sum(sorted[..covered].iter().copied()));
    // Only a time that just reaches over one more gap can be the best; they come in order.
    let (mut covered, mut covered_ms) = (0, 0_u64);
    for kept in std::iter::once(0).chain(sorted.iter().copied()).map(|ms| keep.clamp(ms)) {
        while let Some(gap) = sorted.get(covered).filter(|gap| **gap <= kept) {
            covered_ms = covered_ms.saturating_add(*gap);
            covered += 1;
        }
        best = best.min(total(kept, covered, covered_ms));
    }
    (best.1, best.0)
}
