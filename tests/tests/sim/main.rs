//! The swarm's own code, played against itself: how near it comes to the bound, that the origin is
//! read once, and what each failure costs.
//!
//! Times are those of the model and exactly repeatable, so they may be asserted. Each node's
//! invariants are checked on the way.

mod members;
mod origin;
mod peers;

use std::time::Duration;

use darter_core::simulate::{Bound, Fault, Outcome, Scenario, run};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
/// 512 pieces of 8 MiB.
const SIZE: u64 = 4 * GIB;

fn percent_over(outcome: &Outcome, bound: &Bound) -> f64 {
    (outcome.last / bound.seconds() - 1.0) * 100.0
}

/// Plays with invariants checked, and asserts what holds in every run.
fn play(scenario: &Scenario) -> Outcome {
    let outcome = run(&Scenario { check_every: 13, ..scenario.clone() });
    assert!(outcome.violations.is_empty(), "{:?} in {scenario:?}", outcome.violations);
    assert!(outcome.is_complete(), "a node that lived never got the blob: {outcome:?}\nin {scenario:?}");
    outcome
}

fn origin_copies(scenario: &Scenario, outcome: &Outcome) -> f64 {
    outcome.origin_bytes as f64 / scenario.layout.size() as f64
}

/// One scenario, and what became of it without its faults and with them.
struct Trouble {
    scenario: Scenario,
    calm: Outcome,
    troubled: Outcome,
}

impl Trouble {
    fn copies(&self) -> f64 {
        origin_copies(&self.scenario, &self.troubled)
    }

    /// How many times longer the last node needed.
    fn ratio(&self) -> f64 {
        self.troubled.last / self.calm.last
    }

    /// How many seconds more the last node needed.
    fn delay(&self) -> f64 {
        self.troubled.last - self.calm.last
    }

    /// When the last of the nodes that `counts` names was done, in seconds.
    fn last_of(&self, counts: impl Fn(usize) -> bool) -> f64 {
        let finished = self.troubled.finished.iter().enumerate().filter(|(n, _)| counts(*n));
        finished.filter_map(|(_, time)| *time).fold(0.0, f64::max)
    }
}

/// Plays `calm` with the faults that `faults` says for the time of its bound and a seed, for some seeds.
fn trouble(
    seeds: std::ops::RangeInclusive<u64>,
    calm: &Scenario,
    faults: impl Fn(Duration, u64) -> Vec<(Duration, Fault)>,
) -> Vec<Trouble> {
    let bound = Duration::from_secs_f64(Bound::of(calm).seconds());
    let one = |seed| {
        let calm = Scenario { seed, ..calm.clone() };
        let scenario = Scenario { faults: faults(bound, seed), ..calm.clone() };
        Trouble { calm: play(&calm), troubled: play(&scenario), scenario }
    };
    seeds.map(one).collect()
}

#[test]
fn cold_the_origin_is_read_exactly_once_and_the_last_node_is_within_the_goal() {
    for (nodes, share, goal) in
        [(4, 1, 4.0), (8, 1, 5.0), (16, 1, 6.0), (64, 1, 7.0), (4, 4, 3.0), (8, 4, 3.0), (16, 4, 4.0), (64, 4, 5.0)]
    {
        let scenario = Scenario::cold(nodes, SIZE, share);
        let outcome = play(&scenario);
        assert_eq!(outcome.origin_bytes, SIZE, "{nodes} nodes");
        let bound = Bound::of(&scenario);
        let over = percent_over(&outcome, &bound);
        assert!(outcome.last <= bound.goal_seconds(), "{nodes} nodes, an origin of {share} links: {over:.2} % over");
        assert!(over <= goal, "{nodes} nodes, an origin of {share} links: {over:.1} % over the bound, goal {goal} %");
        let spread = outcome.quantile(0.99) / outcome.quantile(0.5);
        assert!(spread <= 1.05, "{nodes} nodes: p99 is {spread:.3} of p50");
        let slowest = outcome.quantile(1.0) / outcome.quantile(0.5);
        assert!(slowest <= 1.10, "{nodes} nodes: the last is {slowest:.3} of p50");
    }
}

