//! Rings when something may have changed that a report says. Whether it has, the report itself shows.

use std::sync::Arc;

use darter_core::Registry;
use tokio::sync::watch;

use super::gather::Sources;
use crate::certs_d::{HostsState, Preflight};
use crate::going::Reason;
use crate::gpu::Judgement;
use crate::node::Known;
use crate::swarm::control::Standing;

/// All that may ring.
pub(super) struct Bell {
    sources: Arc<Sources>,
    gpus: watch::Receiver<Option<Arc<Judgement>>>,
    pulls: watch::Receiver<()>,
    directives: watch::Receiver<()>,
    going: watch::Receiver<Option<Reason>>,
    node: watch::Receiver<Known>,
    namespace: watch::Receiver<Option<String>>,
    serving: watch::Receiver<Result<(), String>>,
    hosts: watch::Receiver<Vec<(Registry, HostsState)>>,
    preflight: watch::Receiver<Preflight>,
    swarm: Option<watch::Receiver<Standing>>,
}

impl Bell {
    /// Hears from now on.
    pub(super) fn new(sources: &Arc<Sources>) -> Self {
        let watched = &sources.watched;
        let mut bell = Self {
            sources: sources.clone(),
            gpus: watched.gpus.judgements(),
            pulls: sources.pulls.changes(),
            directives: sources.desk.changes(),
            going: sources.going.clone(),
            node: watched.node.changes(),
            namespace: sources.namespace.clone(),
            serving: watched.serving.clone(),
            hosts: watched.hosts.clone(),
            preflight: watched.preflight.clone(),
            swarm: watched.swarm.clone(),
        };
        bell.hush();
        bell
    }

    /// Forgets what rang so far.
    pub(super) fn hush(&mut self) {
        self.gpus.mark_unchanged();
        self.pulls.mark_unchanged();
        self.directives.mark_unchanged();
        self.going.mark_unchanged();
        self.node.mark_unchanged();
        self.namespace.mark_unchanged();
        self.serving.mark_unchanged();
        self.hosts.mark_unchanged();
        self.preflight.mark_unchanged();
        if let Some(swarm) = &mut self.swarm {
            swarm.mark_unchanged();
        }
    }

    /// Waits until it rings. Changes of the store that no pull makes (eviction) are heard from here on only; what is
    /// missed waits for the next ring, or the interval.
    pub(super) async fn rings(&mut self) {
        let store = self.sources.watched.store.clone();
        tokio::select! {
            () = heard(&mut self.gpus) => {}
            () = heard(&mut self.pulls) => {}
            () = heard(&mut self.directives) => {}
            () = heard(&mut self.going) => {}
            () = heard(&mut self.node) => {}
            () = heard(&mut self.namespace) => {}
            () = heard(&mut self.serving) => {}
            () = heard(&mut self.hosts) => {}
            () = heard(&mut self.preflight) => {}
            () = async {
                match &mut self.swarm {
                    Some(swarm) => heard(swarm).await,
                    None => std::future::pending().await,
                }
            } => {}
            () = store.changed() => {}
        }
    }
}

/// Who is gone says nothing more.
async fn heard<T>(from: &mut watch::Receiver<T>) {
    if from.changed().await.is_err() {
        std::future::pending().await
    }
}
