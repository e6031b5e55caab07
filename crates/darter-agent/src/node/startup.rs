//! Takes the startup taint off this node when the core says so (`darter_core::startup`), and nothing else.
//!
//! By a JSON patch that names the taint it means: whoever changes taints at the same moment loses nothing. A
//! taint is never added.

use std::time::{Duration, Instant};

use darter_core::ready::State;
use darter_core::startup::{Decision, Gpus, Part, Seen};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use super::door::{Door, Failed};
use super::events::{Events, Said};
use super::facts::{Facts, Taint};
use super::{Around, Known, MANAGER, Startup};
use crate::metrics::{CheckLabels, Metrics};

/// The effect of the taint.
pub(super) const EFFECT: &str = "NoSchedule";
/// Tries against others who change taints at the same time, before a pause.
const TRIES: usize = 8;
/// The watch tells within milliseconds that the taint is gone; it may be broken just then.
const TOLD: Duration = Duration::from_secs(10);
/// Nothing is due: something has to change first.
const NEVER: Duration = Duration::from_secs(3600);

/// Watches for the moment.
pub(super) struct Keeper<'a> {
    /// The node's name.
    pub(super) node: &'a str,
    /// The taint's key.
    pub(super) key: &'a str,
    pub(super) deadline: Duration,
    pub(super) known: watch::Receiver<Known>,
    pub(super) around: Around,
    pub(super) door: Door<'a>,
    pub(super) events: &'a Events<'a>,
    pub(super) metrics: &'a Metrics,
    pub(super) standing: &'a watch::Sender<Startup>,
    pub(super) began: Instant,
}

/// What came of a removal.
enum Outcome {
    Removed,
    /// Somebody else was quicker.
    WasGone,
    /// It is tried again.
    Failed,
}

