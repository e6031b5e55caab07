//! The readings of one GPU, the newest that matter, and what they say together.

use std::collections::VecDeque;
use std::time::Duration;

use super::floor::{Floor, Learner};
use super::{Evidence, Idleness, Policy, Sample, Says, State, Witness};
use crate::gpu::Time;

/// Readings that are kept: the long window at one a second, which is as often as anybody may look.
const LOOKS_MAX: usize = 1024;

/// One reading and what it says together with the one before.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Time,
    activity: Option<f64>,
    is_idle_bit_set: Option<bool>,
    milliwatts: Option<f64>,
    pcie_rate: Option<f64>,
    memory: Option<u64>,
    processes: Option<u32>,
    is_allocated: Option<bool>,
    has_mig: bool,
}

impl Look {
    /// By activity, and where there is none (MIG before Hopper) by the idle bit.
    fn is_busy(&self) -> Option<bool> {
        self.activity.map(|activity| activity > 0.0).or_else(|| self.is_idle_bit_set.map(|is_set| !is_set))
    }
}

/// One GPU over time.
#[derive(Debug, Clone)]
pub struct Idle {
    policy: Policy,
    /// The driver came up then.
    initialised: Time,
    last: Option<Sample>,
    looks: VecDeque<Look>,
    learner: Learner,
    state: State,
    since: Time,
    idle_since: Option<Time>,
}

impl Idle {
    /// Nothing is known of it but the least power that an earlier agent saw. NVML was started at `now`.
    pub fn new(now: Time, policy: Policy, floor: Floor) -> Self {
        Self {
            policy,
            initialised: now,
            last: None,
            looks: VecDeque::new(),
            learner: Learner::new(floor),
            state: State::Unknown,
            since: now,
            idle_since: None,
        }
    }

    /// The driver or NVML was started again: counters begin anew, and so do the readings.
    pub fn initialised(&mut self, now: Time) {
        self.initialised = now;
        self.last = None;
        self.looks.clear();
    }

    /// The least power that was seen.
    pub const fn floor(&self) -> Floor {
        self.learner.floor
    }

    /// The next reading. One that is not newer than the last is dropped.
    pub fn note(&mut self, sample: Sample) {
        let is_settled = sample.at.since(self.initialised) >= self.policy.settle;
        if !is_settled || self.last.is_some_and(|last| last.at >= sample.at) {
            return;
        }
        let look = self.look(&sample);
        self.last = Some(sample);
        self.looks.push_back(look);
        while self.looks.len() > LOOKS_MAX
            || self.looks.front().is_some_and(|oldest| look.at.since(oldest.at) > self.policy.long_window)
        {
            self.looks.pop_front();
        }
        // Only what the driver itself calls idle: a GPU that works all day has a least power too.
        let is_idle = look.is_idle_bit_set == Some(true) && look.activity.unwrap_or(0.0) <= 0.0;
        let idle = look.memory.filter(|_| is_idle).zip(look.milliwatts);
        let idle = idle.map(|(memory, milliwatts)| (self.is_loaded(memory), milliwatts));
        self.learner.note(look.at, self.policy.window, idle);
    }

    #[cfg(test)]
    pub(super) fn looks(&self) -> usize {
        self.looks.len()
    }

    fn look(&self, sample: &Sample) -> Look {
        let before = self.last.filter(|last| sample.at.since(last.at) <= self.policy.gap);
        // A counter that falls has wrapped or was reset: this once it says nothing.
        let rate = |counter: fn(&Sample) -> Option<u64>| {
            let before = before.as_ref()?;
            let more = counter(sample)?.checked_sub(counter(before)?)?;
            Some(more as f64 / sample.at.since(before.at).as_secs_f64())
        };
        let ratio = |percent: Option<u8>| percent.map(|percent| f64::from(percent) / 100.0);
        let sm_active = sample.sm_active_ratio.filter(|ratio| ratio.is_finite());
        let sm_active = sm_active.map(|ratio| if ratio < self.policy.sm_active_ratio { 0.0 } else { ratio });
        let activity = [ratio(sample.utilization_percent), ratio(sample.utilization_max_percent), sm_active];
        Look {
            at: sample.at,
            activity: activity.into_iter().flatten().reduce(f64::max),
            is_idle_bit_set: sample.is_idle_bit_set,
            milliwatts: rate(|sample| sample.energy_millijoules)
                .or_else(|| sample.power_milliwatts.map(|power| power as f64)),
            pcie_rate: rate(|sample| sample.pcie_bytes),
            memory: sample.memory_used_bytes,
            processes: sample.processes,
            is_allocated: sample.is_allocated,
            has_mig: sample.has_mig,
        }
    }

