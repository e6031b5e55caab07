//! The scaler as a process: bind, run, end.
//!
//! Everything that can fail at the start does so in `bind`, before anybody is answered.

use std::net::SocketAddr;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::access::{Access, Review, TokenFileError};
use crate::clock::Clock;
use crate::config::{Config, Mode, given, ms};
use crate::controller::Controller;
use crate::demand::{Asker, UrlError};
use crate::fleet::acts::ACTS_WAITING_MAX;
use crate::fleet::facts::FACTS_WAITING_MAX;
use crate::fleet::{Act, Actuator, Done, Fact, Fleet};
use crate::grpc::{Door, GrpcError, Services};
use crate::http::{Http, HttpError};
use crate::hub::{Hub, Lead};
use crate::metrics::Metrics;
use crate::recorder::{RecordDirError, Recorder, left};
use crate::{keda, reports};

/// Why a scaler does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The door for agents and KEDA.
    #[error(transparent)]
    Grpc(#[from] GrpcError),
    /// The door for people, Prometheus and demand.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Who may do what.
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
    /// Where decisions are kept.
    #[error(transparent)]
    Record(#[from] RecordDirError),
    /// Where demand is asked for.
    #[error(transparent)]
    Prometheus(#[from] UrlError),
    /// A socket that has no address.
    #[error("cannot tell where it listens")]
    Address(#[from] std::io::Error),
}

/// Why it does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// One part did, and so all do.
    #[error("{0} ended by itself")]
    Part(&'static str),
    /// Without anybody who watches there, no node would ever be known.
    #[error("kubernetes.enabled is true, and nothing watches Kubernetes in this program: set it to false")]
    Unwatched,
}

/// What Kubernetes says, and who writes there: the other ends of the controller's queues, for whoever watches.
#[derive(Debug)]
pub struct Cluster {
    /// What is learned goes in here.
    pub facts: mpsc::Sender<Fact>,
    /// What is to be written comes out here.
    pub acts: mpsc::Receiver<Act>,
    /// What came of it goes in here.
    pub done: mpsc::Sender<Done>,
}

/// Puts metrics into an exposition.
pub type Register = Box<dyn FnOnce(&mut Registry) + Send>;

/// Who decides whether this scaler leads, and who may do what, where that is Kubernetes.
#[derive(Default)]
pub struct Ask {
    /// Whether it leads; none: it is the only one.
    pub lead: Option<Lead>,
    /// Asked where `access.mode` is kubernetes.
    pub review: Option<Review>,
    /// Puts in what is counted there.
    pub metrics: Option<Register>,
}

/// Listens, and answers nobody yet.
#[derive(Debug)]
pub struct Scaler {
    hub: Arc<Hub>,
    access: Access,
    door: Door,
    http: Http,
    controller: Controller,
    asker: Option<Asker>,
    cluster: Option<Cluster>,
    addresses: (SocketAddr, SocketAddr),
}

impl Scaler {
    /// Listens as configured; goes on from what was recorded.
    pub async fn bind(config: &Config, version: &str, revision: &str, ask: Ask) -> Result<Self, StartError> {
        darter_base::limits::raise_open_files();
        let clock = Clock::start();
        let mut fleet = Fleet::new(config.fleet(), clock.now());
        let recorder = match given(&config.record.dir) {
            Some(dir) => {
                let found = left(dir, ms(config.record.resume_within), clock.now());
                if found.freeze.is_some() {
                    fleet.freeze(found.freeze);
                }
                fleet.resume(found.workloads);
                Some(Recorder::open(dir, config.record.max_size.0, config.policy.clone())?)
            }
            None => None,
        };
        let also = ask.metrics.unwrap_or_else(|| Box::new(|_| ()));
        let metrics = Metrics::new(version, revision, also);
        let lead = ask.lead.unwrap_or_else(Lead::alone);
        let hub = Arc::new(Hub::new(fleet, clock, config.policy.clone(), config.actuators.clone(), lead, metrics));
        let access = Access::new(&config.access, ask.review)?;
        let door = Door::bind(&config.grpc, hub.clone()).await?;
        let http = Http::bind(config.http.listen, hub.clone(), access.clone(), ms(config.demand.ttl)).await?;
        let addresses = (door.address()?, http.address()?);
        let (facts_in, facts) = mpsc::channel(FACTS_WAITING_MAX);
        let (acts, acts_out) = mpsc::channel(ACTS_WAITING_MAX);
        let (done_in, done) = mpsc::channel(ACTS_WAITING_MAX);
        let cluster = config.kubernetes.enabled.then_some(Cluster { facts: facts_in, acts: acts_out, done: done_in });
        let acts = cluster.is_some().then_some(acts);
        let controller = Controller::new(hub.clone(), facts, (acts, done), recorder);
        let asker = Asker::new(config, hub.clone())?;
        for actuator in Actuator::ALL {
            if config.actuators.mode(actuator) == Mode::On {
                info!(actuator = actuator.as_str(), "it acts");
            }
        }
        Ok(Self { hub, access, door, http, controller, asker, cluster, addresses })
    }

    /// Where agents and KEDA, and everybody else, are heard.
    pub const fn addresses(&self) -> (SocketAddr, SocketAddr) {
        self.addresses
    }

    /// The queues of whoever watches Kubernetes: once, and where it is enabled.
    pub fn cluster(&mut self) -> Option<Cluster> {
        self.cluster.take()
    }

    /// What its parts share.
    pub fn hub(&self) -> Arc<Hub> {
        self.hub.clone()
    }

    /// Runs until `stop`, or until something ends that should not.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Ended> {
        if self.cluster.is_some() {
            return Err(Ended::Unwatched);
        }
        let Self { hub, access, door, http, controller, asker, cluster: _, addresses: (grpc, page) } = self;
        info!(%grpc, http = %page, "the scaler runs");
        let services = Services {
            reports: reports::server(hub.clone(), access, stop.child_token()),
            keda: keda::server(hub, stop.child_token()),
        };
        let mut tasks = JoinSet::new();
        let of = |name| move |()| name;
        use futures_util::FutureExt as _;
        tasks.spawn(door.run(services, stop.clone()).map(of("the door for agents and KEDA")));
        tasks.spawn(http.run(stop.clone()).map(of("the HTTP door")));
        tasks.spawn(controller.run(stop.clone()).map(of("the controller")));
        if let Some(asker) = asker {
            tasks.spawn(asker.run(stop.clone()).map(of("what asks Prometheus")));
        }
        let mut ended = Ok(());
        while let Some(task) = tasks.join_next().await {
            if !stop.is_cancelled() {
                let name = task.unwrap_or("a task that broke");
                error!(task = name, "ended by itself: the scaler stops");
                ended = Err(Ended::Part(name));
                stop.cancel();
            }
        }
        ended
    }
}
