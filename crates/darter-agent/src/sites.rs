//! The registries this node mirrors, each with its origin and its rules.
//!
//! A request for any other registry is answered 404: the mirror is no open proxy. The hosts before a
//! registry are those of its hosts.toml, and change with it. A registry whose origin cannot be set up (a
//! secret that is mounted late, say) is not served, and does not keep the others from it: it is tried again.
//! A `ca` that was changed is read again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use darter_core::Registry;
use darter_core::ecr::Ecr;
use darter_core::hosts_toml::ForeignOrigin;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::certs_d::Others;
use crate::config::{Access, Config, RegistryConfig};
use crate::log::chain;
use crate::metrics::{Metrics, RegistryLabel};
use crate::origin::{Away, Origin, OriginError, Shared};

/// How long a registry that was away is not asked again by those who have something else.
const PAUSE: Duration = Duration::from_secs(5);
/// A site that never reaches its registry waits for it twice a minute.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// One mirrored registry.
pub struct Site {
    /// How to reach it, and the hosts of hosts.toml that stand before it.
    reach: RwLock<(Origin, Vec<ForeignOrigin>)>,
    /// What the log has of its `ca`.
    complaint: Mutex<Option<String>>,
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
        Self { reach, complaint: Mutex::default(), away, label: RegistryLabel::of(&config.name), config }
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

    /// Takes the certificates that its `ca` holds now. Reads a file.
    fn take_ca(&self, shared: &Shared) {
        let renewed = self.origin().has_new_ca(shared).and_then(|is_news| {
            if is_news {
                let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
                reach.0 = reach.0.with_foreign(&reach.1)?;
                info!(registry = %self.registry(), "its ca was changed: what it holds now is trusted");
            }
            Ok(())
        });
        let complaint = renewed.err().map(|error| chain(&error).to_string());
        let mut known = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = complaint.as_ref().filter(|_| *known != complaint) {
            warn!(registry = %self.registry(), %error, "its ca cannot be used any more: what it held before is trusted");
        }
        *known = complaint;
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

/// The registries that are configured and not served, each with the reason.
pub type Unserved = BTreeMap<Registry, String>;

/// The registries there are: those of the configuration, and this node's own once it is known.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// All of them, served or not.
    pub all: Vec<RegistryConfig>,
    /// Why this node's own is not among them yet.
    pub awaited: Option<String>,
}

/// All mirrored registries.
pub struct Sites {
    /// Those whose origins could be set up.
    sites: RwLock<HashMap<Registry, Arc<Site>>>,
    unserved: watch::Sender<Unserved>,
    registries: watch::Sender<Registries>,
    /// What came since: it is set up before others hear of it, so that hosts.toml names what is served.
    found: watch::Sender<Vec<RegistryConfig>>,
    config: Config,
    shared: Shared,
    metrics: Arc<Metrics>,
}

impl Sites {
    /// The registries of the configuration, with the hosts that their hosts.toml files name.
    pub fn open(config: &Config, shared: Shared, others: &Others, metrics: Arc<Metrics>) -> Self {
        let (sites, unserved, found) = (RwLock::default(), watch::Sender::default(), watch::Sender::default());
        let registries = watch::Sender::new(Registries { all: config.registries.clone(), awaited: None });
        let all = Self { sites, unserved, registries, found, config: config.clone(), shared, metrics };
        all.open_the_rest(others);
        all
    }

    /// The registries that are not served at the moment.
    pub fn unserved(&self) -> watch::Receiver<Unserved> {
        self.unserved.subscribe()
    }

    /// The registries there are.
    pub fn registries(&self) -> watch::Receiver<Registries> {
        self.registries.subscribe()
    }

    /// This node's own registry is not known yet, for this reason.
    pub fn awaits(&self, reason: String) {
        self.registries.send_if_modified(|registries| {
            let is_news = registries.awaited.as_ref() != Some(&reason);
            registries.awaited = Some(reason);
            is_news
        });
    }

    /// Who knows this node's own registry has told: this one, if it is a new one. `follow` sets it up.
    pub fn found(&self, registry: Option<RegistryConfig>) {
        match registry {
            Some(registry) => self.found.send_modify(|found| found.push(registry)),
            None => self.registries.send_modify(|registries| registries.awaited = None),
        }
    }

