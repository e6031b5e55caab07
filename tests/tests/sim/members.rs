//! Nodes that die, stand still, are cut off or come all at once; clocks that are wrong.

use super::*;

/// 512 pieces, of 2 MiB.
fn cold() -> Scenario {
    Scenario::cold(16, GIB, 1)
}

fn node(n: u64, below: u64) -> u32 {
    u32::try_from(n % below).expect("few")
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_dead_importer_or_coordinator_costs_a_moment_and_few_bytes() {
    for fault in [Fault::KillImporter, Fault::KillCoordinator] {
        for run in trouble(1..=2, &Scenario::cold(32, SIZE, 1), |bound, _| vec![(bound / 2, fault)]) {
            assert!(run.copies() <= 1.02, "{fault:?}: {:.4} copies read from the origin", run.copies());
            assert!(run.delay() <= 0.6, "{fault:?}: {:.3} s more", run.delay());
        }
    }
}

#[test]
fn nodes_that_die_while_they_pull_are_replaced() {
    // For 10 % the goal is 1.05 of the time: what dies with a node unshared is missed only at the end.
    for (percent, slower, copies) in [(10, 1.08, 1.02), (30, 1.10, 1.05)] {
        let faults = |bound: Duration, _| {
            let dying = 32 * percent / 100;
            (0..dying).map(|n| (bound * (n + 1) / (dying + 1), Fault::Kill(n * 3))).collect()
        };
        for run in trouble(1..=1, &Scenario::cold(32, SIZE, 1), faults) {
            assert!(run.copies() <= copies, "{percent} % die: {:.4} copies read from the origin", run.copies());
            assert!(run.ratio() <= slower, "{percent} % die: {:.3} of the time without", run.ratio());
        }
    }
}

#[test]
fn a_node_that_stands_still_delays_itself_and_what_it_had_begun_to_read() {
    let pause = 4 * SECOND;
    let paused = |seed| node(seed * 5, 16);
    for run in trouble(1..=5, &cold(), |bound, seed| vec![(bound / 2, Fault::Pause(paused(seed), pause))]) {
        let seed = run.scenario.seed;
        let others = run.last_of(|n| n != paused(seed) as usize);
        let lease = run.scenario.limits.lease_patience.as_secs_f64();
        assert!(others <= run.calm.last + lease + 0.5, "seed {seed}: others took {others:.3} s");
        assert!(run.troubled.last <= run.calm.last + pause.as_secs_f64(), "seed {seed}: {:.3} s", run.troubled.last);
        let twice = u64::from(run.scenario.limits.leases_per_owner) * 8 * MIB;
        assert!(run.troubled.origin_bytes <= GIB + twice, "seed {seed}: {} copies", run.copies());
    }
}

#[test]
fn a_coordinator_that_stands_still_is_passed_over() {
    for run in trouble(1..=5, &cold(), |bound, _| vec![(bound / 2, Fault::PauseCoordinator(10 * SECOND))]) {
        let mut done: Vec<f64> = run.troubled.finished.iter().flatten().copied().collect();
        done.sort_by(f64::total_cmp);
        let others = done[done.len() - 2];
        assert!(others <= run.calm.last + 1.0, "seed {}: {others:.3} s", run.scenario.seed);
        assert!(run.copies() <= 1.02, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
    }
}

#[test]
fn both_halves_of_a_cut_swarm_finish_and_read_the_origin_at_most_twice() {
    // Soon after the start, in the middle, and for longer than it takes.
    for (at, period) in [(4, SECOND / 4), (4, SECOND), (2, 20 * SECOND), (100, SECOND / 2)] {
        for run in trouble(1..=3, &cold(), |bound, _| vec![(bound / at, Fault::Partition(period))]) {
            let seed = run.scenario.seed;
            assert!(run.copies() <= 2.0, "seed {seed}: {:.4} copies", run.copies());
            assert!(run.troubled.events <= 2 * run.calm.events, "seed {seed}: they never come to rest");
            assert!(run.troubled.last <= 2.0 * run.calm.last + 1.0, "seed {seed}: {:.3} s", run.troubled.last);
        }
    }
}

#[test]
fn pairs_that_do_not_reach_each_other_find_others() {
    let pairs = |seed: u64, percent: u64| {
        let all = (0..16_u32).flat_map(|a| (0..16_u32).map(move |b| (a, b)));
        all.filter(move |(a, b)| a != b && Scenario::lot(seed, u64::from(a * 16 + b)) % 100 < percent)
    };
    let asymmetric = |_, seed| pairs(seed, 20).map(|(a, b)| (Duration::ZERO, Fault::Unreachable(a, b))).collect();
    let severed = |_, seed| pairs(seed, 10).map(|(a, b)| (Duration::ZERO, Fault::Sever(a, b))).collect();
    for run in trouble(1..=5, &cold(), asymmetric) {
        assert!(run.ratio() <= 1.05, "seed {}: {:.3} s", run.scenario.seed, run.troubled.last);
        assert!(run.copies() <= 1.02, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
    }
    for run in trouble(1..=5, &cold(), severed) {
        assert!(run.ratio() <= 2.0, "seed {}: {:.3} s", run.scenario.seed, run.troubled.last);
        // Not all need to reach one coordinator.
        assert!(run.copies() <= 2.0, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
    }
}

#[test]
fn a_ring_of_nodes_that_know_two_others_each_finishes() {
    let ring = |_, _| {
        let pairs = (0..8_u32).flat_map(|a| (0..a).map(move |b| (a, b)));
        let far = pairs.filter(|(a, b)| a - b != 1 && a - b != 7);
        far.map(|(a, b)| (Duration::ZERO, Fault::Sever(a, b))).collect()
    };
    for run in trouble(1..=5, &Scenario::cold(8, GIB, 1), ring) {
        assert!(run.copies() <= 5.0, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
    }
}

#[test]
fn lost_messages_delay_a_swarm_and_do_not_stop_it() {
    for run in trouble(1..=8, &cold(), |_, _| vec![(Duration::ZERO, Fault::Lose(50))]) {
        assert!(run.delay() <= 2.5, "seed {}: {:.3} s", run.scenario.seed, run.troubled.last);
        assert!(run.copies() <= 1.5, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
    }
}

#[test]
fn what_another_zone_has_is_asked_for_again_where_a_word_of_it_was_lost() {
    let zones = Scenario { zones: 2, ..Scenario::cold(2, 96 * MIB, 1) };
    for run in trouble(1..=40, &zones, |_, _| vec![(Duration::ZERO, Fault::Lose(100))]) {
        assert!(run.copies() <= 1.05, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
        assert!(run.delay() <= 0.7, "seed {}: {:.3} s more", run.scenario.seed, run.delay());
    }
}

#[test]
fn nodes_that_boot_at_once_and_know_nobody_read_the_origin_once() {
    for (nodes, size, blocks) in [(100, GIB, 4), (1000, 128 * MIB, 2)] {
        let boot = Scenario { spread: SECOND, introductions: SECOND, blocks, ..Scenario::cold(nodes, size, 1) };
        let outcome = play(&boot);
        assert_eq!(outcome.origin_bytes, size, "{nodes} nodes");
        // A second in which they start, and a moment in which none is new.
        let goal = 1.3 + Bound::of(&boot).goal_seconds();
        assert!(outcome.last <= goal, "{nodes} nodes: {:.3} s, goal {goal:.3}", outcome.last);
    }
}

#[test]
fn a_clock_that_leaps_or_stands_still_costs_a_moment() {
    for fault in [0, 1, 2] {
        let faults = |bound: Duration, seed: u64| {
            (0..16)
                .filter(|n| (seed + n).is_multiple_of(2))
                .map(|n| node(n, 16))
                .map(|n| match fault {
                    0 => (bound / 2, Fault::Leap(n, Duration::from_secs(300))),
                    1 => (bound / 3, Fault::Freeze(n, SECOND / 2)),
                    _ => (bound / 3, Fault::Freeze(n, 10 * SECOND)),
                })
                .collect()
        };
        for run in trouble(1..=4, &cold(), faults) {
            assert!(run.delay() <= 0.1, "seed {}: {:.3} s", run.scenario.seed, run.troubled.last);
            assert!(run.copies() <= 1.05, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
        }
    }
}
