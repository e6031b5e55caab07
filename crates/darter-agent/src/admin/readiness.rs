//! The checks of `/readyz`, and the gauges that are read rather than counted.

use std::net::SocketAddr;

use darter_core::Registry;
use darter_core::ready::{Check, Readiness, State};
use tokio::sync::watch;

use super::{advice, status};
use crate::certs_d::{HostsState, Preflight};
use crate::gpu::View;
use crate::metrics::{CheckLabels, Metrics};
use crate::mirror::Seen;
use crate::sites::Registries;
use crate::store::{self, Store};
use crate::swarm::control::Standing;

/// Which agent this is.
#[derive(Debug, Clone)]
pub struct About {
    /// The node's name.
    pub node: String,
    /// The version of this program.
    pub version: String,
    /// Where the mirror listens.
    pub mirror: SocketAddr,
}

/// What the checks look at. Cheap to clone.
#[derive(Clone)]
pub struct Watched {
    /// Which agent this is.
    pub about: About,
    /// Whether the mirror's self-test passes; the text says why not.
    pub serving: watch::Receiver<Result<(), String>>,
    /// The store.
    pub store: Store,
    /// The registries there are: their states are empty until they were first looked at.
    pub registries: watch::Receiver<Registries>,
    /// hosts.toml of each registry.
    pub hosts: watch::Receiver<Vec<(Registry, HostsState)>>,
    /// What containerd's configuration says.
    pub preflight: watch::Receiver<Preflight>,
    /// When containerd asked last.
    pub seen: Seen,
    /// How the swarm stands; none without a swarm key.
    pub swarm: Option<watch::Receiver<Standing>>,
    /// What the GPUs say.
    pub gpus: View,
    /// What the API server says of the node.
    pub node: crate::node::View,
    /// Whether the scaler hears this node; none without a scaler.
    pub report: Option<watch::Receiver<crate::report::Standing>>,
}

impl Watched {
    /// Makes all checks and brings their gauges up to date.
    pub async fn refresh(&self, metrics: &Metrics) -> Readiness {
        let checks = vec![self.mirror(), self.store(), self.hosts_toml(), self.containerd(), self.swarm(), self.gpus()];
        let readiness = Readiness::of(checks);
        for check in &readiness.checks {
            let passes = i64::from(check.state != State::Failed);
            metrics.ready.get_or_create(&CheckLabels { check: check.check }).set(passes);
        }
        if let Some(age) = self.seen.age() {
            metrics.containerd_seen_seconds.get_or_create(&[]).set(age.as_secs_f64());
        }
        if let Some(age) = self.report.as_ref().and_then(|report| report.borrow().accepted_age()) {
            metrics.report_accepted_seconds.get_or_create(&[]).set(age.as_secs_f64());
        }
        readiness
    }

    fn mirror(&self) -> Check {
        match &*self.serving.borrow() {
            Ok(()) => Check::new("mirror", State::Ok, "answers its self-test"),
            Err(reason) => Check::new("mirror", State::Failed, reason.clone()).with_advice(advice::MIRROR),
        }
    }

    fn store(&self) -> Check {
        let usage = self.store.usage();
        match self.store.state() {
            store::State::Ok => {
                let store::Usage { bytes, limit_bytes, blobs, pinned_bytes, .. } = usage;
                let reason = format!("{blobs} blobs, {bytes} of {limit_bytes} bytes, {pinned_bytes} pinned");
                Check::new("store", State::Ok, reason)
            }
            // Pulls go past us to the origin: slower, and not broken.
            state => advised(Check::new("store", State::Degraded, state.to_string()), advice::store(&state)),
        }
    }

    fn hosts_toml(&self) -> Check {
        let (states, registries) = (self.hosts.borrow(), self.registries.borrow());
        if states.len() < registries.all.len() {
            let check = Check::new("hosts_toml", State::Failed, "not looked at yet");
            return check.with_advice(advice::NOT_LOOKED_AT);
        }
        if let Some(awaited) = &registries.awaited
            && states.iter().all(|(_, state)| state.check() < State::Failed)
        {
            let reasons = states.iter().map(|(registry, state)| format!("{registry}: {state}"));
            let reasons: Vec<String> = std::iter::once(awaited.clone()).chain(reasons).collect();
            return Check::new("hosts_toml", State::Degraded, reasons.join("; ")).with_advice(advice::AWAITED);
        }
        if states.is_empty() {
            let reason = "no registry is configured, so nothing is mirrored: add a [[registry]]";
            return Check::new("hosts_toml", State::Degraded, reason);
        }
        let worst = states.iter().map(|(_, state)| state.check()).max().unwrap_or(State::Ok);
        let of_worst = states.iter().find(|(_, state)| state.check() == worst);
        let reasons: Vec<String> = states.iter().map(|(registry, state)| format!("{registry}: {state}")).collect();
        let check = Check::new("hosts_toml", worst, reasons.join("; "));
        advised(check, of_worst.and_then(|(_, state)| advice::hosts(state)))
    }

    fn containerd(&self) -> Check {
        let preflight = self.preflight.borrow();
        let seen = match self.seen.age() {
            Some(age) => format!("asked {} s ago", age.as_secs()),
            None => "has not asked since the start".to_owned(),
        };
        match preflight.problem() {
            None => Check::new("containerd", State::Ok, seen),
            Some(problem) => Check::new("containerd", State::Degraded, format!("{problem}; {seen}")),
        }
    }

    /// Never fails: a node that is alone reads registries by itself.
    fn swarm(&self) -> Check {
        let Some(standing) = &self.swarm else {
            return Check::new("swarm", State::Ok, "off: no swarm key (swarm.key_file)");
        };
        let standing = *standing.borrow();
        let Standing { peers, addresses, strangers, apart, .. } = standing;
        let degraded = |reason| Check::new("swarm", State::Degraded, reason).with_advice(advice::swarm(&standing));
        match (peers, addresses) {
            (peers, _) if apart > 0 => {
                degraded(format!("{peers} other members; {apart} nodes have another swarm.tls than this one"))
            }
            (0, 0) => Check::new("swarm", State::Ok, "alone: no other agent is known"),
            (0, known) if strangers > 0 => {
                degraded(format!("alone: {known} addresses known, and who answers there has another swarm key"))
            }
            (0, known) => degraded(format!("alone: nobody answers at {known} addresses")),
            (peers, known) => Check::new("swarm", State::Ok, format!("{peers} other members, {known} addresses known")),
        }
    }

    fn gpus(&self) -> Check {
        let judgement = self.gpus.judgement();
        let advice = judgement.as_deref().and_then(status::of_first);
        advised(self.gpus.check(), advice)
    }
}

fn advised(check: Check, advice: Option<impl Into<String>>) -> Check {
    match advice {
        Some(advice) => check.with_advice(advice),
        None => check,
    }
}
