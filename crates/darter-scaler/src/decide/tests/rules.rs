//! What single rules decide, and how it reads: made-up moments, whole expectations.

use super::any::{NOW, image};
use crate::apply::apply;
use crate::decide::{Action, decide};
use crate::reason::Subject;
use crate::render::render;
use crate::state::{Freeze, Gap, Gpu, Held, Job, Lease, Node, Pod, Pool, Pull, Report, Sample, State, Work, Workload};
use crate::{Millis, Policy};

const MINUTE: u64 = 60_000;

fn ago(ms: u64) -> Millis {
    Millis(NOW.0 - ms)
}

fn report() -> Report {
    Report {
        heard: ago(2000),
        gpus: vec![Gpu { work: Work::Until(ago(20 * MINUTE)), sick: None }],
        held: Vec::new(),
        pulls: Vec::new(),
        jobs: Vec::new(),
        notice: None,
        served: None,
        warm: true,
    }
}

/// A node that joined an hour ago, is warm, and has done nothing for 20 minutes.
fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        pool: "l4".to_owned(),
        zone: "a".to_owned(),
        created: ago(60 * MINUTE),
        registered: true,
        tainted: false,
        untainted: Some(ago(50 * MINUTE)),
        deleting: false,
        pods: Vec::new(),
        lease: None,
        asked: Vec::new(),
        report: Some(report()),
    }
}

/// Asked for nothing now, one replica, last needed 100 s ago; a cold start is worth 84 GPU-seconds.
fn workload() -> Workload {
    let mut workload = Workload {
        pool: "l4".to_owned(),
        gpus: 1,
        least: 0,
        most: 10,
        target_milli: 1000,
        cold_start_micros: 84_000,
        lead_ms: 84_000,
        samples: Vec::new(),
        floors: Vec::new(),
        answered: 1,
        raised: None,
        ahead: None,
        known: ago(600 * MINUTE),
        needed: Vec::new(),
        gaps: Vec::new(),
    };
    workload.observe(Sample { at: ago(100_000), backlog_milli: 1000 });
    workload.observe(Sample { at: ago(1000), backlog_milli: 0 });
    workload
}

fn state(nodes: impl IntoIterator<Item = Node>) -> State {
    let pool = Pool { micros_per_hour: 3_600_000, gpus: 1, nodes_most: 100, ..Pool::default() };
    State {
        nodes: nodes.into_iter().enumerate().map(|(n, node)| (format!("uid-{n}"), node)).collect(),
        images: (0..2).map(image).collect(),
        pools: [("l4".to_owned(), pool)].into(),
        watched: NOW,
        ..State::default()
    }
}

fn with(workload: Workload) -> State {
    State { workloads: [("models/flux".to_owned(), workload)].into(), ..state([]) }
}

fn told(node: Node, change: impl FnOnce(&mut Report)) -> Node {
    let mut node = node;
    change(node.report.as_mut().unwrap());
    node
}

/// The sentence on one subject.
fn why(state: &State, policy: &Policy, subject: &Subject) -> String {
    let reasons = decide(state, policy, NOW).reasons;
    reasons.iter().filter(|reason| reason.subject == *subject).map(render).collect()
}

fn why_node(node: Node) -> String {
    let subject = Subject::Node(node.name.clone());
    why(&state([node]), &Policy::default(), &subject)
}

fn why_workload(workload: Workload) -> String {
    why(&with(workload), &Policy::default(), &Subject::Workload("models/flux".to_owned()))
}

#[test]
fn the_last_copy_of_a_hot_image_holds_its_node_until_there_are_two() {
    let holder = told(node("gpu-7"), |report| report.held = vec![Held { image: 0, used: ago(3 * MINUTE) }]);
    insta::assert_snapshot!(why_node(holder.clone()), @"node gpu-7 kept: last copy of sha256:0000000000000000000000000000000000000000000000000000000000000000 (11.2 GB, used 3 min ago); released when 2 copies or at 22:40:20");
    // A node that stays anyway is asked to bring it.
    let busy = told(node("gpu-8"), |report| report.gpus[0].work = Work::Until(ago(1000)));
    let mut both = state([holder, busy]);
    let decision = decide(&both, &Policy::default(), NOW);
    assert!(decision.actions.contains(&Action::Copy { node: "uid-1".to_owned(), image: 0 }), "{:?}", decision.actions);
    let digest = both.images[0].digest.to_string();
    insta::assert_snapshot!(why(&both, &Policy::default(), &Subject::Image(digest)), @"image sha256:0000000000000000000000000000000000000000000000000000000000000000 copied: to gpu-8, which stays, so that no node is held for its 11.2 GB; changes when it is there");
    // Once that has it, the first is held no longer.
    apply(&mut both, &decision, NOW);
    both.nodes.get_mut("uid-1").unwrap().report.as_mut().unwrap().held = vec![Held { image: 0, used: NOW }];
    insta::assert_snapshot!(why(&both, &Policy::default(), &Subject::Node("gpu-7".to_owned())), @"node gpu-7 may go: nothing holds it, no GPU has worked for 20 min; this changes when work comes or at 22:23:20, when its lease or notice ends");
}

