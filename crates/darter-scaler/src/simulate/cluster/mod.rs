//! KEDA, the HPA and Karpenter with their timers, over one trace: replicas on nodes with one GPU each.
//!
//! The model's own doing: polls, ticks, batches, launches, pulls, consolidation. What it leaves out: spot,
//! quotas, pods of others, the network. Either the numbers come from the backlog, as in the reference
//! platform, or from [`crate::decide`] through the same controllers.

mod brain;
mod control;
mod nodes;
mod outcome;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use outcome::Outcome;

use crate::Policy;
use crate::record::Record;
use crate::traces::{Request, Trace};
use brain::Brain;

const SECOND: u64 = 1000;

/// How long what takes; the defaults are those of the reference platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timers {
    /// KEDA looks so often.
    pub poll_ms: u64,
    /// KEDA goes from one to none so long after it last saw work.
    pub cooldown_ms: u64,
    /// The HPA looks so often.
    pub sync_ms: u64,
    /// The HPA goes by the most that it saw in this time.
    pub stabilisation_ms: u64,
    /// Karpenter waits for further pods so long.
    pub batch_idle_ms: u64,
    /// And so long in all.
    pub batch_most_ms: u64,
    /// From then until the node has joined.
    pub launch_ms: u64,
    /// Until a pod serves on a node that does not have its image.
    pub pull_ms: u64,
    /// The same where it has it.
    pub start_ms: u64,
    /// An empty node stays so long.
    pub consolidate_after_ms: u64,
    /// Karpenter looks for empty nodes so often.
    pub disruption_ms: u64,
    /// And looks again so long after it found one.
    pub validation_ms: u64,
    /// Nodes that it removes at a time, in percent, rounded up.
    pub budget_percent: u64,
    /// Requests that wait or run for each replica.
    pub target: u32,
    /// Replicas of a workload, at most.
    pub most: u32,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            poll_ms: 30 * SECOND,
            cooldown_ms: 300 * SECOND,
            sync_ms: 15 * SECOND,
            stabilisation_ms: 300 * SECOND,
            batch_idle_ms: SECOND,
            batch_most_ms: 10 * SECOND,
            launch_ms: 37 * SECOND,
            pull_ms: 47 * SECOND,
            start_ms: 5 * SECOND,
            consolidate_after_ms: 180 * SECOND,
            disruption_ms: 10 * SECOND,
            validation_ms: 15 * SECOND,
            budget_percent: 10,
            target: 1,
            most: 10,
        }
    }
}

/// Who says how many replicas there are to be.
#[derive(Debug, Clone)]
pub enum Control {
    /// KEDA and the HPA, by the backlog.
    Reference,
    /// The scaler, with what a cold start is worth in milliseconds of a GPU.
    Darter(Box<Policy>, u64),
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(usize),
    Done(u32),
    PodServes(u32),
    NodeJoins(u32),
    Poll,
    Sync,
    Batch,
    Disrupt,
    Validate(u32),
    Decide,
}

#[derive(Default)]
struct Load {
    queue: VecDeque<Waiting>,
    serving: u32,
    replicas: u32,
    pods: BTreeSet<u32>,
    /// When KEDA last saw work.
    active: Option<u64>,
    /// What the HPA found lately.
    found: VecDeque<(u64, u32)>,
}

impl Load {
    fn backlog(&self) -> u32 {
        u32::try_from(self.queue.len()).unwrap_or(u32::MAX).saturating_add(self.serving)
    }
}

#[derive(Clone, Copy)]
struct Waiting {
    since: u64,
    service_ms: u64,
}

struct Pod {
    workload: u32,
    node: Option<u32>,
    /// Since when it serves.
    serves: Option<u64>,
    work: Option<Waiting>,
    /// What it costs to end it, for the ReplicaSet.
    cost: i32,
}

struct Node {
    launched: u64,
    joined: bool,
    pod: Option<u32>,
    /// When each image was last used.
    images: BTreeMap<u32, u64>,
    worked: u64,
    empty: u64,
    lease: Option<crate::state::Lease>,
    going: bool,
}

struct World<'a> {
    now: u64,
    timers: &'a Timers,
    events: BTreeSet<(u64, u64, Event)>,
    count: u64,
    requests: &'a [Request],
    loads: Vec<Load>,
    pods: BTreeMap<u32, Pod>,
    nodes: BTreeMap<u32, Node>,
    next: u32,
    pending: VecDeque<u32>,
    batch: Option<(u64, u64)>,
    brain: Option<Brain>,
    note: &'a mut dyn FnMut(&Record<'_>),
    outcome: Outcome,
}

