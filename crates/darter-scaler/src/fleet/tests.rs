//! Who says what, and what of it is believed.

use darter_api::report::{
    Allocation, CarriedOut, Evidence, Going, GoingReason, Gpu, GpuReadiness, GpuState, Gpus, Idleness, Image, Node,
    Owner, Protection, Pull, Report as Told,
};

use super::*;
use crate::decide;
use crate::state::{Lease, Work};

const NOW: Millis = Millis(1_700_000_000_000);
const NAME: &str = "models/llm";

fn settings() -> Settings {
    let pool =
        PoolConfig { micros_per_hour: Some(1_000_000), gpus: Some(1), nodes_most: Some(50), ..PoolConfig::default() };
    let workload = WorkloadConfig { most: Some(10), lead_ms: Some(60_000), ..WorkloadConfig::default() };
    Settings {
        pools: [("l4".to_owned(), pool)].into(),
        workloads: [(NAME.to_owned(), workload)].into(),
        ..Settings::default()
    }
}

fn fleet() -> Fleet {
    Fleet::new(settings(), NOW)
}

fn kubernetes() -> Fleet {
    Fleet::new(Settings { kubernetes: true, ..settings() }, NOW)
}

fn digest(n: u8) -> String {
    darter_core::Digest::from_bytes([n; 32]).to_string()
}

/// A node with one idle GPU and one image.
fn told(name: &str, sequence: u64) -> Told {
    let idleness = Idleness { state: GpuState::LoadedIdle.into(), idle_ms: Some(90_000), ..Idleness::default() };
    let gpu = Gpu { uuid: "GPU-1".to_owned(), idleness: Some(idleness), ..Gpu::default() };
    let image = Image {
        digest: digest(1),
        references: vec!["r.example/a:v1".to_owned()],
        size_bytes: 100,
        held_bytes: 100,
        is_complete: true,
        used_ms: Some(5000),
        ..Image::default()
    };
    Told {
        node: Some(Node { name: name.to_owned(), ..Node::default() }),
        instance: "first".to_owned(),
        sequence,
        running_ms: 600_000,
        gpus: Some(Gpus { gpus: vec![gpu], readiness: Some(GpuReadiness::Ready.into()), ..Gpus::default() }),
        images: vec![image],
        ..Told::default()
    }
}

fn demand(backlog: u64) -> Demand {
    Demand { backlog_milli: backlog * 1000, age_ms: 0, ttl_ms: 90_000 }
}

/// Decides and does, as the controller would.
fn decides(fleet: &mut Fleet, now: Millis) -> Vec<Action> {
    let state = fleet.state(now);
    state.check().unwrap();
    let decision = decide(&state, &fleet.settings.policy.clone(), now);
    fleet.decided(&state);
    for action in &decision.actions {
        fleet.acted(action, now);
    }
    decision.actions
}

#[test]
fn a_report_becomes_a_node_whose_ages_are_moments_of_our_own_clock() {
    let mut fleet = fleet();
    assert_eq!(fleet.report(told("a", 1), None, NOW), Ok(Taken { node: "a".to_owned(), is_news: true }));
    let state = fleet.state(NOW.plus(1000));
    let node = &state.nodes["a"];
    let report = node.report.as_ref().unwrap();
    assert_eq!((node.pool.as_str(), node.created, report.heard), ("l4", Millis(NOW.0 - 600_000), NOW));
    assert_eq!(report.gpus[0].work, Work::Until(Millis(NOW.0 - 90_000)));
    assert_eq!((report.held[0].used, state.images[0].bytes), (Millis(NOW.0 - 5000), 100));
    assert_eq!(fleet.image_name(0), Some(format!("r.example/a@{}", digest(1))));
    assert_eq!(fleet.report(told("a", 2), None, NOW).map(|taken| taken.is_news), Ok(false));
}

#[test]
fn a_uid_that_is_another_nodes_is_not_believed() {
    let with_uid = |name: &str, sequence, uid: &str| {
        let mut told = told(name, sequence);
        told.node.as_mut().unwrap().uid = Some(uid.to_owned());
        told
    };
    let refusal = Refusal::Uid { node: "b".to_owned(), uid: "1".to_owned(), of: "a".to_owned() };
    // As Kubernetes has them; one that it does not show yet may be new.
    let mut fleet = kubernetes();
    fleet.fact(Fact::Node(NodeFact { uid: "1".to_owned(), name: "a".to_owned(), ..NodeFact::default() }), NOW);
    assert_eq!(fleet.report(with_uid("b", 1, "1"), None, NOW), Err(refusal.clone()));
    assert!(fleet.report(with_uid("a", 1, "1"), None, NOW).is_ok());
    assert!(fleet.report(with_uid("b", 1, "2"), None, NOW).is_ok());
    // And where there is only their word: who said it first.
    let mut fleet = self::fleet();
    assert!(fleet.report(with_uid("a", 1, "1"), None, NOW).is_ok());
    assert!(fleet.report(with_uid("a", 2, "1"), None, NOW).is_ok());
    assert_eq!(fleet.report(with_uid("b", 1, "1"), None, NOW), Err(refusal));
}

