//! For how long a replica without work is kept: until that stops paying.
//!
//! Keeping it costs its price for as long as it does nothing; letting it go costs a cold start when work
//! comes back. Of all times the one is taken that would have cost least over the gaps that were seen.
//! Where too few were seen it is kept until that has cost a cold start, which is never more than twice
//! what the best choice in hindsight costs.

use crate::policy::Keep;
use crate::reason::Rule;
use crate::state::Gap;

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

/// For how long the last replica is kept, where a cold start is worth `cold_ms`.
pub(super) fn of(gaps: &[Gap], cold_ms: u64, keep: &Keep) -> KeepTime {
    let clamp = |ms: u64| ms.clamp(keep.least_ms, keep.most_ms.max(keep.least_ms));
    let usual = clamp(cold_ms.min(keep.usual_ms));
    let count = u64::try_from(gaps.len()).unwrap_or(u64::MAX);
    let found = |ms, rule, cost_ms, usual_cost_ms| KeepTime { ms, rule, gaps: count, cost_ms, usual_cost_ms };
    if count < keep.gaps_least {
        return found(usual, Rule::KeepBreakEven, 0, 0);
    }
    let usual_cost = sum(gaps.iter().map(|gap| cost(gap.ms, usual, cold_ms)));
    // What was chosen is judged by what it cost, not by what it promised.
    let paid = sum(gaps.iter().map(|gap| cost(gap.ms, gap.kept_ms, cold_ms)));
    if above(paid, usual_cost, keep.margin_permille) {
        return found(usual, Rule::KeepUsual, paid, usual_cost);
    }
    let (ms, cost_ms) = cheapest(gaps, (usual, keep.doubt), cold_ms, &clamp);
    let doubted = usual_cost.saturating_add(keep.doubt.saturating_mul(usual));
    if above(doubted, cost_ms, keep.margin_permille) {
        found(ms, Rule::KeepByGaps, cost_ms, doubted)
    } else {
        found(usual, Rule::KeepUsual, cost_ms, doubted)
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
fn cheapest(gaps: &[Gap], (usual, doubt): (u64, u64), cold_ms: u64, clamp: &impl Fn(u64) -> u64) -> (u64, u64) {
    let mut sorted: Vec<u64> = gaps.iter().map(|gap| gap.ms).collect();
    sorted.sort_unstable();
    let count = u64::try_from(sorted.len()).unwrap_or(u64::MAX);
    let mut sums = Vec::with_capacity(sorted.len() + 1);
    sums.push(0_u64);
    for gap in &sorted {
        sums.push(sums[sums.len() - 1].saturating_add(*gap));
    }
    // Only a time that just reaches over one more gap can be the best.
    let candidates = [0, usual].into_iter().chain(sorted.iter().copied()).map(clamp);
    let costs = candidates.map(|kept| {
        let covered = sorted.partition_point(|gap| *gap <= kept);
        let missed = count - u64::try_from(covered).unwrap_or(count);
        let total = sums[covered].saturating_add(missed.saturating_mul(kept.saturating_add(cold_ms)));
        (total.saturating_add(doubt.saturating_mul(cost(usual, kept, cold_ms))), kept)
    });
    costs.min().map_or((usual, 0), |(total, kept)| (kept, total))
}
