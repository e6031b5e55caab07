//! What must hold of every decision.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::any::{IMAGES, NOW, policy, state};
use crate::apply::apply;
use crate::decide::{Action, Class, Decision, Trust, classify, decide, trust};
use crate::state::{Node, State};
use crate::{Millis, Policy};

/// Something that is heard later than it was, or not at all.
#[derive(Debug, Clone)]
enum Loss {
    Report(usize),
    Age(usize, u64),
    Demand(usize),
    AgeDemand(usize, u64),
    Forget(usize),
    Increments(usize),
    Watch(u64),
}

fn loss() -> impl Strategy<Value = Loss> {
    prop_oneof![
        (0..7_usize).prop_map(Loss::Report),
        (0..7_usize, 0..200_000_u64).prop_map(|(n, ms)| Loss::Age(n, ms)),
        (0..4_usize).prop_map(Loss::Demand),
        (0..4_usize, 91_000..200_000_u64).prop_map(|(n, ms)| Loss::AgeDemand(n, ms)),
        (0..4_usize).prop_map(Loss::Forget),
        (0..2_usize).prop_map(Loss::Increments),
        (0..200_000_u64).prop_map(Loss::Watch),
    ]
}

fn lose(state: &State, loss: &Loss) -> State {
    let mut state = state.clone();
    match loss {
        Loss::Report(n) => state.nodes.values_mut().skip(*n).take(1).for_each(|node| node.report = None),
        Loss::Age(n, ms) => {
            let reports = state.nodes.values_mut().skip(*n).take(1).filter_map(|node| node.report.as_mut());
            reports.for_each(|report| report.heard.0 -= ms);
        }
        Loss::Demand(n) => state.workloads.values_mut().skip(*n).take(1).for_each(|one| one.samples.clear()),
        Loss::AgeDemand(n, ms) => {
            let samples = state.workloads.values_mut().skip(*n).take(1).flat_map(|one| &mut one.samples);
            samples.for_each(|sample| sample.at.0 -= ms);
        }
        // All that was learnt is lost together, and what is known begins now.
        Loss::Forget(n) => state.workloads.values_mut().skip(*n).take(1).for_each(|one| {
            (one.known, one.needed, one.gaps) = (NOW, Vec::new(), Vec::new());
        }),
        Loss::Increments(n) => state.pools.values_mut().skip(*n).take(1).for_each(|pool| pool.increments.clear()),
        Loss::Watch(ms) => state.watched.0 -= ms,
    }
    state
}

fn removed(decision: &Decision) -> BTreeSet<&str> {
    let removed = decision.actions.iter().filter_map(|action| match action {
        Action::Remove { node } => Some(node.as_str()),
        _ => None,
    });
    removed.collect()
}

/// What each workload is answered, and each pool keeps, once this is done.
fn levels(state: &State, decision: &Decision) -> BTreeMap<String, (u32, u32)> {
    let mut after = state.clone();
    apply(&mut after, decision, NOW);
    let workloads = state.workloads.iter().map(|(name, one)| (name, one.answered, after.workloads[name].answered));
    let pools = state.pools.iter().map(|(name, one)| (name, one.buffer, after.pools[name].buffer));
    workloads.chain(pools).map(|(name, before, after)| (name.clone(), (before, after))).collect()
}

fn until(node: &Node) -> Millis {
    node.lease.map_or(Millis(0), |lease| lease.until)
}

fn judged(node: &Node, policy: &Policy) -> (Trust, Class) {
    let trust = trust::of(node, policy, NOW);
    (trust, classify::of(node, trust, policy, NOW))
}

