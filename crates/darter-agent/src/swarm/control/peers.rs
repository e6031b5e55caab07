//! Who is connected. Pure: which connections a peer has, which of them is kept, who is a member.
//!
//! A node that exchanges pieces in another way than this one is connected, and no member: the two tell
//! each other addresses, so that each finds its own kind, and nothing else.
//!
//! Two agents that call each other at the same moment have two connections; the one with the lower
//! name ends one of them, and keeps the one that it made itself. One decides, so that they agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use darter_core::swarm::{Member, Members, PeerId};
use libp2p::swarm::ConnectionId;
use tokio::sync::mpsc;

use super::directory::Route;
use super::session::Outgoing;
use crate::swarm::wire::Hello;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) peer: PeerId,
    pub(super) name: libp2p::PeerId,
    pub(super) ip: IpAddr,
    /// Whether this node began it.
    pub(super) is_ours: bool,
    pub(super) since: Instant,
    /// The stream that we write.
    pub(super) queue: Option<mpsc::Sender<Outgoing>>,
    /// What the peer said of itself, on the stream that it writes.
    pub(super) hello: Option<Hello>,
    /// Whether the peer opened its stream.
    pub(super) is_heard: bool,
}

impl Session {
    pub(super) const fn is_complete(&self) -> bool {
        self.queue.is_some() && self.hello.is_some()
    }

    /// How the peer is reached, once it has said hello.
    fn route(&self) -> Option<Route> {
        let (hello, queue) = self.hello.as_ref().zip(self.queue.clone())?;
        let exchange = SocketAddr::new(self.ip, hello.exchange_port);
        Some(Route { queue, exchange, zone: hello.zone, features: hello.features })
    }

    /// Where the peer's control plane listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.hello.as_ref().map(|hello| SocketAddr::new(self.ip, hello.control_port))
    }
}

/// All connections.
#[derive(Debug)]
pub(super) struct Peers {
    me: Member,
    /// How this node exchanges pieces.
    is_plain: bool,
    sessions: BTreeMap<ConnectionId, Session>,
}

impl Peers {
    pub(super) const fn new(me: Member, is_plain: bool) -> Self {
        Self { me, is_plain, sessions: BTreeMap::new() }
    }

    pub(super) fn insert(&mut self, id: ConnectionId, session: Session) {
        self.sessions.insert(id, session);
    }

    pub(super) fn get(&mut self, id: &ConnectionId) -> Option<&mut Session> {
        self.sessions.get_mut(id)
    }

    pub(super) fn remove(&mut self, id: &ConnectionId) -> Option<Session> {
        self.sessions.remove(id)
    }

    pub(super) fn connections(&self) -> usize {
        self.sessions.len()
    }

    /// Connections to a peer, whether they say anything yet or not.
    pub(super) fn of(&self, peer: PeerId) -> impl Iterator<Item = (&ConnectionId, &Session)> {
        self.sessions.iter().filter(move |(_, session)| session.peer == peer)
    }

    /// Whether no piece can go to or from the peer of a connection.
    pub(super) fn is_apart(&self, session: &Session) -> bool {
        session.hello.as_ref().is_some_and(|hello| hello.is_plain != self.is_plain)
    }

    /// Nodes to and from which no piece can go.
    pub(super) fn apart(&self) -> usize {
        let apart = self.sessions.values().filter(|session| session.is_complete() && self.is_apart(session));
        apart.map(|session| session.peer).collect::<BTreeSet<_>>().len()
    }

    /// How a member is reached. None: it is none.
    pub(super) fn route(&self, peer: PeerId) -> Option<Route> {
        self.best(peer).filter(|(_, session)| !self.is_apart(session))?.1.route()
    }

    /// The connection on which a peer is spoken to. None: it has not said hello.
    pub(super) fn best(&self, peer: PeerId) -> Option<(ConnectionId, &Session)> {
        let complete = self.of(peer).filter(|(_, session)| session.is_complete());
        let wanted = self.me.id < peer;
        complete.min_by_key(|(id, session)| (session.is_ours != wanted, **id)).map(|(id, session)| (*id, session))
    }

