//! How long one decision of the scaler takes, for as many nodes as anybody has.
//!
//! A decision is made whenever something is heard, so it must be over before the next thing is. Beside it, in the
//! same run: one look at everything that nodes hold, which no decision can do without.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use darter_benches::{Better, Report, percentile};
use darter_core::Digest;
use darter_scaler::apply::apply;
use darter_scaler::state::{
    GAPS_MAX, Gap, Gpu, Held, Image, Node, Pod, Pool, Report as Heard, Sample, State, Work, Workload,
};
use darter_scaler::{Millis, Policy, decide};

/// Images that a node has.
const HELD: u32 = 200;
/// Different ones in the cluster.
const IMAGES: u32 = 2000;
const GPUS: usize = 4;
const NOW: Millis = Millis(1_700_000_000_000);
const RUNS: usize = 50;

fn main() -> Result<()> {
    let mut report = Report::default();
    for (nodes, goal) in [(1000, 5.0), (10_000, 50.0)] {
        let policy = Policy::default();
        let fresh = state(nodes);
        let mut settled = fresh.clone();
        apply(&mut settled, &decide(&fresh, &policy, NOW), NOW);
        let conditions = format!("{nodes} nodes, {HELD} images and {GPUS} GPUs each, {} workloads", nodes / 5);
        for (what, state) in [("everything to do", &fresh), ("nothing to do", &settled)] {
            let took = times(|| drop(black_box(decide(black_box(state), &policy, NOW))));
            let name = format!("decide: {nodes} nodes, {what}");
            report.add(&name, best(&took), "ms", Better::Lower, Some(goal), format!("{conditions}, best of {RUNS}"));
            report.add(&format!("{name}, p99"), percentile(took, 0.99), "ms", Better::Lower, None, &*conditions);
        }
        let look = best(&times(|| drop(black_box(newest(black_box(&fresh))))));
        let took = best(&times(|| drop(black_box(decide(black_box(&settled), &policy, NOW)))));
        let conditions = "nothing to do; over one look at everything that nodes hold";
        report.add(&format!("decide: {nodes} nodes over a look"), took / look, "", Better::Lower, None, conditions);
    }
    report.finish("scaler")
}

/// What else this machine does only makes a run slower.
fn best(took: &[f64]) -> f64 {
    took.iter().copied().fold(f64::MAX, f64::min)
}

/// In milliseconds.
fn times(mut run: impl FnMut()) -> Vec<f64> {
    let once = |_| {
        let began = Instant::now();
        run();
        began.elapsed().as_secs_f64() * 1000.0
    };
    (0..RUNS).map(once).collect()
}

/// When each image was last used anywhere.
fn newest(state: &State) -> Vec<Millis> {
    let mut newest = vec![Millis(0); state.images.len()];
    let reports = state.nodes.values().filter_map(|node| node.report.as_ref());
    for held in reports.flat_map(|report| &report.held) {
        let image = &mut newest[held.image as usize];
        *image = held.used.max(*image);
    }
    newest
}

fn ago(ms: u64) -> Millis {
    Millis(NOW.0 - ms)
}

/// Half of the nodes work, a fifth have nothing to do, the others had work a while ago; some say nothing.
fn state(nodes: u32) -> State {
    let pool = Pool { micros_per_hour: 3_600_000, gpus: 4, nodes_most: nodes * 2, ..Pool::default() };
    let image = |n: u32| Image { digest: Digest::of(&n.to_be_bytes()), bytes: 5_000_000_000 };
    State {
        nodes: (0..nodes).map(|n| (format!("uid-{n:05}"), node(n))).collect(),
        images: (0..IMAGES).map(image).collect(),
        workloads: (0..nodes / 5).map(|n| (format!("models/w{n:05}"), workload(n))).collect(),
        pools: [("l4".to_owned(), pool)].into(),
        watched: NOW,
        ..State::default()
    }
}

fn node(n: u32) -> Node {
    let worked = match n % 10 {
        0..5 => ago(2000),
        5..8 => ago(600_000),
        _ => ago(7_200_000),
    };
    let held = (0..HELD).map(|k| Held { image: (n * 7 + k * 13) % IMAGES, used: ago(u64::from(k) * 30_000) });
    let pod = |k: u32| Pod {
        uid: format!("pod-{n}-{k}"),
        workload: Some(format!("models/w{:05}", n / 5)),
        cost: 0,
        ranked: None,
    };
    let report = Heard {
        heard: ago(if n % 50 == 49 { 90_000 } else { 2000 }),
        gpus: vec![Gpu { work: Work::Until(worked), sick: None }; GPUS],
        held: held.collect(),
        pulls: Vec::new(),
        jobs: Vec::new(),
        notice: None,
        served: None,
        warm: true,
    };
    Node {
        name: format!("gpu-{n}"),
        pool: "l4".to_owned(),
        zone: ["a", "b", "c"][n as usize % 3].to_owned(),
        created: ago(36_000_000),
        registered: true,
        tainted: false,
        untainted: None,
        deleting: false,
        pods: if n % 10 < 8 { (0..4).map(pod).collect() } else { Vec::new() },
        lease: None,
        asked: Vec::new(),
        report: Some(report),
    }
}

fn workload(n: u32) -> Workload {
    let gap = |k: u64| Gap { ms: (u64::from(n) * 7919 + k * 104_729) % 1_800_000, kept_ms: 300_000 };
    let mut workload = Workload {
        pool: "l4".to_owned(),
        gpus: 1,
        least: 0,
        most: 50,
        target_milli: 1000,
        cold_start_micros: 300_000,
        lead_ms: 85_000,
        samples: Vec::new(),
        floors: Vec::new(),
        answered: 16,
        raised: None,
        ahead: None,
        known: ago(36_000_000),
        needed: Vec::new(),
        gaps: (0..GAPS_MAX as u64).map(gap).collect(),
    };
    for k in (0..20).rev() {
        workload.observe(Sample { at: ago(k * 5000), backlog_milli: u64::from(n % 20) * 1000 + k * 10 });
    }
    workload
}