impl Keeper<'_> {
    /// Never ends.
    pub(super) async fn run(mut self) {
        let mut said = Vec::new();
        let mut told_late = false;
        let mut told_effect = false;
        let mut judged = self.around.gpus.judgements();
        for part in Part::ALL.into_iter().filter(|part| part.fails_open()) {
            // Its first one is a rise.
            self.metrics.startup_failed_open.get_or_create(&CheckLabels { check: part.as_str() }).inc_by(0);
        }
        loop {
            let facts = self.known.borrow_and_update().clone();
            judged.mark_unchanged();
            self.around.unchanged();
            let mut wait = NEVER;
            if let Some(facts) = &facts {
                let taints = || facts.taints.iter().filter(|taint| taint.key == self.key);
                if let Some(taint) = taints().find(|taint| taint.effect != EFFECT)
                    && !std::mem::replace(&mut told_effect, true)
                {
                    let Taint { key, effect } = taint;
                    warn!(key, effect, "a taint has the key of the startup taint and another effect: it is left alone");
                }
                if taints().any(|taint| taint.effect == EFFECT) {
                    let seen = self.look(facts);
                    let decision = seen.decide();
                    self.show(&seen, &decision);
                    match decision {
                        Decision::Keep { waits_for, is_late } => {
                            wait = if is_late { NEVER } else { seen.left() };
                            if waits_for != said {
                                info!(node = self.node, waits_for = words(&waits_for), "the startup taint stays");
                                said = waits_for;
                            }
                            if is_late && !std::mem::replace(&mut told_late, true) {
                                self.tell_late(&seen);
                            }
                        }
                        Decision::Remove { failed_open } => {
                            match self.remove(facts.taints.clone()).await {
                                Outcome::Removed => self.tell_removed(&seen, &failed_open),
                                Outcome::WasGone => info!(node = self.node, "somebody else removed the startup taint"),
                                Outcome::Failed => {
                                    self.door.pause().await;
                                    continue;
                                }
                            }
                            (said, told_late) = (Vec::new(), false);
                            let is_gone = |known: &Known| known.as_ref().is_none_or(|facts| !self.is_there(facts));
                            // Late is not wrong: it is looked at again.
                            let _ = tokio::time::timeout(TOLD, self.known.clone().wait_for(is_gone)).await;
                            continue;
                        }
                    }
                } else {
                    self.show_gone();
                }
            }
            tokio::select! {
                // Whoever tells of these lives as long as this.
                _ = self.known.changed() => {}
                _ = judged.changed() => {}
                () = self.around.changed() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn is_there(&self, facts: &Facts) -> bool {
        index(&facts.taints, self.key).is_some()
    }

    fn look(&self, facts: &Facts) -> Seen {
        let Around { gpus, serving, hosts, registries, missing_images } = &self.around;
        let registries = registries.borrow();
        let (hosts, verdict) = (hosts.borrow(), gpus.judgement().map(|judgement| judgement.verdict.state));
        let gpus = match Gpus::of(verdict) {
            _ if gpus.is_off() => Gpus::None,
            // Judged before the API server said what node this is.
            Gpus::None if facts.has_gpus => Gpus::Unknown,
            gpus => gpus,
        };
        Seen {
            mirror: serving.borrow().is_ok(),
            hosts_toml: registries.awaited.is_none()
                && hosts.len() >= registries.all.len()
                && hosts.iter().all(|(_, state)| state.check() == State::Ok),
            images: missing_images.borrow().is_empty(),
            gpus,
            node_age: facts.age(),
            agent_age: self.began.elapsed(),
            deadline: self.deadline,
        }
    }

    /// Takes it off, whatever else is there and however that changes.
    async fn remove(&mut self, mut taints: Vec<Taint>) -> Outcome {
        let node = self.node;
        for _ in 0..TRIES {
            let Some(index) = index(&taints, self.key) else { return Outcome::WasGone };
            let at = format!("/spec/taints/{index}");
            let patch = json!([
                { "op": "test", "path": format!("{at}/key"), "value": self.key },
                { "op": "test", "path": format!("{at}/effect"), "value": EFFECT },
                { "op": "remove", "path": at },
            ]);
            let question = |client: Client| async move {
                let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                // Not `Patch::Json`, whose type takes a crate of its own to name.
                let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).map_err(kube::Error::SerdeError)?);
                Api::<Node>::all(client).patch(node, &params, &patch).await
            };
            match self.door.ask_if(question).await {
                Ok(_) => return Outcome::Removed,
                Err(Failed::Conflict) => {}
                Err(Failed::Otherwise) => return Outcome::Failed,
            }
            let read = self.door.ask(|client: Client| async move { Api::<Node>::all(client).get(node).await });
            match read.await {
                Ok(node) => taints = Facts::of(&node).taints,
                Err(_) => return Outcome::Failed,
            }
        }
        self.door.lost();
        Outcome::Failed
    }

    fn show(&self, seen: &Seen, decision: &Decision) {
        let (waits_for, is_late) = match decision {
            Decision::Keep { waits_for, is_late } => (waits_for.clone(), *is_late),
            Decision::Remove { .. } => (Vec::new(), false),
        };
        self.metrics.startup_taint.get_or_create(&[]).set(1);
        self.metrics.startup_overdue.get_or_create(&[]).set(is_late.into());
        for part in Part::ALL {
            let labels = CheckLabels { check: part.as_str() };
            self.metrics.startup_waits.get_or_create(&labels).set(waits_for.contains(&part).into());
        }
        let (at, age, deadline) = (Instant::now(), seen.age(), self.deadline);
        self.standing.send_replace(Startup::Waits { waits_for, is_late, at, age, deadline });
    }

    fn show_gone(&self) {
        self.metrics.startup_taint.get_or_create(&[]).set(0);
        self.metrics.startup_overdue.get_or_create(&[]).set(0);
        for part in Part::ALL {
            self.metrics.startup_waits.get_or_create(&CheckLabels { check: part.as_str() }).set(0);
        }
        self.standing.send_if_modified(|standing| {
            let is_news = !matches!(standing, Startup::Removed { .. } | Startup::Absent);
            if is_news {
                *standing = Startup::Absent;
            }
            is_news
        });
    }

    fn tell_removed(&self, seen: &Seen, failed_open: &[Part]) {
        let (seconds, agent_seconds) = (seen.age().as_secs(), seen.agent_age.as_secs());
        for part in failed_open {
            self.metrics.startup_failed_open.get_or_create(&CheckLabels { check: part.as_str() }).inc();
        }
        self.metrics.startup_seconds.get_or_create(&[]).set(seen.age().as_secs_f64());
        let mut note = format!("Pods may come after {seconds} s, {agent_seconds} s after the agent's start");
        if failed_open.is_empty() {
            info!(node = self.node, key = self.key, seconds, agent_seconds, "removed the startup taint");
        } else {
            let failed_open = words(failed_open);
            warn!(
                node = self.node,
                key = self.key,
                seconds,
                agent_seconds,
                failed_open,
                "removed the startup taint at \
                its deadline, without all that it waited for"
            );
            note.push_str(&format!(
                ". Not waited for any longer, as the deadline of {} s is over: {failed_open}; pods start slower, \
                 `darter status` on the node says why",
                self.deadline.as_secs()
            ));
        }
        let is_warning = !failed_open.is_empty();
        self.events.say(Said { is_warning, reason: "StartupTaintRemoved", action: "Untaint", note });
        let (age, failed_open) = (seen.age(), failed_open.to_vec());
        self.standing.send_replace(Startup::Removed { age, failed_open });
    }

    /// GPUs do not fail open.
    fn tell_late(&self, seen: &Seen) {
        let seconds = seen.age().as_secs();
        let why = self.around.gpus.judgement().and_then(|judgement| {
            let first = judgement.verdict.first()?;
            Some(format!("{}: {}", judgement.verdict.state.as_str(), first.reason))
        });
        let why = why.unwrap_or_else(|| "Unknown: they were not looked at yet".to_owned());
        warn!(
            node = self.node,
            key = self.key,
            seconds,
            why,
            "the startup taint stays past its deadline: the GPUs are \
            not ready"
        );
        let note = format!(
            "The startup taint {} stays past its deadline, after {seconds} s: the GPUs are {why}. `darter status` on \
             the node says what to do; a node that stays like this is to be replaced",
            self.key
        );
        self.events.say(Said { is_warning: true, reason: "StartupGpuNotReady", action: "KeepTaint", note });
    }
}

/// Where the taint is.
fn index(taints: &[Taint], key: &str) -> Option<usize> {
    taints.iter().position(|taint| taint.key == key && taint.effect == EFFECT)
}

fn words(parts: &[Part]) -> String {
    parts.iter().map(|part| part.as_str()).collect::<Vec<_>>().join(", ")
}
