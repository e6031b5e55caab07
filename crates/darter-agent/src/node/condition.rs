//! The condition `darter.dev/GpuReady` of this node, kept as the GPUs are.
//!
//! Written by server-side apply, which leaves the kubelet's conditions and everybody else's alone. When it says
//! what is the core's (`gpu::readiness::condition`).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use darter_core::gpu::readiness::condition::{Condition, Status, Wanted};
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{debug, info};

use super::door::Door;
use super::events::{Events, Said};
use super::facts::{CONDITION, Facts, Shown};
use super::{Known, MANAGER};
use crate::gpu;

/// Nothing is due: something has to change first.
const NEVER: Duration = Duration::from_secs(3600);

/// Keeps it.
pub(super) struct Keeper<'a> {
    /// The node's name.
    pub(super) node: &'a str,
    pub(super) is_on: bool,
    pub(super) gpus: gpu::View,
    pub(super) known: watch::Receiver<Known>,
    pub(super) door: Door<'a>,
    pub(super) events: &'a Events<'a>,
    pub(super) began: Instant,
}

/// What this agent wrote last, which the watch may not have told yet.
struct Written {
    uid: String,
    at: Instant,
    shown: Shown,
}

impl Keeper<'_> {
    /// Never ends.
    pub(super) async fn run(mut self) {
        let mut judged = self.gpus.judgements();
        let mut written = None;
        // With which facts it was taken away: it goes once, whoever else wants it there.
        let mut cleared: Option<Arc<Facts>> = None;
        loop {
            let facts = self.known.borrow_and_update().clone();
            let judgement = judged.borrow_and_update().clone();
            let mut wait = NEVER;
            if let Some(facts) = &facts {
                written = written.filter(|written: &Written| written.uid == facts.uid);
                let shown = written.as_ref().map(|written| &written.shown).or(facts.condition.as_ref());
                let status = shown.map(|shown| shown.condition.status);
                let wanted = match judgement {
                    _ if !self.is_on || self.gpus.is_off() => Wanted::None,
                    Some(judgement) => Wanted::of(&judgement.verdict, self.began.elapsed(), status),
                    None => Wanted::AsItIs,
                };
                match wanted {
                    Wanted::AsItIs => {}
                    Wanted::None => {
                        let was_cleared = cleared.as_ref().is_some_and(|cleared| Arc::ptr_eq(cleared, facts));
                        if shown.is_some() && !was_cleared {
                            if self.apply(json!({})).await {
                                info!(node = self.node, "this node has no condition {CONDITION} any more");
                                (cleared, written) = (Some(facts.clone()), None);
                            }
                            continue;
                        }
                    }
                    Wanted::Some(condition) => {
                        wait = condition.due(shown.map(|shown| (&shown.condition, age(&written, shown))));
                        if wait.is_zero() {
                            let next = self.write(condition, shown).await;
                            let (uid, at) = (facts.uid.clone(), Instant::now());
                            written = next.map(|shown| Written { uid, at, shown }).or(written);
                            continue;
                        }
                    }
                }
            }
            tokio::select! {
                // Whoever tells of either lives as long as this.
                _ = self.known.changed() => {}
                _ = judged.changed() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// What is there now, if it could be written.
    async fn write(&mut self, condition: Condition, before: Option<&Shown>) -> Option<Shown> {
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default();
        let transition = before
            .filter(|before| before.condition.status == condition.status)
            .and_then(|before| before.transition)
            .unwrap_or(now);
        let Condition { status, reason, message } = condition.clone();
        let entry = NodeCondition {
            type_: CONDITION.to_owned(),
            status: status.as_str().to_owned(),
            reason: Some(reason),
            message: Some(message),
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: Some(Time(transition)),
        };
        if !self.apply(json!({ "conditions": [entry] })).await {
            return None;
        }
        self.tell(&condition, before.map(|before| &before.condition));
        Some(Shown { condition, transition: Some(transition), heartbeat: Some(now) })
    }

    /// Server-side apply: of what this agent does not name, it takes away only what it wrote itself.
    async fn apply(&mut self, status: Value) -> bool {
        let node = self.node;
        let body = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node }, "status": status });
        let question = |client: Client| async move {
            let params = PatchParams::apply(MANAGER).force();
            Api::<Node>::all(client).patch_status(node, &params, &Patch::Apply(body)).await
        };
        let is_done = self.door.ask(question).await.is_ok();
        if !is_done {
            self.door.pause().await;
        }
        is_done
    }

    fn tell(&self, now: &Condition, before: Option<&Condition>) {
        let Condition { status, reason, message } = now;
        let is_same = before.is_some_and(|before| (before.status, &before.reason) == (*status, reason));
        if is_same {
            return debug!(status = status.as_str(), "the condition {CONDITION} was written again");
        }
        info!(node = self.node, status = status.as_str(), reason, "the condition {CONDITION} of this node");
        // That a new node is as it should be is no news.
        let was = before.map_or(Status::True, |before| before.status);
        if was != *status {
            let (is_warning, word) = match status {
                Status::True => (false, "GpuReady"),
                Status::False => (true, "GpuNotReady"),
                Status::Unknown => (true, "GpuUnknown"),
            };
            self.events.say(Said { is_warning, reason: word, action: "Judge", note: format!("{reason}: {message}") });
        }
    }
}

/// For how long it has been there.
fn age(written: &Option<Written>, shown: &Shown) -> Duration {
    match (written, shown.heartbeat) {
        (Some(written), _) => written.at.elapsed(),
        // Another agent's, by its clock.
        (None, Some(heartbeat)) => SystemTime::now().duration_since(heartbeat.into()).unwrap_or_default(),
        (None, None) => Duration::MAX,
    }
}