#[test]
fn who_speaks_for_another_node_is_not_heard() {
    let mut fleet = fleet();
    let refusal = fleet.report(told("b", 1), Some("a"), NOW).unwrap_err();
    assert_eq!(refusal, Refusal::Identity { of: "a".to_owned(), says: "b".to_owned() });
    assert_eq!(refusal.word(), "identity");
    assert!(fleet.state(NOW).nodes.is_empty());
    assert!(fleet.report(told("a", 1), Some("a"), NOW).is_ok());
}

#[test]
fn what_was_said_before_is_not_heard_again_in_this_life_or_of_an_earlier_one() {
    let mut fleet = fleet();
    let second = |sequence| Told { instance: "second".to_owned(), ..told("a", sequence) };
    assert!(fleet.report(told("a", 7), None, NOW).is_ok());
    for sequence in [7, 3] {
        let refusal = fleet.report(told("a", sequence), None, NOW.plus(5)).unwrap_err();
        assert_eq!(refusal, Refusal::Sequence { node: "a".to_owned(), had: 7, came: sequence });
    }
    assert_eq!(fleet.state(NOW.plus(5)).nodes["a"].report.as_ref().unwrap().heard, NOW, "it does not become younger");
    assert!(fleet.report(second(1), None, NOW.plus(6)).is_ok(), "an agent that started again counts anew");
    let refusal = fleet.report(told("a", 8), None, NOW.plus(7)).unwrap_err();
    assert_eq!(refusal.word(), "instance");
    assert!(fleet.report(second(2), None, NOW.plus(8)).is_ok());
}

#[test]
fn what_cannot_be_is_no_report_and_changes_nothing() {
    let wrong = |change: fn(&mut Told)| {
        let mut fleet = fleet();
        fleet.report(told("a", 1), None, NOW).unwrap();
        let before = fleet.state(NOW);
        let mut report = told("a", 2);
        change(&mut report);
        let refusal = fleet.report(report, None, NOW.plus(10)).unwrap_err();
        assert_eq!(fleet.state(NOW.plus(10)).nodes, before.nodes);
        assert_eq!(fleet.images.len(), 1, "an image of a report that is refused is not kept");
        refusal.word()
    };
    assert_eq!(wrong(|report| report.images = vec![report.images[0].clone(); 201]), "bounds");
    assert_eq!(wrong(|report| report.gpus.as_mut().unwrap().gpus = vec![Gpu::default(); 65]), "bounds");
    assert_eq!(wrong(|report| report.running_ms = u64::MAX), "nonsense");
    assert_eq!(wrong(|report| report.images[0].used_ms = Some(u64::MAX - 7)), "nonsense");
    assert_eq!(wrong(|report| report.images[0].size_bytes = u64::MAX), "nonsense");
    assert_eq!(wrong(|report| report.images[0].held_bytes = 101), "nonsense");
    assert_eq!(wrong(|report| report.images[0].digest = "sha256:12".to_owned()), "nonsense");
    assert_eq!(wrong(|report| report.node = None), "nonsense");
    assert_eq!(wrong(|report| report.node.as_mut().unwrap().name = "a\nb".to_owned()), "nonsense");
    assert_eq!(wrong(|report| report.sequence = 0), "nonsense");
    assert_eq!(wrong(|report| report.instance = String::new()), "nonsense");
    assert_eq!(wrong(|report| report.node.as_mut().unwrap().zone = Some("z".repeat(2000))), "bounds");
    let ratio = |report: &mut Told, ratio| {
        report.gpus.as_mut().unwrap().gpus[0].idleness.as_mut().unwrap().busy_ratio = Some(ratio);
    };
    let mut fleet = fleet();
    for (n, value) in (1..).zip(["NaN", "inf", "-inf", "-0.5", "1.5"]) {
        let mut report = told("a", n);
        ratio(&mut report, value.parse().unwrap());
        assert_eq!(fleet.report(report, None, NOW).unwrap_err().word(), "nonsense", "{value}");
        let mut report = told("a", n);
        let evidence = Evidence { value: Some(value.parse().unwrap()), ..Evidence::default() };
        report.gpus.as_mut().unwrap().gpus[0].idleness.as_mut().unwrap().evidence = vec![evidence];
        let is_number = ["-0.5", "1.5"].contains(&value);
        assert_eq!(Fleet::new(settings(), NOW).report(report, None, NOW).is_ok(), is_number, "{value}");
    }
}

