//! The simplest model that tells keep-alive times apart: one replica of each workload, that serves its
//! requests one after the other.
//!
//! A cold start makes the request wait for the lead time; a replica that does nothing costs its time. What
//! a cold start is worth in GPU-seconds, P, is the user's to say. After the last request the replica is
//! kept as long as ever, and that counts.

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

/// Who says for how long a replica is kept.
trait Keeper {
    /// Work came, `gap_ms` after the last of it was done.
    fn work(&mut self, at: Millis, gap_ms: Option<u64>);
    /// Work is done: for how long the replica stays, if nothing comes.
    fn rest(&mut self, at: Millis) -> u64;
}

fn serve(requests: &[Request], lead_ms: u64, keeper: &mut impl Keeper) -> Cost {
    let mut cost = Cost::default();
    let mut requests = requests.iter().peekable();
    // When all that came is done, and for how long the replica stays then; none before the first.
    let mut rest: Option<(u64, u64)> = None;
    while let Some(first) = requests.next() {
        cost.requests += 1;
        let gap = rest.map(|(done, kept)| (first.at_ms - done, kept));
        keeper.work(Millis(first.at_ms), gap.map(|(gap, _)| gap));
        let warm = gap.is_some_and(|(gap, kept)| gap <= kept);
        cost.idle_ms += gap.map_or(0, |(gap, kept)| gap.min(kept));
        cost.colds += u64::from(!warm);
        let start = if warm { first.at_ms } else { first.at_ms + lead_ms };
        let mut done = start + first.service_ms;
        // What comes before that waits its turn.
        while let Some(next) = requests.next_if(|next| next.at_ms <= done) {
            cost.requests += 1;
            done += next.service_ms;
        }
        rest = Some((done, keeper.rest(Millis(done))));
    }
    cost.idle_ms += rest.map_or(0, |(_, kept)| kept);
    cost
}

struct Fixed(u64);

impl Keeper for Fixed {
    fn work(&mut self, _: Millis, _: Option<u64>) {}

    fn rest(&mut self, _: Millis) -> u64 {
        self.0
    }
}

/// The same time for all.
pub fn fixed(trace: &Trace, lead_ms: u64, keep_ms: u64) -> Cost {
    let mut all = Cost::default();
    for requests in trace.by_workload() {
        all.add(serve(&requests, lead_ms, &mut Fixed(keep_ms)));
    }
    all
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
    let mut all = Cost::default();
    for requests in trace.by_workload() {
        all.add(serve(&requests, lead_ms, &mut Decided::new(lead_ms, cold_ms, policy)));
    }
    all
}

const NAME: &str = "replay/model";
/// One micro-dollar a millisecond, so that costs are milliseconds.
const MICROS_PER_HOUR: u64 = 3_600_000;

/// A state with one workload, that is told what happens and asked what to do.
struct Decided<'a> {
    state: State,
    policy: &'a Policy,
    kept_ms: u64,
}

impl<'a> Decided<'a> {
    fn new(lead_ms: u64, cold_ms: u64, policy: &'a Policy) -> Self {
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
            known: Millis(0),
            needed: Vec::new(),
            gaps: Vec::new(),
        };
        let pool = Pool { micros_per_hour: MICROS_PER_HOUR, gpus: 1, nodes_most: 1, ..Pool::default() };
        let mut state = State::default();
        state.workloads.insert(NAME.to_owned(), workload);
        state.pools.insert("gpu".to_owned(), pool);
        Self { state, policy, kept_ms: 0 }
    }

    fn hear(&mut self, at: Millis, backlog_milli: u64) {
        self.state.watched = at;
        if let Some(workload) = self.state.workloads.get_mut(NAME) {
            workload.observe(Sample { at, backlog_milli });
        }
    }

    /// Asks and does. Whether the workload has a replica now, and when to ask again.
    fn ask(&mut self, at: Millis) -> (bool, Option<Millis>) {
        let decision = decide(&self.state, self.policy, at);
        for action in &decision.actions {
            if let (Action::Answer { replicas, .. }, Some(workload)) = (action, self.state.workloads.get_mut(NAME)) {
                workload.answered = *replicas;
            }
        }
        let replicas = self.state.workloads.get(NAME).map_or(0, |workload| workload.answered);
        (replicas > 0, decision.next_wake)
    }
}

impl Keeper for Decided<'_> {
    fn work(&mut self, at: Millis, gap_ms: Option<u64>) {
        let kept_ms = self.kept_ms;
        if let (Some(ms), Some(workload)) = (gap_ms, self.state.workloads.get_mut(NAME)) {
            workload.resume(Gap { ms, kept_ms });
        }
        self.hear(at, 1000);
        self.ask(at);
    }

    fn rest(&mut self, at: Millis) -> u64 {
        self.hear(at, 1000);
        self.hear(at, 0);
        let mut now = at;
        // Each answer says when to ask again; an hour and a bit more is the longest that anything is kept.
        while let (true, wake) = self.ask(now) {
            let Some(wake) = wake.filter(|wake| wake.since(at) < 7 * 24 * MICROS_PER_HOUR) else {
                return u64::MAX >> 20;
            };
            now = wake;
            self.hear(now, 0);
        }
        self.kept_ms = now.since(at);
        self.kept_ms
    }
}