    const fn is_loaded(&self, memory: u64) -> bool {
        memory >= self.policy.memory_empty_bytes.saturating_add(self.policy.memory_baseline_bytes)
    }

    /// What it does now.
    pub fn judge(&mut self, now: Time) -> Idleness {
        let window: Vec<_> = self.looks.iter().filter(|look| now.since(look.at) <= self.policy.window).collect();
        let evidence = self.evidence(now, &window);
        let state = if self.is_whole(now, &window) { self.conclude(&window, &evidence) } else { State::Unknown };
        // One witness is enough, also of a window with holes.
        let is_busy = evidence.iter().any(|evidence| evidence.says == Says::Busy);
        let state = if is_busy { State::Busy } else { state };
        let busy_ratio = self.busy_ratio(now);
        if state != self.state {
            (self.state, self.since) = (state, now);
        }
        let is_idle = matches!(state, State::Empty | State::LoadedIdle);
        self.idle_since = is_idle.then(|| self.idle_since.unwrap_or(now));
        Idleness { state, since: self.since, idle_since: self.idle_since, busy_ratio, evidence }
    }

    /// Whether there are readings from all of the window, and the last is of now.
    fn is_whole(&self, now: Time, window: &[&Look]) -> bool {
        let Some((oldest, newest)) = window.first().zip(window.last()) else { return false };
        let gap = self.policy.gap;
        window.len() >= self.policy.readings_min
            && now.since(newest.at) <= gap
            && now.since(oldest.at) + gap >= self.policy.window
            && window.windows(2).all(|pair| pair[1].at.since(pair[0].at) <= gap)
    }

    fn conclude(&self, window: &[&Look], evidence: &[Evidence]) -> State {
        let says_idle = |witness| evidence.iter().any(|found| found.witness == witness && found.says == Says::Idle);
        let is_known = window.iter().all(|look| look.memory.is_some() && (look.activity.is_some() || look.has_mig));
        if !is_known {
            return State::Unknown;
        }
        let is_free = window.iter().all(|look| look.is_allocated == Some(false));
        if is_free && says_idle(Witness::Memory) && says_idle(Witness::Processes) {
            return State::Empty;
        }
        let witnesses = [Witness::Activity, Witness::IdleBit, Witness::Power];
        let votes = witnesses.into_iter().filter(|witness| says_idle(*witness)).count();
        if votes >= 2 { State::LoadedIdle } else { State::Unknown }
    }

