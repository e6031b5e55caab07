//! Which addresses are dialled, and when. Pure: the time and lots are arguments.
//!
//! An address comes from discovery, from a peer that was asked, or from the peer that listens there.
//! Which peer it is shows only when it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use darter_core::swarm::PeerId;

/// The first pause after a failure is up to this long, each next one up to twice as long.
const FIRST: Duration = Duration::from_millis(500);
/// A node that was away for an hour is found again within half a minute.
const LONGEST: Duration = Duration::from_secs(30);
/// An address that only peers told of is forgotten after so many failures: some two minutes.
const FAILURES_MAX: u32 = 10;
/// Dials at a time: enough for a node that meets a thousand others to be done in a second.
const DIALS_MAX: usize = 64;

/// All known addresses.
#[derive(Debug)]
pub(super) struct Addresses {
    known: BTreeMap<SocketAddr, Entry>,
    /// Past this nothing more is learned.
    max: usize,
}

#[derive(Debug)]
struct Entry {
    is_found: bool,
    failures: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody is connected there.
    Waits(Instant),
    Dialling,
    Connected(PeerId),
    /// It is this node itself.
    Own,
}

impl Addresses {
    pub(super) const fn new(max: usize) -> Self {
        Self { known: BTreeMap::new(), max }
    }

    /// Discovery's whole list.
    pub(super) fn found(&mut self, now: Instant, list: &BTreeSet<SocketAddr>) {
        for (address, entry) in &mut self.known {
            entry.is_found = list.contains(address);
        }
        // Who is connected stays: a name service that forgets a node does not end it.
        self.known.retain(|_, entry| entry.is_found || matches!(entry.state, State::Connected(_) | State::Dialling));
        for address in list {
            self.add(now, *address, true);
        }
    }

    /// A peer says that a member is there.
    pub(super) fn told(&mut self, now: Instant, address: SocketAddr, by: IpAddr) {
        let ip = address.ip();
        let is_local = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_link_local(ip);
        // No peer sends us to our own node's services, unless it is on this very node.
        if !is_local(ip) || (ip.is_loopback() && by.is_loopback()) {
            self.add(now, address, false);
        }
    }

    fn add(&mut self, now: Instant, address: SocketAddr, is_found: bool) {
        if let Some(entry) = self.known.get_mut(&address) {
            entry.is_found |= is_found;
            return;
        }
        // What peers tell must not keep out what discovery found.
        if self.known.len() >= self.max && is_found {
            let told = self.known.iter().find(|(_, entry)| !entry.is_found && matches!(entry.state, State::Waits(_)));
            let told = told.map(|(address, _)| *address);
            told.map(|address| self.known.remove(&address));
        }
        if self.known.len() < self.max {
            self.known.insert(address, Entry { is_found, failures: 0, state: State::Waits(now) });
        }
    }

    /// Whom to dial now: the caller does.
    pub(super) fn due(&mut self, now: Instant) -> Vec<SocketAddr> {
        let dialling = self.known.values().filter(|entry| entry.state == State::Dialling).count();
        let due = self.known.iter_mut().filter(|(_, entry)| matches!(entry.state, State::Waits(at) if at <= now));
        let due = due.take(DIALS_MAX.saturating_sub(dialling));
        due.map(|(address, entry)| {
            entry.state = State::Dialling;
            *address
        })
        .collect()
    }

    /// When somebody is due next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let dialling = self.known.values().filter(|entry| entry.state == State::Dialling).count();
        let waits = self.known.values().filter_map(|entry| match entry.state {
            State::Waits(at) => Some(at),
            _ => None,
        });
        // With all dials in use the end of one is what is waited for.
        if dialling < DIALS_MAX { waits.min() } else { None }
    }

    /// The peer listens at this address, and is connected.
    pub(super) fn connected(&mut self, address: SocketAddr, peer: PeerId) {
        let has_room = self.known.len() < self.max;
        if let Some(entry) = self.known.get_mut(&address) {
            (entry.state, entry.failures) = (State::Connected(peer), 0);
        } else if has_room {
            self.known.insert(address, Entry { is_found: false, failures: 0, state: State::Connected(peer) });
        }
    }

    /// A dial ended without a connection.
    pub(super) fn failed(&mut self, now: Instant, address: SocketAddr, dice: u64) {
        let Some(entry) = self.known.get_mut(&address) else { return };
        if matches!(entry.state, State::Connected(_)) {
            // It called us meanwhile.
            return;
        }
        entry.failures = entry.failures.saturating_add(1);
        entry.state = State::Waits(now + pause(entry.failures, dice));
        if !entry.is_found && entry.failures >= FAILURES_MAX {
            self.known.remove(&address);
        }
    }

    /// A dial reached this node itself.
    pub(super) fn own(&mut self, address: SocketAddr) {
        if let Some(entry) = self.known.get_mut(&address) {
            entry.state = State::Own;
        }
    }

    /// The last connection to a peer is gone: it is dialled again, not by everybody at once.
    pub(super) fn lost(&mut self, now: Instant, peer: PeerId, dice: u64) {
        for entry in self.known.values_mut().filter(|entry| entry.state == State::Connected(peer)) {
            entry.state = State::Waits(now + pause(1, dice));
        }
    }

    /// Addresses of others, connected or not.
    pub(super) fn others(&self) -> usize {
        self.known.values().filter(|entry| entry.state != State::Own).count()
    }
}