#[test]
fn a_gpu_that_gives_no_reading_is_not_idle_and_one_left_out_neither() {
    let work = |change: fn(&mut Gpus)| {
        let mut fleet = fleet();
        let mut report = told("a", 1);
        change(report.gpus.as_mut().unwrap());
        fleet.report(report, None, NOW).unwrap();
        let gpus = fleet.state(NOW).nodes["a"].report.as_ref().unwrap().gpus.clone();
        gpus.iter().map(|gpu| (gpu.work == Work::Unread, gpu.sick.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(work(|_| {}), [(false, false)]);
    assert_eq!(work(|gpus| gpus.gpus[0].idleness = None), [(true, false)]);
    assert_eq!(work(|gpus| gpus.gpus[0].idleness.as_mut().unwrap().idle_ms = None), [(true, false)]);
    assert_eq!(work(|gpus| gpus.gpus[0].idleness.as_mut().unwrap().state = 77), [(true, false)]);
    assert_eq!(work(|gpus| gpus.gpus_left_out = 1), [(false, false), (true, false)]);
    assert_eq!(work(|gpus| gpus.gpus[0].is_lost = true), [(false, true)]);
    assert_eq!(work(|gpus| gpus.readiness = Some(GpuReadiness::NotReady.into())), [(false, false), (true, true)]);
}

#[test]
fn keda_is_told_nothing_that_was_not_heard_and_none_only_while_it_is_known() {
    let mut fleet = fleet();
    let later = |ms| NOW.plus(ms);
    assert_eq!(fleet.answer("models/other", NOW), Err(NoAnswer::Unknown));
    decides(&mut fleet, NOW);
    assert_eq!(fleet.answer(NAME, NOW), Err(NoAnswer::NoDemand), "silence is not idleness");
    fleet.demand(NAME, demand(0), NOW).unwrap();
    assert_eq!(fleet.answer(NAME, NOW), Err(NoAnswer::NotYet));
    decides(&mut fleet, NOW);
    assert_eq!(fleet.answer(NAME, NOW), Ok(0));
    assert_eq!(fleet.answer(NAME, later(90_000)), Err(NoAnswer::Stale { age_ms: 90_000 }));
    fleet.demand(NAME, demand(3), later(100_000)).unwrap();
    let wanted = Action::Answer { workload: NAME.to_owned(), replicas: 3 };
    assert_eq!(decides(&mut fleet, later(100_000)), [wanted]);
    assert_eq!(fleet.answer(NAME, later(100_000)), Ok(3));
    // Long after the last sample what it was told stays, however often that is decided.
    assert_eq!(decides(&mut fleet, later(9_000_000)), []);
    assert_eq!(fleet.answer(NAME, later(9_000_000)), Ok(3));
}

#[test]
fn demand_that_is_old_overtaken_or_of_nobody_is_not_taken() {
    let mut fleet = fleet();
    assert_eq!(fleet.demand("models/other", demand(1), NOW), Err(NotTaken::Unknown));
    let aged = |age_ms| Demand { age_ms, ..demand(1) };
    assert_eq!(fleet.demand(NAME, aged(90_000), NOW), Err(NotTaken::Old { age_ms: 90_000, most_ms: 90_000 }));
    assert_eq!(fleet.demand(NAME, aged(10_000), NOW), Ok(()));
    assert_eq!(fleet.demand(NAME, aged(10_001), NOW), Err(NotTaken::Overtaken));
    let short = Demand { ttl_ms: 2000, ..demand(1) };
    fleet.demand(NAME, short, NOW).unwrap();
    assert_eq!(fleet.state(NOW.plus(1999)).workloads[NAME].samples.len(), 2);
    assert!(fleet.state(NOW.plus(2000)).workloads[NAME].samples.is_empty(), "what holds for 2 s holds no longer");
    assert_eq!(fleet.next_end(NOW), Some(NOW.plus(2000)));
}

#[test]
fn a_time_without_work_is_learnt_from_with_what_it_was_kept_for() {
    let mut fleet = fleet();
    let later = |ms| NOW.plus(ms);
    for (ms, backlog) in [(0, 2), (10_000, 0), (20_000, 0), (70_000, 1)] {
        fleet.demand(NAME, demand(backlog), later(ms)).unwrap();
        decides(&mut fleet, later(ms));
    }
    let gaps = fleet.state(later(70_000)).workloads[NAME].gaps.clone();
    assert!(gaps.len() == 1 && gaps[0].ms == 60_000 && gaps[0].kept_ms > 0, "{gaps:?}");
}

#[test]
fn a_trigger_describes_its_workload_and_one_without_words_does_not() {
    let mut fleet = fleet();
    fleet.described("a/b", WorkloadConfig::default(), NOW);
    assert_eq!(fleet.answer("a/b", NOW), Err(NoAnswer::Unknown));
    let words = WorkloadConfig { pool: Some("none".to_owned()), ..WorkloadConfig::default() };
    fleet.described("a/b", words.clone(), NOW);
    assert_eq!(fleet.answer("a/b", NOW), Err(NoAnswer::NoPool));
    fleet.described("a/b", WorkloadConfig { pool: Some("l4".to_owned()), ..words }, NOW);
    assert_eq!(fleet.answer("a/b", NOW), Err(NoAnswer::NoMost));
    let words = WorkloadConfig { pool: Some("l4".to_owned()), most: Some(4), ..WorkloadConfig::default() };
    fleet.described("a/b", words.clone(), NOW);
    assert_eq!(fleet.answer("a/b", NOW), Err(NoAnswer::NoDemand));
    fleet.demand("a/b", demand(9), NOW).unwrap();
    decides(&mut fleet, NOW);
    assert_eq!(fleet.answer("a/b", NOW), Ok(4));
    for n in 0..2 * DESCRIBED_MAX {
        fleet.described(&format!("many/{n}"), words.clone(), NOW);
    }
    assert_eq!(fleet.counts().workloads, DESCRIBED_MAX + 1, "whoever asks cannot fill the table");
    fleet.sweep(NOW.plus(3_600_000));
    assert_eq!(fleet.counts().workloads, 1, "who does not ask any more is gone");
}

fn node(uid: &str, name: &str) -> NodeFact {
    let (uid, name) = (uid.to_owned(), name.to_owned());
    NodeFact {
        uid,
        name,
        pool: Some("l4".to_owned()),
        registered: true,
        created_ms_ago: 5000,
        gpus: 1,
        ..NodeFact::default()
    }
}

#[test]
fn what_a_node_said_that_had_the_name_before_says_nothing_of_the_next() {
    let mut fleet = kubernetes();
    let mut report = told("a", 1);
    report.node.as_mut().unwrap().uid = Some("u1".to_owned());
    fleet.report(report, None, NOW).unwrap();
    assert!(fleet.state(NOW).nodes.is_empty(), "whether a node is there is Kubernetes' word");
    fleet.fact(Fact::Node(node("u1", "a")), NOW);
    assert!(fleet.state(NOW).nodes["u1"].report.is_some());
    fleet.fact(Fact::NodeGone { uid: "u1".to_owned() }, NOW);
    fleet.fact(Fact::Node(node("u2", "a")), NOW);
    assert_eq!(fleet.state(NOW).nodes["u2"].report, None);
}

#[test]
fn what_a_list_does_not_name_is_gone_and_a_taint_that_goes_is_noted() {
    let mut fleet = kubernetes();
    let uids = |uids: &[&str]| uids.iter().map(|uid| (*uid).to_owned()).collect();
    fleet.fact(Fact::Node(NodeFact { tainted: true, ..node("u1", "a") }), NOW);
    fleet.fact(Fact::Node(node("u2", "b")), NOW);
    fleet.fact(Fact::Node(NodeFact { created_ms_ago: 1, ..node("u1", "a") }), NOW.plus(7000));
    let state = fleet.state(NOW.plus(7000));
    assert_eq!((state.nodes["u1"].untainted, state.nodes["u1"].created), (Some(NOW.plus(7000)), Millis(NOW.0 - 5000)));
    let pod = PodFact {
        uid: "p".to_owned(),
        node: Some("b".to_owned()),
        gpus: 1,
        workload: Some(NAME.to_owned()),
        ..PodFact::default()
    };
    fleet.fact(Fact::Pod(pod), NOW);
    assert_eq!(fleet.state(NOW).nodes["u2"].pods.len(), 1);
    fleet.fact(Fact::Only { kind: Kind::Node, uids: uids(&["u2"]) }, NOW);
    fleet.fact(Fact::Only { kind: Kind::Pod, uids: uids(&[]) }, NOW);
    let state = fleet.state(NOW);
    assert!(state.nodes.keys().eq(["u2"]) && state.nodes["u2"].pods.is_empty());
}

#[test]
fn replicas_that_are_there_when_the_scaler_starts_are_what_keda_was_told() {
    let mut fleet = kubernetes();
    fleet.fact(Fact::Node(node("u1", "a")), NOW);
    for n in 0..3 {
        let (uid, workload) = (n.to_string(), Some(NAME.to_owned()));
        fleet
            .fact(Fact::Pod(PodFact { uid, node: Some("a".to_owned()), gpus: 1, workload, ..PodFact::default() }), NOW);
    }
    fleet.demand(NAME, demand(1), NOW).unwrap();
    decides(&mut fleet, NOW);
    assert_eq!(fleet.answer(NAME, NOW), Ok(3), "what was needed before is not known: it is kept for a while");
}

#[test]
fn a_workload_is_as_the_scaler_before_left_it_also_one_that_a_trigger_describes_later() {
    let mut before = fleet();
    let words = WorkloadConfig { pool: Some("l4".to_owned()), most: Some(9), ..WorkloadConfig::default() };
    before.described("a/b", words.clone(), NOW);
    for name in [NAME, "a/b"] {
        before.demand(name, demand(4), NOW).unwrap();
    }
    decides(&mut before, NOW);
    let left = before.state(NOW).workloads;
    let mut after = fleet();
    after.resume(left);
    after.described("a/b", words, NOW.plus(1000));
    for name in [NAME, "a/b"] {
        assert_eq!(after.answer(name, NOW.plus(1000)), Err(NoAnswer::NoDemand), "what waits now is not known");
        after.demand(name, demand(0), NOW.plus(1000)).unwrap();
    }
    decides(&mut after, NOW.plus(1000));
    assert_eq!([NAME, "a/b"].map(|name| after.answer(name, NOW.plus(1000))), [Ok(4), Ok(4)]);
}

#[test]
fn a_lease_holds_by_our_word_until_the_agent_had_time_to_say_otherwise() {
    let mut fleet = fleet();
    fleet.report(told("a", 1), None, NOW).unwrap();
    let until = NOW.plus(600_000);
    fleet.acted(&Action::Protect { node: "a".to_owned(), until }, NOW);
    let lease = |fleet: &mut Fleet, ms| fleet.state(NOW.plus(ms)).nodes["a"].lease;
    assert_eq!(lease(&mut fleet, 1), Some(Lease { since: NOW, until }));
    fleet.report(told("a", 2), None, NOW.plus(5000)).unwrap();
    assert_eq!(lease(&mut fleet, 5000), Some(Lease { since: NOW, until }));
    fleet.report(told("a", 3), None, NOW.plus(20_000)).unwrap();
    assert_eq!(lease(&mut fleet, 20_000), None, "it was not given");
    let protection = Protection { remaining_ms: 9000, ..Protection::default() };
    let out = CarriedOut { protection: Some(protection), ..CarriedOut::default() };
    fleet.report(Told { carried_out: Some(out), ..told("a", 4) }, None, NOW.plus(30_000)).unwrap();
    assert_eq!(lease(&mut fleet, 30_000), Some(Lease { since: NOW.plus(30_000), until: NOW.plus(39_000) }));
    assert_eq!(lease(&mut fleet, 39_000), None);
}

#[test]
fn a_node_that_is_silent_for_an_hour_is_gone_with_its_images() {
    let mut fleet = fleet();
    let pull = Pull { digest: digest(2), total_bytes: Some(10), done_bytes: 4, is_ahead: false };
    let going = Going { reason: GoingReason::SpotNotice.into(), since_ms: 1000 };
    let owner = Owner { namespace: "models".to_owned(), pod: "llm-5d4f8c7b9-x2x4z".to_owned(), ..Owner::default() };
    let mut report = Told { pulls: vec![pull], going: Some(going), ..told("a", 1) };
    report.gpus.as_mut().unwrap().gpus[0].allocation = Some(Allocation { owners: vec![owner] });
    fleet.report(report, None, NOW).unwrap();
    let node = fleet.state(NOW).nodes["a"].clone();
    assert_eq!(node.report.as_ref().unwrap().notice, Some(NOW.plus(119_000)));
    assert_eq!(node.report.unwrap().pulls[0].bytes_left, 6);
    assert_eq!(node.pods[0].workload.as_deref(), Some(NAME), "by the pod's name");
    fleet.sweep(NOW.plus(3_599_999));
    assert_eq!((fleet.state(NOW).nodes.len(), fleet.images.len()), (1, 2));
    fleet.sweep(NOW.plus(3_600_000));
    assert_eq!((fleet.state(NOW).nodes.len(), fleet.images.len()), (0, 0));
}
