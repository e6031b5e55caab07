//! The simplest model that tells keep-alive times apart: one replica of each workload, that serves its
//! requests one after the other.
//!
//! A cold start makes the request wait for the lead time; a replica that does nothing costs its time. What
//! a cold start is worth in GPU-seconds, P, is the user's to say. After the last request the replica is
//! kept as long as ever, and that counts.

use std::collections::BTreeSet;

use crate::decide::kept_ms;
use crate::state::{Gap, Pool, Sample, Workload};
use crate::traces::{Request, Trace};
use crate::{Action, Millis, Policy, State, decide};

/// What it came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Requests.
    pub requests: u64,
    /// Of which so many found no replica.
    pub colds: u64,
    /// Replicas without work.
    pub idle_ms: u64,
}

impl Cost {
    /// Idle time and cold starts, in milliseconds of a GPU.
    pub const fn total_ms(&self, cold_ms: u64) -> u64 {
        self.idle_ms.saturating_add(self.colds.saturating_mul(cold_ms))
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.colds += other.colds;
        self.idle_ms += other.idle_ms;
    }
}

/// The same time for all.
pub fn fixed(trace: &Trace, lead_ms: u64, keep_ms: u64) -> Cost {
    let mut all = Cost::default();
    for requests in trace.by_workload() {
        all.add(serve(&requests, lead_ms, keep_ms));
    }
    all
}

fn serve(requests: &[Request], lead_ms: u64, keep_ms: u64) -> Cost {
    let mut cost = Cost::default();
    let mut requests = requests.iter().peekable();
    // When all that came is done; none before the first.
    let mut rest: Option<u64> = None;
    while let Some(first) = requests.next() {
        cost.requests += 1;
        let gap = rest.map(|done| first.at_ms - done);
        let warm = gap.is_some_and(|gap| gap <= keep_ms);
        cost.idle_ms += gap.map_or(0, |gap| gap.min(keep_ms));
        cost.colds += u64::from(!warm);
        let start = if warm { first.at_ms } else { first.at_ms + lead_ms };
        let mut done = start + first.service_ms;
        // What comes before that waits its turn.
        while let Some(next) = requests.next_if(|next| next.at_ms <= done) {
            cost.requests += 1;
            done += next.service_ms;
        }
        rest = Some(done);
    }
    cost.idle_ms += rest.map_or(0, |_| keep_ms);
    cost
}

/// The fixed time that costs least, known only afterwards, of a grid of ten steps for each doubling.
pub fn best_fixed(trace: &Trace, lead_ms: u64, cold_ms: u64) -> (u64, Cost) {
    let steps = std::iter::successors(Some(10_000_u64), |ms| Some(ms + ms / 14));
    let grid = std::iter::once(0).chain(steps.take_while(|ms| *ms <= 2 * 3_600_000));
    let costs = grid.map(|keep_ms| (fixed(trace, lead_ms, keep_ms), keep_ms));
    let best = costs.min_by_key(|(cost, keep_ms)| (cost.total_ms(cold_ms), *keep_ms));
    best.map_or_else(|| (0, Cost::default()), |(cost, keep_ms)| (keep_ms, cost))
}

/// What [`decide`] says.
pub fn decided(trace: &Trace, lead_ms: u64, cold_ms: u64, policy: &Policy) -> Cost {
    let mut played = Played::new(trace, lead_ms, cold_ms, policy);
    // At the same moment work comes before a replica goes.
    for request in &trace.requests {
        played.until(request.at_ms);
        played.work(*request);
    }
    played.until(u64::MAX);
    played.cost
}

/// One micro-dollar a millisecond, so that costs are milliseconds.
const MICROS_PER_HOUR: u64 = 3_600_000;
/// Longer than anything is kept: what is not given up by then is kept for ever.
const FOR_EVER_MS: u64 = 7 * 24 * 3_600_000;

/// What a replica does.
#[derive(Clone, Copy)]
enum Replica {
    Gone { since: Option<(u64, u64)> },
    Works { until: u64 },
    Rests { since: u64, kept_ms: u64 },
}

/// A state that is told what happens, and asked what to do.
struct Played<'a> {
    state: State,
    policy: &'a Policy,
    lead_ms: u64,
    names: Vec<String>,
    replicas: Vec<Replica>,
    /// When a replica is done, or may go.
    due: BTreeSet<(u64, u32)>,
    cost: Cost,
}

