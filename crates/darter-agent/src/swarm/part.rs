//! The swarm as a part of the agent: from its configuration to its events.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use darter_core::Digest;
use darter_core::swarm::Zone;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::control::{Control, ControlError, ControlEvent, Limits, Setup, Standing};
use super::discovery::{Discovery, ServicePort, ServiceWatch};
use super::driver::{Driver, Errand, House, INBOX, Why, announce};
use super::exchange::{self, Client, Gate, Server};
use super::handle::{Endings, Input, Shared, SwarmHandle};
use super::identity::{Identity, IdentityError};
use super::key::{self, KeyError};
use super::shelf::{Others, Shelf};
use super::tokens::Tokens;
use super::witnesses::Witnesses;
use crate::config::Config;
use crate::going::Reason;
use crate::images::Memory;
use crate::log::chain;
use crate::metrics::Metrics;
use crate::node::Notes;
use crate::pulls::Pulls;
use crate::store::Store;

/// Nodes that boot together find each other in this time; whoever waits longer for others makes
/// containerd wait.
const SETTLE: Duration = Duration::from_secs(2);

/// How long a stop takes after `stop` and the end of the handover at most: uploads (`Limits::drain`).
pub const STOP: Duration = Duration::from_secs(6);
/// Blobs to bring here unasked that wait for their task: more than the core orders at a time.
const ERRANDS: usize = 16;