    /// The registry that a request means; one that names none means `mirror.default_registry`.
    pub fn get(&self, named: Option<&Registry>) -> Option<Arc<Site>> {
        let registry = named.or(self.config.mirror.default_registry.as_ref())?;
        self.sites.read().unwrap_or_else(PoisonError::into_inner).get(registry).cloned()
    }

    /// Sets up the origins that are not there. Reads files.
    fn open_the_rest(&self, others: &Others) {
        let before = self.unserved.borrow().clone();
        let mut unserved = Unserved::new();
        let mut all = self.config.registries.clone();
        all.extend(self.found.borrow().iter().cloned());
        for registry in all.iter().filter(|registry| self.get(Some(&registry.name)).is_none()) {
            let (name, foreign) = (&registry.name, others.get(&registry.name).cloned().unwrap_or_default());
            match self.site(registry, foreign) {
                Ok(site) => {
                    if before.contains_key(name) {
                        info!(registry = %name, "can be used as configured now: served from now on");
                    }
                    let mut sites = self.sites.write().unwrap_or_else(PoisonError::into_inner);
                    sites.insert(name.clone(), Arc::new(site));
                }
                Err(error) => {
                    let reason = format!("cannot be used as configured, and is tried again: {}", chain(&error));
                    if before.get(name) != Some(&reason) {
                        error!(registry = %name, %reason, "this registry is not served; the others are");
                    }
                    unserved.insert(name.clone(), reason);
                }
            }
        }
        self.unserved.send_if_modified(|known| {
            let is_news = *known != unserved;
            *known = unserved;
            is_news
        });
        self.registries.send_if_modified(|known| {
            let is_news = known.all.len() != all.len();
            if is_news {
                *known = Registries { all, awaited: None };
            }
            is_news
        });
    }

    fn site(&self, registry: &RegistryConfig, foreign: Vec<ForeignOrigin>) -> Result<Site, OriginError> {
        let origin = Origin::new(&self.config, registry, &foreign, &self.shared, self.metrics.clone())?;
        let site = Site::new(registry.clone(), origin, foreign);
        if site.access() == Some(Access::Node) && !site.origin().has_node_credential() {
            warn!(registry = %registry.name, "access = \"node\", and this node has no credential for it: give \
                username and password_file, or docker_config");
        }
        Ok(site)
    }

    /// Looks whether a `ca` was changed. Reads files.
    fn renew(&self) {
        for registry in self.config.registries.iter().filter(|registry| registry.ca.is_some()) {
            if let Some(site) = self.get(Some(&registry.name)) {
                site.take_ca(&self.shared);
            }
        }
    }

    /// Follows what hosts.toml files name, sets up what came since the start, tries again what could not be,
    /// and takes a `ca` that was changed, until `stop`.
    pub async fn follow(self: Arc<Self>, mut others: watch::Receiver<Others>, stop: CancellationToken) {
        let mut found = self.found.subscribe();
        let mut has_more = !found.borrow_and_update().is_empty();
        let has_ca = self.config.registries.iter().any(|registry| registry.ca.is_some());
        loop {
            let hosts = others.borrow_and_update().clone();
            for (registry, foreign) in &hosts {
                if let Some(site) = self.get(Some(registry)) {
                    site.take(foreign);
                }
            }
            let is_all_served = self.unserved.borrow().is_empty();
            if has_more || has_ca || !is_all_served {
                let sites = self.clone();
                // A disk that hangs must not keep the agent from stopping.
                let tried = tokio::task::spawn_blocking(move || {
                    sites.renew();
                    sites.open_the_rest(&hosts);
                });
                stop.run_until_cancelled(tried).await;
            }
            has_more = false;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.config.certs_d.check_every.0), if has_ca || !is_all_served => (),
                Ok(()) = found.changed() => has_more = true,
                // Who looks at the files is gone, and the agent with it.
                changed = others.changed() => if changed.is_err() {
                    return stop.cancelled().await;
                },
            }
        }
    }
}
