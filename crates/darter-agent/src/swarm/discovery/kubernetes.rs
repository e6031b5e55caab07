//! The EndpointSlices of one Service, watched: where all agents are, within a second.
//!
//! One LIST, then a WATCH that goes on where it broke off. Addresses stay while the API server is
//! away, and a file has them for the next start, so that nothing ever waits for an API server.
//! Not here: which endpoints count (`slices`), how the API server is spoken to (`crate::kubernetes`).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;
use tracing::{info, warn};

use super::remembered::Remembered;
use super::slices::{Slices, Wanted};
use super::{ServiceName, ServicePort, replace};
use crate::kubernetes::{AGAIN, Connected, Teller, connect};
use crate::metrics::Metrics;

/// What is watched, and how.
#[derive(Debug, Clone)]
pub struct ServiceWatch {
    /// The Service whose endpoints are the agents.
    pub service: ServiceName,
    /// The port of their control planes.
    pub port: ServicePort,
    /// Whether they listen on IPv6, else on IPv4.
    pub is_ipv6: bool,
    /// Where the API server is and who asks it; none: as every pod is told.
    pub kubeconfig: Option<PathBuf>,
    /// Where the last membership is kept.
    pub file: PathBuf,
    /// Addresses at most.
    pub max: usize,
    /// Where errors are counted.
    pub metrics: Arc<Metrics>,
}

impl ServiceWatch {
    /// Keeps `found` up to date. Never ends.
    pub(super) async fn run(self, found: watch::Sender<BTreeSet<SocketAddr>>) {
        let remembered = Remembered::new(&self.file, &self.service);
        replace(&found, remembered.read().await.into_iter().take(self.max).collect());
        tokio::join!(remembered.follow(found.subscribe()), self.follow(&found));
    }

    async fn follow(&self, found: &watch::Sender<BTreeSet<SocketAddr>>) {
        let service = &self.service;
        let trouble =
            format!("cannot watch the EndpointSlices of this Service ({service}); the addresses known before stay");
        let mut teller = Teller::new(trouble, &self.metrics.swarm_watch_errors);
        loop {
            match connect(self.kubeconfig.as_deref(), "swarm.kubeconfig").await {
                Ok(connected) => self.watch(connected, &mut teller, found).await,
                Err(reason) => teller.fails("credentials", &reason),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Until credentials should be read anew.
    async fn watch(&self, connected: Connected, teller: &mut Teller<'_>, found: &watch::Sender<BTreeSet<SocketAddr>>) {
        let Connected { client, namespace, heard } = connected;
        let namespace = self.service.namespace.clone().unwrap_or(namespace);
        let rights = format!(
            "a Role that lets it get, list and watch endpointslices (discovery.k8s.io) in namespace {namespace}"
        );
        let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
        let label = format!("kubernetes.io/service-name={}", self.service.name);
        // What the API server has in memory is new enough, and costs etcd nothing when all nodes boot.
        let config = watcher::Config::default().labels(&label).any_semantic();
        let mut events = pin!(watcher(api, config).default_backoff());
        let mut slices = Slices::new(Wanted { port: self.port.clone(), is_ipv6: self.is_ipv6 }, self.max);
        loop {
            let event = tokio::select! {
                // In this order: that it answers is said before what it says, and an error after both.
                biased;
                () = heard.notified() => {
                    self.works(teller, found.borrow().len());
                    continue;
                }
                event = events.try_next() => event,
            };
            match event {
                Ok(Some(event)) => {
                    if slices.on(event) {
                        replace(found, slices.addresses().into_iter().take(self.max).collect());
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    if teller.met(&error, &rights) {
                        return;
                    }
                }
            }
        }
    }

    fn works(&self, teller: &mut Teller<'_>, addresses: usize) {
        if !teller.works() {
            return;
        }
        if addresses == 0 {
            warn!(service = %self.service, "watching the EndpointSlices of this Service, and no agent is in them; \
                if that stays so: is there such a Service, does it select the agents, is swarm.endpoint_port right?");
        } else {
            info!(service = %self.service, addresses, "watching the EndpointSlices of this Service");
        }
    }
}
