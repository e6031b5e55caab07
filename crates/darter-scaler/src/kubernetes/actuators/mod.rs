//! What was decided, done at Kubernetes: each act sets a level, so that doing it twice is doing it once.
//!
//! Every write goes out by the fenced client, carries our field manager, and can be taken back (`undo`), but for a
//! claim that is deleted, which is looked at once more before. One after the other: two acts on one thing never
//! overtake each other.

mod buffer;
mod claim;
mod cost;
mod notes;
mod undo;

use std::collections::BTreeMap;
use std::sync::Arc;

use darter_base::kubernetes::{Teller, refusal};
use kube::Client;
use kube::runtime::watcher::DefaultBackoff;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use self::undo::{Undone, undo};
use super::events::Events;
use super::fence::is_not_leading;
use super::metrics::Metrics;
use super::settings::Settings;
use crate::decide::Action;
use crate::fleet::{Act, Actuator, Done, Outcome, Target};

/// Why an act was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wrong {
    /// Somebody else leads.
    NotLeading,
    /// It is another one by now, or somebody else's.
    Conflict(String),
    /// Something else: a word for the metric, and a sentence.
    Failed(&'static str, String),
}

impl Wrong {
    fn of(error: &kube::Error, rights: &str) -> Self {
        if is_not_leading(error) {
            return Self::NotLeading;
        }
        match refusal(error, rights) {
            Some(("conflict" | "not_found", text)) => Self::Conflict(text),
            // A patch of one that has another uid is taken for a try to change that.
            Some(("invalid", text)) if text.contains("metadata.uid") => Self::Conflict(text),
            Some((reason, text)) => Self::Failed(reason, text),
            None => Self::Failed("answer", error.to_string()),
        }
    }
}

/// Carries acts out.
pub struct Actuators {
    client: Client,
    settings: Settings,
    metrics: Arc<Metrics>,
    events: Events,
}

impl Actuators {
    /// By this client, which is to be [`fenced`](super::fenced).
    pub fn new(fenced: Client, settings: &Settings, metrics: Arc<Metrics>, events: Events) -> Self {
        Self { client: fenced, settings: settings.clone(), metrics, events }
    }

    /// Until `stop` or the end of the acts, and what is being done is done. Each act is answered.
    pub async fn run(self, mut acts: mpsc::Receiver<Act>, done: mpsc::Sender<Done>, stop: CancellationToken) {
        let mut tellers: BTreeMap<Actuator, Teller<'_>> = BTreeMap::new();
        let mut pauses = DefaultBackoff::default();
        while let Some(Some(act)) = stop.run_until_cancelled(acts.recv()).await {
            let actuator = Actuator::of(&act.action);
            let teller = tellers.entry(actuator).or_insert_with(|| {
                Teller::new(
                    format!("cannot carry out {}; it is decided again", actuator.as_str()),
                    &self.metrics.write_errors,
                )
            });
            let came = self.carry_out(&act).await;
            let outcome = match &came {
                Ok(()) => {
                    teller.works();
                    Outcome::Done
                }
                Err(Wrong::NotLeading) => Outcome::NotLeading,
                Err(Wrong::Conflict(text)) => {
                    teller.fails("conflict", text);
                    Outcome::Conflict
                }
                Err(Wrong::Failed(reason, text)) => {
                    teller.fails(reason, text);
                    Outcome::Failed
                }
            };
            if done.send(Done { action: act.action, outcome }).await.is_err() {
                return;
            }
            let Err(Wrong::Failed("unreachable" | "throttled" | "unauthorized" | "credentials", _)) = came else {
                pauses = DefaultBackoff::default();
                continue;
            };
            // What waits was decided before: by the time that it could be done it may be wrong.
            while let Ok(act) = acts.try_recv() {
                if done.send(Done { action: act.action, outcome: Outcome::Failed }).await.is_err() {
                    return;
                }
            }
            if let Some(pause) = pauses.next() {
                stop.run_until_cancelled(tokio::time::sleep(pause)).await;
            }
        }
    }

    async fn carry_out(&self, act: &Act) -> Result<(), Wrong> {
        match (&act.action, &act.target) {
            (Action::Rank { cost, .. }, Target::Pod { uid, namespace, name }) => {
                cost::rank(&self.client, &self.settings, &cost::Pod { uid, namespace, name }, *cost).await
            }
            (Action::Buffer { gpus, .. }, Target::Pool { name }) => {
                let spare = buffer::keep(&self.client, &self.settings, name, *gpus).await?;
                if let Some(said) = spare.said(&act.reason) {
                    info!(pool = name, gpus, by = spare.kind(), replicas = spare.replicas, "keeping spare GPUs");
                    self.events.say(said);
                }
                Ok(())
            }
            (Action::Remove { .. }, Target::Node { uid, name, claim }) => {
                let node = claim::Node { name, claim: claim.as_ref() };
                claim::remove(&self.client, &self.settings, &node).await?;
                info!(node = name, reason = act.reason, "removed a node: its claim is deleted");
                self.events.say(claim::said(name, uid, &act.reason));
                Ok(())
            }
            (action, target) => {
                // The controller sends an act to who carries it out, with what it needs.
                Err(Wrong::Failed("invalid", format!("{action:?} of {target:?} is nothing that is done at Kubernetes")))
            }
        }
    }
}
