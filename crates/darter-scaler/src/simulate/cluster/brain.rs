//! The scaler in the model: its state is filled from what happens there, and [`decide`] says the rest.

use std::collections::BTreeMap;

use darter_core::Digest;

use super::{Node, Pod, Timers};
use crate::apply::apply;
use crate::decide::{decide, kept_ms};
use crate::record::Record;
use crate::state::{self, Gap, Gpu, Held, Image, Lease, Report, Sample, State, Work, Workload};
use crate::traces::Trace;
use crate::{Action, Millis, Policy};

/// A sample is taken anew so often where nothing changes.
const SAMPLE_MS: u64 = 30_000;
/// The reference platform's image.
const IMAGE_BYTES: u64 = 130_000_000;
const POOL: &str = "gpu";

pub(super) struct Brain {
    state: State,
    policy: Policy,
    names: Vec<String>,
    /// Since when a workload has nothing to do, and for how long it was to be kept then.
    idle: BTreeMap<u32, (u64, u64)>,
    wake: Option<u64>,
}

impl Brain {
    pub(super) fn new(trace: &Trace, timers: &Timers, policy: &Policy, cold_ms: u64) -> Self {
        let lead_ms = timers.batch_idle_ms + timers.launch_ms + timers.pull_ms;
        let names: Vec<_> = (0..trace.workloads.len()).map(|n| format!("played/{n:05}")).collect();
        let workload = Workload {
            pool: POOL.to_owned(),
            gpus: 1,
            least: 0,
            most: timers.most,
            target_milli: u64::from(timers.target) * 1000,
            cold_start_micros: cold_ms,
            lead_ms,
            samples: Vec::new(),
            floors: Vec::new(),
            answered: 0,
            raised: None,
            ahead: None,
            known: Millis(0),
            needed: Vec::new(),
            gaps: Vec::new(),
        };
        // One micro-dollar a millisecond.
        let nodes_most = u32::try_from(state::NODES_MAX).unwrap_or(u32::MAX);
        let pool = state::Pool { micros_per_hour: 3_600_000, gpus: 1, nodes_most, ..state::Pool::default() };
        // Spare capacity and prices are not part of the model.
        let mut policy = policy.clone();
        policy.headroom.most = 0;
        policy.rails.gpus_most = nodes_most;
        policy.rails.micros_per_hour_most = u64::MAX;
        let state = State {
            images: (0..names.len()).map(image).collect(),
            workloads: names.iter().map(|name| (name.clone(), workload.clone())).collect(),
            pools: [(POOL.to_owned(), pool)].into(),
            ..State::default()
        };
        Self { state, policy, names, idle: BTreeMap::new(), wake: None }
    }

    fn workload(&mut self, number: u32) -> Option<&mut Workload> {
        self.state.workloads.get_mut(&self.names[number as usize])
    }

    pub(super) fn answered(&self, number: u32) -> u32 {
        self.state.workloads.get(&self.names[number as usize]).map_or(0, |workload| workload.answered)
    }

    /// The backlog of a workload changed.
    pub(super) fn hear(&mut self, now: u64, number: u32, before: u32, after: u32) {
        let at = Millis(now);
        let gap = self.idle.get(&number).copied().filter(|_| before == 0 && after > 0);
        if let Some(workload) = self.workload(number) {
            if let Some((since, kept_ms)) = gap {
                workload.resume(Gap { ms: now - since, kept_ms });
            }
            for backlog in [before.max(after), after] {
                workload.observe(Sample { at, backlog_milli: u64::from(backlog) * 1000 });
            }
        }
        if after == 0 && before > 0 {
            let kept_ms = kept_ms(&self.state, &self.policy, &self.names[number as usize]);
            self.idle.insert(number, (now, kept_ms));
        }
    }

    /// Whether it would not be asked by then anyway.
    pub(super) fn wakes_before(&mut self, due: u64) -> bool {
        let sooner = self.wake.is_none_or(|wake| wake > due);
        if sooner {
            self.wake = Some(due);
        }
        sooner
    }