/// Why the swarm cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    /// The data directory.
    #[error("cannot make the data directory {}", .path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The swarm key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Who this node is.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The same, for the blob exchange.
    #[error(transparent)]
    Shown(#[from] exchange::IdentityError),
    /// What tokens are made with.
    #[error("cannot get random bytes for the secret of this node's tokens")]
    Secret(#[source] std::io::Error),
    /// The connections.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The blob exchange's address.
    #[error("cannot start the blob exchange (swarm.exchange_listen)")]
    Exchange(#[from] exchange::BindError),
}

/// The swarm of this node, listening.
pub struct SwarmPart {
    control: Control,
    events: mpsc::Receiver<ControlEvent>,
    driver: Driver,
    inbox: mpsc::Receiver<Input>,
    server: Server<Shelf>,
    store: Store,
    errands: mpsc::Receiver<Errand>,
    handle: SwarmHandle,
    /// What others have for taking what only this node has, from SIGTERM on (`swarm.handover`).
    handover: Duration,
}

impl SwarmPart {
    /// None without a swarm key: then nothing listens, and the node is a mirror by itself.
    pub async fn bind(
        config: &Config,
        version: &str,
        store: &Store,
        metrics: &Arc<Metrics>,
        notes: Notes,
    ) -> Result<Option<Self>, SwarmError> {
        let swarm = &config.swarm;
        let Some(file) = &swarm.key_file else { return Ok(None) };
        let key = key::load(file)?;
        store.offer_containerds_blobs();
        let directory = config.data_dir();
        std::fs::create_dir_all(&directory)
            .map_err(|source| SwarmError::Directory { path: directory.clone(), source })?;
        let identity = Identity::load_or_make(&directory.join("identity.key"))?;
        let shown = exchange::Identity::new(identity.keypair().clone())?;
        let dns = swarm.dns.as_deref();
        let (port, every, max) = (swarm.listen.port(), swarm.lookup_every.0, swarm.max_members);
        let service = service(config, &directory, metrics.clone());
        // The DNS name has everybody, and so has the Service.
        let wants_peers = dns.is_none() && service.is_none();
        let discovery = Discovery::new(&swarm.peers, dns, port, every, max).watching(service);
        let zone = zone(swarm.zone.as_deref());
        let setup = Setup {
            listen: swarm.listen,
            exchange_port: swarm.exchange_listen.port(),
            zone,
            key,
            max_members: swarm.max_members,
            wants_peers,
            is_seed: config.seed.enabled,
            is_plain: !swarm.tls,
            version: version.to_owned(),
            limits: Limits::default(),
        };
        let (control, words, events) = Control::bind(setup, &identity, discovery, metrics.clone()).await?;
        let limits = exchange::Limits::default();
        let (sender, inbox) = mpsc::channel(INBOX);
        let others = || Others { control: words.clone(), zone };
        let shelf = Shelf { others: others(), store: store.clone(), identity: shown.clone(), inbox: sender.clone() };
        let tokens =
            if swarm.tls { None } else { Some(Arc::new(Tokens::new(words.clone()).map_err(SwarmError::Secret)?)) };
        // Either this or that, in both directions: no piece of a node with TLS ever goes without.
        let (gate, ours) = match &tokens {
            None => (Gate::Tls(shown.clone()), Some(shown.clone())),
            Some(tokens) => (Gate::Token(tokens.secret().clone()), None),
        };
        let server = Server::bind(swarm.exchange_listen, gate, Arc::new(shelf), limits.clone(), metrics.clone())?;
        let client = Arc::new(Client::new(ours, Arc::new(others()), limits, metrics.clone()));
        let endings = Arc::new(Endings::default());
        let (errand, errands) = mpsc::channel(ERRANDS);
        let house = House { store: store.clone(), metrics: metrics.clone(), errands: errand, notes };
        let witnesses = Arc::new(Witnesses::new(words.clone(), metrics.clone()));
        let (asking, has_rights, ending) = (witnesses.clone(), tokens.clone(), endings.clone());
        let place = (zone, swarm.scope);
        let driver = Driver::new(words.clone(), place, client.clone(), has_rights, asking, ending, house);
        let (peer, address, tls) = (words.me(), words.address(), swarm.tls);
        info!(%peer, %address, key = %key.fingerprint(), tls, "this node is in a swarm");
        let handle = SwarmHandle(Arc::new(Shared {
            control: words,
            client,
            tokens,
            witnesses,
            identity: shown,
            inbox: sender,
            endings,
            wishes: AtomicU64::new(0),
            settled_by: Instant::now() + SETTLE,
            expects_others: !wants_peers || !swarm.peers.is_empty(),
        }));
        let (store, handover) = (store.clone(), swarm.handover.0);
        Ok(Some(Self { control, events, driver, inbox, server, store, errands, handle, handover }))
    }

    /// What the rest of the agent has of it.
    pub fn handle(&self) -> SwarmHandle {
        self.handle.clone()
    }

    /// Where the control plane listens.
    pub fn address(&self) -> SocketAddr {
        self.handle.0.control.address()
    }

    /// How it stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.handle.0.control.standing()
    }

    /// From now on members that ask what this node saw at a registry get an answer.
    pub fn answer_from(&self, memory: Memory) {
        self.handle.0.witnesses.answer_from(memory);
    }

    /// Until `stop`. While `going` has a reason to hand over, and from `leaving` on, what only this node has goes to
    /// others; after `stop` no upload begins, and those that run get a while to end. Only then the
    /// connections end: with them, others would break off what they fetch here.
    pub async fn run(
        self,
        pulls: Pulls,
        going: watch::Receiver<Option<Reason>>,
        leaving: CancellationToken,
        stop: CancellationToken,
    ) {
        let Self { control, events, driver, inbox, server, store, errands, handle, handover } = self;
        let (serving, connected) = (CancellationToken::new(), CancellationToken::new());
        let leave = async {
            leaving.run_until_cancelled(heed(going, &handle, &store)).await;
            if tokio::time::timeout(handover, handle.leave(store.blobs_by_use())).await.is_err() {
                info!(?handover, "not all blobs that only this node has are with others; the registry still has them");
            }
            stop.cancelled().await;
            handle.withdraw().await;
            serving.cancel();
        };
        let serve = async {
            server.run(serving.clone()).await;
            connected.cancel();
        };
        tokio::join!(
            leave,
            serve,
            control.run(connected.clone()),
            driver.run(events, inbox, connected.clone()),
            stop.run_until_cancelled(announce(store.clone(), handle.clone())),
            stop.run_until_cancelled(run_errands(errands, pulls, handle.clone())),
        );
    }
}

/// A node that is told that it will go hands over at once; it serves on, and may stay after all.
async fn heed(mut going: watch::Receiver<Option<Reason>>, swarm: &SwarmHandle, store: &Store) {
    loop {
        let told = going.wait_for(|reason| hands_over(*reason)).await.map(|reason| *reason);
        // An error is that nobody tells any more.
        let Ok(reason) = told else { return std::future::pending().await };
        info!(?reason, "this node is about to go: what only it has goes to others");
        tokio::select! {
            () = swarm.leave(store.blobs_by_use()) => info!("others have what only this node had, as far as they take it"),
            _ = going.wait_for(|reason| !hands_over(*reason)) => {}
        }
        if going.wait_for(|reason| !hands_over(*reason)).await.is_ok() {
            info!("this node stays after all");
            swarm.stay().await;
        }
    }
}

/// Brings blobs here that nobody on this node asks for.
async fn run_errands(mut errands: mpsc::Receiver<Errand>, pulls: Pulls, swarm: SwarmHandle) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            Some(errand) = errands.recv() => {
                let (pulls, swarm) = (pulls.clone(), swarm.clone());
                // As many at a time as the core has ordered.
                running.spawn(async move {
                    let Errand { blob, size, why } = errand;
                    let outcome = match why {
                        Why::ItsHolderGoes => pulls.take(blob, size).await,
                        Why::ToKeep => pulls.keep(blob, size).await,
                    };
                    match outcome {
                        Ok(()) => info!(digest = %blob, bytes = size, ?why, "took a blob from other nodes"),
                        Err(error) => {
                            debug!(digest = %blob, ?why, error = %chain(&error), "did not take a blob");
                            swarm.not_taken(blob).await;
                        }
                    }
                });
            }
            Some(_) = running.join_next() => {}
            else => return,
        }
    }
}

/// The Service to watch, if one is configured.
fn service(config: &Config, directory: &Path, metrics: Arc<Metrics>) -> Option<ServiceWatch> {
    let swarm = &config.swarm;
    Some(ServiceWatch {
        service: swarm.service.clone()?,
        port: swarm.endpoint_port.clone().unwrap_or_else(|| ServicePort::Number(swarm.listen.port())),
        is_ipv6: swarm.listen.is_ipv6(),
        kubeconfig: config.kubernetes.kubeconfig.clone(),
        file: directory.join("members.json"),
        max: swarm.max_members,
        metrics,
    })
}

/// Whether what only this node has is to go to others.
fn hands_over(going: Option<Reason>) -> bool {
    going.is_some_and(Reason::hands_over)
}

/// A zone's number is a hash of its name, so that nodes agree on it without a word.
fn zone(name: Option<&str>) -> Zone {
    let head = name.map(|name| Digest::of(name.as_bytes())).and_then(|hash| hash.as_bytes().first_chunk().copied());
    Zone(head.map_or(0, u64::from_be_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_differ_and_an_unknown_one_is_zero() {
        assert_eq!(zone(None), Zone(0));
        assert_eq!(zone(Some("us-east-1a")), zone(Some("us-east-1a")));
        assert_ne!(zone(Some("us-east-1a")), zone(Some("us-east-1b")));
    }
}
