//! The models by hand, and what must hold of the scaler on demand that is made up.

use super::cluster::{self, Control, Timers};
use super::replay::{best_fixed, decided, fixed};
use crate::Policy;
use crate::traces::{Request, Shape, Trace, generate};

const LEAD: u64 = 84_000;

fn trace(requests: &[(u64, u64)]) -> Trace {
    let requests =
        requests.iter().map(|(at, service)| Request { at_ms: at * 1000, workload: 0, service_ms: service * 1000 });
    Trace { workloads: vec!["models/flux".to_owned()], requests: requests.collect() }
}

#[test]
fn one_replica_serves_in_turn_and_idle_time_and_cold_starts_are_counted() {
    // Cold: done at 94 s, the second in the queue until 104 s; a gap of 96 s; then one of 490 s.
    let trace = trace(&[(0, 10), (50, 10), (200, 10), (700, 10)]);
    let cost = |keep_ms| {
        let cost = fixed(&trace, LEAD, keep_ms);
        (cost.requests, cost.colds, cost.idle_ms)
    };
    assert_eq!(cost(300_000), (4, 2, 96_000 + 300_000 + 300_000));
    assert_eq!(cost(0), (4, 3, 0));
    // A gap that is just covered is covered. A cold start shifts what comes after.
    assert_eq!(cost(96_000), (4, 2, 96_000 * 3));
    assert_eq!(cost(600_000), (4, 1, 96_000 + 490_000 + 600_000));
    let (keep_ms, best) = best_fixed(&trace, LEAD, 84_000);
    assert_eq!((keep_ms, best.colds), (0, 3));
}

#[test]
fn the_scaler_learns_for_how_long_to_keep_a_replica() {
    // Work every 400 s: an idle time of 300 s never pays, one of 390 s always does where a start costs more.
    let every = trace(&(0..200).map(|n| (n * 400, 10)).collect::<Vec<_>>());
    let policy = Policy::default();
    let cheap = decided(&every, LEAD, 84_000, &policy);
    assert!(cheap.idle_ms < fixed(&every, LEAD, 300_000).idle_ms / 20, "{cheap:?}");
    let dear = decided(&every, LEAD, 900_000, &policy);
    assert!(dear.colds < 20, "{dear:?}");
}

#[test]
fn on_made_up_demand_it_is_never_much_worse_than_300_seconds_and_mostly_much_better() {
    let policy = Policy::default();
    let (mut pairs, mut better) = (0, 0);
    for (name, shape) in Shape::ALL {
        for seed in 1..4 {
            let trace = generate(shape, 20, 3, seed);
            let usual = fixed(&trace, LEAD, 300_000);
            for cold_ms in [84_000, 300_000, 900_000] {
                let ours = decided(&trace, LEAD, cold_ms, &policy).total_ms(cold_ms);
                let usual = usual.total_ms(cold_ms);
                assert!(ours * 100 <= usual * 102, "{name}, seed {seed}, P {cold_ms}: {ours} over {usual}");
                pairs += 1;
                better += u32::from(ours * 10 <= usual * 9);
            }
        }
    }
    assert!(better * 4 >= pairs * 3, "{better} of {pairs}");
}

#[test]
fn a_batch_a_launch_and_a_pull_pass_before_the_first_answer_and_a_push_saves_the_poll() {
    let (once, timers) = (trace(&[(1, 10)]), Timers::default());
    // KEDA looks again at 30 s.
    assert_eq!(cluster::run(&once, &timers, &Control::Reference).waits_ms, [29_000 + 1000 + 37_000 + 47_000]);
    let darter = cluster::run(&once, &timers, &Control::Darter(Box::default(), 84_000));
    assert_eq!(darter.waits_ms, [100 + 1000 + 37_000 + 47_000]);
}

#[test]
fn an_empty_node_stays_for_karpenters_time_and_is_looked_at_twice() {
    let (once, timers) = (trace(&[(1, 10)]), Timers::default());
    let outcome = cluster::run(&once, &timers, &Control::Reference);
    // Asked for at 31 s, serves at 115 s and works until 125 s, seen by the poll of 120 s; 300 s after that
    // none is wanted, so 420 s; 180 s later it counts as empty, and the next loop is at 600 s; gone at 615 s.
    assert_eq!(outcome.waits_ms, [114_000]);
    assert_eq!(outcome.node_ms, 615_000 - 31_000);
}

#[test]
fn whatever_the_demand_no_last_copy_is_lost_and_no_lease_broken() {
    let mut lost = 0;
    for (name, shape) in Shape::ALL {
        let trace = generate(shape, 12, 1, 5);
        let timers = Timers { consolidate_after_ms: 60_000, ..Timers::default() };
        lost += cluster::run(&trace, &timers, &Control::Reference).last_copies_lost;
        let ours = cluster::run(&trace, &timers, &Control::Darter(Box::default(), 300_000));
        assert_eq!((ours.last_copies_lost, ours.leases_broken), (0, 0), "{name}");
        // One whose replica was ended is served again.
        assert_eq!(usize::try_from(ours.requests - ours.killed).unwrap(), trace.requests.len(), "{name}");
    }
    // The same demand without the scaler: what it is for.
    assert!(lost > 0);
}

#[test]
fn the_same_trace_is_played_the_same_way() {
    let trace = generate(Shape::OnOff, 5, 1, 9);
    assert_eq!(trace, generate(Shape::OnOff, 5, 1, 9));
    let play = || cluster::run(&trace, &Timers::default(), &Control::Darter(Box::default(), 300_000));
    assert_eq!(play(), play());
}
