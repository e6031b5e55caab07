//! Names that are looked up again and again: the list in the configuration, and a DNS name that has
//! all agents.
//!
//! One that cannot be looked up keeps what it gave last: a name service that is away must not take
//! the swarm apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tracing::{info, warn};

use super::replace;

/// A lookup that takes longer has failed.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(5);

/// Looks up names.
#[derive(Debug)]
pub(super) struct Names {
    /// `host:port` each.
    pub(super) names: Vec<String>,
    pub(super) every: Duration,
}

impl Names {
    /// Keeps `found` up to date. Never ends.
    pub(super) async fn run(self, found: watch::Sender<BTreeSet<SocketAddr>>) {
        let mut known: BTreeMap<&str, BTreeSet<SocketAddr>> = BTreeMap::new();
        let mut failing = BTreeSet::new();
        loop {
            // All at once, and each is told as it comes: a name that does not answer must not hold up the others.
            let mut answers: FuturesUnordered<_> =
                self.names.iter().map(|name| async move { (name, look_up(name).await) }).collect();
            while let Some((name, answer)) = answers.next().await {
                match answer {
                    Ok(addresses) => {
                        if failing.remove(name) {
                            info!(name, addresses = addresses.len(), "peers can be looked up again");
                        }
                        known.insert(name, addresses);
                    }
                    // Said once: the next word is that it works again.
                    Err(reason) if failing.insert(name) => {
                        warn!(name, reason, "cannot look up peers; those found before stay");
                    }
                    Err(_) => {}
                }
                replace(&found, known.values().flatten().copied().collect());
            }
            if self.names.is_empty() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(self.every).await;
        }
    }
}

/// Whether a name says which port: `name:4002`, `10.0.0.1:4002`, `[::1]:4002`.
pub fn has_port(name: &str) -> bool {
    name.rsplit_once(':').is_some_and(|(host, port)| {
        let is_host = !host.is_empty() && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')));
        is_host && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

async fn look_up(name: &str) -> Result<BTreeSet<SocketAddr>, String> {
    match tokio::time::timeout(LOOKUP_PATIENCE, tokio::net::lookup_host(name)).await {
        Ok(Ok(addresses)) => {
            Ok(addresses.map(|address| SocketAddr::new(address.ip().to_canonical(), address.port())).collect())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LOOKUP_PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_told_from_an_address() {
        for name in ["darter.gpu.svc:4002", "10.0.0.1:4002", "[2001:db8::1]:4002"] {
            assert!(has_port(name), "{name}");
        }
        for name in ["darter.gpu.svc", "10.0.0.1", "2001:db8::1", "[2001:db8::1]", "a:0", "a:65536", ":4002", "a:"] {
            assert!(!has_port(name), "{name}");
        }
    }

    #[tokio::test]
    async fn lists_and_names_become_addresses_and_a_failing_name_keeps_none_from_the_others() {
        let names = ["127.0.0.1:7001", "nobody.invalid:7002", "localhost:7003"].map(ToOwned::to_owned).to_vec();
        let discovery = Names { names, every: Duration::from_secs(3600) };
        let (sender, mut found) = watch::channel(BTreeSet::new());
        let running = tokio::spawn(discovery.run(sender));
        let ports = |found: &BTreeSet<SocketAddr>| found.iter().map(SocketAddr::port).collect::<BTreeSet<u16>>();
        let found = found.wait_for(|found| ports(found) == [7001, 7003].into()).await.unwrap().clone();
        running.abort();
        assert!(found.iter().all(|address| address.ip().is_loopback()), "{found:?}");
    }
}
