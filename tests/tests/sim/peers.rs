//! Peers that are slow, silent, of another version, or that lie.

use super::*;

fn cold() -> Scenario {
    Scenario::cold(16, GIB, 1)
}

/// One of the sixteen.
fn some(n: u64) -> u32 {
    u32::try_from(n % 16).expect("few")
}

#[test]
fn slow_nodes_cost_what_their_uplinks_lack() {
    // With few nodes all are asked to read at the same time, and a slow one is never the last in turn.
    for (nodes, slow) in [(4, 1), (8, 1), (32, 3)] {
        let faults = |_, _| (0..slow).map(|n| (Duration::ZERO, Fault::Slow(n * 10))).collect();
        for run in trouble(1..=2, &Scenario::cold(nodes, SIZE, 1), faults) {
            assert_eq!(run.troubled.origin_bytes, SIZE, "{nodes} nodes");
            // Whole uplinks, and tenths, carry all copies but the one that the origin sends.
            let uplinks = f64::from(nodes - slow) + f64::from(slow) / 10.0;
            let fluid = SIZE as f64 * f64::from(nodes - 1) / (uplinks * run.scenario.uplink as f64);
            let ratio = run.troubled.last / fluid.max(Bound::of(&run.scenario).seconds());
            assert!(ratio <= 1.15, "{nodes} nodes: {ratio:.3} of the bound with slow nodes");
        }
    }
}

#[test]
fn a_peer_that_accepts_requests_and_sends_nothing_costs_less_than_a_second() {
    for at in [0, 2, 9] {
        for run in trouble(1..=4, &cold(), |bound, seed| vec![(bound * at / 10, Fault::Stall(some(seed * 5)))]) {
            // The goal is half a second; what it alone has read is missed by all, and read again.
            assert!(run.delay() <= 0.8, "seed {}: {:.3} s more", run.scenario.seed, run.delay());
            assert!(
                run.troubled.origin_bytes <= GIB + 4 * 8 * MIB,
                "seed {}: {:.4} copies",
                run.scenario.seed,
                run.copies()
            );
        }
    }
}

#[test]
fn wrong_bytes_cost_each_victim_one_piece_and_the_liar_its_place() {
    for at in [0, 5] {
        for run in trouble(1..=4, &Scenario::cold(16, SIZE, 1), |bound, _| vec![(bound * at / 10, Fault::Corrupt(5))]) {
            let bans = run.troubled.bans;
            assert!((2..=15).contains(&bans), "{bans} bans");
            let wasted = run.troubled.wasted.values().max();
            assert_eq!(wasted, Some(&1), "{:?}", run.troubled.wasted);
            assert!(run.copies() <= 1.02, "{:.4} copies read from the origin", run.copies());
            assert!(run.ratio() <= 1.05, "{:.3} of the time without", run.ratio());
        }
    }
}

#[test]
fn who_vouches_for_what_the_origin_does_not_have_costs_one_pull_more_and_is_found_by_all() {
    for run in trouble(1..=8, &Scenario::cold(16, SIZE, 1), |_, seed| vec![(Duration::ZERO, Fault::Lie(some(seed)))]) {
        let seed = run.scenario.seed;
        assert!(run.troubled.restarts >= 1, "seed {seed}: it read nothing, this tests nothing");
        // Each finds it out once, and it has no part in what follows.
        assert!(run.troubled.restarts <= 15 && run.troubled.bans == run.troubled.restarts, "seed {seed}");
        // The second copy, and for each node up to a piece of each of fifteen that read: 225 of 512.
        assert!(run.copies() <= 2.45, "seed {seed}: {:.3} copies", run.copies());
        // Twice, and the pieces that are looked at. A third pull would be another.
        assert!(run.ratio() <= 2.4, "seed {seed}: {:.3} of the time without", run.ratio());
    }
}

#[test]
fn a_peer_that_claims_what_it_has_not_costs_little() {
    for run in trouble(1..=4, &cold(), |_, seed| vec![(Duration::ZERO, Fault::Boast(some(seed * 5)))]) {
        assert_eq!(run.troubled.origin_bytes, GIB);
        assert!(run.ratio() <= 1.05, "seed {}: {:.3} of the time without", run.scenario.seed, run.ratio());
    }
}

#[test]
fn nodes_of_a_version_that_keeps_no_slots_share_the_swarm() {
    let old = |_, seed: u64| {
        (0..16).filter(|n| (seed + n).is_multiple_of(3)).map(|n| (Duration::ZERO, Fault::Old(some(n)))).collect()
    };
    for run in trouble(1..=4, &cold(), old) {
        assert_eq!(run.troubled.origin_bytes, GIB);
        assert!(run.ratio() <= 2.0, "seed {}: {:.3} of the time without", run.scenario.seed, run.ratio());
    }
}
