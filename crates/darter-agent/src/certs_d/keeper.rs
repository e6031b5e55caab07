//! One look at all registries: puts in, takes out or reports, and tells what it found.
//!
//! Files block, so a look runs on a thread that may; the loop around it is in `mod`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use darter_core::Registry;
use darter_core::hosts_toml::{HostsTomlError, LeftOut, Wanted, own_server};
use tracing::{info, warn};

use super::site::{Installed, OtherHosts, Site};
use super::{CertsDError, HostsState, Others, States, Uninstalled, chain, files, mirror_url, site, uninstall, wanted};
use crate::config::{Access, Config, RegistryConfig};
use crate::metrics::{HostsTomlLabels, Metrics, RegistryLabel};
use crate::sites::Unserved;

/// What a round works on; it runs on a thread that may block.
#[derive(Debug)]
pub(super) struct Keeper {
    /// What `uninstall` goes by.
    config: Config,
    /// Nothing is written any more.
    is_uninstalled: bool,
    root: PathBuf,
    later_roots: Vec<PathBuf>,
    mirror_url: String,
    write: bool,
    sites: Vec<Site>,
    /// Registries that get no file whatever happens.
    closed: Vec<Registry>,
    /// Registries that get none as long as their origins cannot be set up.
    pub(super) unserved: Unserved,
    pub(super) metrics: Arc<Metrics>,
    last: BTreeMap<Registry, HostsState>,
    others: Others,
    said: BTreeMap<Registry, OtherHosts>,
}

/// What a round did.
pub(super) struct Round {
    pub(super) states: States,
    pub(super) others: Others,
    /// Something was put right, or could not be: what we hear next may be our own doing.
    pub(super) is_uneasy: bool,
}

impl Keeper {
    pub(super) fn new(config: &Config, later_roots: &[PathBuf], metrics: Arc<Metrics>) -> Self {
        let mut keeper = Self {
            config: Config { registries: Vec::new(), ..config.clone() },
            is_uninstalled: false,
            root: config.certs_d.path.clone(),
            later_roots: later_roots.to_vec(),
            mirror_url: mirror_url(config.mirror.listen),
            write: config.certs_d.write,
            sites: Vec::new(),
            closed: Vec::new(),
            unserved: Unserved::new(),
            metrics,
            last: BTreeMap::new(),
            others: BTreeMap::new(),
            said: BTreeMap::new(),
        };
        keeper.take(&config.registries);
        keeper.look_for_others();
        keeper
    }

    /// Looks after these too.
    pub(super) fn take(&mut self, registries: &[RegistryConfig]) {
        for registry in registries {
            if self.config.registries.iter().any(|known| known.name == registry.name) {
                continue;
            }
            match registry.access {
                Some(Access::Off) => self.closed.push(registry.name.clone()),
                _ => self.sites.push(Site {
                    root: self.root.clone(),
                    later_roots: self.later_roots.clone(),
                    wanted: wanted(&self.config, registry, self.config.mirror.listen),
                }),
            }
            self.config.registries.push(registry.clone());
        }
    }

    /// The other hosts that each registry's hosts.toml names, as of the last look.
    pub(super) const fn others(&self) -> &Others {
        &self.others
    }

    /// Says once what of others' is not honoured, or ours to take out.
    fn look_for_others(&mut self) {
        for site in &self.sites {
            let registry = &site.wanted.registry;
            let found = match site.others() {
                Ok(found) => found,
                Err(error) => {
                    // They stay as they were. The state of the file tells the same later on.
                    if !self.others.contains_key(registry) {
                        warn!(%registry, error = %chain(&error), "cannot look for other hosts of this registry");
                    }
                    continue;
                }
            };
            self.others.insert(registry.clone(), found.origins.clone());
            let known = self.said.entry(registry.clone()).or_default();
            for LeftOut { host, key } in found.left_out.iter().filter(|host| !known.left_out.contains(host)) {
                warn!(%registry, %host, key, "containerd alone asks this host: darter cannot honour the key");
            }
            for by in found.left_by.iter().filter(|by| !site.wanted.adopt && !known.left_by.contains(by)) {
                warn!(%registry, %by, "another program left a host in hosts.toml; certs_d.adopt = true takes it out");
            }
            *known = found;
        }
    }

