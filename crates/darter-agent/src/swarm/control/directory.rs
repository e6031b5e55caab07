//! Who is a member, and how each is reached: what the whole agent knows of the connections.
//!
//! The loop of the control plane writes it, everybody else reads it: a look-up, never a wait.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use darter_core::swarm::{PeerId, Zone};
use tokio::sync::mpsc;

use super::session::Outgoing;

/// A connected member.
#[derive(Debug, Clone)]
pub(super) struct Route {
    /// What is written to it.
    pub(super) queue: mpsc::Sender<Outgoing>,
    /// Where its blob exchange listens.
    pub(super) exchange: SocketAddr,
    pub(super) zone: Zone,
    /// What it can do beyond the protocol's version.
    pub(super) features: u64,
}

/// All members, and those that were.
#[derive(Debug)]
pub(super) struct Directory {
    max: usize,
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    routes: HashMap<PeerId, Route>,
    /// Who went, the last one last: what they attested may still be on its way.
    former: VecDeque<PeerId>,
    banned: HashMap<PeerId, Instant>,
}

impl Directory {
    /// With room for so many members, and as many that were.
    pub(super) fn new(max: usize) -> Self {
        Self { max, inner: RwLock::default() }
    }

    /// Notes how a peer is reached, or that it is not. Whether it was a member before.
    pub(super) fn set(&self, peer: PeerId, route: Option<Route>) -> bool {
        let mut inner = self.write();
        match route {
            Some(route) => {
                inner.former.retain(|other| *other != peer);
                inner.routes.insert(peer, route).is_some()
            }
            None => {
                let was_member = inner.routes.remove(&peer).is_some();
                if was_member {
                    if inner.former.len() >= self.max {
                        inner.former.pop_front();
                    }
                    inner.former.push_back(peer);
                }
                was_member
            }
        }
    }

    /// The word of a peer counts for nothing before `until`.
    pub(super) fn ban(&self, peer: PeerId, until: Instant) {
        let mut inner = self.write();
        let now = Instant::now();
        inner.banned.retain(|_, until| *until > now);
        // Each of them was a member once.
        if inner.banned.len() < self.max.saturating_mul(2) {
            inner.banned.insert(peer, until);
        }
    }

    pub(super) fn route(&self, peer: &PeerId) -> Option<Route> {
        self.read().routes.get(peer).cloned()
    }

    /// Members that can do something beyond the protocol's version, each with its address.
    pub(super) fn all_that_can(&self, feature: u64) -> Vec<(PeerId, IpAddr)> {
        let inner = self.read();
        let can = inner.routes.iter().filter(|(_, route)| route.features & feature == feature);
        can.map(|(peer, route)| (*peer, route.exchange.ip())).collect()
    }

    pub(super) fn members(&self) -> usize {
        self.read().routes.len()
    }

    /// Whether a peer is or was a member, and is not banned.
    pub(super) fn is_trusted(&self, peer: &PeerId) -> bool {
        let inner = self.read();
        let is_known = inner.routes.contains_key(peer) || inner.former.contains(peer);
        is_known && inner.banned.get(peer).is_none_or(|until| *until <= Instant::now())
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn route() -> Option<Route> {
        let exchange = "10.0.0.1:4003".parse().unwrap();
        Some(Route { queue: mpsc::channel(1).0, exchange, zone: Zone(0), features: 0 })
    }

    #[test]
    fn the_word_of_a_former_member_counts_until_it_is_banned_or_long_gone() {
        let directory = Directory::new(2);
        for n in 1..=3 {
            assert!(!directory.set(peer(n), route()));
            assert!(directory.set(peer(n), None) && directory.route(&peer(n)).is_none());
        }
        let trusted: Vec<_> = (1..=4).filter(|n| directory.is_trusted(&peer(*n))).collect();
        assert_eq!(trusted, [2, 3], "the bound is two; the fourth was none");
        directory.ban(peer(3), Instant::now() + Duration::from_secs(60));
        directory.ban(peer(2), Instant::now());
        assert!(!directory.is_trusted(&peer(3)) && directory.is_trusted(&peer(2)));
        directory.set(peer(3), route());
        assert!(!directory.is_trusted(&peer(3)), "coming back is no excuse");
        assert_eq!(directory.members(), 1);
    }
}
