//! Workloads: what is known of each, its demand, and what KEDA may be told of it.
//!
//! KEDA is told nothing that was not decided on something that was heard: no demand yet is no answer, and none
//! is what is said only while the newest sample of demand says so.

use std::collections::BTreeMap;

use super::WorkloadFact;
use super::known::WorkloadConfig;
use crate::state::{Gap, Needed, Sample, Workload};
use crate::{Millis, Policy};

/// Workloads that only a trigger's metadata describes: whoever reaches the scaler can name some.
pub(super) const DESCRIBED_MAX: usize = 1000;
/// One that KEDA does not ask for any more, for so long, was deleted.
pub(super) const DESCRIBED_FOR_MS: u64 = 3_600_000;
/// The reference platform's: a node and an image of 130 MB.
const LEAD_MS: u64 = 84_000;

/// Demand, as somebody said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// What waits or runs, in thousandths.
    pub backlog_milli: u64,
    /// How old that is.
    pub age_ms: u64,
    /// For how long it says something.
    pub ttl_ms: u64,
}

/// Why demand is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// Nobody described it.
    #[error(
        "no such workload: name it in [[workloads]], or let KEDA ask for it once with a trigger that describes it \
         (pool, maxReplicas)"
    )]
    Unknown,
    /// It says nothing of now.
    #[error("it is {age_ms} ms old, and what is older than {most_ms} ms says nothing of now")]
    Old {
        /// How old it is.
        age_ms: u64,
        /// How old it may be.
        most_ms: u64,
    },
    /// A newer one is here.
    #[error("a newer sample of it is here already")]
    Overtaken,
}

/// Why KEDA is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Nobody described it.
    #[error(
        "no such workload: name it in [[workloads]] of the scaler, or describe it in the trigger's metadata (pool, \
         maxReplicas)"
    )]
    Unknown,
    /// Where it runs is not known.
    #[error("it is not known in which pool it runs: say `pool` in [[workloads]] or in the trigger's metadata")]
    NoPool,
    /// How far it may grow is not known.
    #[error(
        "it is not known how many replicas it may have: say `most` in [[workloads]] or `maxReplicas` in the metadata"
    )]
    NoMost,
    /// Nothing was heard of its demand since this scaler started.
    #[error("no sample of its demand came yet, and silence is not idleness")]
    NoDemand,
    /// Nothing new was heard, and it was told to have none.
    #[error("the newest sample of its demand came {age_ms} ms ago, and silence is not idleness")]
    Stale {
        /// How long ago.
        age_ms: u64,
    },
    /// Not decided yet.
    #[error("not decided yet: ask again")]
    NotYet,
}

impl NoAnswer {
    /// As in `darter_scaler_keda_refusals_total{reason}`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::NoPool => "no_pool",
            Self::NoMost => "no_most",
            Self::NoDemand => "no_demand",
            Self::Stale { .. } => "stale",
            Self::NotYet => "not_yet",
        }
    }
}

/// One workload.
#[derive(Debug, Default)]
pub(super) struct Load {
    config: Option<WorkloadConfig>,
    pub(super) fact: Option<WorkloadFact>,
    /// By KEDA's own words: when it last asked, and with which metadata.
    described: Option<(Millis, WorkloadConfig)>,
    /// Since when it is known at all.
    known: Millis,
    samples: Workloadlike,
    pub(super) answered: u32,
    raised: Option<Millis>,
    ahead: Option<Millis>,
    /// Since when it has nothing to do, and for how long it was to be kept then.
    idle: Option<(Millis, u64)>,
    /// For how long the newest sample says something.
    until: Option<Millis>,
    /// Whether something was decided on a sample.
    decided: bool,
}

/// What decisions learn from, apart from what is said of the workload.
#[derive(Debug, Default)]
struct Workloadlike {
    samples: Vec<Sample>,
    needed: Vec<Needed>,
    gaps: Vec<Gap>,
}

impl Load {
    pub(super) fn new(now: Millis) -> Self {
        Self { known: now, ..Self::default() }
    }

    pub(super) fn configured(config: WorkloadConfig, now: Millis) -> Self {
        Self { config: Some(config), ..Self::new(now) }
    }

    /// Whether somebody says that it is there.
    pub(super) fn is_there(&self, now: Millis) -> bool {
        let described = self.described.as_ref().is_some_and(|(asked, _)| now.since(*asked) < DESCRIBED_FOR_MS);
        self.config.is_some() || self.fact.is_some() || described
    }

    pub(super) const fn is_described_only(&self) -> bool {
        self.config.is_none() && self.fact.is_none()
    }

    pub(super) fn describe(&mut self, words: WorkloadConfig, now: Millis) {
        self.described = Some((now, words));
    }

    /// What all say of it together.
    pub(super) fn words(&self) -> WorkloadConfig {
        let mut words = self.config.clone().unwrap_or_default();
        if let Some((_, described)) = &self.described {
            words = words.or(described);
        }
        let Some(fact) = &self.fact else { return words };
        let metadata = WorkloadConfig::of_metadata(&fact.metadata).unwrap_or_default();
        let told = WorkloadConfig {
            pool: fact.pool.clone(),
            gpus: Some(fact.gpus).filter(|gpus| *gpus > 0),
            least: Some(fact.least),
            most: Some(fact.most).filter(|most| *most > 0),
            ..WorkloadConfig::default()
        };
        words.or(&metadata).or(&told)
    }

