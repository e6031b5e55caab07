//! The swarm as a part of the agent: from its configuration to its events.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use darter_core::Digest;
use darter_core::swarm::Zone;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::control::{Control, ControlError, ControlEvent, ControlHandle, Limits, Setup, Standing};
use super::discovery::{Discovery, ServicePort, ServiceWatch};
use super::identity::{Identity, IdentityError};
use super::key::{self, KeyError};
use crate::config::{self, Config};
use crate::metrics::Metrics;

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
    /// The connections.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// The swarm of this node, listening.
pub struct SwarmPart {
    control: Control,
    handle: ControlHandle,
    events: mpsc::Receiver<ControlEvent>,
}

impl SwarmPart {
    /// None without a swarm key: then nothing listens, and the node is a mirror by itself.
    pub async fn bind(config: &Config, version: &str, metrics: Arc<Metrics>) -> Result<Option<Self>, SwarmError> {
        let swarm = &config.swarm;
        let Some(file) = &swarm.key_file else { return Ok(None) };
        let key = key::load(file)?;
        let directory = config.data_dir();
        std::fs::create_dir_all(&directory)
            .map_err(|source| SwarmError::Directory { path: directory.clone(), source })?;
        let identity = Identity::load_or_make(&directory.join("identity.key"))?;
        let dns = swarm.dns.as_deref();
        let (port, every, max) = (swarm.listen.port(), swarm.lookup_every.0, swarm.max_members);
        let service = service(swarm, &directory, metrics.clone());
        // The DNS name has everybody, and so has the Service.
        let wants_peers = dns.is_none() && service.is_none();
        let discovery = Discovery::new(&swarm.peers, dns, port, every, max).watching(service);
        let setup = Setup {
            listen: swarm.listen,
            exchange_port: swarm.exchange_listen.port(),
            zone: zone(swarm.zone.as_deref()),
            key,
            max_members: swarm.max_members,
            wants_peers,
            version: version.to_owned(),
            limits: Limits::default(),
        };
        let (control, handle, events) = Control::bind(setup, &identity, discovery, metrics).await?;
        info!(peer = %handle.me(), address = %handle.address(), key = %key.fingerprint(), "this node is in a swarm");
        Ok(Some(Self { control, handle, events }))
    }

    /// Where the control plane listens.
    pub const fn address(&self) -> SocketAddr {
        self.handle.address()
    }

    /// How it stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.handle.standing()
    }

    /// Until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let Self { control, handle: _handle, mut events } = self;
        // Nobody decides on them yet: the driver of `darter_core::swarm` takes this place. Until then
        // they are taken and let go, so that no peer has to wait for this node.
        let ignored = async { while events.recv().await.is_some() {} };
        tokio::join!(control.run(stop), ignored);
    }
}

/// The Service to watch, if one is configured.
fn service(swarm: &config::Swarm, directory: &Path, metrics: Arc<Metrics>) -> Option<ServiceWatch> {
    Some(ServiceWatch {
        service: swarm.service.clone()?,
        port: swarm.endpoint_port.clone().unwrap_or_else(|| ServicePort::Number(swarm.listen.port())),
        is_ipv6: swarm.listen.is_ipv6(),
        kubeconfig: swarm.kubeconfig.clone(),
        file: directory.join("members.json"),
        max: swarm.max_members,
        metrics,
    })
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