    /// The directories whose changes matter.
    pub(super) fn watched(&self) -> Vec<PathBuf> {
        // What a file was folded from counts too: containerd fails a pull whose `ca` is gone.
        let dirs = self.sites.iter().flat_map(|site| [Some(site.dir()), site.hidden_dir()]).flatten();
        let mut all: Vec<PathBuf> = self.root.parent().map(Path::to_owned).into_iter().chain(dirs).collect();
        all.push(self.root.clone());
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Removes what an agent that was killed left half done, and its files for registries that are
    /// not configured any more. Only at the start: later, what looks like this is another process at
    /// work.
    pub(super) fn clear_leftovers(&self) {
        let cleared = |names: Option<Vec<String>>| {
            names.unwrap_or_default().iter().filter(|name| self.write && !self.is_kept(name)).try_for_each(|name| {
                uninstall::leave_dir(&self.root, name, |registry| self.orphan(registry)).map(|_| ())
            })
        };
        let dirs = self.sites.iter().map(Site::dir).filter(|dir| !dir.is_symlink());
        let all = [self.root.clone()].into_iter().chain(dirs).filter(|_| self.write);
        for result in all.map(|dir| files::clear_leftovers(&dir)).chain([files::names(&self.root).and_then(cleared)]) {
            if let Err(error) = result {
                warn!(error = %chain(&error), "cannot clear leftovers");
            }
        }
    }

    fn is_kept(&self, dir_name: &str) -> bool {
        let registry = site::registry_of(dir_name);
        registry.is_none_or(|registry| self.sites.iter().any(|site| site.wanted.registry == registry))
    }

    /// What a file of ours for a registry that nobody configured was most likely made as.
    fn orphan(&self, registry: &Registry) -> Wanted {
        Wanted {
            registry: registry.clone(),
            server: own_server(registry),
            mirror_url: self.mirror_url.clone(),
            resolve: true,
            dial_timeout: Duration::from_millis(200),
            adopt: false,
        }
    }

    pub(super) fn round(&mut self, is_serving: bool) -> Round {
        if self.is_uninstalled {
            return self.settle(|_, _| HostsState::Uninstalled);
        }
        if !self.write {
            return self.settle(|keeper, site| keeper.report(site));
        }
        if !is_serving {
            return self.leave("the mirror does not pass its self-test");
        }
        if let Err(reason) = self.make_root() {
            return self.settle(|_, _| reason.clone());
        }
        self.settle(|keeper, site| keeper.install(site))
    }

    fn install(&self, site: &Site) -> HostsState {
        let registry = &site.wanted.registry;
        if let Some(reason) = self.unserved.get(registry) {
            return Self::withdraw(site, reason);
        }
        match site.install() {
            Ok(Installed::Held) => HostsState::Written,
            Ok(Installed::Written) => {
                let was_written = self.last.get(registry) == Some(&HostsState::Written);
                if was_written {
                    self.metrics.hosts_toml_repairs.inc();
                    warn!(%registry, "someone changed hosts.toml; put right");
                }
                HostsState::Written
            }
            Ok(Installed::Contended) => HostsState::Drifted,
            Ok(Installed::Foreign(by)) => HostsState::Foreign { by },
            Err(error) => HostsState::Failed { reason: chain(&error) },
        }
    }

    fn withdraw(site: &Site, reason: &str) -> HostsState {
        match site.withdraw() {
            Ok(_) => HostsState::Absent { reason: reason.to_owned() },
            Err(error) => HostsState::Failed { reason: chain(&error) },
        }
    }

    /// The no-write mode.
    fn report(&self, site: &Site) -> HostsState {
        if let Some(reason) = self.unserved.get(&site.wanted.registry) {
            return HostsState::Absent { reason: reason.clone() };
        }
        let report = || {
            if site.is_in_force()? {
                return Ok(HostsState::Written);
            }
            Ok(match site.should_be()? {
                Ok(merged) => HostsState::NotWritten { should_be: merged.text },
                Err(HostsTomlError::AddressTaken { by, .. }) => HostsState::Foreign { by },
            })
        };
        report().unwrap_or_else(|error: CertsDError| HostsState::Failed { reason: chain(&error) })
    }

    /// Puts everything back as `darter uninstall` does without us, and from then on writes nothing: also
    /// where something could not be put back, and is tried again with the next order.
    pub(super) fn uninstall(&mut self) -> Result<Uninstalled, CertsDError> {
        if !std::mem::replace(&mut self.is_uninstalled, true) {
            warn!("ordered to uninstall: no hosts.toml is written until this agent is started again");
        }
        let undone = uninstall(&self.config)?;
        for done in &undone {
            info!(%done, "put back");
        }
        Ok(Uninstalled { certs_d: self.root.clone(), undone })
    }

    /// Takes everything out.
    pub(super) fn leave(&mut self, reason: &str) -> Round {
        if self.is_uninstalled {
            return self.settle(|_, _| HostsState::Uninstalled);
        }
        if !self.write {
            return self.settle(|keeper, site| keeper.report(site));
        }
        let round = self.settle(|_, site| Self::withdraw(site, reason));
        if let Err(error) = uninstall::leave_root(&self.root) {
            warn!(error = %chain(&error), "cannot clear certs.d");
        }
        round
    }

    /// certs.d itself may be missing, but not what it belongs in: that would be a host without
    /// containerd, or a mount that went wrong.
    fn make_root(&self) -> Result<(), HostsState> {
        if self.root.is_dir() || self.sites.is_empty() {
            return Ok(());
        }
        let parent = self.root.parent().filter(|parent| parent.is_dir());
        if parent.is_none() {
            let reason = format!("{} is in no directory: no containerd here, or not mounted", self.root.display());
            return Err(HostsState::Absent { reason });
        }
        let made = files::make_dir(&self.root, &[(files::CREATED, "")]);
        made.map(|_| ()).map_err(|error| HostsState::Failed { reason: chain(&error) })
    }

    /// Finds the state of each registry, and tells it to the metrics and, where it is new, the log.
    fn settle(&mut self, state: impl Fn(&Self, &Site) -> HostsState) -> Round {
        let repairs = self.metrics.hosts_toml_repairs.get();
        let found = self.sites.iter().map(|site| (site.wanted.registry.clone(), state(self, site)));
        let closed = self.closed.iter().cloned().map(|registry| (registry, HostsState::Closed));
        let states: States = found.chain(closed).collect();
        for (registry, state) in &states {
            let before = self.last.insert(registry.clone(), state.clone());
            if before.as_ref() != Some(state) {
                self.tell(registry, before.as_ref(), state);
            }
        }
        let is_in_trouble = |state: &HostsState| matches!(state, HostsState::Drifted | HostsState::Failed { .. });
        let is_uneasy =
            self.metrics.hosts_toml_repairs.get() > repairs || states.iter().any(|(_, state)| is_in_trouble(state));
        self.look_for_others();
        Round { states, others: self.others.clone(), is_uneasy }
    }

    fn tell(&self, registry: &Registry, before: Option<&HostsState>, state: &HostsState) {
        let label =
            |state: &HostsState| HostsTomlLabels { registry: RegistryLabel::of(registry), state: state.label() };
        if let Some(before) = before.filter(|before| before.label() != state.label()) {
            self.metrics.hosts_toml.remove(&label(before));
        }
        self.metrics.hosts_toml.get_or_create(&label(state)).set(1);
        match state {
            HostsState::Written => info!(%registry, "containerd asks the mirror"),
            HostsState::Closed => info!(%registry, "not mirrored: access = \"off\""),
            HostsState::Absent { reason } => info!(%registry, reason, "containerd does not ask the mirror"),
            HostsState::NotWritten { should_be } => {
                info!(%registry, should_be, "hosts.toml is not ours to write; it should be this");
            }
            HostsState::Uninstalled => info!(%registry, "containerd does not ask the mirror: darter was uninstalled"),
            HostsState::Drifted => warn!(%registry, "hosts.toml is wrong and changes all the time"),
            HostsState::Failed { reason } => warn!(%registry, reason, "cannot keep hosts.toml"),
            HostsState::Foreign { by } => {
                warn!(%registry, %by, "the mirror's address is another program's in hosts.toml; certs_d.adopt = true takes it out");
            }
        }
    }
}