#[test]
fn warm_one_holder_feeds_newcomers_within_eight_percent_and_the_origin_is_not_asked() {
    for (nodes, holders) in [(1, 1), (3, 1), (15, 1), (64, 1), (15, 2), (4, 8)] {
        let scenario = Scenario::warm(nodes, holders, SIZE);
        let outcome = play(&scenario);
        assert_eq!(outcome.origin_bytes, 0);
        let over = percent_over(&outcome, &Bound::of(&scenario));
        assert!(over <= 8.0, "{nodes} newcomers, {holders} holders: {over:.1} % over the bound");
    }
}

#[test]
fn a_warm_blob_is_not_read_again_because_its_coordinators_died() {
    for seed in 1..=20 {
        let mut scenario = Scenario::warm(8, 3, 64 * MIB);
        scenario.seed = seed;
        scenario.spread = Duration::from_secs(1);
        // The backup knew from the start; who follows it has to be told.
        let next = Duration::from_millis(100);
        scenario.faults = vec![(Duration::ZERO, Fault::KillCoordinator), (next, Fault::KillCoordinator)];
        assert_eq!(play(&scenario).origin_bytes, 0, "seed {seed}");
    }
}

#[test]
fn the_same_seed_is_the_same_run_and_another_is_not() {
    let scenario = Scenario::cold(24, GIB, 2);
    let first = run(&scenario);
    assert_eq!(first, run(&scenario));
    assert_ne!(first, run(&Scenario { seed: 2, ..scenario }));
}

#[test]
fn a_lone_node_is_a_plain_pull_through_mirror() {
    let scenario = Scenario::cold(1, SIZE, 1);
    let outcome = play(&scenario);
    assert_eq!((outcome.origin_bytes, outcome.peer_bytes), (SIZE, 0));
    assert!(percent_over(&outcome, &Bound::of(&scenario)) < 2.0);
}

#[test]
fn small_blobs_are_read_once_too() {
    for size in [1, MIB - 1, MIB, MIB + 1, 3 * MIB + 7, 9 * MIB] {
        let scenario = Scenario::cold(16, size, 1);
        let outcome = play(&scenario);
        assert_eq!(outcome.origin_bytes, size);
    }
}

#[test]
fn an_origin_that_limits_each_connection_is_read_on_many() {
    let mut scenario = Scenario::cold(16, 8 * GIB, 4);
    scenario.origin.connection_rate = scenario.uplink / 15;
    let outcome = play(&scenario);
    assert_eq!(outcome.origin_bytes, 8 * GIB);
    let over = percent_over(&outcome, &Bound::of(&scenario));
    assert!(over <= 5.0, "{over:.1} % over the bound");
}

#[test]
fn slow_links_read_the_origin_once_too() {
    let mut scenario = Scenario::cold(16, 256 * MIB, 1);
    let rate = 12_500_000;
    (scenario.uplink, scenario.downlink) = (rate, rate);
    (scenario.origin.rate, scenario.origin.connection_rate) = (rate, rate);
    let outcome = play(&scenario);
    assert_eq!(outcome.origin_bytes, 256 * MIB);
    let over = percent_over(&outcome, &Bound::of(&scenario));
    assert!(over <= 10.0, "{over:.1} % over the bound");
}

#[test]
fn late_joiners_need_little_more_than_their_own_link_does() {
    let scenario = Scenario { spread: Duration::from_secs(10), ..Scenario::cold(32, SIZE, 1) };
    let outcome = play(&scenario);
    assert_eq!(outcome.origin_bytes, SIZE);
    let own = SIZE as f64 / scenario.downlink as f64;
    let worst = outcome.quantile(1.0) / own;
    // The goal is 1.05. The first few share an origin of one link with those that come after them.
    assert!(worst <= 1.20, "the slowest took {worst:.3} of what its link needs");
}