    /// Decides and does; when to ask again.
    pub(super) fn decide(
        &mut self,
        now: u64,
        nodes: &mut BTreeMap<u32, Node>,
        pods: &mut BTreeMap<u32, Pod>,
        backlogs: &[u32],
        note: &mut dyn FnMut(&Record<'_>),
    ) -> Option<u64> {
        if self.wake.is_some_and(|wake| wake > now) {
            return None;
        }
        let at = Millis(now);
        self.state.watched = at;
        self.sample(at, backlogs);
        self.state.nodes =
            nodes.iter().map(|(n, node)| (format!("{n:010}"), told(at, *n, node, pods, &self.names))).collect();
        let decision = decide(&self.state, &self.policy, at);
        note(&Record { policy: &self.policy, state: &self.state, now: at, decision: &decision });
        apply(&mut self.state, &decision, at);
        for action in &decision.actions {
            carry_out(action, &self.state, nodes, pods);
        }
        self.wake = decision.next_wake.map(|wake| wake.0);
        self.wake
    }

    /// KEDA's raw metrics come whether anything changes or not.
    fn sample(&mut self, at: Millis, backlogs: &[u32]) {
        for (workload, backlog) in self.state.workloads.values_mut().zip(backlogs) {
            let old = workload.samples.last().is_none_or(|sample| at.since(sample.at) >= SAMPLE_MS);
            if old && (workload.answered > 0 || *backlog > 0) {
                workload.observe(Sample { at, backlog_milli: u64::from(*backlog) * 1000 });
            }
        }
    }
}

fn image(number: usize) -> Image {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Image { digest: Digest::from_bytes(bytes), bytes: IMAGE_BYTES }
}

/// What a node's agent would say now.
fn told(at: Millis, number: u32, node: &Node, pods: &BTreeMap<u32, Pod>, names: &[String]) -> state::Node {
    let here = node.pod.and_then(|pod| Some((pod, pods.get(&pod)?)));
    let works = here.is_some_and(|(_, pod)| pod.work.is_some());
    let pulls = here.filter(|(_, pod)| pod.serves.is_none() && !node.images.contains_key(&pod.workload));
    let held = node.images.iter().map(|(image, used)| Held { image: *image, used: Millis(*used) });
    let report = Report {
        heard: at,
        gpus: vec![Gpu { work: Work::Until(if works { at } else { Millis(node.worked) }), sick: None }],
        held: held.collect(),
        pulls: pulls.map(|(_, pod)| state::Pull { image: pod.workload, bytes_left: IMAGE_BYTES }).into_iter().collect(),
        jobs: Vec::new(),
        notice: None,
        served: None,
        warm: true,
    };
    let pods = here.map(|(number, pod)| state::Pod {
        uid: number.to_string(),
        workload: Some(names[pod.workload as usize].clone()),
        cost: pod.cost,
        ranked: None,
    });
    state::Node {
        name: format!("node-{number}"),
        pool: POOL.to_owned(),
        zone: "a".to_owned(),
        created: Millis(node.launched),
        registered: node.joined,
        tainted: false,
        untainted: None,
        deleting: false,
        pods: pods.into_iter().collect(),
        lease: node.lease.filter(|lease| lease.until > at),
        asked: Vec::new(),
        report: node.joined.then_some(report),
    }
}

fn carry_out(action: &Action, state: &State, nodes: &mut BTreeMap<u32, Node>, pods: &mut BTreeMap<u32, Pod>) {
    match action {
        Action::Protect { node, .. } => {
            let lease: Option<Lease> = state.nodes.get(node).and_then(|node| node.lease);
            if let Some(node) = node.parse().ok().and_then(|node: u32| nodes.get_mut(&node)) {
                node.lease = lease;
            }
        }
        Action::Rank { pod, cost, .. } => {
            if let Some(pod) = pod.parse().ok().and_then(|pod: u32| pods.get_mut(&pod)) {
                pod.cost = *cost;
            }
        }
        // Small, and next to it: as good as at once.
        Action::Copy { node, image } => {
            if let Some(node) = node.parse().ok().and_then(|node: u32| nodes.get_mut(&node)) {
                node.images.entry(*image).or_insert(0);
            }
        }
        // Answers are read from the state; the rest is off, or not part of the model.
        _ => {}
    }
}
