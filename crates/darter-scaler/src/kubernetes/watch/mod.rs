//! What Kubernetes says, as facts for the fleet: watched for ever, whoever is away or says no.
//!
//! One watch of each kind, of the few fields that matter (`shape`); joined where two say one thing (`nodes`,
//! `workloads`); the newest of each thing handed on (`outbox`). Nothing here decides.

mod listed;
mod nodes;
mod outbox;
mod pods;
mod pools;
pub(super) mod served;
mod shape;
mod workloads;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use darter_base::kubernetes::{Teller, Told, Watch, connect, follow, refusal};
use k8s_openapi::jiff::Timestamp;
use kube::core::object::Object;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::nodes::Nodes;
use self::outbox::Outbox;
use self::pods::Pods;
use self::pools::Pools;
use self::served::Kind;
use self::workloads::Workloads;
use super::metrics::{KindLabels, Metrics};
use super::settings::Settings;
use crate::fleet::Fact;

const NODE_CLAIMS: Kind = Kind {
    group: "karpenter.sh",
    versions: &["v1"],
    plural: "nodeclaims",
    without: "nodes are known once they have joined, and none can be removed",
};
const NODE_POOLS: Kind = Kind {
    group: "karpenter.sh",
    versions: &["v1"],
    plural: "nodepools",
    without: "pools are what the configuration says of them",
};
const SCALED_OBJECTS: Kind = Kind {
    group: "keda.sh",
    versions: &["v1alpha1"],
    plural: "scaledobjects",
    without: "no workload is scaled by KEDA; those of the configuration are known",
};

/// For the answer to whether the API server is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// Watches all kinds.
#[derive(Debug)]
pub struct Watches {
    settings: Settings,
    metrics: Arc<Metrics>,
    facts: mpsc::Sender<Fact>,
    outbox: Outbox,
}

impl Watches {
    /// Facts go to `facts`, which may be slow.
    pub fn new(settings: &Settings, metrics: Arc<Metrics>, facts: mpsc::Sender<Fact>) -> Self {
        Self { settings: settings.clone(), metrics, facts, outbox: Outbox::default() }
    }

    /// Watches until `stop`, or until nobody listens.
    pub async fn run(self, stop: CancellationToken) {
        let all = async {
            let (nodes, workloads) = (Mutex::new(Nodes::default()), Mutex::new(Workloads::new()));
            let watches = async {
                tokio::join!(
                    self.nodes(&nodes),
                    self.claims(&nodes),
                    self.pods(),
                    self.pools(),
                    self.scaled(&workloads),
                    self.deployments(&workloads),
                    self.heartbeat(),
                )
            };
            tokio::select! {
                () = self.outbox.forward(&self.facts) => {}
                _ = watches => {}
            }
        };
        stop.run_until_cancelled(all).await;
    }

    async fn nodes(&self, nodes: &Mutex<Nodes>) {
        let rights = "a ClusterRole that lets it list and watch nodes";
        let resource = shape::resource("", "v1", "Node", "nodes");
        self.watch("nodes", rights, "nodes are as they were", None, &resource, |event| {
            let mut nodes = lock(nodes);
            let facts = nodes.node(&self.settings, event, Timestamp::now());
            (facts, nodes.dropped())
        })
        .await;
    }

    async fn claims(&self, nodes: &Mutex<Nodes>) {
        let version = NODE_CLAIMS.served(&self.settings, &self.metrics).await;
        let rights = "a ClusterRole that lets it list and watch nodeclaims (karpenter.sh)";
        let resource = shape::resource(NODE_CLAIMS.group, version, "NodeClaim", NODE_CLAIMS.plural);
        self.watch("nodeclaims", rights, NODE_CLAIMS.without, None, &resource, |event| {
            let mut nodes = lock(nodes);
            let facts = nodes.claim(&self.settings, event, Timestamp::now());
            (facts, nodes.dropped())
        })
        .await;
    }

    async fn pods(&self) {
        let rights = "a ClusterRole that lets it list and watch pods";
        let (resource, mut pods) = (shape::resource("", "v1", "Pod", "pods"), Pods::new());
        // Those that ended hold no GPU.
        let fields = Some("status.phase!=Succeeded,status.phase!=Failed");
        self.watch("pods", rights, "pods are as they were", fields, &resource, |event| {
            (pods.on(&self.settings, event).into_iter().collect(), pods.dropped())
        })
        .await;
    }

