//! The loop of the control plane: what libp2p and the sessions report, and what follows from it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::swarm::{Member, PeerId};
use futures_util::StreamExt;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, Swarm, SwarmEvent};
use libp2p::{identify, ping};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::addresses::Addresses;
use super::behaviour::{Behaviour, BehaviourEvent, listen, swarm};
use super::directory::Directory;
use super::peers::{Peers, Session};
use super::session::{Outgoing, QUEUE, Report, Reports, read, write};
use super::streams::StreamEvent;
use super::transport::{Failure, multiaddr, socket_addr};
use super::{ControlError, ControlEvent, ControlHandle, EVENTS, ORDERS, Order, Setup, Standing};
use crate::log::chain;
use crate::metrics::{Metrics, ReasonLabels};
use crate::swarm::discovery::Discovery;
use crate::swarm::identity::{Identity, to_core, to_libp2p};
use crate::swarm::wire::{FEATURES, Hello};

/// Reports of sessions that the loop did not take yet.
pub(super) const REPORTS: usize = 256;
/// Peers that are banned at a time; beyond, the one that is free soonest is freed.
const BANS_MAX: usize = 1024;
/// Strangers at the door are in the metrics; the log has one line in this time.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The control plane, listening.
pub struct Control {
    setup: Setup,
    hello: Hello,
    swarm: Swarm<Behaviour>,
    discovery: Option<Discovery>,
    addresses: Addresses,
    peers: Peers,
    dials: HashMap<ConnectionId, SocketAddr>,
    bans: BTreeMap<libp2p::PeerId, Instant>,
    tasks: JoinSet<()>,
    directory: Arc<Directory>,
    reports: mpsc::Receiver<(ConnectionId, Report)>,
    /// Given to every session.
    reporting: mpsc::Sender<(ConnectionId, Report)>,
    orders: mpsc::Receiver<Order>,
    events: mpsc::Sender<ControlEvent>,
    /// What `events` has no room for yet. Views of the members replace each other; of those that are
    /// lost there are no more than members.
    lost: VecDeque<PeerId>,
    is_changed: bool,
    standing: watch::Sender<Standing>,
    metrics: Arc<Metrics>,
    /// When the log last had a line for a reason that is counted.
    warned: BTreeMap<&'static str, Instant>,
}

impl Control {
    /// Listens. Nothing is dialled, and nobody answered, before `run`.
    pub async fn bind(
        setup: Setup,
        identity: &Identity,
        discovery: Discovery,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, ControlHandle, mpsc::Receiver<ControlEvent>), ControlError> {
        let mut swarm = swarm(&setup, identity)?;
        let address = listen(&mut swarm, setup.listen).await?;
        let hello = Hello {
            version: setup.version.clone(),
            features: FEATURES,
            zone: setup.zone,
            control_port: address.port(),
            exchange_port: setup.exchange_port,
            wants_peers: setup.wants_peers,
            is_seed: setup.is_seed,
            is_plain: setup.is_plain,
        };
        let me = Member { id: identity.id(), zone: setup.zone, is_seed: setup.is_seed };
        let directory = Arc::new(Directory::new(setup.max_members));
        let (order, orders) = mpsc::channel(ORDERS);
        let (reporting, reports) = mpsc::channel(REPORTS);
        let (events, heard) = mpsc::channel(EVENTS);
        let standing = watch::Sender::new(Standing::default());
        let handle = ControlHandle {
            directory: directory.clone(),
            orders: order,
            metrics: metrics.clone(),
            standing: standing.subscribe(),
            me: identity.id(),
            address,
        };
        let control = Self {
            hello,
            swarm,
            discovery: Some(discovery),
            addresses: Addresses::new(setup.max_members),
            peers: Peers::new(me, setup.is_plain),
            dials: HashMap::new(),
            bans: BTreeMap::new(),
            tasks: JoinSet::new(),
            directory,
            reports,
            reporting,
            orders,
            events,
            lost: VecDeque::new(),
            is_changed: true,
            standing,
            metrics,
            warned: BTreeMap::new(),
            setup,
        };
        Ok((control, handle, heard))
    }