/// Many: edges are rare. PROPTEST_CASES asks for more.
fn config() -> ProptestConfig {
    let usual = ProptestConfig::default();
    ProptestConfig { cases: usual.cases.max(2000), failure_persistence: None, ..usual }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn missing_knowledge_only_keeps_things_as_they_are(state in state(), policy in policy(), loss in loss()) {
        let less = lose(&state, &loss);
        let (full, poor) = (decide(&state, &policy, NOW), decide(&less, &policy, NOW));
        prop_assert!(removed(&poor).is_subset(&removed(&full)), "removes more: {:?}", poor.actions);
        let (full, poor_levels) = (levels(&state, &full), levels(&less, &poor));
        for (name, (before, after)) in &poor_levels {
            prop_assert!(after >= before || *after >= full[name].1, "{name}: {before}, {after}, {:?}", full[name]);
        }
        let mut after = less.clone();
        apply(&mut after, &poor, NOW);
        for (uid, node) in &less.nodes {
            prop_assert!(until(&after.nodes[uid]) >= until(node), "the lease of {uid} got shorter");
        }
    }

    #[test]
    fn what_is_decided_is_decided_again(state in state(), policy in policy()) {
        prop_assert_eq!(decide(&state, &policy, NOW), decide(&state.clone(), &policy, NOW));
    }

    #[test]
    fn once_it_is_done_nothing_is_left_to_do(state in state(), policy in policy()) {
        let mut state = state;
        let first = decide(&state, &policy, NOW);
        apply(&mut state, &first, NOW);
        let again = decide(&state, &policy, NOW);
        prop_assert_eq!(again.actions, []);
        prop_assert!(again.next_wake.is_none_or(|wake| wake > NOW), "{:?}", again.next_wake);
    }

    #[test]
    fn the_order_in_which_things_were_heard_does_not_matter(state in state(), policy in policy(), turn in 0..IMAGES) {
        // Images get their numbers, and lists their order, as they come.
        let mut other = state.clone();
        let renamed = |image: u32| (image + turn) % IMAGES;
        other.images.rotate_right(turn as usize);
        for node in other.nodes.values_mut() {
            node.pods.reverse();
            node.asked.iter_mut().for_each(|image| *image = renamed(*image));
            if let Some(report) = &mut node.report {
                report.held.iter_mut().for_each(|held| held.image = renamed(held.image));
                report.pulls.iter_mut().for_each(|pull| pull.image = renamed(pull.image));
                report.held.reverse();
                report.gpus.reverse();
                report.jobs.reverse();
            }
        }
        other.removals.reverse();
        let (one, mut two) = (decide(&state, &policy, NOW), decide(&other, &policy, NOW));
        for action in &mut two.actions {
            if let Action::Copy { image, .. } = action {
                *image = (*image + IMAGES - turn) % IMAGES;
            }
        }
        let sorted = |decision: &Decision| {
            let mut actions: Vec<_> = decision.actions.iter().map(|action| format!("{action:?}")).collect();
            let mut reasons: Vec<_> = decision.reasons.iter().map(|reason| format!("{reason:?}")).collect();
            actions.sort();
            reasons.sort();
            (actions, reasons, decision.next_wake)
        };
        prop_assert_eq!(sorted(&one), sorted(&two));
    }

    #[test]
    fn no_rail_is_passed(state in state(), policy in policy()) {
        let decision = decide(&state, &policy, NOW);
        let mut after = state.clone();
        apply(&mut after, &decision, NOW);
        let rails = &policy.rails;
        let gpus = |state: &State| -> u32 { state.workloads.values().map(|one| one.answered * one.gpus).sum() };
        prop_assert!(gpus(&after) <= gpus(&state).max(rails.gpus_most));
        for (name, workload) in &state.workloads {
            let answered = after.workloads[name].answered;
            prop_assert!(answered <= workload.answered.max(workload.most));
            prop_assert!(answered >= workload.least.min(workload.answered));
        }
        for (name, pool) in &state.pools {
            let asked = |state: &State| -> u32 {
                state.workloads.values().filter(|one| one.pool == *name).map(|one| one.answered * one.gpus).sum()
            };
            prop_assert!(asked(&after) <= asked(&state).max(pool.nodes_most * pool.gpus));
            let of_pool: Vec<_> = state.nodes.iter().filter(|(_, node)| node.pool == *name).collect();
            let unknown = of_pool.iter().filter(|(_, node)| judged(node, &policy).0 == Trust::Unknown).count();
            let gone: Vec<_> = removed(&decision).into_iter().filter(|uid| state.nodes[*uid].pool == *name).collect();
            let late = |removal: &&crate::state::Removal| NOW.since(removal.at) < rails.removals_window_ms;
            let before = state.removals.iter().filter(|removal| removal.pool == *name).filter(late);
            if !gone.is_empty() {
                prop_assert!(unknown as u64 * 100 <= of_pool.len() as u64 * rails.unknown_percent);
                prop_assert!(state.freeze.is_none() && NOW.since(state.watched) <= rails.partition_ms);
                prop_assert!(pool.grew.is_none_or(|grew| NOW.since(grew) >= rails.settle_ms));
                let alive = of_pool.iter().filter(|(_, node)| !node.deleting).count();
                prop_assert!(alive - gone.len() >= pool.nodes_least as usize);
                let victims = (alive as u64 * rails.victims_percent / 100).max(1);
                prop_assert!((before.clone().count() + gone.len()) as u64 <= victims);
            }
            for zone in ["a", "b"] {
                let gone = gone.iter().filter(|uid| state.nodes[**uid].zone == zone).count();
                let before = before.clone().filter(|removal| removal.zone == zone).count();
                prop_assert!(gone == 0 || before + gone <= rails.removals_most as usize);
            }
        }
        if state.freeze.is_some() {
            prop_assert_eq!(levels(&state, &decision).values().filter(|(before, after)| before != after).count(), 0);
        }
        for action in &decision.actions {
            if let Action::Protect { node, until } = action {
                let since = after.nodes[node].lease.unwrap().since;
                prop_assert!(until.since(NOW) <= policy.protect.lease_ms);
                prop_assert!(until.since(since) <= policy.protect.most_ms);
            }
        }
    }

    #[test]
    fn nothing_that_works_or_is_leased_or_unknown_is_removed(state in state(), policy in policy()) {
        let decision = decide(&state, &policy, NOW);
        for uid in removed(&decision) {
            let node = &state.nodes[uid];
            prop_assert_eq!(judged(node, &policy).0, Trust::Fresh);
            prop_assert!(until(node) <= NOW);
            let report = node.report.as_ref().unwrap();
            prop_assert!(report.jobs.iter().all(|job| job.until <= NOW));
        }
    }

    #[test]
    fn a_hot_image_keeps_its_copies_on_fresh_nodes_that_stay(state in state(), policy in policy()) {
        let mut after = state.clone();
        apply(&mut after, &decide(&state, &policy, NOW), NOW);
        let hot_at = |image: u32| {
            let used = state.nodes.values().filter_map(|node| node.report.as_ref()).flat_map(|report| &report.held);
            used.filter(|held| held.image == image).map(|held| held.used).max()
        };
        for image in (0..IMAGES).filter(|image| {
            hot_at(*image).is_some_and(|at| NOW.since(at) < policy.protect.hot_ms)
        }) {
            let has = |node: &Node| node.report.as_ref().is_some_and(|report| report.held.iter().any(|held| held.image == image));
            let good = |node: &Node| {
                let (trust, class) = judged(node, &policy);
                trust == Trust::Fresh && has(node) && !matches!(
                    class,
                    Class::Draining | Class::Launching | Class::Doomed { .. } | Class::Sick { .. }
                )
            };
            let holders: Vec<_> = state.nodes.iter().filter(|(_, node)| good(node)).map(|(uid, _)| uid).collect();
            // Protected, or as long as that may be.
            let spent = |uid: &str| {
                let lease = state.nodes[uid].lease.filter(|lease| lease.until > NOW);
                lease.is_some_and(|lease| NOW.since(lease.since) >= policy.protect.most_ms)
            };
            let stay = holders.iter().filter(|uid| until(&after.nodes[**uid]) > NOW || spent(uid)).count();
            prop_assert!(stay >= holders.len().min(policy.protect.copies.into()), "image {image}: {stay} of {holders:?}");
        }
    }
}