#[test]
fn a_gpu_that_works_or_is_not_read_holds_its_node() {
    insta::assert_snapshot!(
        why_node(told(node("gpu-1"), |report| report.gpus[0].work = Work::Until(ago(5000)))), @"node gpu-1 kept: a GPU worked 5 s ago; released at 22:14:15");
    insta::assert_snapshot!(why_node(told(node("gpu-1"), |report| report.gpus[0].work = Work::Unread)), @"node gpu-1 kept: a GPU gives no reading, which is not idleness; released when the GPU is read");
}

#[test]
fn a_job_a_pull_and_a_warm_up_hold_their_nodes() {
    let job = Job { name: "finetune-3".to_owned(), until: NOW.plus(25 * MINUTE) };
    insta::assert_snapshot!(why_node(told(node("gpu-1"), |report| report.jobs = vec![job])), @"node gpu-1 kept: job finetune-3 asked not to be disturbed; released when the job ends or at 22:38:20");
    let pull = Pull { image: 0, bytes_left: 4_300_000_000 };
    let pulling = Node { created: ago(4 * MINUTE), untainted: None, ..node("gpu-1") };
    insta::assert_snapshot!(why_node(told(pulling, |report| report.pulls = vec![pull])), @"node gpu-1 kept: an image is coming, 4.3 GB of it are missing; released when it is there or at 22:29:20");
    let warming = Node { created: ago(MINUTE), tainted: true, untainted: None, ..node("gpu-1") };
    insta::assert_snapshot!(why_node(warming), @"node gpu-1 kept: it warms up, made 60 s ago; released at 22:32:20");
    insta::assert_snapshot!(why_node(Node { untainted: Some(ago(30_000)), ..node("gpu-1") }), @"node gpu-1 kept: it became ready 30 s ago and waits for its first pod; released at 22:14:50");
}

#[test]
fn a_node_that_says_nothing_is_left_as_it_is() {
    insta::assert_snapshot!(why_node(Node { report: None, ..node("gpu-1") }), @"node gpu-1 left as it is: nothing is known of it: no report, made 60 min ago; decided again when it reports");
    insta::assert_snapshot!(why_node(told(node("gpu-1"), |report| report.heard = ago(5 * MINUTE))), @"node gpu-1 left as it is: nothing is known of it: it reported 5 min ago; decided again when it reports");
}

#[test]
fn an_idle_node_may_go_once_its_lease_ends() {
    let leased = Node { lease: Some(Lease { since: ago(9 * MINUTE), until: NOW.plus(MINUTE) }), ..node("gpu-1") };
    insta::assert_snapshot!(why_node(leased), @"node gpu-1 may go: nothing holds it, no GPU has worked for 20 min; this changes when work comes or at 22:14:20, when its lease or notice ends");
    insta::assert_snapshot!(why_node(node("gpu-1")), @"node gpu-1 may go: nothing holds it, no GPU has worked for 20 min; this changes when work comes");
}

#[test]
fn an_agent_that_says_it_works_for_ever_holds_its_node_for_six_hours() {
    let lease = Lease { since: ago(360 * MINUTE), until: NOW.plus(MINUTE) };
    let busy = told(node("gpu-1"), |report| report.gpus[0].work = Work::Until(ago(5000)));
    let spent = Node { lease: Some(lease), ..busy };
    assert_eq!(decide(&state([spent.clone()]), &Policy::default(), NOW).actions, []);
    insta::assert_snapshot!(why_node(spent), @"node gpu-1 left as it is: a GPU worked 5 s ago; rail: protected for 6.0 h, at most 6.0 h; decided again at 22:14:15 or at 22:14:20");
}

