//! Who is connected. Pure: which connections a peer has, which of them is kept, who is a member.
//!
//! Two agents that call each other at the same moment have two connections; the one with the lower
//! name ends one of them, and keeps the one that it made itself. One decides, so that they agree.

use std::collections::BTreeMap;
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

    /// How the peer is reached, once it is a member.
    pub(super) fn route(&self) -> Option<Route> {
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
    sessions: BTreeMap<ConnectionId, Session>,
}

impl Peers {
    pub(super) const fn new(me: Member) -> Self {
        Self { me, sessions: BTreeMap::new() }
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

    /// The connection on which a peer is spoken to. None: it is no member.
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

    /// This node and everybody it is connected to.
    pub(super) fn members(&self) -> Members {
        let complete = self.sessions.values().filter(|session| session.is_complete());
        let member = |session: &Session| {
            let Hello { zone, is_seed, .. } = session.hello.as_ref()?;
            Some(Member { id: session.peer, zone: *zone, is_seed: *is_seed })
        };
        Members::new(std::iter::once(self.me).chain(complete.filter_map(member)).collect())
    }

    /// Where members listen, except one.
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
        let (features, wants_peers, is_seed) = (0, false, n == 9);
        let hello = Hello { version, features, zone, control_port, exchange_port, wants_peers, is_seed };
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
        let mut peers = Peers::new(Member { id: peer(ME), zone: Zone(1), is_seed: false });
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
}
