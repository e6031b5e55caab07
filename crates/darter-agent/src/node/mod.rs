//! This node as Kubernetes has it: watched once for all who want to know, its condition kept, its startup taint
//! removed.
//!
//! Nothing here keeps anything else waiting: an API server that is away or says no is told once and asked
//! again. Not here: whether GPUs are ready (`gpu`), and when the taint goes (`darter_core::startup`).

mod condition;
mod door;
mod events;
mod facts;
mod notes;
mod startup;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::startup::Part;
use darter_core::status;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::door::Door;
use self::events::Events;
pub use self::facts::{Facts, Taint};
pub use self::notes::{Note, Notes};
use crate::certs_d::States;
use crate::config;
use crate::gpu;
use crate::kubernetes::{Teller, Told, Watch, follow};
use crate::metrics::Metrics;
use crate::sites::Registries;

/// Who writes, for the API server.
const MANAGER: &str = "darter-agent";

/// Nothing: not told yet, or there is no such node.
pub(crate) type Known = Option<Arc<Facts>>;

/// This node, before anybody was asked.
pub struct OwnNode {
    settings: config::Kubernetes,
    known: watch::Sender<Known>,
    startup: watch::Sender<Startup>,
    notes: Notes,
    noted: mpsc::Receiver<Note>,
}

/// What is known of the node, for whoever wants to know. Cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    /// Its name, where it is watched.
    name: Option<Arc<str>>,
    known: watch::Receiver<Known>,
    startup: watch::Receiver<Startup>,
}

/// How the startup taint stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Startup {
    /// Nobody takes it off, or nobody knows yet.
    Unknown,
    /// The node has none.
    Absent,
    Waits {
        waits_for: Vec<Part>,
        is_late: bool,
        /// When the node was so old.
        at: Instant,
        age: Duration,
        deadline: Duration,
    },
    /// This agent took it off.
    Removed { age: Duration, failed_open: Vec<Part> },
}

/// What the startup taint waits for.
pub struct Around {
    /// The GPUs.
    pub gpus: gpu::View,
    /// Whether the mirror's self-test passes.
    pub serving: watch::Receiver<Result<(), String>>,
    /// hosts.toml of each registry.
    pub hosts: watch::Receiver<States>,
    /// The registries there are.
    pub registries: watch::Receiver<Registries>,
    /// Images that are to be here and are not.
    pub missing_images: watch::Receiver<Vec<String>>,
}

impl Around {
    fn unchanged(&mut self) {
        self.serving.mark_unchanged();
        self.hosts.mark_unchanged();
        self.registries.mark_unchanged();
        self.missing_images.mark_unchanged();
    }

    async fn changed(&mut self) {
        tokio::select! {
            true = told(&mut self.serving) => {}
            true = told(&mut self.hosts) => {}
            true = told(&mut self.registries) => {}
            true = told(&mut self.missing_images) => {}
            // Nobody tells any more.
            else => std::future::pending().await,
        }
    }
}

async fn told<T>(receiver: &mut watch::Receiver<T>) -> bool {
    receiver.changed().await.is_ok()
}

impl OwnNode {
    /// As configured.
    pub fn new(settings: &config::Kubernetes) -> Self {
        let (notes, noted) = Notes::new();
        Self {
            settings: settings.clone(),
            known: watch::Sender::new(None),
            startup: watch::Sender::new(Startup::Unknown),
            notes,
            noted,
        }
    }

    /// For parts that have something to say of the node.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// For readers.
    pub fn view(&self) -> View {
        View {
            name: self.settings.node.as_deref().map(Arc::from),
            known: self.known.subscribe(),
            startup: self.startup.subscribe(),
        }
    }

    /// Watches and writes until `stop`. Without a name nothing is asked.
    pub async fn run(mut self, around: Around, metrics: Arc<Metrics>, stop: CancellationToken) {
        let Some(name) = self.settings.node.clone() else { return stop.cancelled().await };
        let began = Instant::now();
        let kubeconfig = self.settings.kubeconfig.as_deref();
        let (events, said) = Events::new(&metrics);
        let (_, nothing) = mpsc::channel(1);
        let mut noted = std::mem::replace(&mut self.noted, nothing);
        let notes = async {
            while let Some(note) = noted.recv().await {
                events.say(note.into());
            }
            std::future::pending::<()>().await
        };
        let door = |what, rights| Door::new(kubeconfig, what, rights, &metrics.node_write_errors);
        let known = || self.known.subscribe();
        let writes = events::write(&name, known(), said, door(EVENTS, EVENT_RIGHTS));
        let condition = condition::Keeper {
            node: &name,
            is_on: self.settings.gpu_condition,
            gpus: around.gpus.clone(),
            known: known(),
            door: door(CONDITION, CONDITION_RIGHTS),
            events: &events,
            began,
        };
        let taint = async {
            let Some(key) = self.settings.startup_taint.as_deref() else { return std::future::pending().await };
            let keeper = startup::Keeper {
                node: &name,
                key,
                deadline: self.settings.startup_deadline.0,
                known: known(),
                around,
                door: door(TAINT, TAINT_RIGHTS),
                events: &events,
                metrics: &metrics,
                standing: &self.startup,
                began,
            };
            keeper.run().await
        };
        let all =
            async { tokio::join!(self.watch(&name, kubeconfig, &metrics), condition.run(), taint, writes, notes) };
        stop.run_until_cancelled(all).await;
    }