/// Plays a trace to its end: the last node gone, or a day after the last request.
pub fn run(trace: &Trace, timers: &Timers, control: &Control) -> Outcome {
    run_noting(trace, timers, control, &mut |_| ())
}

/// The same; every decision is handed to `note` before it is carried out.
pub fn run_noting(trace: &Trace, timers: &Timers, control: &Control, note: &mut dyn FnMut(&Record<'_>)) -> Outcome {
    let brain = match control {
        Control::Reference => None,
        Control::Darter(policy, cold_ms) => Some(Brain::new(trace, timers, policy, *cold_ms)),
    };
    let mut world = World {
        now: 0,
        timers,
        events: BTreeSet::new(),
        count: 0,
        requests: &trace.requests,
        loads: trace.workloads.iter().map(|_| Load::default()).collect(),
        pods: BTreeMap::new(),
        nodes: BTreeMap::new(),
        next: 0,
        pending: VecDeque::new(),
        batch: None,
        brain,
        note,
        outcome: Outcome::default(),
    };
    world.run(trace.length_ms());
    world.outcome.finish()
}

impl World<'_> {
    fn run(&mut self, length_ms: u64) {
        if !self.requests.is_empty() {
            self.at(self.requests[0].at_ms, Event::Arrive(0));
        }
        for event in [Event::Poll, Event::Sync, Event::Disrupt] {
            self.at(0, event);
        }
        let end = length_ms + 24 * 3600 * SECOND;
        while let Some((at, _, event)) = self.events.pop_first() {
            let quiet = self.nodes.is_empty() && self.pending.is_empty();
            if at > end || (at > length_ms && quiet && self.loads.iter().all(|load| load.backlog() == 0)) {
                break;
            }
            self.now = at;
            self.on(event);
        }
        let left: Vec<_> = self.nodes.keys().copied().collect();
        left.into_iter().for_each(|node| self.leave(node));
    }

    fn at(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.insert((at, self.count, event));
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Arrive(n) => self.arrive(n),
            Event::Done(pod) => self.done(pod),
            Event::PodServes(pod) => self.serves(pod),
            Event::NodeJoins(node) => self.joins(node),
            Event::Batch => self.launch(),
            Event::Disrupt => self.disrupt(),
            Event::Validate(node) => self.validate(node),
            Event::Poll => self.poll(),
            Event::Sync => self.sync(),
            Event::Decide => self.decide(),
        }
    }

    fn arrive(&mut self, n: usize) {
        let request = self.requests[n];
        if let Some(next) = self.requests.get(n + 1) {
            self.at(next.at_ms, Event::Arrive(n + 1));
        }
        let before = self.loads[request.workload as usize].backlog();
        let waiting = Waiting { since: self.now, service_ms: request.service_ms };
        self.loads[request.workload as usize].queue.push_back(waiting);
        self.serve(request.workload);
        self.changed(request.workload, before);
    }

    /// Gives what waits to replicas that have nothing to do.
    fn serve(&mut self, workload: u32) {
        let load = &mut self.loads[workload as usize];
        for number in &load.pods {
            let Some(pod) = self.pods.get_mut(number) else { continue };
            let Some(since) = pod.serves.filter(|_| pod.work.is_none()) else { continue };
            let Some(waiting) = load.queue.pop_front() else { return };
            pod.work = Some(waiting);
            load.serving += 1;
            // It came before there was a replica for it.
            self.outcome.served(self.now - waiting.since, waiting.since < since && waiting.since < self.now);
            self.count += 1;
            self.events.insert((self.now + waiting.service_ms, self.count, Event::Done(*number)));
        }
    }

    fn done(&mut self, number: u32) {
        let Some(pod) = self.pods.get_mut(&number) else { return };
        let Some(waiting) = pod.work.take() else { return };
        let (workload, node) = (pod.workload, pod.node);
        self.outcome.busy_ms += waiting.service_ms;
        if let Some(node) = node.and_then(|node| self.nodes.get_mut(&node)) {
            node.worked = self.now;
            node.images.insert(workload, self.now);
        }
        let load = &mut self.loads[workload as usize];
        let before = load.backlog();
        load.serving -= 1;
        self.serve(workload);
        self.changed(workload, before);
    }
}
