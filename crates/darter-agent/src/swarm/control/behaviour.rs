//! What libp2p is told to do here: limits, bans, two streams a connection, ping, identify.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use libp2p::core::transport::TransportError;
use libp2p::swarm::{NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{allow_block_list, connection_limits, identify, ping};

use super::streams::Streams;
use super::transport::{limits, multiaddr, socket_addr, transport};
use super::{ControlError, Setup};
use crate::swarm::identity::Identity;

/// A listener has its address by then, or it never has.
const LISTEN_PATIENCE: Duration = Duration::from_secs(5);

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    pub(super) banned: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    streams: Streams,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
}

/// Connected to nobody, and listening nowhere.
pub(super) fn swarm(setup: &Setup, identity: &Identity) -> Result<Swarm<Behaviour>, ControlError> {
    let transport = transport(setup.key, identity, setup.limits.handshake)?;
    let ping = ping::Config::new().with_interval(setup.limits.ping_every).with_timeout(setup.limits.ping_patience);
    let identify = identify::Config::new("/darter/1".to_owned(), identity.keypair().public())
        .with_agent_version(format!("darter/{}", setup.version))
        // Addresses come from discovery and from the hello.
        .with_hide_listen_addrs(true)
        .with_cache_size(0);
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits(setup.max_members)),
        banned: allow_block_list::Behaviour::default(),
        streams: Streams::default(),
        ping: ping::Behaviour::new(ping),
        identify: identify::Behaviour::new(identify),
    };
    let name = identity.keypair().public().to_peer_id();
    Ok(Swarm::new(transport, behaviour, name, libp2p::swarm::Config::with_tokio_executor()))
}

/// Listens, and says where: the port is the real one where 0 was asked for.
pub(super) async fn listen(swarm: &mut Swarm<Behaviour>, address: SocketAddr) -> Result<SocketAddr, ControlError> {
    let wrong = |source| ControlError::Listen { address, source };
    swarm.listen_on(multiaddr(address)).map_err(|error| match error {
        TransportError::Other(error) => wrong(error),
        TransportError::MultiaddrNotSupported(_) => wrong(std::io::ErrorKind::Unsupported.into()),
    })?;
    let listens = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { address, .. } => {
                    if let Some(found) = socket_addr(&address) {
                        return Ok(found.port());
                    }
                }
                SwarmEvent::ListenerClosed { reason: Err(error), .. } => return Err(wrong(error)),
                _ => {}
            }
        }
    };
    let port = tokio::time::timeout(LISTEN_PATIENCE, listens)
        .await
        .map_err(|_| wrong(std::io::ErrorKind::TimedOut.into()))??;
    Ok(SocketAddr::new(address.ip(), port))
}
