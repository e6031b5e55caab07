//! One observation after the other: what is raised at once, what has to stay for a while, and what it takes
//! to be well again.

use std::collections::BTreeMap;

use super::slowdown::Slowdown;
use super::{Finding, Observation, Policy, Reason, State, Verdict, checks};
use crate::gpu::Time;

/// Polls that a fault needs which has an ordinary cause while a node starts or is upgraded: the driver, the
/// device plugin and the API server come late.
const POLLS_OF_WHAT_COMES_LATE: u8 = 3;
/// Polls without a fault before it is over.
const POLLS_TO_RECOVER: u8 = 2;
/// GPUs of a node; the largest have 16.
const GPUS_MAX: usize = 64;

/// NVML's clock event reasons.
const HW_SLOWDOWN: u64 = 0x8;
const HW_THERMAL_SLOWDOWN: u64 = 0x40;
const HW_POWER_BRAKE: u64 = 0x80;

/// A fault, as it was found in the last polls.
#[derive(Debug, Clone)]
struct Fault {
    finding: Finding,
    bad: u8,
    good: u8,
    is_raised: bool,
}

/// What was read over time of one GPU.
#[derive(Debug, Clone, Default)]
struct History {
    uncorrected_ecc_at_start: Option<u64>,
    thermal: Slowdown,
    power_brake: Slowdown,
}

/// The readiness of a node's GPUs over time.
#[derive(Debug, Clone)]
pub struct Readiness {
    policy: Policy,
    /// The newest that is known of everything.
    known: Observation,
    learned_gpus: Option<u32>,
    histories: BTreeMap<String, History>,
    /// By `Reason::fault`.
    faults: BTreeMap<Reason, Fault>,
    state: State,
}

impl Readiness {
    /// Nothing is known yet. `learned_gpus` is the most GPUs that an earlier agent saw here.
    pub fn new(policy: Policy, learned_gpus: Option<u32>) -> Self {
        Self {
            policy,
            known: Observation::default(),
            learned_gpus,
            histories: BTreeMap::new(),
            faults: BTreeMap::new(),
            state: State::Unknown,
        }
    }

    /// The most GPUs that were ever seen here: to be stored, so that one that goes while no agent runs is missed.
    pub const fn learned_gpus(&self) -> Option<u32> {
        self.learned_gpus
    }

    /// What was concluded last.
    pub const fn state(&self) -> State {
        self.state
    }

    /// Judges the next observation. What it does not know stays as it was.
    pub fn poll(&mut self, now: Time, mut observation: Observation) -> Verdict {
        self.remember(now, &mut observation);
        let known = observation.clone().or(&self.known);
        let verdict = match checks::applies(&known, &self.policy) {
            Some(true) => self.judge(&observation, &known),
            Some(false) => {
                self.faults.clear();
                Verdict::not_applicable()
            }
            None => Verdict::nobody_knows(),
        };
        self.known = known;
        self.state = verdict.state;
        verdict
    }

    /// Fills in what takes more than one reading.
    fn remember(&mut self, now: Time, observation: &mut Observation) {
        self.learned_gpus = self.learned_gpus.max(observation.pci_functions).max(observation.nvml_count);
        observation.learned_gpus = observation.learned_gpus.max(self.learned_gpus);
        let Some(gpus) = &mut observation.gpus else { return };
        gpus.truncate(GPUS_MAX);
        for gpu in gpus {
            if !self.histories.contains_key(&gpu.uuid) && self.histories.len() >= GPUS_MAX {
                continue;
            }
            let history = self.histories.entry(gpu.uuid.clone()).or_default();
            // It goes back to 0 when the driver is loaded again.
            let errors = gpu.uncorrected_ecc;
            let start = history.uncorrected_ecc_at_start;
            history.uncorrected_ecc_at_start =
                errors.map_or(start, |errors| Some(start.map_or(errors, |s| s.min(errors))));
            gpu.uncorrected_ecc_at_start = gpu.uncorrected_ecc_at_start.or(history.uncorrected_ecc_at_start);
            // The general bit is set with either of the two others, and alone on old boards.
            let thermal = gpu.clock_event_reasons.map(|reasons| {
                let is_general = reasons & (HW_SLOWDOWN | HW_POWER_BRAKE) == HW_SLOWDOWN;
                is_general || reasons & HW_THERMAL_SLOWDOWN != 0
            });
            let brake = gpu.clock_event_reasons.map(|reasons| reasons & HW_POWER_BRAKE != 0);
            let persists = history.thermal.note(now, thermal, gpu.thermal_slowdown_ns);
            gpu.thermal_slowdown_persists = gpu.thermal_slowdown_persists.or(persists);
            let persists = history.power_brake.note(now, brake, gpu.power_brake_ns);
            gpu.power_brake_persists = gpu.power_brake_persists.or(persists);
        }
    }

    /// `seen` is this poll alone, `known` all that is known: only what was seen counts as a poll.
    fn judge(&mut self, seen: &Observation, known: &Observation) -> Verdict {
        let (seen, known) = (checks::run(seen, &self.policy), checks::run(known, &self.policy));
        let mut findings: Vec<_> =
            known.findings.iter().filter(|finding| finding.reason.is_silence()).cloned().collect();
        for finding in known.findings.into_iter().filter(|finding| !finding.reason.is_silence()) {
            let key = finding.reason.fault();
            let is_seen = seen.findings.iter().any(|other| other.reason.fault() == key);
            if !is_seen && !self.faults.contains_key(&key) {
                // It takes an old reading to see it.
                continue;
            }
            let new = || Fault { finding: finding.clone(), bad: 0, good: 0, is_raised: false };
            let fault = self.faults.entry(key).or_insert_with(new);
            if is_seen {
                fault.bad = fault.bad.saturating_add(1);
                fault.good = 0;
                fault.is_raised |= fault.bad >= polls(key);
                fault.finding = finding;
            }
        }
        self.faults.retain(|key, fault| {
            let check = key.check();
            let is_found = seen.findings.iter().any(|other| other.reason.fault() == *key);
            // Well only by the word of everything that ever had one.
            let is_heard = seen.known[check] > 0 && seen.known[check] >= known.known[check];
            if is_found || known.is_masked[check] || !is_heard {
                return true;
            }
            fault.good = fault.good.saturating_add(1);
            fault.is_raised && fault.good < POLLS_TO_RECOVER
        });
        // Until it has stayed, what comes late only keeps a node from becoming ready.
        let was_ready = matches!(self.state, State::Ready | State::Degraded);
        let meanwhile = if was_ready { State::Ready } else { State::Unknown };
        findings.extend(self.faults.values().map(|fault| {
            let state = if fault.is_raised { fault.finding.state } else { fault.finding.state.min(meanwhile) };
            // Found before it was known that the driver is being replaced: a node is not lost for that.
            let is_excused = known.is_excused && checks::NEED_DRIVER.contains(&fault.finding.reason.check());
            let state = if is_excused { state.min(State::Unknown) } else { state };
            Finding { state, ..fault.finding.clone() }
        }));
        Verdict::of(findings)
    }
}

/// How many polls a fault needs.
const fn polls(reason: Reason) -> u8 {
    match reason.check() {
        1 | 10 | 11 => POLLS_OF_WHAT_COMES_LATE,
        _ => 1,
    }
}
