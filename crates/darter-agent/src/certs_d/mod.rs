//! Owns darter's part of containerd's certs.d: there while the mirror works, gone when it does not.
//!
//! containerd reads a registry's hosts.toml at each pull, so writing one is all it takes to be
//! asked, and taking it away all it takes to be out of the way. `hosts_toml` in the core decides
//! what a file should say, `site` what to do in one directory, `files` does it in steps that a kill
//! between any two survives; here is the loop. containerd's config.toml is never written, containerd
//! never restarted.

mod files;
mod preflight;
mod site;
#[cfg(test)]
mod tests;
mod uninstall;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use darter_core::Registry;
use darter_core::hosts_toml::{Foreign, HostsTomlError, Wanted, own_server};
use tokio::sync::watch as channel;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::{Access, Config, RegistryConfig};
use crate::metrics::{HostsTomlLabels, Metrics, RegistryLabel};

pub use preflight::{Preflight, preflight, preflight_for};
pub use site::{How, Undone};
pub use uninstall::uninstall;

use site::{Installed, Site};
use watch::Watch;

/// After a repair the next one waits: another program may put its own back as fast as we do, and
/// the two must not keep a core and the disk busy.
const FIGHT_PAUSE: Duration = Duration::from_secs(1);

/// Why a file under certs.d could not be dealt with.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum CertsDError {
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot replace {}", .path.display())]
    Replace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot remove {}", .path.display())]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot back up {}", .path.display())]
    Backup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is a symbolic link; darter writes only into a directory of the registry's own", .path.display())]
    Link { path: PathBuf },
    #[error("{} is being changed by another program all the time", .path.display())]
    Contended { path: PathBuf },
}

/// How a registry's hosts.toml is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum HostsState {
    /// In force.
    Written,
    /// Not there, on purpose.
    Absent {
        /// What is missing for it to be there.
        reason: String,
    },
    /// Wrong, and about to be put right.
    Drifted,
    /// Not written because `certs_d.write` is false.
    NotWritten {
        /// What the file should say.
        should_be: String,
    },
    /// Could not be written.
    Failed {
        /// The error, with its causes.
        reason: String,
    },
    /// Another program has the mirror's address in the file; `certs_d.adopt` takes it out.
    Foreign {
        /// Which program.
        by: Foreign,
    },
}

impl HostsState {
    /// The label value of `darter_hosts_toml`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Absent { .. } => "absent",
            Self::Drifted => "drifted",
            Self::NotWritten { .. } => "not_written",
            Self::Failed { .. } => "failed",
            Self::Foreign { .. } => "foreign",
        }
    }
}

/// The states of all registries, in the order of the configuration.
pub type States = Vec<(Registry, HostsState)>;

/// The writer of certs.d.
#[derive(Debug)]
pub struct CertsD {
    keeper: Keeper,
    remove_on_exit: bool,
    check_every: Duration,
    states: channel::Sender<States>,
}

/// What a round works on; it runs on a thread that may block.
#[derive(Debug)]
struct Keeper {
    root: PathBuf,
    write: bool,
    sites: Vec<Site>,
    /// Registries that get no file whatever happens, and why.
    closed: Vec<(Registry, String)>,
    metrics: Arc<Metrics>,
    last: BTreeMap<Registry, HostsState>,
}

/// What a round did.
struct Round {
    states: States,
    /// Something was put right, or could not be: what we hear next may be our own doing.
    is_uneasy: bool,
}

impl CertsD {
    /// Reads containerd's configuration for the directories that ours would hide; writes nothing.
    pub fn new(config: &Config, registries: &[RegistryConfig], mirror: SocketAddr, metrics: Arc<Metrics>) -> Self {
        let later_roots = preflight::later_roots(config);
        let (off, on): (Vec<_>, Vec<_>) = registries.iter().partition(|registry| registry.access == Some(Access::Off));
        let site = |registry: &&RegistryConfig| Site {
            root: config.certs_d.path.clone(),
            later_roots: later_roots.clone(),
            wanted: wanted(config, registry, mirror),
        };
        let closed = off.iter().map(|registry| (registry.name.clone(), "access = \"off\"".to_owned()));
        let keeper = Keeper {
            root: config.certs_d.path.clone(),
            write: config.certs_d.write,
            sites: on.iter().map(site).collect(),
            closed: closed.collect(),
            metrics,
            last: BTreeMap::new(),
        };
        let states = channel::Sender::new(Vec::new());
        let crate::config::CertsD { remove_on_exit, check_every, .. } = config.certs_d;
        Self { keeper, remove_on_exit, check_every: check_every.0, states }
    }

    /// What others want asked for this registry, found in the existing file, in their order. `/v2`
    /// belongs after each that has no such segment.
    pub fn foreign_origins(&self, registry: &Registry) -> Vec<String> {
        let site = self.keeper.sites.iter().find(|site| site.wanted.registry == *registry);
        site.map(Site::foreign_origins)
            .transpose()
            .unwrap_or_else(|error| {
                warn!(%registry, error = %chain(&error), "cannot look for other hosts of this registry");
                None
            })
            .unwrap_or_default()
    }

    /// The states, as of the last round.
    pub fn states(&self) -> channel::Receiver<States> {
        self.states.subscribe()
    }