#[test]
fn a_replica_without_work_is_kept_for_as_long_as_its_gaps_make_it_pay() {
    let mut gone = workload();
    let decision = decide(&with(gone.clone()), &Policy::default(), NOW);
    assert_eq!(decision.actions, [Action::Answer { workload: "models/flux".to_owned(), replicas: 0 }]);
    insta::assert_snapshot!(why_workload(gone.clone()), @"workload models/flux lowered from 1 to 0 replicas: no work for 100 s, kept for 84 s: too little is known to tell more than what a cold start costs; changes when more than 0 wait or run");
    // Work comes back within 20 s or much later: after that there is nothing to wait for.
    gone.gaps = [20_000, 20 * MINUTE].repeat(30).into_iter().map(|ms| Gap { ms, kept_ms: 84_000 }).collect();
    gone.observe(Sample { at: ago(10_000), backlog_milli: 1000 });
    gone.observe(Sample { at: ago(1000), backlog_milli: 0 });
    insta::assert_snapshot!(why_workload(gone.clone()), @"workload models/flux stays at 1 replica: no work for 10 s, kept for 20 s: over the last 60 gaps that would have cost 67 min, the usual time 98 min; changes to 0 at 22:13:30 or when more than 1 wait or run");
    // What was learnt did worse than what is usual.
    gone.gaps = vec![Gap { ms: 70_000, kept_ms: 20_000 }; 30];
    insta::assert_snapshot!(why_workload(gone), @"workload models/flux stays at 1 replica: no work for 10 s, kept for 84 s, as usual: over the last 30 gaps that cost 35 min, and what was learnt 52 min; changes to 0 at 22:14:34 or when more than 1 wait or run");
}

#[test]
fn silence_scales_nothing_away_and_a_rise_is_met_before_it_comes() {
    let mut silent = workload();
    silent.samples.iter_mut().for_each(|sample| sample.at = ago(10 * MINUTE));
    insta::assert_snapshot!(why_workload(silent), @"workload models/flux stays at 1 replica: the newest sample of demand came 10 min ago, and silence is not idleness; changes when a sample comes");
    let mut asked = workload();
    asked.observe(Sample { at: ago(500), backlog_milli: 2500 });
    insta::assert_snapshot!(why_workload(asked), @"workload models/flux raised from 1 to 4 replicas: 2.5 wait or run, seen 500 ms ago, and rising: that many will be needed after a lead time; changes when more than 4 wait or run");
}

#[test]
fn what_was_asked_for_ahead_of_demand_is_not_given_up_before_it_came() {
    let mut asked = Workload { known: ago(60 * MINUTE), ..workload() };
    asked.observe(Sample { at: ago(500), backlog_milli: 2500 });
    let mut state = with(asked);
    let ahead = decide(&state, &Policy::default(), NOW);
    apply(&mut state, &ahead, NOW);
    let raised = state.workloads["models/flux"].answered;
    assert_eq!(raised, 4, "three would do now");
    insta::assert_snapshot!(why(&state, &Policy::default(), &Subject::Workload("models/flux".to_owned())), @"workload models/flux stays at 4 replicas: asked for 0 ms ago, ahead of demand, and kept for 84 s from then; changes to 3 at 22:14:44 or when more than 4 wait or run");
}

#[test]
fn rails_hold_and_say_so() {
    let mut asked = workload();
    asked.observe(Sample { at: ago(500), backlog_milli: 9000 });
    let policy = Policy { rails: crate::policy::Rails { gpus_most: 4, ..Default::default() }, ..Policy::default() };
    insta::assert_snapshot!(why(&with(asked), &policy, &Subject::Workload("models/flux".to_owned())), @"workload models/flux raised from 1 to 4 replicas: 9 wait or run, seen 500 ms ago, and rising: that many will be needed after a lead time; rail: 10 GPUs in all, at most 4; changes when that rail allows it");
    let frozen = Some(Freeze { since: ago(MINUTE), why: "an incident".to_owned() });
    let frozen = State { freeze: frozen, ..with(workload()) };
    insta::assert_snapshot!(why(&frozen, &Policy::default(), &Subject::Workload("models/flux".to_owned())), @"workload models/flux stays at 1 replica: 0 wait or run, seen 1 s ago; rail: frozen 60 s ago; changes when the freeze ends");
}

