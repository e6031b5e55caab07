//! All of it as one thing to run: connected at the start, ended in the order in which nothing is done by somebody
//! who does not lead.

use std::sync::Arc;

use darter_base::kubernetes::connect;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::actuators::{Actuators, undo};
use super::events::{Events, Said, write};
use super::fence::fenced;
use super::leader::{Lead, TimesError};
use super::lease::Election;
use super::metrics::Metrics;
use super::review::Reviews;
use super::settings::Settings;
use super::watch::Watches;
use crate::fleet::{Act, Done, Fact};

/// Why it does not start.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// There is no credential, or no address.
    #[error("cannot speak to Kubernetes: {0}")]
    Connect(String),
    /// A lease that cannot work.
    #[error(transparent)]
    Times(#[from] TimesError),
}

/// The other ends of the controller's queues.
#[derive(Debug)]
pub struct Ends {
    /// What is learned goes in here.
    pub facts: mpsc::Sender<Fact>,
    /// What is to be done comes out here.
    pub acts: mpsc::Receiver<Act>,
    /// What came of it goes in here.
    pub done: mpsc::Sender<Done>,
}

/// The scaler's side of Kubernetes. Nobody was asked yet.
pub struct Side {
    settings: Settings,
    client: Client,
    election: Election,
    reviews: Arc<Reviews>,
    events: Events,
    said: mpsc::Receiver<Said>,
    metrics: Arc<Metrics>,
}

impl Side {
    /// Reads credentials. Tokens are to be for `audience`; `agents` are the service accounts of agents,
    /// `<namespace>/<name>`.
    pub async fn connect(
        settings: &Settings,
        audience: &str,
        agents: &[String],
        metrics: Arc<Metrics>,
    ) -> Result<Self, SideError> {
        let times = settings.times();
        times.check()?;
        let connected = connect(settings.kubeconfig.as_deref()).await.map_err(SideError::Connect)?;
        let client = connected.client;
        let election = Election::new(client.clone(), &settings.lease, &settings.identity, times);
        let reviews = Arc::new(Reviews::new(client.clone(), audience, agents, metrics.clone()));
        let (events, said) = Events::new(metrics.clone());
        Ok(Self { settings: settings.clone(), client, election, reviews, events, said, metrics })
    }

    /// Asked right before each act.
    pub fn lead(&self) -> Lead {
        self.election.lead()
    }

    /// Hears when this scaler begins or ceases to lead: for readiness.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.election.leads()
    }

    /// Who asks whose a token is.
    pub fn reviews(&self) -> Arc<Reviews> {
        self.reviews.clone()
    }

    /// Takes Events, of whoever has something to say.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Watches, acts, and wants to lead, until `stop`. Then what is being done is done, all is taken back if so
    /// configured, and last the lease is given back.
    pub async fn run(self, ends: Ends, stop: CancellationToken) {
        let Self { settings, client, election, reviews: _, events, said, metrics } = self;
        let fenced = fenced(&client, &election.lead(), settings.times().write_within());
        let leave = CancellationToken::new();
        let elected = election.run(&metrics, leave.clone());
        let acting = async {
            let watches = Watches::new(&settings, metrics.clone(), ends.facts);
            let actuators = Actuators::new(fenced.clone(), &settings, metrics.clone(), events);
            tokio::join!(
                watches.run(stop.clone()),
                actuators.run(ends.acts, ends.done, stop.clone()),
                stop.run_until_cancelled(write(fenced.clone(), &settings.identity, said, &metrics)),
            );
            // Whoever ended first, the lease is kept until this scaler is told to go.
            stop.cancelled().await;
            if settings.undo_on_exit {
                let undone = undo(&fenced, &settings).await;
                info!(?undone, "took back what was written");
                for failed in &undone.failed {
                    warn!(failed, "cannot take something back");
                }
            }
            leave.cancel();
        };
        tokio::join!(elected, acting);
    }
}