    /// Until `stop`, or until nobody takes the events. All connections end with it.
    pub async fn run(mut self, stop: CancellationToken) {
        let (sender, mut found) = watch::channel(BTreeSet::new());
        let discovery = self.discovery.take();
        let mut finding = Box::pin(async move {
            match discovery {
                Some(discovery) => discovery.run(sender).await,
                None => std::future::pending().await,
            }
        });
        loop {
            let now = Instant::now();
            self.expire(now);
            self.dial(now);
            let deadline = self.deadline();
            let due = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let events = self.events.clone();
            let is_owed = self.is_changed || !self.lost.is_empty();
            tokio::select! {
                () = stop.cancelled() => return,
                event = self.swarm.select_next_some() => self.on_swarm(event),
                Some((id, report)) = self.reports.recv() => self.on_report(id, report),
                Some(order) = self.orders.recv() => match order {
                    Order::Ban(peer, period) => if let Some(name) = to_libp2p(peer) {
                        self.ban(name, period);
                    },
                },
                Ok(()) = found.changed() => {
                    let list = found.borrow_and_update().clone();
                    self.addresses.found(Instant::now(), &list);
                    self.stand();
                }
                Some(_) = self.tasks.join_next() => {}
                permit = events.reserve(), if is_owed => match permit {
                    Ok(permit) => permit.send(self.owed()),
                    Err(_) => return,
                },
                () = due => {}
                () = &mut finding => {}
            }
        }
    }

