//! The EndpointSlices of one Service, watched: where all agents are, within a second.
//!
//! One LIST, then a WATCH that goes on where it broke off. Addresses stay while the API server is
//! away, and a file has them for the next start, so that nothing ever waits for an API server.
//! Not here: which endpoints count (`slices`), how the API server is spoken to (`crate::kubernetes`).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::watch;
use tracing::{info, warn};

use super::remembered::Remembered;
use super::slices::{Slices, Wanted};
use super::{ServiceName, ServicePort, replace};
use crate::kubernetes::{Teller, Told, Watch, follow};
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
        let watch = |client, own| {
            let namespace = service.namespace.clone().unwrap_or(own);
            Watch {
                api: Api::<EndpointSlice>::namespaced(client, &namespace),
                config: watcher::Config::default().labels(&format!("kubernetes.io/service-name={}", service.name)),
                rights: format!(
                    "a Role that lets it get, list and watch endpointslices (discovery.k8s.io) in namespace {namespace}"
                ),
            }
        };
        let mut slices = Slices::new(Wanted { port: self.port.clone(), is_ipv6: self.is_ipv6 }, self.max);
        let tell = |told| match told {
            Told::Works => self.works(found.borrow().len()),
            Told::Event(event) => {
                if slices.on(event) {
                    replace(found, slices.addresses().into_iter().take(self.max).collect());
                }
            }
        };
        let teller = Teller::new(trouble, &self.metrics.swarm_watch_errors);
        follow(self.kubeconfig.as_deref(), teller, watch, tell).await;
    }

    fn works(&self, addresses: usize) {
        if addresses == 0 {
            warn!(service = %self.service, "watching the EndpointSlices of this Service, and no agent is in them; \
                if that stays so: is there such a Service, does it select the agents, is swarm.endpoint_port right?");
        } else {
            info!(service = %self.service, addresses, "watching the EndpointSlices of this Service");
        }
    }
}