    async fn pools(&self) {
        let version = NODE_POOLS.served(&self.settings, &self.metrics).await;
        let rights = "a ClusterRole that lets it list and watch nodepools (karpenter.sh)";
        let resource = shape::resource(NODE_POOLS.group, version, "NodePool", NODE_POOLS.plural);
        let mut pools = Pools::new();
        self.watch("nodepools", rights, NODE_POOLS.without, None, &resource, |event| {
            (pools.on(&self.settings, event).into_iter().collect(), pools.dropped())
        })
        .await;
    }

    async fn scaled(&self, workloads: &Mutex<Workloads>) {
        let version = SCALED_OBJECTS.served(&self.settings, &self.metrics).await;
        let rights = "a ClusterRole that lets it list and watch scaledobjects (keda.sh)";
        let resource = shape::resource(SCALED_OBJECTS.group, version, "ScaledObject", SCALED_OBJECTS.plural);
        self.watch("scaledobjects", rights, SCALED_OBJECTS.without, None, &resource, |event| {
            let mut workloads = lock(workloads);
            (workloads.scaled(&self.settings, event), workloads.dropped())
        })
        .await;
    }

    async fn deployments(&self, workloads: &Mutex<Workloads>) {
        // Only of those that KEDA scales anything is asked.
        SCALED_OBJECTS.served(&self.settings, &self.metrics).await;
        let rights = "a ClusterRole that lets it list and watch deployments (apps)";
        let resource = shape::resource("apps", "v1", "Deployment", "deployments");
        let without = "a workload takes the GPUs that its trigger says, or one";
        self.watch("deployments", rights, without, None, &resource, |event| {
            let mut workloads = lock(workloads);
            (workloads.deployment(&self.settings, event), workloads.dropped())
        })
        .await;
    }

    /// Never ends.
    async fn watch<P, U>(
        &self,
        kind: &'static str,
        rights: &str,
        without: &str,
        fields: Option<&str>,
        resource: &kube::api::ApiResource,
        mut on: impl FnMut(Event<Object<P, U>>) -> (Vec<Fact>, u64),
    ) where
        P: Clone + Debug + DeserializeOwned + Send + 'static,
        U: Clone + Debug + Default + DeserializeOwned + Send + 'static,
    {
        let watch = |client: Client, _| Watch {
            api: Api::<Object<P, U>>::all_with(client, resource),
            config: match fields {
                Some(fields) => watcher::Config::default().fields(fields),
                None => watcher::Config::default(),
            },
            rights: rights.to_owned(),
        };
        let mut full = false;
        let tell = |told| match told {
            Told::Works => {
                info!(kind, "watching");
                self.outbox.say(Fact::Watched);
            }
            Told::Event(event) => {
                let (facts, dropped) = on(event);
                if dropped > 0 {
                    self.metrics.watch_dropped.get_or_create(&KindLabels { kind }).inc_by(dropped);
                    if !std::mem::replace(&mut full, true) {
                        warn!(kind, "there are more of these than are kept: some are as if they were not there");
                    }
                }
                self.outbox.say(Fact::Watched);
                facts.into_iter().for_each(|fact| self.outbox.say(fact));
            }
        };
        let teller = Teller::new(format!("cannot watch {kind}: {without}"), &self.metrics.watch_errors);
        follow(self.settings.kubeconfig.as_deref(), teller, watch, tell).await;
    }

    /// A cluster in which nothing happens is not one that cannot be heard.
    async fn heartbeat(&self) {
        let trouble = "cannot ask the API server whether it is there: nothing is scaled in".to_owned();
        let mut teller = Teller::new(trouble, &self.metrics.watch_errors);
        let mut client = None;
        loop {
            tokio::time::sleep(Duration::from_millis(self.settings.heartbeat_ms)).await;
            let asked = match client.take() {
                Some(client) => client,
                None => match connect(self.settings.kubeconfig.as_deref()).await {
                    Ok(connected) => connected.client,
                    Err(reason) => {
                        teller.fails("credentials", &reason);
                        continue;
                    }
                },
            };
            match tokio::time::timeout(PATIENCE, asked.apiserver_version()).await {
                Ok(Ok(_)) => {
                    teller.works();
                    self.outbox.say(Fact::Watched);
                    client = Some(asked);
                }
                Ok(Err(error)) => {
                    let rights = "to read /version, as everybody may";
                    let (reason, text) = refusal(&error, rights).unwrap_or_else(|| ("answer", error.to_string()));
                    teller.fails(reason, &text);
                }
                Err(_) => teller.fails("unreachable", &format!("no answer within {} s", PATIENCE.as_secs())),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
