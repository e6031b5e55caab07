//! An origin that throttles or refuses, disks that are full, images that share layers.

use super::*;

#[test]
fn a_throttling_origin_gets_fewer_requests_and_nobody_takes_over() {
    let pause = Duration::from_millis(500);
    for run in trouble(1..=2, &Scenario::cold(16, SIZE, 1), |bound, _| vec![(bound / 4, Fault::Throttle(pause))]) {
        assert_eq!(run.troubled.origin_bytes, SIZE);
        assert!(run.troubled.throttled >= 1, "the fault did nothing");
        let most = u64::from(run.scenario.limits.imports_max);
        assert!(run.troubled.throttled <= most, "{} requests were throttled", run.troubled.throttled);
        assert!(run.delay() <= 2.0, "{:.3} s more", run.delay());
    }
}

#[test]
fn an_origin_of_slow_connections_is_read_once_also_where_a_piece_takes_longer_than_a_lease_may_be_silent() {
    // 1 MiB in 10 s.
    for (size, seed) in [(MIB, 1), (5 * MIB, 2), (16 * MIB, 3)] {
        let mut scenario = Scenario { seed, ..Scenario::cold(4, size, 1) };
        scenario.origin.connection_rate = MIB / 10;
        assert_eq!(play(&scenario).origin_bytes, size, "{size} bytes");
    }
}

#[test]
fn nodes_without_a_credential_import_nothing_and_get_the_blob() {
    let forbid = |_, _| (0..8).map(|n| (Duration::ZERO, Fault::Forbid(n * 2))).collect();
    for run in trouble(1..=2, &Scenario::cold(16, SIZE, 1), forbid) {
        assert_eq!(run.troubled.origin_bytes, SIZE);
        assert!(run.ratio() <= 1.05, "{:.3} of the time without", run.ratio());
    }
}

#[test]
fn nodes_whose_disk_is_full_leave_and_the_others_go_on() {
    let full = |bound: Duration, seed: u64| {
        let node = |n: u32| u32::try_from((seed + u64::from(n) * 5) % 16).expect("few");
        (0..3).map(|n| (bound * (n + 1) / 4, Fault::DiskFull(node(n)))).collect()
    };
    for run in trouble(1..=4, &Scenario::cold(16, GIB, 1), full) {
        assert!(run.copies() <= 1.05, "seed {}: {:.4} copies", run.scenario.seed, run.copies());
        assert!(run.ratio() <= 1.10, "seed {}: {:.3} of the time without", run.scenario.seed, run.ratio());
    }
}

#[test]
fn two_images_with_layers_in_common_are_read_as_often_as_their_unique_bytes() {
    for seed in 1..=4 {
        let sizes = [300 * MIB, 64 * MIB, 200 * MIB, 5 * MIB, 150 * MIB];
        let scenario = Scenario {
            further: sizes[1..].iter().map(|size| darter_core::pieces::Layout::new(*size)).collect(),
            // The first two layers are in both.
            images: vec![vec![0, 1, 2], vec![0, 1, 3, 4]],
            spread: Duration::from_millis(300),
            seed,
            ..Scenario::cold(16, sizes[0], 2)
        };
        let outcome = play(&scenario);
        assert_eq!(outcome.origin_bytes, sizes.iter().sum::<u64>(), "seed {seed}");
        let largest = 564 * MIB;
        let own = largest as f64 / scenario.downlink as f64;
        assert!(
            outcome.quantile(1.0) <= own * 1.3,
            "seed {seed}: {:.3} s, the link needs {own:.3}",
            outcome.quantile(1.0)
        );
    }
}