    fn evidence(&self, now: Time, window: &[&Look]) -> Vec<Evidence> {
        let policy = &self.policy;
        let all = Values { now, window };
        let looks = window.len() as f64;

        let activity = all.of(|look| look.activity);
        let highest = activity.known.iter().copied().reduce(f64::max);
        let activity = activity.evidence(Witness::Activity, highest, Some(0.0), |value, is_whole| match value {
            _ if value > 0.0 => Says::Busy,
            _ if is_whole => Says::Idle,
            _ => Says::Nothing,
        });

        let bit = all.of(|look| look.is_idle_bit_set.map(f64::from));
        let (set, known) = (bit.known.iter().sum::<f64>(), bit.known.len() as f64);
        let ratio = (known > 0.0).then(|| set / known);
        let bit = bit.evidence(Witness::IdleBit, ratio, Some(policy.idle_bit_ratio), |_, _| {
            // What is not known has it neither set nor clear.
            if set >= policy.idle_bit_ratio * looks {
                Says::Idle
            } else if known - set > (1.0 - policy.idle_bit_ratio) * looks {
                Says::Busy
            } else {
                Says::Nothing
            }
        });

        let memory = all.of(|look| look.memory.map(|bytes| bytes as f64));
        let most = window.iter().filter_map(|look| look.memory).max();
        let power = all.of(|look| look.milliwatts);
        let limit = most.and_then(|most| self.learner.floor.of(self.is_loaded(most)));
        let limit = limit.map(|floor| floor * (1.0 + policy.power_tolerance) / 1000.0);
        let watts = power.mean().map(|milliwatts| milliwatts / 1000.0);
        let power = power.evidence(Witness::Power, watts, limit, |watts, is_whole| match limit {
            Some(limit) if watts > limit => Says::Busy,
            Some(_) if is_whole => Says::Idle,
            _ => Says::Nothing,
        });

        let pcie = all.of(|look| look.pcie_rate);
        let (rate, limit) = (pcie.mean(), policy.pcie_bytes_per_second);
        let pcie =
            pcie.evidence(
                Witness::Pcie,
                rate,
                Some(limit),
                |rate, _| {
                    if rate > limit { Says::Busy } else { Says::Nothing }
                },
            );

        let most_bytes = most.map(|most| most as f64);
        let limit = policy.memory_empty_bytes.saturating_add(policy.memory_baseline_bytes) as f64;
        let memory = memory.evidence(Witness::Memory, most_bytes, Some(limit), |used, is_whole| {
            if used < limit && is_whole { Says::Idle } else { Says::Nothing }
        });

        let processes = all.of(|look| look.processes.map(f64::from));
        let most = processes.known.iter().copied().reduce(f64::max);
        let processes = processes.evidence(Witness::Processes, most, Some(0.0), |most, is_whole| {
            if most <= 0.0 && is_whole { Says::Idle } else { Says::Nothing }
        });

        let allocation = all.of(|look| look.is_allocated.map(f64::from));
        let most = allocation.known.iter().copied().reduce(f64::max);
        let allocation = allocation.evidence(Witness::Allocation, most, None, |_, _| Says::Nothing);
        vec![activity, bit, power, pcie, memory, processes, allocation]
    }

    fn busy_ratio(&self, now: Time) -> Option<f64> {
        let looks = self.looks.iter().filter(|look| now.since(look.at) <= self.policy.long_window);
        let told = looks.filter_map(Look::is_busy);
        let (busy, all) = told.fold((0u32, 0u32), |(busy, all), is_busy| (busy + u32::from(is_busy), all + 1));
        (all > 0).then(|| f64::from(busy) / f64::from(all))
    }
}

struct Values<'a> {
    now: Time,
    window: &'a [&'a Look],
}

/// What is known of one kind of reading.
struct Known {
    known: Vec<f64>,
    is_whole: bool,
    age: Option<Duration>,
}

impl Values<'_> {
    fn of(&self, value: impl Fn(&Look) -> Option<f64>) -> Known {
        let known: Vec<_> = self.window.iter().filter_map(|look| value(look)).collect();
        let newest = self.window.iter().rev().find(|look| value(look).is_some());
        let is_whole = known.len() == self.window.len();
        Known { is_whole, known, age: newest.map(|look| self.now.since(look.at)) }
    }
}

impl Known {
    fn mean(&self) -> Option<f64> {
        (!self.known.is_empty()).then(|| self.known.iter().sum::<f64>() / self.known.len() as f64)
    }

    fn evidence(
        &self,
        witness: Witness,
        value: Option<f64>,
        limit: Option<f64>,
        says: impl FnOnce(f64, bool) -> Says,
    ) -> Evidence {
        let says = value.map_or(Says::Nothing, |value| says(value, self.is_whole));
        Evidence { witness, says, value, limit, age: self.age }
    }
}