#[test]
fn a_node_that_the_cloud_takes_back_is_removed_only_where_that_is_allowed() {
    let doomed = told(node("gpu-1"), |report| report.notice = Some(NOW.plus(2 * MINUTE)));
    let state = state([doomed]);
    let subject = Subject::Node("gpu-1".to_owned());
    insta::assert_snapshot!(why(&state, &Policy::default(), &subject), @r#"
node gpu-1 may go: its cloud takes it back; this changes at 22:15:20, when its lease or notice ends
node gpu-1 left as it is: its cloud takes it back in 2 min; rail: removing such nodes is off; decided again when the policy allows it
"#);
    let mut allowed = Policy::default();
    allowed.remove.doomed = true;
    insta::assert_snapshot!(why(&state, &allowed, &subject), @r#"
node gpu-1 may go: its cloud takes it back; this changes at 22:15:20, when its lease or notice ends
node gpu-1 removed: its cloud takes it back in 2 min
"#);
    // Not while it works: what holds it stands below.
    let mut working = state.clone();
    working.nodes.get_mut("uid-0").unwrap().report.as_mut().unwrap().gpus[0].work = Work::Until(ago(1000));
    insta::assert_snapshot!(why(&working, &allowed, &subject), @r#"
node gpu-1 kept: a GPU worked 1 s ago; released at 22:14:19
node gpu-1 left as it is: its cloud takes it back in 2 min; decided again with time
  node gpu-1 kept: a GPU worked 1 s ago; released at 22:14:19
"#);
    insta::assert_snapshot!(why(&state, &allowed, &Subject::Pool("l4".to_owned())), @"pool l4 raised from 0 to 1 spare GPU: as configured, as demand was seen 0 times only; about to go: 1 node");
}

#[test]
fn a_replica_that_works_or_may_work_is_not_taken_away_though_nothing_waits() {
    let pod = Pod { uid: "pod-0".to_owned(), workload: Some("models/flux".to_owned()), cost: 0, ranked: None };
    let busy = told(node("gpu-1"), |report| report.gpus[0].work = Work::Until(ago(1000)));
    let asked = |node: Node| {
        let node = Node { pods: vec![pod.clone()], ..node };
        // Others that are known: one silent node must not be held by the rail alone.
        let others = (2..12).map(|n| self::node(&format!("gpu-{n}")));
        let state = State { workloads: with(workload()).workloads, ..state([node].into_iter().chain(others)) };
        let answers = decide(&state, &Policy::default(), NOW).actions.into_iter();
        answers.filter(|action| matches!(action, Action::Answer { .. })).count()
    };
    assert_eq!(asked(busy.clone()), 0);
    assert_eq!(asked(told(busy, |report| report.heard = ago(20_000))), 0);
    assert_eq!(asked(Node { report: None, ..node("gpu-1") }), 0, "a node that says nothing is not idle");
    assert_eq!(asked(node("gpu-1")), 1);
}

#[test]
fn a_node_that_falls_silent_keeps_its_place_among_removals() {
    let doomed = |name| told(node(name), |report| report.notice = Some(NOW.plus(2 * MINUTE)));
    let others = (2..20).map(|n| node(&format!("gpu-{n}")));
    let mut state = state([doomed("gpu-0"), doomed("gpu-1")].into_iter().chain(others));
    let mut policy = Policy::default();
    policy.remove.doomed = true;
    policy.rails.removals_most = 1;
    let removed = |state: &State| -> Vec<String> {
        let actions = decide(state, &policy, NOW).actions.into_iter();
        actions.filter_map(|action| if let Action::Remove { node } = action { Some(node) } else { None }).collect()
    };
    assert_eq!(removed(&state), ["uid-0"]);
    // Nothing is known of the first now: that must not cost the second its node.
    state.nodes.get_mut("uid-0").unwrap().report = None;
    assert_eq!(removed(&state), [""; 0]);
}

#[test]
fn an_idle_pod_goes_before_one_that_works() {
    let pod = |n: u32| Pod { uid: format!("pod-{n}"), workload: Some("models/flux".to_owned()), cost: 0, ranked: None };
    let busy = told(node("gpu-1"), |report| report.gpus[0].work = Work::Until(ago(1000)));
    let nodes = [Node { pods: vec![pod(0)], ..busy }, Node { pods: vec![pod(1)], ..node("gpu-2") }];
    let decision = decide(&state(nodes), &Policy::default(), NOW);
    let ranks = decision.actions.into_iter().filter_map(|action| match action {
        Action::Rank { pod, cost, .. } => Some((pod, cost)),
        _ => None,
    });
    assert_eq!(ranks.collect::<Vec<_>>(), [("pod-0".to_owned(), 600_000), ("pod-1".to_owned(), 100_000)]);
}