    /// Keeps the files right until `stop`: there while `serving` is true, taken out while it is not.
    pub async fn run(self, mut serving: channel::Receiver<bool>, stop: CancellationToken) {
        let Self { mut keeper, remove_on_exit, check_every, states } = self;
        let mut watch = Watch::new().inspect_err(|error| warn!(%error, "changes are seen by the timer only")).ok();
        let mut is_sure = true;
        let Some((kept, ())) = blocking(keeper, |keeper| keeper.clear_leftovers()).await else { return };
        keeper = kept;
        while !stop.is_cancelled() {
            // A mirror whose self-test is gone has none that passes.
            let is_serving = *serving.borrow_and_update() && serving.has_changed().is_ok();
            // Listen first, look after: what happens in between is heard.
            watch.as_mut().map(|watch| watch.cover(&keeper.watched()));
            let Some((kept, round)) = blocking(keeper, move |keeper| keeper.round(is_serving)).await else { return };
            keeper = kept;
            states.send_replace(round.states);
            if watch.as_mut().is_some_and(|watch| watch.cover(&keeper.watched())) {
                continue;
            }
            let pause = if round.is_uneasy { FIGHT_PAUSE } else { Duration::ZERO };
            tokio::select! {
                () = stop.cancelled() => (),
                changed = serving.changed(), if is_sure => is_sure = changed.is_ok(),
                () = heard(watch.as_mut(), pause) => (),
                () = sleep(check_every) => (),
            }
        }
        if remove_on_exit
            && let Some((_, round)) = blocking(keeper, |keeper| keeper.leave("the agent is stopping")).await
        {
            states.send_replace(round.states);
        }
    }
}

/// Waits for a change, but not before the pause is over.
async fn heard(watch: Option<&mut Watch>, pause: Duration) {
    sleep(pause).await;
    let error = match watch {
        Some(watch) => watch.changed().await.err(),
        None => std::future::pending().await,
    };
    if let Some(error) = error {
        warn!(%error, "changes of certs.d are not heard any more");
        std::future::pending().await
    }
}

async fn blocking<R: Send + 'static>(
    mut keeper: Keeper,
    work: impl FnOnce(&mut Keeper) -> R + Send + 'static,
) -> Option<(Keeper, R)> {
    let work = tokio::task::spawn_blocking(move || {
        let result = work(&mut keeper);
        (keeper, result)
    });
    work.await.inspect_err(|error| error!(%error, "certs.d is not looked after any more")).ok()
}

impl Keeper {
    /// The directories whose changes matter.
    fn watched(&self) -> Vec<PathBuf> {
        // What a file was folded from counts too: containerd fails a pull whose `ca` is gone.
        let dirs = self.sites.iter().flat_map(|site| [Some(site.dir()), site.hidden_dir()]).flatten();
        let mut all: Vec<PathBuf> = self.root.parent().map(Path::to_owned).into_iter().chain(dirs).collect();
        all.push(self.root.clone());
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Removes what an agent that was killed left half done. Only at the start: later, what looks like
    /// this is another process at work.
    fn clear_leftovers(&self) {
        let dirs = self.sites.iter().map(Site::dir).filter(|dir| !dir.is_symlink());
        for dir in [self.root.clone()].into_iter().chain(dirs).filter(|_| self.write) {
            if let Err(error) = files::clear_leftovers(&dir) {
                warn!(error = %chain(&error), "cannot clear leftovers");
            }
        }
    }

    fn round(&mut self, is_serving: bool) -> Round {
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

    /// The no-write mode.
    fn report(&self, site: &Site) -> HostsState {
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

    /// Takes everything out.
    fn leave(&mut self, reason: &str) -> Round {
        if !self.write {
            return self.settle(|keeper, site| keeper.report(site));
        }
        let round = self.settle(|_, site| match site.withdraw() {
            Ok(_) => HostsState::Absent { reason: reason.to_owned() },
            Err(error) => HostsState::Failed { reason: chain(&error) },
        });
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
        let closed = self.closed.iter().cloned().map(|(registry, reason)| (registry, HostsState::Absent { reason }));
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
        Round { states, is_uneasy }
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
            HostsState::Absent { reason } => info!(%registry, reason, "containerd does not ask the mirror"),
            HostsState::NotWritten { should_be } => {
                info!(%registry, should_be, "hosts.toml is not ours to write; it should be this");
            }
            HostsState::Drifted => warn!(%registry, "hosts.toml is wrong and changes all the time"),
            HostsState::Failed { reason } => warn!(%registry, reason, "cannot keep hosts.toml"),
            HostsState::Foreign { by } => {
                warn!(%registry, %by, "the mirror's address is another program's in hosts.toml; certs_d.adopt = true takes it out");
            }
        }
    }
}

/// What the configuration wants in a registry's hosts.toml.
fn wanted(config: &Config, registry: &RegistryConfig, mirror: SocketAddr) -> Wanted {
    let plain = registry.plain_http.then(|| format!("http://{}", registry.name));
    Wanted {
        registry: registry.name.clone(),
        server: registry.endpoint.clone().or(plain).or_else(|| own_server(&registry.name)),
        mirror_url: mirror_url(mirror),
        resolve: registry.resolve,
        dial_timeout: config.certs_d.dial_timeout.0,
        adopt: config.certs_d.adopt,
    }
}

/// Where containerd, on the same host, reaches what listens there.
fn mirror_url(mut listen: SocketAddr) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        });
    }
    format!("http://{listen}")
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