#[test]
fn bytes_between_zones_go_once_to_each_zone() {
    let scenario = Scenario { zones: 3, ..Scenario::cold(24, SIZE, 4) };
    let outcome = play(&scenario);
    assert_eq!(outcome.origin_bytes, SIZE);
    let crossings = outcome.cross_zone_bytes as f64 / SIZE as f64;
    assert!(crossings <= 2.0 * 1.05, "{crossings:.3} copies went between zones");
    let mut scenario = scenario;
    scenario.limits.scope_is_zone = true;
    let outcome = play(&scenario);
    assert_eq!((outcome.origin_bytes, outcome.cross_zone_bytes), (3 * SIZE, 0), "each zone reads for itself");
}

/// One of nineteen faults, or two; or none.
fn by_lot(kind: u64, node: &dyn Fn(u64) -> u32, lot: &dyn Fn(u64, u64) -> u64) -> Vec<Fault> {
    let period = Duration::from_millis(1 + lot(7, 400));
    match kind {
        0 => vec![Fault::KillImporter],
        1 => vec![Fault::KillCoordinator],
        2 => vec![Fault::KillCoordinator, Fault::KillImporter],
        3 => vec![Fault::Kill(node(7)), Fault::Kill(node(8))],
        4 => vec![Fault::Slow(node(7))],
        5 => vec![Fault::Corrupt(node(7))],
        6 => vec![Fault::Throttle(period)],
        7 => vec![Fault::Forbid(node(7))],
        8 => vec![Fault::Pause(node(7), period * 10)],
        9 => vec![Fault::PauseCoordinator(period * 10)],
        10 => vec![Fault::Partition(period * 4)],
        11 => vec![Fault::Sever(node(7), node(8)), Fault::Unreachable(node(8), node(9))],
        12 => vec![Fault::Lose(20)],
        13 => vec![Fault::Stall(node(7))],
        14 => vec![Fault::Boast(node(7))],
        15 => vec![Fault::DiskFull(node(7)), Fault::KillImporter],
        16 => vec![Fault::Leap(node(7), period * 1000), Fault::Freeze(node(8), period)],
        17 => vec![Fault::Lie(node(7))],
        _ => Vec::new(),
    }
}

/// Scenarios by lot, with one fault by lot each. `DARTER_SIM_SEEDS` plays more.
#[test]
fn whatever_breaks_every_node_that_lives_gets_the_blob() {
    let seeds = std::env::var("DARTER_SIM_SEEDS").map_or(200, |seeds| seeds.parse().expect("a number of seeds"));
    for seed in 1..=seeds {
        let lot = |n: u64, below: u64| Scenario::lot(seed, n) % below;
        let nodes = u32::try_from(2 + lot(0, 30)).expect("few");
        let node = |n: u64| u32::try_from(lot(n, u64::from(nodes))).expect("few");
        let size = MIB * (1 + lot(1, 160)) + lot(2, MIB);
        let mut scenario = match lot(3, 4) {
            0 => Scenario::warm(nodes, 1 + node(4) % 3, size),
            share => Scenario::cold(nodes, size, u32::try_from(share * share).expect("few")),
        };
        let bound = Duration::from_secs_f64(Bound::of(&scenario).seconds());
        let at = bound * u32::try_from(lot(5, 120)).expect("few") / 100;
        let fault = by_lot(lot(6, 19), &node, &lot);
        // A node that may not read the registry, in a zone where nobody else is, never gets it.
        let is_zonal = lot(11, 4) == 0 && !matches!(fault[..], [Fault::Forbid(_)]);
        let is_calm = fault.is_empty() && !is_zonal;
        scenario.faults = fault.into_iter().map(|fault| (at, fault)).collect();
        scenario.seed = seed;
        scenario.zones = 1 + node(9) % 3;
        scenario.limits.scope_is_zone = is_zonal;
        scenario.spread = bound * u32::try_from(lot(10, 3)).expect("few");
        scenario.end = bound * 20 + Duration::from_secs(30);
        let outcome = play(&scenario);
        if is_calm {
            let once = if scenario.holders > 0 { 0 } else { size };
            assert_eq!(outcome.origin_bytes, once, "seed {seed}");
        }
    }
}