/// Exponential with jitter over its upper half.
fn pause(failures: u32, dice: u64) -> Duration {
    let longest = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST);
    let half = u64::try_from(longest.as_millis() / 2).unwrap_or(u64::MAX).max(1);
    Duration::from_millis(half + dice % half)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 4002))
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn found(now: Instant, list: impl IntoIterator<Item = u8>) -> Addresses {
        let mut addresses = Addresses::new(100);
        addresses.found(now, &list.into_iter().map(at).collect());
        addresses
    }

    #[test]
    fn what_is_found_is_dialled_at_once_and_again_with_growing_pauses() {
        let mut now = Instant::now();
        let mut addresses = found(now, [1]);
        let mut last = Duration::ZERO;
        for _ in 0..12 {
            assert_eq!(addresses.due(now), [at(1)]);
            assert_eq!((addresses.due(now), addresses.deadline()), (Vec::new(), None), "one dial at a time");
            addresses.failed(now, at(1), 0);
            let next = addresses.deadline().unwrap();
            assert!(next - now >= last && next - now <= LONGEST, "{:?}", next - now);
            (last, now) = (next - now, next);
        }
        assert_eq!(last, LONGEST / 2);
    }

    #[test]
    fn a_lost_peer_is_dialled_again() {
        let now = Instant::now();
        let mut addresses = found(now, [1, 2]);
        addresses.due(now);
        addresses.connected(at(1), peer(1));
        addresses.own(at(2));
        assert_eq!((addresses.deadline(), addresses.others()), (None, 1));
        addresses.lost(now, peer(2), 0);
        assert_eq!(addresses.deadline(), None);
        addresses.lost(now, peer(1), 0);
        assert_eq!(addresses.due(now + FIRST), [at(1)]);
    }

    #[test]
    fn a_peer_that_called_us_meanwhile_is_not_dialled() {
        let now = Instant::now();
        let mut addresses = found(now, [1]);
        addresses.due(now);
        addresses.connected(at(1), peer(1));
        addresses.failed(now, at(1), 0);
        assert_eq!(addresses.deadline(), None);
    }

    #[test]
    fn what_discovery_forgets_is_forgotten_unless_it_is_connected() {
        let now = Instant::now();
        let mut addresses = found(now, [1, 2]);
        addresses.connected(at(1), peer(1));
        addresses.found(now, &BTreeSet::new());
        assert_eq!(addresses.others(), 1);
        addresses.lost(now, peer(1), 0);
        for _ in 0..FAILURES_MAX {
            let now = addresses.deadline().unwrap();
            assert_eq!(addresses.due(now), [at(1)]);
            addresses.failed(now, at(1), 0);
        }
        assert_eq!(addresses.others(), 0);
    }

    #[test]
    fn a_peer_cannot_send_us_to_this_node_or_fill_the_table() {
        let now = Instant::now();
        let mut addresses = Addresses::new(3);
        let (remote, local) = (at(9).ip(), IpAddr::from([127, 0, 0, 1]));
        for address in ["127.0.0.1:80", "169.254.169.254:80", "0.0.0.0:80", "224.0.0.1:80", "[fe80::1]:80", "[::1]:80"]
        {
            addresses.told(now, address.parse().unwrap(), remote);
        }
        assert_eq!(addresses.others(), 0);
        addresses.told(now, SocketAddr::new(local, 4002), local);
        assert_eq!(addresses.others(), 1, "tests and demos live on one node");
        (1..200).for_each(|n| addresses.told(now, at(n), remote));
        assert_eq!(addresses.others(), 3);
        // What discovery finds comes in all the same.
        addresses.found(now, &BTreeSet::from([at(201), at(202), at(203)]));
        assert_eq!(addresses.due(now), [at(201), at(202), at(203)]);
    }

    #[test]
    fn a_thousand_addresses_are_not_dialled_at_once() {
        let now = Instant::now();
        let mut addresses = Addresses::new(1000);
        addresses.found(now, &(0..200).map(at).collect());
        let first = addresses.due(now);
        assert_eq!((first.len(), addresses.deadline()), (DIALS_MAX, None));
        addresses.connected(first[0], peer(1));
        assert_eq!(addresses.due(now).len(), 1);
    }
}