    /// As decisions see it, in this pool; none where too little is known to decide.
    pub(super) fn workload(&self, pool: &str, price: u64, now: Millis) -> Option<Workload> {
        let words = self.words();
        let most = words.most.filter(|most| *most > 0)?;
        let gpus = words.gpus.unwrap_or(1);
        let lead_ms = words.lead_ms.unwrap_or(LEAD_MS);
        let cold_ms = words.cold_start_ms.unwrap_or(lead_ms);
        let is_told = self.until.is_some_and(|until| until > now);
        Some(Workload {
            pool: pool.to_owned(),
            gpus,
            least: words.least.unwrap_or(0).min(most),
            most,
            target_milli: words.target_milli.unwrap_or(1000),
            cold_start_micros: u64::from(gpus).saturating_mul(price).saturating_mul(cold_ms) / 3_600_000,
            lead_ms,
            // What was said for a while says nothing after it.
            samples: if is_told { self.samples.samples.clone() } else { Vec::new() },
            floors: words.floors,
            answered: self.answered,
            raised: self.raised,
            ahead: self.ahead,
            known: self.known,
            needed: self.samples.needed.clone(),
            gaps: self.samples.gaps.clone(),
        })
    }

    /// Takes a sample. `kept_ms` is for how long the last replica is kept if a time without work begins now.
    pub(super) fn demand(
        &mut self,
        demand: Demand,
        policy: &Policy,
        kept_ms: impl FnOnce() -> u64,
        now: Millis,
    ) -> Result<(), NotTaken> {
        let most_ms = policy.demand_lifetime_ms.min(demand.ttl_ms);
        if demand.age_ms >= most_ms {
            return Err(NotTaken::Old { age_ms: demand.age_ms, most_ms });
        }
        let at = Millis(now.0.saturating_sub(demand.age_ms));
        let newest = self.samples.samples.last();
        if newest.is_some_and(|newest| newest.at > at) {
            return Err(NotTaken::Overtaken);
        }
        let before = newest.map(|newest| newest.backlog_milli);
        if let Some((since, kept_ms)) = self.idle.filter(|_| demand.backlog_milli > 0) {
            self.samples.gaps.push(Gap { ms: at.since(since), kept_ms });
            let many = self.samples.gaps.len().saturating_sub(crate::state::GAPS_MAX);
            self.samples.gaps.drain(..many);
            self.idle = None;
        } else if demand.backlog_milli == 0 && before.is_some_and(|before| before > 0) {
            self.idle = Some((at, kept_ms()));
        }
        let words = self.words();
        let sample = Sample { at, backlog_milli: demand.backlog_milli };
        self.samples.with(&words, |workload| workload.observe(sample));
        self.until = Some(at.plus(most_ms));
        Ok(())
    }

    /// Replicas, or why that is not said.
    pub(super) fn answer(&self, has_pool: bool, now: Millis) -> Result<u32, NoAnswer> {
        if !self.is_there(now) {
            return Err(NoAnswer::Unknown);
        }
        if !has_pool {
            return Err(NoAnswer::NoPool);
        }
        if self.words().most.unwrap_or(0) == 0 {
            return Err(NoAnswer::NoMost);
        }
        let newest = self.samples.samples.last().ok_or(NoAnswer::NoDemand)?;
        if !self.decided {
            return Err(NoAnswer::NotYet);
        }
        let is_told = self.until.is_some_and(|until| until > now);
        if self.answered == 0 && !is_told {
            return Err(NoAnswer::Stale { age_ms: now.since(newest.at) });
        }
        Ok(self.answered)
    }

    /// The newest sample.
    pub(super) fn newest(&self) -> Option<Sample> {
        self.samples.samples.last().copied()
    }

    /// When the newest sample says nothing any more.
    pub(super) const fn until(&self) -> Option<Millis> {
        self.until
    }

    /// It was decided on: what was known then holds for what is said of it.
    pub(super) const fn decided(&mut self) {
        self.decided = true;
    }

    /// KEDA is told so many; whether that is more.
    pub(super) fn told(&mut self, replicas: u32, now: Millis) -> bool {
        let (words, answered, raised, ahead) = (self.words(), self.answered, self.raised, self.ahead);
        let told = self.samples.with(&words, |workload| {
            (workload.answered, workload.raised, workload.ahead) = (answered, raised, ahead);
            let is_more = workload.tell(replicas, now);
            (is_more, workload.raised, workload.ahead)
        });
        let is_more;
        (is_more, self.raised, self.ahead) = told;
        self.answered = replicas;
        is_more
    }

    /// Replicas that are there already when nothing was decided yet: what a scaler before this one asked for.
    pub(super) fn found(&mut self, replicas: u32) {
        if !self.decided {
            self.answered = replicas;
        }
    }

    /// As a scaler before this one left it.
    pub(super) fn resume(&mut self, left: &Workload) {
        if self.decided {
            return;
        }
        self.answered = left.answered;
        self.known = left.known;
        self.raised = left.raised;
        self.ahead = left.ahead;
        self.samples.needed.clone_from(&left.needed);
        self.samples.gaps.clone_from(&left.gaps);
    }
}

impl Workloadlike {
    /// Does something to a workload that has only what this is, and what demand is measured by.
    fn with<T>(&mut self, words: &WorkloadConfig, act: impl FnOnce(&mut Workload) -> T) -> T {
        let mut workload = Workload {
            pool: String::new(),
            gpus: 1,
            least: 0,
            most: words.most.unwrap_or(u32::MAX),
            target_milli: words.target_milli.unwrap_or(1000),
            cold_start_micros: 0,
            lead_ms: 0,
            samples: std::mem::take(&mut self.samples),
            floors: Vec::new(),
            answered: 0,
            raised: None,
            ahead: None,
            known: Millis(0),
            needed: std::mem::take(&mut self.needed),
            gaps: Vec::new(),
        };
        let done = act(&mut workload);
        self.samples = workload.samples;
        self.needed = workload.needed;
        done
    }
}

/// Of all of them, by name.
pub(super) type Loads = BTreeMap<String, Load>;
