//! All of it as one thing to run: connected at the start, ended in the order in which nothing is done by somebody
//! who does not lead.

use std::sync::Arc;

use darter_base::kubernetes::connect;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::actuators::{Actuators, undo};
use super::events::{Events, Said, write};
use super::fence::fenced;
use super::leader::{Lead, TimesError};
use super::lease::Election;
use super::metrics::Metrics;
use super::review::{Denied, Reviews, Right, Who};
use super::settings::Settings;
use super::watch::Watches;
use crate::access::{self, Granted, Review, Wish};
use crate::hub;
use crate::scaler::{Ask, Cluster};

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
    /// `<namespace>/<name>`; none: the account `darter` of this namespace.
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
        let usual = [format!("{}/darter", client.default_namespace())];
        let agents = if agents.is_empty() { &usual } else { agents };
        let reviews = Arc::new(Reviews::new(client.clone(), audience, agents, metrics.clone()));
        let (events, said) = Events::new(metrics.clone());
        Ok(Self { settings: settings.clone(), client, election, reviews, events, said, metrics })
    }

    /// What the scaler asks: whether it leads, and whose a token is.
    pub fn ask(&self) -> Ask {
        let (lead, metrics) = (self.lead(), self.metrics.clone());
        Ask {
            lead: Some(hub::Lead::by(move || lead.holds_now())),
            review: Some(review(self.reviews.clone())),
            metrics: Some(Box::new(move |registry| metrics.register(registry))),
        }
    }

    /// Asked right before each act.
    pub fn lead(&self) -> Lead {
        self.election.lead()
    }

    /// Hears when this scaler begins or ceases to lead: for readiness.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.election.leads()
    }

    /// Takes Events, of whoever has something to say.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Watches, acts, and wants to lead, until `stop`. Then what is being done is done, all is taken back if so
    /// configured, and last the lease is given back.
    pub async fn run(self, ends: Cluster, stop: CancellationToken) {
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

/// Whether somebody may: an agent report as the node of its pod, others what a Role says.
fn review(reviews: Arc<Reviews>) -> Review {
    Arc::new(move |token, wish| {
        let reviews = reviews.clone();
        Box::pin(async move {
            let came = match right(wish) {
                None => reviews.agent(&token).await.map(|who| Granted { node: who.node.clone() }),
                Some(right) => reviews.may(&token, &right).await.map(|_: Arc<Who>| Granted::default()),
            };
            came.map_err(|denied| match denied {
                Denied::Unauthenticated(why) => {
                    debug!(why, "a token is not accepted");
                    access::Denied::BadToken
                }
                Denied::Forbidden(why) => access::Denied::Forbidden(why),
                Denied::Unavailable(why) => access::Denied::Unavailable(why),
            })
        })
    })
}

/// None of a report: that is no right but who one is.
fn right(wish: Wish) -> Option<Right> {
    match wish {
        Wish::Report => None,
        Wish::Demand(workload) => {
            let (namespace, name) = workload.split_once('/').unwrap_or(("", &workload));
            let (namespace, name) = (Some(namespace.to_owned()), Some(name.to_owned()));
            Some(Right { verb: "update", resource: "demands", namespace, name })
        }
        Wish::Freeze => Some(Right { verb: "update", resource: "freezes", namespace: None, name: None }),
    }
}
