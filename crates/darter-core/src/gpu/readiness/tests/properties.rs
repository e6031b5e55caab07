//! What holds for every observation, and for every row of them.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// What a field can be, by level: 0 not known, 1 well, above that worse and worse.
const LEVELS: [u8; 24] = [3, 3, 3, 4, 4, 4, 3, 3, 3, 3, 3, 4, 3, 4, 3, 3, 4, 3, 3, 3, 3, 4, 3, 3];

fn level<T: Clone>(level: u8, values: &[T]) -> Option<T> {
    usize::from(level).checked_sub(1).map(|at| values[at].clone())
}

/// An observation from a level a field.
fn built(levels: &[u8]) -> Observation {
    let wrong = |at: usize| level(levels[at], &[false, true]);
    let right = |at: usize| level(levels[at], &[true, false]);
    let mut o = healthy();
    (o.driver_version_file, o.control_node) = (right(0), right(1));
    o.pci_functions = level(levels[2], &[2, 1]);
    o.device_nodes = level(levels[3], &[2, 1, 0]);
    o.nvml = level(levels[4], &[Nvml::Ok, Nvml::Unresponsive, Nvml::InitFailed(1)]);
    o.nvml_count = level(levels[5], &[2, 1, 0]);
    (o.gfd_labels, o.sees_processes) = (right(6), right(7));
    // One that does not take the driver: what does excuses other faults.
    o.driver_upgrade = level(levels[8], &[Upgrade::None, Upgrade::DrainRequired]);
    o.allocatable = level(levels[9], &[2, 0]);
    o.instance_gpus = level(levels[10], &[2, 3]);
    o.plugin_devices = level(levels[11], &[3, 1, 0]);
    o.plugin_expected = level(levels[12], &[2, 3]);
    o.xids =
        level(levels[13], &[Some(Vec::new()), against(94, xid::Verdict::Degraded), against(79, xid::Verdict::Fatal)])
            .flatten();
    let gpu = &mut o.gpus.as_mut().expect("it has two")[0];
    (gpu.is_lost, gpu.row_remap_failed) = (wrong(14), wrong(15));
    gpu.recovery_action = level(levels[16], &[0, 3, 1]);
    (gpu.row_remap_pending, gpu.retired_pages_pending) = (wrong(17), wrong(18));
    gpu.sram_threshold_exceeded = wrong(19);
    gpu.thermal_margin_celsius = level(levels[20], &[10, 0]);
    gpu.fabric = level(levels[21], &[(3, 0), (2, 0), (3, 1)]).map(|(state, status)| Fabric { state, status });
    (gpu.thermal_slowdown_persists, gpu.power_brake_persists) = (wrong(22), wrong(23));
    o
}

fn levels() -> impl Strategy<Value = Vec<u8>> {
    // Mostly well, so that single faults show.
    LEVELS.map(|count| prop_oneof![3 => Just(1), 2 => 0..count]).to_vec()
}

fn rank(observation: &Observation) -> State {
    evaluate(observation, &Policy::default()).state
}

proptest! {
    #[test]
    fn what_is_not_known_makes_nothing_worse_than_unknown(full in levels(), gone in vec(any::<bool>(), 24)) {
        let less: Vec<_> = full.iter().zip(&gone).map(|(level, gone)| if *gone { 0 } else { *level }).collect();
        let (full, less) = (rank(&built(&full)), rank(&built(&less)));
        prop_assert!(less <= full.max(State::Unknown), "{:?} became {:?}", full, less);
    }

    #[test]
    fn a_worse_observation_is_never_judged_better(some in levels(), at in 0usize..24, by in 1u8..3) {
        let mut worse = some.clone();
        if worse[at] > 0 {
            worse[at] = (worse[at] + by).min(LEVELS[at] - 1);
        }
        let verdict = evaluate(&built(&worse), &Policy::default());
        let (some, worse) = (rank(&built(&some)), verdict.state);
        // Who does not see the GPUs any more knows no more than that.
        let is_blind = |finding: &Finding| matches!(finding.reason, Reason::GpusNotVisible | Reason::LibraryNotFound);
        let least = if verdict.reasons.iter().any(is_blind) { some.min(State::Unknown) } else { some };
        prop_assert!(worse >= least, "{:?} became {:?}", some, worse);
    }

    #[test]
    fn reasons_come_in_order_and_each_once(polls in vec(levels(), 1..8)) {
        let mut readiness = Readiness::new(Policy::default(), None);
        for (n, levels) in polls.iter().enumerate() {
            let now = Time::ZERO + Duration::from_secs(5 * n as u64);
            for verdict in [evaluate(&built(levels), &Policy::default()), readiness.poll(now, built(levels))] {
                prop_assert!(verdict.reasons.windows(2).all(|pair| pair[0].reason < pair[1].reason), "{:?}", verdict);
                let worst = verdict.reasons.iter().map(|finding| finding.state).max();
                prop_assert_eq!(verdict.state, worst.unwrap_or(State::Ready));
            }
        }
    }

    #[test]
    fn silence_keeps_everything_as_it_is(polls in vec(levels(), 1..8), silence in 1usize..6) {
        let mut node = Node::new();
        let said: Vec<_> = polls.iter().map(|levels| node.poll(built(levels))).collect();
        for _ in 0..silence {
            prop_assert_eq!(Some(&node.poll(Observation::default())), said.last());
        }
    }

    #[test]
    fn a_healthy_node_that_is_half_seen_never_goes_bad(polls in vec(vec(any::<bool>(), 24), 1..12)) {
        let mut node = Node::new();
        let mut was_ready = false;
        for seen in polls {
            let levels: Vec<_> = seen.iter().map(|seen| u8::from(*seen)).collect();
            let state = node.poll(built(&levels));
            prop_assert!(state.starts_with(if was_ready { "Ready" } else { "" }), "{}", state);
            prop_assert!(!state.starts_with("NotReady"), "{}", state);
            was_ready = state == "Ready";
        }
    }
}
