//! Demand that the scaler asks for itself, where nobody says it: Prometheus, again and again.
//!
//! What comes is a sample like any other. What does not come is none: an empty answer is not zero. Not here: demand
//! that is said (`http`), and what is taken of it (`fleet`).

mod query;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_core::units::Seconds;
use futures_util::{StreamExt as _, stream};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::query::{Prometheus, Unanswered, UrlError};
use crate::bell::SOON;
use crate::config::{Config, ms};
use crate::fleet::Demand;
use crate::hub::Hub;
use crate::metrics::ReasonLabels;

/// Queries at once: Prometheus has others to answer.
const AT_ONCE: usize = 8;

/// Asks for the demand of those workloads that have a query.
#[derive(Debug)]
pub struct Asker {
    hub: Arc<Hub>,
    prometheus: Prometheus,
    /// By workload.
    queries: BTreeMap<String, String>,
    every: Duration,
    ttl_ms: u64,
    /// Workloads whose trouble is in the log.
    told: Mutex<BTreeSet<String>>,
}

impl Asker {
    /// None where nothing is asked.
    pub fn new(config: &Config, hub: Arc<Hub>) -> Result<Option<Self>, UrlError> {
        if config.demand.prometheus.is_empty() {
            return Ok(None);
        }
        let prometheus = Prometheus::new(&config.demand.prometheus)?;
        let query = |workload: &crate::config::Workload| Some((workload.name.clone(), workload.prometheus.clone()?));
        let queries = config.workloads.iter().filter_map(query).collect();
        let (Seconds(every), ttl_ms) = (config.demand.every, ms(config.demand.ttl));
        Ok(Some(Self { hub, prometheus, queries, every, ttl_ms, told: Mutex::default() }))
    }

    /// Until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            let mut turns = interval(self.every);
            // One that took long is not made up for.
            turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                turns.tick().await;
                if self.hub.lead.holds() {
                    stream::iter(&self.queries)
                        .for_each_concurrent(AT_ONCE, |(name, query)| self.one(name, query))
                        .await;
                }
            }
        })
        .await;
    }

    async fn one(&self, name: &str, query: &str) {
        match self.prometheus.ask(query).await {
            Ok(backlog_milli) => {
                let demand = Demand { backlog_milli, age_ms: 0, ttl_ms: self.ttl_ms };
                let taken = self.hub.fleet().demand(name, demand, self.hub.clock.now());
                match taken {
                    Ok(()) => self.hub.bell.ring(SOON),
                    // Somebody said it a moment ago: theirs is the newer.
                    Err(error) => tracing::debug!(workload = name, %error, "a sample of Prometheus is not taken"),
                }
                if self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(name) {
                    info!(workload = name, "Prometheus says its demand again");
                }
            }
            Err(why) => {
                self.hub.metrics.demand_refusals.get_or_create(&ReasonLabels { reason: why.word() }).inc();
                if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned()) {
                    let why = why.to_string();
                    warn!(workload = name, why, "Prometheus does not say its demand, which is not zero");
                }
            }
        }
    }
}
