//! Owns darter's part of containerd's certs.d: there while the mirror works, gone when it does not.
//!
//! containerd reads a registry's hosts.toml at each pull, so writing one is all it takes to be
//! asked, and taking it away all it takes to be out of the way. `hosts_toml` in the core decides
//! what a file should say, `site` what to do in one directory, `files` does it in steps that a kill
//! between any two survives; here is the loop. containerd's config.toml is never written, containerd
//! never restarted.

mod files;
mod keeper;
mod order;
mod preflight;
mod site;
#[cfg(test)]
mod tests;
mod uninstall;
mod verdict;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_core::Registry;
use darter_core::hosts_toml::{Foreign, ForeignOrigin, Wanted, own_server};
use tokio::sync::mpsc;
use tokio::sync::watch as channel;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::config::{Config, RegistryConfig};
use crate::metrics::Metrics;
use crate::sites::{Registries, Unserved};
use crate::watch::Watch;

pub use order::{OrderError, Uninstalled, Uninstaller};
pub use preflight::{Preflight, preflight, preflight_for};
pub use site::{How, Undone};
pub use uninstall::uninstall;

use keeper::Keeper;
use order::Order;

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
    /// Not there because the operator closed the registry: `access = "off"`.
    Closed,
    /// Not there, on purpose.
    Absent {
        /// What is missing for it to be there.
        reason: String,
    },
    /// Given up by `darter uninstall`, until the agent is started again.
    Uninstalled,
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
            Self::Closed => "closed",
            Self::Absent { .. } => "absent",
            Self::Uninstalled => "uninstalled",
            Self::Drifted => "drifted",
            Self::NotWritten { .. } => "not_written",
            Self::Failed { .. } => "failed",
            Self::Foreign { .. } => "foreign",
        }
    }
}

/// The states of all registries, in the order of the configuration.
pub type States = Vec<(Registry, HostsState)>;

/// What others want asked for each registry, found in its file, in their order. `/v2` belongs after each
/// that has no such segment.
pub type Others = BTreeMap<Registry, Vec<ForeignOrigin>>;

/// The writer of certs.d.
#[derive(Debug)]
pub struct CertsD {
    keeper: Keeper,
    remove_on_exit: bool,
    check_every: Duration,
    states: channel::Sender<States>,
    others: channel::Sender<Others>,
    unserved: channel::Receiver<Unserved>,
    registries: channel::Receiver<Registries>,
    orders: (Uninstaller, mpsc::Receiver<Order>),
}

impl CertsD {
    /// For the registries of the configuration. `later_roots` are those of the preflight: what they say, a
    /// directory of ours would hide. Writes nothing.
    pub fn new(config: &Config, later_roots: &[PathBuf], metrics: Arc<Metrics>) -> Self {
        let keeper = Keeper::new(config, later_roots, metrics);
        let (states, others) = (channel::Sender::new(Vec::new()), channel::Sender::new(keeper.others().clone()));
        let crate::config::CertsD { remove_on_exit, check_every, .. } = config.certs_d;
        let (_, unserved) = channel::channel(Unserved::new());
        let (_, registries) = channel::channel(Registries::default());
        let orders = order::channel();
        Self { keeper, remove_on_exit, check_every: check_every.0, states, others, unserved, registries, orders }
    }

    /// The same, with no hosts.toml for the registries that are not served, as long as they are not.
    pub fn without(self, unserved: channel::Receiver<Unserved>) -> Self {
        Self { unserved, ..self }
    }

    /// The same, and also for registries that come later.
    pub fn with(self, registries: channel::Receiver<Registries>) -> Self {
        Self { registries, ..self }
    }

    /// The hosts of others, as of the last round.
    pub fn others(&self) -> channel::Receiver<Others> {
        self.others.subscribe()
    }

    /// The states, as of the last round.
    pub fn states(&self) -> channel::Receiver<States> {
        self.states.subscribe()
    }

    /// Takes the order of `darter uninstall`.
    pub fn uninstaller(&self) -> Uninstaller {
        self.orders.0.clone()
    }

    /// Keeps the files right until `stop`: there while `serving` is true, taken out while it is not.
    pub async fn run(self, mut serving: channel::Receiver<bool>, stop: CancellationToken) {
        let Self { mut keeper, remove_on_exit, check_every, states, others, mut unserved, mut registries, orders } =
            self;
        let (_orders, mut ordered) = orders;
        let mut watch = Watch::new().inspect_err(|error| warn!(%error, "changes are seen by the timer only")).ok();
        let mut is_sure = true;
        let Some((kept, ())) = blocking(keeper, |keeper| keeper.clear_leftovers()).await else { return };
        keeper = kept;
        while !stop.is_cancelled() {
            // A mirror whose self-test is gone has none that passes.
            let is_serving = *serving.borrow_and_update() && serving.has_changed().is_ok();
            keeper.unserved = unserved.borrow_and_update().clone();
            keeper.take(&registries.borrow_and_update().all);
            // Listen first, look after: what happens in between is heard.
            watch.as_mut().map(|watch| watch.cover(&keeper.watched()));
            let Some((kept, round)) = blocking(keeper, move |keeper| keeper.round(is_serving)).await else { return };
            keeper = kept;
            // Before the states: who sees that a round is over sees what it found.
            others.send_if_modified(|before| {
                *before != round.others && {
                    *before = round.others;
                    true
                }
            });
            states.send_replace(round.states);
            if watch.as_mut().is_some_and(|watch| watch.cover(&keeper.watched())) {
                continue;
            }
            let pause = if round.is_uneasy { FIGHT_PAUSE } else { Duration::ZERO };
            tokio::select! {
                () = stop.cancelled() => (),
                changed = serving.changed(), if is_sure => is_sure = changed.is_ok(),
                Ok(()) = unserved.changed() => (),
                Ok(()) = registries.changed() => (),
                () = heard(watch.as_mut(), pause) => (),
                () = sleep(check_every) => (),
                Some(Order { done }) = ordered.recv() => {
                    let work = |keeper: &mut Keeper| (keeper.uninstall(), keeper.round(false).states);
                    let Some((kept, (undone, found))) = blocking(keeper, work).await else { return };
                    keeper = kept;
                    // Before the answer: who has it sees in /readyz what it says.
                    states.send_replace(found);
                    // Whoever ordered it may be gone; it is done all the same.
                    let _ = done.send(undone);
                }
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