    /// The next event that is owed to the rest of the agent.
    fn owed(&mut self) -> ControlEvent {
        // Who went and is back again went first: told the other way round, its new words would be lost.
        if let Some(back) = self.lost.iter().position(|peer| self.peers.best(*peer).is_some())
            && let Some(peer) = self.lost.remove(back)
        {
            return ControlEvent::Lost(peer);
        }
        if std::mem::take(&mut self.is_changed) {
            return ControlEvent::Members(self.peers.members());
        }
        match self.lost.pop_front() {
            Some(peer) => ControlEvent::Lost(peer),
            None => ControlEvent::Members(self.peers.members()),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let hello = self.peers.oldest_silent().map(|since| since + self.setup.limits.hello);
        let ban = self.bans.values().min().copied();
        [self.addresses.deadline(), hello, ban].into_iter().flatten().min()
    }

    /// What is over.
    fn expire(&mut self, now: Instant) {
        let free: Vec<_> = self.bans.iter().filter(|(_, until)| **until <= now).map(|(name, _)| *name).collect();
        for name in free {
            self.bans.remove(&name);
            self.swarm.behaviour_mut().banned.unblock_peer(name);
        }
        if let Some(then) = now.checked_sub(self.setup.limits.hello) {
            for id in self.peers.silent(then) {
                if self.swarm.close_connection(id) {
                    self.reject("hello");
                }
                // Gone from the table at once: it must not be due again.
                self.forget(id);
            }
        }
    }

    fn dial(&mut self, now: Instant) {
        for address in self.addresses.due(now) {
            let options = DialOpts::unknown_peer_id().address(multiaddr(address)).allocate_new_port().build();
            let id = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => {
                    self.dials.insert(id, address);
                }
                Err(error) => {
                    debug!(%address, error = %chain(&error), "cannot dial");
                    match Failure::of_dial(&error) {
                        Failure::Own => self.addresses.own(address),
                        _ => self.addresses.failed(now, address, dice()),
                    }
                }
            }
        }
    }

    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let dialled = self.dials.remove(&connection_id);
                let Some(remote) = socket_addr(endpoint.get_remote_address()) else { return };
                let Some(peer) = to_core(&peer_id) else {
                    self.reject("identity");
                    self.swarm.close_connection(connection_id);
                    return;
                };
                if let Some(address) = dialled {
                    self.addresses.connected(address, peer);
                }
                let session = Session {
                    peer,
                    name: peer_id,
                    ip: remote.ip(),
                    is_ours: endpoint.is_dialer(),
                    since: now,
                    queue: None,
                    hello: None,
                    is_heard: false,
                };
                self.peers.insert(connection_id, session);
                self.stand();
            }
            SwarmEvent::ConnectionClosed { connection_id, .. } => self.forget(connection_id),
            SwarmEvent::IncomingConnectionError { error, send_back_addr, .. } => {
                let failure = Failure::of_listen(&error);
                debug!(from = %send_back_addr, error = %chain(&error), ?failure, "a connection was not accepted");
                self.count(failure, || format!("{send_back_addr} called"));
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                let Some(address) = self.dials.remove(&connection_id) else { return };
                let failure = Failure::of_dial(&error);
                debug!(%address, error = %chain(&error), ?failure, "a peer was not reached");
                match failure {
                    Failure::Own => self.addresses.own(address),
                    _ => self.addresses.failed(now, address, dice()),
                }
                if failure == Failure::Handshake {
                    self.standing.send_modify(|standing| standing.strangers += 1);
                }
                self.count(failure, || format!("{address} answered"));
                self.stand();
            }
            SwarmEvent::ListenerError { error, .. } => warn!(%error, "the swarm's listener has trouble"),
            SwarmEvent::Behaviour(BehaviourEvent::Streams((name, id, event))) => self.on_stream(name, id, event),
            // A peer without ping is of a later version, and not dead.
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event {
                connection,
                result: Err(error @ (ping::Failure::Timeout | ping::Failure::Other { .. })),
                ..
            })) => {
                debug!(error = %chain(&error), "a peer does not answer");
                self.swarm.close_connection(connection);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. })) => {
                debug!(peer = %peer_id, agent = info.agent_version, protocol = info.protocol_version, "a peer is");
            }
            _ => {}
        }
    }

    fn on_stream(&mut self, name: libp2p::PeerId, id: ConnectionId, event: StreamEvent) {
        let reports = Reports { connection: id, to: self.reporting.clone() };
        // A stream of a connection that was given up meanwhile ends with it.
        let Some(session) = self.peers.get(&id) else { return };
        match event {
            StreamEvent::Out(stream) => {
                let (sender, queue) = mpsc::channel(QUEUE);
                session.queue = Some(sender);
                self.tasks.spawn(write(stream, self.hello.clone(), queue, reports));
                self.complete(id);
            }
            StreamEvent::In(stream) if !session.is_heard => {
                session.is_heard = true;
                let is_plain = self.setup.is_plain;
                self.tasks.spawn(read(stream, session.peer, is_plain, self.events.clone(), reports));
            }
            StreamEvent::In(_) => {
                self.reject("streams");
                self.ban(name, self.setup.limits.ban);
            }
            StreamEvent::Refused => {
                self.reject("protocol");
                self.swarm.close_connection(id);
            }
        }
    }

    fn on_report(&mut self, id: ConnectionId, report: Report) {
        let Some(session) = self.peers.get(&id) else { return };
        match report {
            Report::Hello(hello) => {
                session.hello = Some(hello);
                self.complete(id);
            }
            Report::Peers(..) if !self.setup.wants_peers => {}
            Report::Peers(list, turn) => {
                let by = session.ip;
                for address in list {
                    self.addresses.told(Instant::now(), address, by);
                }
                self.stand();
                drop(turn);
            }
            Report::Bad(error) => {
                let (name, peer) = (session.name, session.peer);
                warn!(%peer, error = %chain(&error), ban = ?self.setup.limits.ban, "a peer broke the protocol");
                self.reject("bad_frame");
                self.ban(name, self.setup.limits.ban);
            }
            Report::Ended => {
                self.swarm.close_connection(id);
            }
        }
    }

    /// A connection may now be complete: its peer is a member.
    fn complete(&mut self, id: ConnectionId) {
        let Some(session) = self.peers.get(&id).filter(|session| session.is_complete()) else { return };
        let (peer, address) = (session.peer, session.address());
        let (wants_peers, queue) =
            (session.hello.as_ref().is_some_and(|hello| hello.wants_peers), session.queue.clone());
        let is_plain = session.hello.as_ref().is_some_and(|hello| hello.is_plain);
        if let Some(address) = address {
            self.addresses.connected(address, peer);
        }
        if let (true, Some(queue)) = (wants_peers, queue) {
            // The queue is new: there is room.
            let _ = queue.try_send(Outgoing::Peers(self.peers.addresses(peer)));
        }
        if is_plain != self.setup.is_plain {
            self.reject("tls");
            if self.is_news("tls") {
                let theirs = if is_plain { "plaintext" } else { "TLS" };
                warn!(%peer, theirs, "a node with another swarm.tls than this one: no blobs go between the two; counted from here on");
            }
        }
        self.route(peer);
        for id in self.peers.surplus(peer) {
            self.swarm.close_connection(id);
        }
    }

    /// Brings the queue of a peer up to date, and everybody's view of whether it is a member.
    fn route(&mut self, peer: PeerId) {
        let route = self.peers.route(peer);
        let is_member = route.is_some();
        let was_member = self.directory.set(peer, route);
        if is_member != was_member {
            self.is_changed = true;
            info!(%peer, members = self.peers.members().len(), "{}", if is_member { "a member came" } else { "a member went" });
        }
        if was_member && !is_member {
            if self.lost.len() >= self.setup.max_members {
                self.lost.pop_front();
            }
            self.lost.push_back(peer);
        }
        self.stand();
    }

    /// A connection is gone.
    fn forget(&mut self, id: ConnectionId) {
        let Some(session) = self.peers.remove(&id) else { return };
        self.route(session.peer);
        if self.peers.of(session.peer).next().is_none() {
            self.addresses.lost(Instant::now(), session.peer, dice());
        }
    }

    fn ban(&mut self, name: libp2p::PeerId, period: Duration) {
        if self.bans.len() >= BANS_MAX
            && !self.bans.contains_key(&name)
            && let Some(soonest) = self.bans.iter().min_by_key(|(_, until)| **until).map(|(name, _)| *name)
        {
            self.bans.remove(&soonest);
            self.swarm.behaviour_mut().banned.unblock_peer(soonest);
        }
        // A short one does not end a long one.
        let until = self.bans.entry(name).or_insert_with(Instant::now);
        *until = (*until).max(Instant::now() + period);
        // Ends its connections too.
        self.swarm.behaviour_mut().banned.block_peer(name);
    }

    fn count(&mut self, failure: Failure, who: impl FnOnce() -> String) {
        let Some(reason) = failure.reason() else { return };
        self.reject(reason);
        if failure == Failure::Handshake && self.is_news(reason) {
            warn!(who = who(), "no darter agent, or one with another swarm key (swarm.key_file); counted from here on");
        }
    }

    /// Whether the log has had no line for this reason of late. Notes that it has one now.
    fn is_news(&mut self, reason: &'static str) -> bool {
        let is_news = self.warned.get(reason).is_none_or(|at| at.elapsed() >= WARN_EVERY);
        if is_news {
            self.warned.insert(reason, Instant::now());
        }
        is_news
    }

    fn reject(&self, reason: &'static str) {
        self.metrics.peer_rejected.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Brings the gauges up to date.
    fn stand(&self) {
        let peers = self.directory.members();
        let (connections, addresses, apart) = (self.peers.connections(), self.addresses.others(), self.peers.apart());
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics.swarm_peers.set(gauge(peers));
        self.metrics.swarm_connections.set(gauge(connections));
        self.standing.send_if_modified(|standing| {
            let now = Standing { peers, connections, addresses, apart, ..*standing };
            std::mem::replace(standing, now) != now
        });
    }
}

/// Any number: whom to try again when.
fn dice() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
