//! The ECR registry of this node's own account and region: as configured, or as the metadata service tells.
//!
//! A start does not wait for long, and a service that answers late is not asked in vain: it is asked until it
//! tells, and the registry is mirrored from then on. Not here: what it is asked (`imds`), and what becomes of
//! the registry (`sites`).

use std::sync::Arc;
use std::time::Duration;

use darter_core::ecr::Ecr;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::{Aws, Config, Discover, RegistryConfig};
use crate::imds::{self, ImdsError};
use crate::log::chain;
use crate::metrics::Metrics;
use crate::sites::Sites;

/// The first pause after the start; each next one is twice as long. A node that boots with a hundred others is
/// without its registry for no longer than it must.
const FIRST: Duration = Duration::from_secs(1);
/// No pause is longer: in a pod whose hops are counted no answer ever comes, until somebody raises the limit.
const LONGEST: Duration = Duration::from_secs(30);

/// Who still has to be asked.
#[derive(Debug)]
pub struct OwnRegistry {
    /// And why nobody told so far. None: it is known, or nobody can tell it.
    ask: Option<(Aws, String)>,
    metrics: Arc<Metrics>,
}

impl OwnRegistry {
    /// Adds the registry to the configuration, where it is known by now.
    pub async fn look(config: &mut Config, metrics: Arc<Metrics>) -> Self {
        let named = config.aws.account.clone().zip(config.aws.region.clone());
        let found = match (named, config.aws.discover) {
            (Some(named), _) => Ok(Some(named)),
            (None, Discover::Off) => Ok(None),
            (None, Discover::Auto) => {
                imds::identity(&config.aws).await.map(|found| Some((found.account, found.region)))
            }
        };
        // Another endpoint is there because somebody said so.
        let is_expected = config.aws.imds_endpoint.is_some() || imds::is_ec2();
        let ask = match found {
            Ok(found) => {
                let own = found.and_then(|(account, region)| registry(&account, &region, &config.registries));
                config.registries.extend(own);
                None
            }
            Err(error) if is_expected => {
                let reason = waits(&error);
                warn!(%reason, "asking for this node's own registry until it is known");
                Some((config.aws.clone(), reason))
            }
            Err(error) => {
                info!(reason = %chain(&error), "the metadata service tells no account and region: no default registry");
                None
            }
        };
        Self { ask, metrics }
    }

    /// Tells who looks at the registries that one is awaited.
    pub fn announce(&self, sites: &Sites) {
        if let Some((_, reason)) = &self.ask {
            sites.awaits(reason.clone());
        }
    }

    /// Asks until the registry is known, and has it mirrored. Ends with `stop`.
    pub async fn run(self, sites: Arc<Sites>, stop: CancellationToken) {
        if let Some((aws, _)) = &self.ask {
            stop.run_until_cancelled(self.ask(aws, &sites)).await;
        }
        stop.cancelled().await;
    }

    async fn ask(&self, aws: &Aws, sites: &Sites) {
        let mut pause = FIRST;
        loop {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
            match imds::identity_now(aws).await {
                Ok(found) => {
                    info!("the metadata service tells account and region now");
                    let known = sites.registries().borrow().all.clone();
                    return sites.found(registry(&found.account, &found.region, &known));
                }
                Err(error) => {
                    self.metrics.own_registry_errors.inc();
                    debug!(error = %chain(&error), "still no registry of this node's own");
                    sites.awaits(waits(&error));
                }
            }
        }
    }
}

/// What `/readyz` says meanwhile.
fn waits(error: &ImdsError) -> String {
    let what = match error {
        ImdsError::TimedOut | ImdsError::Unreachable(_) => "has not answered".to_owned(),
        error => format!("has not told account and region ({error})"),
    };
    format!("the instance metadata service {what}: the ECR registry of this node's account is not mirrored yet")
}

/// The registry of an account in a region, unless it is among the known ones.
fn registry(account: &str, region: &str, known: &[RegistryConfig]) -> Option<RegistryConfig> {
    match Ecr::host(account, region).parse() {
        Ok(name) if known.iter().any(|registry| registry.name == name) => None,
        Ok(name) => {
            info!(registry = %name, "mirroring this node's own ECR registry");
            Some(RegistryConfig::named(name))
        }
        Err(error) => {
            warn!(error = %chain(&error), "account and region do not make a registry name");
            None
        }
    }
}