    /// Connections to a peer that this node ends, since there is a better one.
    pub(super) fn surplus(&self, peer: PeerId) -> Vec<ConnectionId> {
        match self.best(peer) {
            Some((best, _)) if self.me.id < peer => {
                let others = self.of(peer).filter(|(id, session)| **id != best && session.is_complete());
                others.map(|(id, _)| *id).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Connections that began before `then` and are not complete.
    pub(super) fn silent(&self, then: Instant) -> Vec<ConnectionId> {
        let silent = self.sessions.iter().filter(|(_, session)| !session.is_complete() && session.since <= then);
        silent.map(|(id, _)| *id).collect()
    }

    /// When the oldest incomplete connection began.
    pub(super) fn oldest_silent(&self) -> Option<Instant> {
        self.sessions.values().filter(|session| !session.is_complete()).map(|session| session.since).min()
    }

    /// This node and everybody it is connected to that exchanges pieces as it does.
    pub(super) fn members(&self) -> Members {
        let complete = self.sessions.values().filter(|session| session.is_complete() && !self.is_apart(session));
        let member = |session: &Session| {
            let Hello { zone, is_seed, .. } = session.hello.as_ref()?;
            Some(Member { id: session.peer, zone: *zone, is_seed: *is_seed })
        };
        Members::new(std::iter::once(self.me).chain(complete.filter_map(member)).collect())
    }

    /// Where others listen, except one.
    pub(super) fn addresses(&self, but: PeerId) -> Vec<SocketAddr> {
        let others = self.sessions.values().filter(|session| session.is_complete() && session.peer != but);
        let mut addresses: Vec<_> = others.filter_map(Session::address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use darter_core::swarm::Zone;

    use super::*;

    const ME: u8 = 5;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn session(n: u8, is_ours: bool, is_complete: bool) -> Session {
        let version = "0".to_owned();
        let (zone, control_port, exchange_port) = (Zone(u64::from(n)), 4002, 4003);
        let (features, wants_peers, is_seed, is_plain) = (0, false, n == 9, n == 8);
        let hello = Hello { version, features, zone, control_port, exchange_port, wants_peers, is_seed, is_plain };
        Session {
            peer: peer(n),
            name: libp2p::PeerId::random(),
            ip: IpAddr::from([10, 0, 0, n]),
            is_ours,
            since: Instant::now(),
            queue: is_complete.then(|| mpsc::channel(1).0),
            hello: is_complete.then_some(hello),
            is_heard: is_complete,
        }
    }

    fn peers(sessions: impl IntoIterator<Item = Session>) -> Peers {
        let mut peers = Peers::new(Member { id: peer(ME), zone: Zone(1), is_seed: false }, false);
        for (session, id) in sessions.into_iter().zip(0..) {
            peers.insert(ConnectionId::new_unchecked(id), session);
        }
        peers
    }

    #[test]
    fn of_two_connections_both_sides_keep_the_one_that_the_lower_name_made() {
        for (other, decides) in [(9, true), (1, false)] {
            let mut peers = peers([session(other, false, true), session(other, true, true)]);
            let (best, kept) = peers.best(peer(other)).unwrap();
            assert_eq!(kept.is_ours, decides, "the lower name's own");
            let surplus = peers.surplus(peer(other));
            assert_eq!(surplus.len(), usize::from(decides), "only the lower name ends one");
            assert!(!surplus.contains(&best));
            peers.remove(&best);
            assert!(peers.best(peer(other)).is_some() && peers.surplus(peer(other)).is_empty());
        }
    }

    #[test]
    fn a_connection_that_is_not_complete_replaces_none_and_makes_no_member() {
        let peers = peers([session(9, true, false), session(9, false, true), session(7, true, false)]);
        assert!(!peers.best(peer(9)).unwrap().1.is_ours);
        assert!(peers.surplus(peer(9)).is_empty() && peers.best(peer(7)).is_none());
        let ids: Vec<_> = peers.members().iter().map(|member| member.id).collect();
        assert_eq!(ids, [peer(ME), peer(9)]);
        assert_eq!(peers.members().seeds(), [peer(9)], "it said so");
        assert_eq!(peers.addresses(peer(1)), ["10.0.0.9:4002".parse().unwrap()]);
        assert!(peers.addresses(peer(9)).is_empty());
        assert_eq!(peers.silent(Instant::now() + Duration::from_secs(1)).len(), 2);
    }

    #[test]
    fn a_node_that_exchanges_pieces_in_another_way_is_connected_once_and_no_member() {
        let peers = peers([session(8, true, true), session(8, false, true), session(9, true, true)]);
        let ids: Vec<_> = peers.members().iter().map(|member| member.id).collect();
        assert_eq!(ids, [peer(ME), peer(9)]);
        assert!(peers.route(peer(8)).is_none() && peers.route(peer(9)).is_some());
        assert_eq!(peers.apart(), 1, "one node, whatever its connections");
        assert_eq!(peers.surplus(peer(8)).len(), 1);
        assert!(peers.silent(Instant::now() + Duration::from_secs(1)).is_empty(), "it has said hello");
        let addresses = ["10.0.0.8:4002", "10.0.0.9:4002"].map(|text| text.parse().unwrap());
        assert_eq!(peers.addresses(peer(1)), addresses, "its own kind hears of it from here");
    }
}