    /// Never ends.
    async fn watch(&self, name: &str, kubeconfig: Option<&Path>, metrics: &Metrics) {
        let trouble = format!(
            "cannot watch this node ({name}): who is going to delete it is not heard, and its condition and its \
             startup taint stay as they are"
        );
        let watch = |client, _| Watch {
            api: Api::<Node>::all(client),
            config: watcher::Config::default().fields(&format!("metadata.name={name}")),
            rights: format!("a ClusterRole that lets it get, list and watch the node {name}"),
        };
        let mut is_there = false;
        let tell = |told| match told {
            Told::Works => info!(node = name, "watching this node"),
            Told::Event(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                is_there = true;
                self.learn(Some(Facts::of(&node)));
            }
            Told::Event(watcher::Event::Init) => is_there = false,
            Told::Event(watcher::Event::InitDone) if !is_there => {
                warn!(node = name, "there is no such node; is kubernetes.node its name in Kubernetes (spec.nodeName)?");
                self.learn(None);
            }
            Told::Event(watcher::Event::InitDone) => {}
            Told::Event(watcher::Event::Delete(_)) => self.learn(None),
        };
        let teller = Teller::new(trouble, &metrics.node_watch_errors);
        follow(kubeconfig, teller, watch, tell).await;
    }

    fn learn(&self, facts: Option<Facts>) {
        self.known.send_if_modified(|known| {
            let is_news = known.as_deref() != facts.as_ref();
            if is_news {
                *known = facts.map(Arc::new);
            }
            is_news
        });
    }
}

const EVENTS: &str = "write an Event for this node";
const EVENT_RIGHTS: &str = "a Role in the namespace default that lets it create and patch events (events.k8s.io)";
const CONDITION: &str = "write the condition darter.dev/GpuReady of this node";
const CONDITION_RIGHTS: &str = "a ClusterRole that lets it patch nodes/status (off: kubernetes.gpu_condition = false)";
const TAINT: &str = "remove the startup taint of this node";
const TAINT_RIGHTS: &str = "a ClusterRole that lets it get and patch nodes (off: kubernetes.startup_taint = \"\")";

impl View {
    /// Whether anybody watches it.
    pub fn is_watched(&self) -> bool {
        self.name.is_some()
    }

    /// What is known now.
    pub fn facts(&self) -> Option<Arc<Facts>> {
        self.known.borrow().clone()
    }

    /// Hears when something else is known.
    pub(crate) fn changes(&self) -> watch::Receiver<Known> {
        self.known.clone()
    }

    /// The next that is known. Never, where nobody tells any more.
    pub async fn next(&mut self) -> Option<Arc<Facts>> {
        if self.known.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.known.borrow_and_update().clone()
    }

    /// For people; nothing where the node is not watched.
    pub(crate) fn status(&self) -> Option<status::Kubernetes> {
        self.name.as_ref()?;
        let facts = self.facts();
        let condition = facts.as_ref().and_then(|facts| facts.condition.as_ref()).map(|shown| {
            let condition = &shown.condition;
            status::Condition { status: condition.status.as_str().to_owned(), reason: condition.reason.clone() }
        });
        let startup_taint = match self.startup.borrow().clone() {
            Startup::Unknown => status::StartupTaint::Unknown,
            Startup::Absent => status::StartupTaint::Absent,
            Startup::Waits { waits_for, is_late, at, age, deadline } => status::StartupTaint::Stays {
                waits_for,
                is_late,
                age_seconds: (age + at.elapsed()).as_secs(),
                deadline_seconds: deadline.as_secs(),
            },
            Startup::Removed { age, failed_open } => {
                status::StartupTaint::Removed { after_seconds: age.as_secs(), failed_open }
            }
        };
        Some(status::Kubernetes { is_known: facts.is_some(), gpu_ready: condition, startup_taint })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
