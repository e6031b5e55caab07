//! The registries this node mirrors, each with its origin and its rules.
//!
//! A request for any other registry is answered 404: the mirror is no open proxy. The hosts before a
//! registry are those of its hosts.toml, and change with it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use darter_core::Registry;
use darter_core::ecr::Ecr;
use darter_core::hosts_toml::ForeignOrigin;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::certs_d::Others;
use crate::config::{Access, RegistryConfig};
use crate::log::chain;
use crate::metrics::RegistryLabel;
use crate::origin::{Away, Origin};

/// How long a registry that was away is not asked again by those who have something else.
const PAUSE: Duration = Duration::from_secs(5);
/// A site that never reaches its registry waits for it twice a minute.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// One mirrored registry.
pub struct Site {
    /// How to reach it, and the hosts of hosts.toml that stand before it.
    reach: RwLock<(Origin, Vec<ForeignOrigin>)>,
    /// Whether it is away.
    pub away: Away,
    /// Its label in the metrics.
    pub label: RegistryLabel,
    /// What the operator said about it.
    pub config: RegistryConfig,
}

impl Site {
    /// A registry with the origin that was made for it and for these hosts before it.
    pub fn new(config: RegistryConfig, origin: Origin, foreign: Vec<ForeignOrigin>) -> Self {
        let (reach, away) = (RwLock::new((origin, foreign)), Away::new(PAUSE, PAUSE_MAX));
        Self { reach, away, label: RegistryLabel::of(&config.name), config }
    }

    /// How to reach it now. Whoever asks for several parts of one thing keeps what this gives.
    pub fn origin(&self) -> Origin {
        self.reach.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Takes the hosts that its hosts.toml names now.
    fn take(&self, foreign: &[ForeignOrigin]) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        if reach.1 == foreign {
            return;
        }
        match reach.0.with_foreign(foreign) {
            Ok(origin) => {
                info!(registry = %self.registry(), hosts = ?origin.others(),
                    "hosts.toml was changed: these hosts are asked before the registry now");
                *reach = (origin, foreign.to_vec());
            }
            Err(error) => {
                warn!(registry = %self.registry(), error = %chain(&error),
                    "hosts.toml was changed, and the hosts before the registry cannot be: they stay as they were");
                // Not tried again before it is changed again.
                reach.1 = foreign.to_vec();
            }
        }
    }

    /// The registry's name.
    pub const fn registry(&self) -> &Registry {
        &self.config.name
    }

    /// The access policy: as configured, `node` for private ECR. `None`: `public` where an anonymous
    /// request works, else `caller`; that can differ from one repository to the next.
    pub fn access(&self) -> Option<Access> {
        let is_ecr = || matches!(Ecr::recognise(&self.config.name), Some(Ecr::Private { .. }));
        self.config.access.or_else(|| is_ecr().then_some(Access::Node))
    }
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Site").field(&self.config.name).finish()
    }
}

/// All mirrored registries.
#[derive(Debug, Default)]
pub struct Sites {
    sites: HashMap<Registry, Arc<Site>>,
    default: Option<Registry>,
}

impl Sites {
    /// These registries; `default` is the one meant by requests that name none.
    pub fn new(sites: impl IntoIterator<Item = Site>, default: Option<Registry>) -> Self {
        let sites = sites.into_iter().map(|site| (site.registry().clone(), Arc::new(site))).collect();
        Self { sites, default }
    }

    /// The registry that a request means.
    pub fn get(&self, named: Option<&Registry>) -> Option<&Arc<Site>> {
        named.or(self.default.as_ref()).and_then(|registry| self.sites.get(registry))
    }

    /// Follows what hosts.toml files name, until `stop`.
    pub async fn follow(self: Arc<Self>, mut others: watch::Receiver<Others>, stop: CancellationToken) {
        loop {
            for (registry, foreign) in &*others.borrow_and_update() {
                if let Some(site) = self.sites.get(registry) {
                    site.take(foreign);
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                // Who looks at the files is gone, and the agent with it.
                changed = others.changed() => if changed.is_err() {
                    return stop.cancelled().await;
                },
            }
        }
    }

    /// All of them, in order of name.
    pub fn all(&self) -> Vec<&Arc<Site>> {
        let mut all: Vec<_> = self.sites.values().collect();
        all.sort_by_key(|site| site.registry());
        all
    }
}
