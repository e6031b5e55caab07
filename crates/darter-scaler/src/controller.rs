//! The one loop: something was heard or time passed, so decide, record, and have it done.
//!
//! It alone changes what the scaler thinks it did. Not here: what follows from what is known (`decide`), and how
//! it is done at Kubernetes.

mod carry_out;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use crate::bell::SOON;
use crate::clock::stopwatch;
use crate::decide::{Action, decide};
use crate::fleet::{Act, Done, Fact};
use crate::hub::{Hub, Moment};
use crate::recorder::Recorder;
use crate::{Decision, Millis};

/// Whatever happens it looks again after this: reports grow old by themselves.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A decision that took so long rests for as long as this many of them: a large cluster costs a quarter of a
/// processor at most.
const REST: u32 = 3;
/// A push waits for no rest longer than this: one that took long for want of a processor is no reason to wait more.
const REST_MAX: Duration = Duration::from_millis(100);
/// Facts that are taken before the next look at the time.
const FACTS_AT_ONCE: usize = 1024;
/// Nothing was recorded for so long: then what is known is, so that a scaler that starts again knows it.
const RECORD_EVERY: Duration = Duration::from_secs(60);
/// What nobody speaks of any more is dropped so often.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// What the loop hears and says, besides the hub.
#[derive(Debug)]
pub struct Controller {
    hub: Arc<Hub>,
    facts: mpsc::Receiver<Fact>,
    done: mpsc::Receiver<Done>,
    acts: Option<mpsc::Sender<Act>>,
    recorder: Option<Recorder>,
    id: u64,
    /// When the last decision was made, and how long that took.
    last: Option<(Instant, Duration)>,
    /// What was recorded last, and when.
    recorded: Option<(Vec<Action>, Instant)>,
    is_frozen: bool,
    swept: Instant,
}

/// A decision as `/v1/decisions` has it: without what it was made from, which is on disk.
#[derive(Serialize)]
struct Told<'a> {
    id: u64,
    now: Millis,
    #[serde(flatten)]
    decision: &'a Decision,
}

impl Controller {
    /// Decides nothing yet. `acts` goes to those who write at Kubernetes, who say on `done` what came of it.
    pub fn new(
        hub: Arc<Hub>,
        facts: mpsc::Receiver<Fact>,
        (acts, done): (Option<mpsc::Sender<Act>>, mpsc::Receiver<Done>),
        recorder: Option<Recorder>,
    ) -> Self {
        let (id, last, recorded, is_frozen, swept) = (0, None, None, false, stopwatch());
        Self { hub, facts, done, acts, recorder, id, last, recorded, is_frozen, swept }
    }

    /// Until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            loop {
                self.hear().await;
                self.turn().await;
            }
        })
        .await;
        // What was heard since the last record is in the next scaler's hands with this.
        self.recorded = None;
        if self.hub.lead.holds()
            && let Some(moment) = self.decide().await
        {
            self.record(&moment);
        }
    }

    /// Until there is something to decide.
    async fn hear(&mut self) {
        let hub = self.hub.clone();
        let earliest = self.last.map_or_else(stopwatch, |(at, took)| at + (took * REST).min(REST_MAX));
        let latest = self.latest();
        let mut facts = Vec::new();
        let (mut facts_end, mut done_end) = (false, false);
        let mut rung = std::pin::pin!(hub.bell.rung(earliest, latest));
        loop {
            tokio::select! {
                () = rung.as_mut() => return,
                count = self.facts.recv_many(&mut facts, FACTS_AT_ONCE), if !facts_end => {
                    facts_end = count == 0;
                    let now = hub.clock.now();
                    let mut fleet = hub.fleet();
                    // That the API server answered changes nothing but how long ago that was.
                    let is_news = facts.iter().any(|fact| *fact != Fact::Watched);
                    facts.drain(..).for_each(|fact| fleet.fact(fact, now));
                    drop(fleet);
                    if is_news {
                        hub.bell.ring(SOON);
                    }
                }
                done = self.done.recv(), if !done_end => match done {
                    Some(done) => self.done(&done),
                    None => done_end = true,
                },
            }
        }
    }

    /// When it looks at the latest: in a while, or when time changes something.
    fn latest(&self) -> Instant {
        let clock = &self.hub.clock;
        let now = clock.now();
        let wake = self.hub.newest.borrow().decision.next_wake;
        let end = self.hub.fleet().next_end(now);
        let soonest = wake.into_iter().chain(end).filter(|at| *at > now).min();
        let latest = stopwatch() + LOOK_EVERY;
        soonest.map_or(latest, |at| clock.instant(at).min(latest))
    }

    /// One decision, and what follows from it.
    async fn turn(&mut self) {
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.swept = stopwatch();
            self.hub.fleet().sweep(self.hub.clock.now());
        }
        let Some(moment) = self.decide().await else { return };
        if self.hub.lead.holds() {
            self.record(&moment);
            self.hub.fleet().decided(&moment.state);
            for action in &moment.decision.actions {
                self.carry_out(action, &moment);
            }
        }
        self.hub.newest.send_replace(moment);
    }

    /// None where that is not to be had: then everything stays as it is.
    async fn decide(&mut self) -> Option<Arc<Moment>> {
        let began = stopwatch();
        // A large cluster takes tens of milliseconds: not on a thread that others wait for.
        let hub = self.hub.clone();
        let id = self.id + 1;
        let decided = tokio::task::spawn_blocking(move || {
            let now = hub.clock.now();
            let state = hub.fleet().state(now);
            let decision = decide(&state, &hub.policy, now);
            Moment { id, now, state, decision }
        });
        let moment = match decided.await {
            Ok(moment) => Arc::new(moment),
            Err(error) => {
                error!(%error, "a decision could not be made: everything stays as it is");
                self.last = Some((stopwatch(), REST_MAX));
                return None;
            }
        };
        self.id = id;
        let took = began.elapsed();
        self.hub.metrics.decision_seconds.observe(took.as_secs_f64());
        self.last = Some((stopwatch(), took));
        debug!(id, actions = moment.decision.actions.len(), took_us = took.as_micros(), "decided");
        Some(moment)
    }

    /// Keeps what does something new, and each minute what is known.
    fn record(&mut self, moment: &Arc<Moment>) {
        let actions = &moment.decision.actions;
        let is_frozen = moment.state.freeze.is_some();
        let is_same = match &self.recorded {
            Some((before, at)) => {
                at.elapsed() < RECORD_EVERY && (actions.is_empty() || before == actions) && is_frozen == self.is_frozen
            }
            None => false,
        };
        if is_same {
            return;
        }
        self.recorded = Some((actions.clone(), stopwatch()));
        self.is_frozen = is_frozen;
        match serde_json::to_string(&Told { id: moment.id, now: moment.now, decision: &moment.decision }) {
            Ok(line) => self.hub.remember(moment.id, line),
            Err(error) => error!(%error, "a decision cannot be shown"),
        }
        if let Some(recorder) = &self.recorder
            && !recorder.keep(moment.clone())
        {
            self.hub.metrics.records_lost.inc();
        }
    }
}