impl<'a> Played<'a> {
    fn new(trace: &Trace, lead_ms: u64, cold_ms: u64, policy: &'a Policy) -> Self {
        let workload = Workload {
            pool: "gpu".to_owned(),
            gpus: 1,
            least: 0,
            most: 1,
            target_milli: 1000,
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
        let names: Vec<_> = (0..trace.workloads.len()).map(|n| format!("played/{n:05}")).collect();
        let nodes_most = u32::try_from(names.len()).unwrap_or(u32::MAX);
        let pool = Pool { micros_per_hour: MICROS_PER_HOUR, gpus: 1, nodes_most, ..Pool::default() };
        let state = State {
            workloads: names.iter().map(|name| (name.clone(), workload.clone())).collect(),
            pools: [("gpu".to_owned(), pool)].into(),
            ..State::default()
        };
        let replicas = vec![Replica::Gone { since: None }; names.len()];
        Self { state, policy, lead_ms, names, replicas, due: BTreeSet::new(), cost: Cost::default() }
    }

    fn hear(&mut self, at: u64, number: u32, backlog_milli: u64) {
        self.state.watched = Millis(at);
        if let Some(workload) = self.state.workloads.get_mut(&self.names[number as usize]) {
            workload.observe(Sample { at: Millis(at), backlog_milli });
        }
    }

    /// Asks and does. Of the others nothing fresh is known here, so that they stay as they are: each is
    /// asked about when its own time comes. Whether this one has a replica now, and when to ask again.
    fn ask(&mut self, at: u64, number: u32) -> (bool, Option<u64>) {
        let decision = decide(&self.state, self.policy, Millis(at));
        let name = &self.names[number as usize];
        for action in &decision.actions {
            if let Action::Answer { workload, replicas } = action
                && workload == name
                && let Some(workload) = self.state.workloads.get_mut(workload)
            {
                workload.answered = *replicas;
            }
        }
        let there = self.state.workloads.get(name).is_some_and(|workload| workload.answered > 0);
        (there, decision.next_wake.map(|wake| wake.0))
    }

    /// A request comes.
    fn work(&mut self, request: Request) {
        let (at, number) = (request.at_ms, request.workload);
        self.cost.requests += 1;
        let gap = match self.replicas[number as usize] {
            Replica::Works { until } => {
                self.due.remove(&(until, number));
                return self.works(number, until + request.service_ms);
            }
            Replica::Rests { since, kept_ms } => {
                self.cost.idle_ms += at - since;
                self.due.retain(|(_, other)| *other != number);
                Some((at - since, kept_ms))
            }
            Replica::Gone { since } => since.map(|(since, kept_ms)| (at - since, kept_ms)),
        };
        if let (Some((ms, kept_ms)), Some(workload)) = (gap, self.state.workloads.get_mut(&self.names[number as usize]))
        {
            workload.resume(Gap { ms, kept_ms });
        }
        let warm = matches!(self.replicas[number as usize], Replica::Rests { .. });
        self.hear(at, number, 1000);
        let start = if warm {
            at
        } else {
            self.cost.colds += 1;
            self.ask(at, number);
            at + self.lead_ms
        };
        self.works(number, start + request.service_ms);
    }

    fn works(&mut self, number: u32, until: u64) {
        self.replicas[number as usize] = Replica::Works { until };
        self.due.insert((until, number));
    }

    /// All that is due before `end`.
    fn until(&mut self, end: u64) {
        while let Some((at, number)) = self.due.first().copied().filter(|(at, _)| *at < end) {
            self.due.remove(&(at, number));
            match self.replicas[number as usize] {
                Replica::Works { .. } => {
                    self.hear(at, number, 1000);
                    self.hear(at, number, 0);
                    let kept_ms = kept_ms(&self.state, self.policy, &self.names[number as usize]);
                    self.replicas[number as usize] = Replica::Rests { since: at, kept_ms };
                    self.due.insert((at + kept_ms, number));
                }
                Replica::Rests { since, kept_ms } => self.may_go(at, number, (since, kept_ms)),
                Replica::Gone { .. } => {}
            }
        }
    }

    fn may_go(&mut self, at: u64, number: u32, (since, kept_ms): (u64, u64)) {
        self.hear(at, number, 0);
        let (there, wake) = self.ask(at, number);
        if !there {
            self.cost.idle_ms += at - since;
            self.replicas[number as usize] = Replica::Gone { since: Some((since, kept_ms)) };
        } else if at - since < FOR_EVER_MS {
            // What others did in between made it stay longer.
            self.due.insert((wake.unwrap_or(u64::MAX).max(at + 1), number));
        } else {
            self.cost.idle_ms += FOR_EVER_MS;
        }
    }
}
