//! Where other agents may be: a list in the configuration, a DNS name that has all of them, and the
//! EndpointSlices of a Kubernetes Service. One of them, or several together.
//!
//! All give addresses only; who is there shows in the handshake. `names` looks up lists and names,
//! `kubernetes` watches, with `slices` for what it sees and `remembered` for the next start; `service`
//! is what the configuration calls a Service.
//! Not here: dialling.

mod kubernetes;
mod names;
pub mod remembered;
mod service;
pub mod slices;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

pub use self::kubernetes::ServiceWatch;
use self::names::Names;
pub use self::names::has_port;
pub use self::service::{ServiceName, ServicePort};

/// Finds addresses.
#[derive(Debug)]
pub struct Discovery {
    names: Names,
    service: Option<ServiceWatch>,
    max: usize,
}

impl Discovery {
    /// `peers` are `host:port`; `dns` is a name with or without a port, which is then `port`.
    /// At most `max` addresses are found.
    pub fn new(peers: &[String], dns: Option<&str>, port: u16, every: Duration, max: usize) -> Self {
        let dns = dns.map(|name| if has_port(name) { name.to_owned() } else { format!("{name}:{port}") });
        Self { names: Names { names: peers.iter().cloned().chain(dns).collect(), every }, service: None, max }
    }

    /// Watches a Kubernetes Service too.
    #[must_use]
    pub fn watching(mut self, service: Option<ServiceWatch>) -> Self {
        self.service = service;
        self
    }

    /// Keeps `found` up to date. Never ends.
    pub async fn run(self, found: watch::Sender<BTreeSet<SocketAddr>>) {
        let Self { names, service, max } = self;
        let (naming, mut named) = watch::channel(BTreeSet::new());
        let (watching, mut watched) = watch::channel(BTreeSet::new());
        let watch = async {
            match service {
                Some(service) => service.run(watching).await,
                None => std::future::pending().await,
            }
        };
        let merge = async {
            loop {
                let all = &*named.borrow_and_update() | &*watched.borrow_and_update();
                replace(&found, all.into_iter().take(max).collect());
                tokio::select! {
                    Ok(()) = named.changed() => {}
                    Ok(()) = watched.changed() => {}
                    // Without a Service, or without names, only the others change.
                    else => std::future::pending().await,
                }
            }
        };
        tokio::join!(names.run(naming), watch, merge);
    }
}

/// Says something only if it is new.
fn replace(found: &watch::Sender<BTreeSet<SocketAddr>>, all: BTreeSet<SocketAddr>) {
    found.send_if_modified(|found| {
        let is_new = *found != all;
        *found = all;
        is_new
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn at_most_so_many_addresses_are_found() {
        let peers: Vec<_> = (1..=9).map(|port| format!("127.0.0.1:700{port}")).collect();
        let discovery = Discovery::new(&peers, Some("127.0.0.1"), 7001, Duration::from_secs(3600), 4);
        let (sender, mut found) = watch::channel(BTreeSet::new());
        let running = tokio::spawn(discovery.run(sender));
        let found = found.wait_for(|found| !found.is_empty()).await.unwrap().clone();
        running.abort();
        assert_eq!(found.iter().map(SocketAddr::port).collect::<Vec<_>>(), [7001, 7002, 7003, 7004]);
    }
}
