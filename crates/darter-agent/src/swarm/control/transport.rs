//! What a connection is made of: TCP, the swarm key, noise, yamux; and why one was not made.
//!
//! The swarm key comes first, before a byte that would tell what listens here.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, TransportError};
use libp2p::core::upgrade::Version;
use libp2p::multiaddr::Protocol;
use libp2p::pnet::{PnetConfig, PreSharedKey};
use libp2p::swarm::{DialError, ListenError};
use libp2p::{Multiaddr, PeerId, Transport, allow_block_list, connection_limits, noise, tcp, yamux};

use crate::swarm::identity::Identity;

/// Streams of one connection: ours, theirs, identify and ping.
const STREAMS_MAX: usize = 16;

/// How connections are made, each within `patience` from the first byte to the last handshake.
pub fn transport(
    key: PreSharedKey,
    identity: &Identity,
    patience: Duration,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let noise = noise::Config::new(identity.keypair())?;
    let mut muxer = yamux::Config::default();
    muxer.set_max_num_streams(STREAMS_MAX);
    let private = PnetConfig::new(key);
    Ok(tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .map_err(Unreached)
        .and_then(move |socket, _| private.handshake(socket))
        .upgrade(Version::V1)
        .authenticate(noise)
        .multiplex(muxer)
        .timeout(patience)
        .boxed())
}

/// TCP did not connect. A type of its own, since what combines the errors of transports shows the
/// causes of each, and not the error itself.
#[derive(Debug, thiserror::Error)]
#[error("no connection")]
struct Unreached(#[source] io::Error);

/// The address in libp2p's words.
pub fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// The address of a TCP socket.
pub(super) fn socket_addr(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::from(ip),
        Protocol::Ip6(ip) => IpAddr::from(ip).to_canonical(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// Why a connection was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// It is this node itself.
    Own,
    /// Nobody there.
    Unreachable,
    /// Somebody there without the swarm key, or no agent at all. From outside both look the same.
    Handshake,
    /// Past a limit of ours.
    Limit,
    /// A peer that did wrong.
    Banned,
}

impl Failure {
    /// The label of `darter_peer_rejected_total`, where somebody was rejected.
    pub(super) const fn reason(self) -> Option<&'static str> {
        match self {
            Self::Own | Self::Unreachable => None,
            Self::Handshake => Some("handshake"),
            Self::Limit => Some("limit"),
            Self::Banned => Some("banned"),
        }
    }

    /// Of a connection that somebody else began.
    pub(super) fn of_listen(error: &ListenError) -> Self {
        match error {
            ListenError::LocalPeerId { .. } => Self::Own,
            ListenError::Denied { cause } => Self::denied(cause),
            ListenError::Aborted => Self::Unreachable,
            ListenError::WrongPeerId { .. } | ListenError::Transport(_) => Self::Handshake,
        }
    }

    /// Of one that this node began.
    pub(super) fn of_dial(error: &DialError) -> Self {
        match error {
            // libp2p takes addresses out on which this node itself listens.
            DialError::LocalPeerId { .. } | DialError::NoAddresses => Self::Own,
            DialError::Denied { cause } => Self::denied(cause),
            DialError::WrongPeerId { .. } => Self::Handshake,
            DialError::Transport(errors) if errors.iter().any(|(_, error)| is_answered(error)) => Self::Handshake,
            _ => Self::Unreachable,
        }
    }

    fn denied(cause: &libp2p::swarm::ConnectionDenied) -> Self {
        let is_ban = any_cause(cause, |error| error.is::<allow_block_list::Blocked>());
        if is_ban { Self::Banned } else { Self::Limit }
    }
}

/// Whether somebody answered before it failed. Silence is nobody, as far as this node can tell.
fn is_answered(error: &TransportError<io::Error>) -> bool {
    use io::ErrorKind::{
        AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable, PermissionDenied,
        TimedOut,
    };
    let TransportError::Other(error) = error else { return false };
    !any_cause(error, |error| {
        let is_silent = |kind| {
            matches!(
                kind,
                ConnectionRefused
                    | HostUnreachable
                    | NetworkUnreachable
                    | NetworkDown
                    | AddrNotAvailable
                    | PermissionDenied
                    | TimedOut
            )
        };
        let is_late = error.to_string().starts_with("Timeout");
        is_late || error.downcast_ref::<io::Error>().is_some_and(|error| is_silent(error.kind()))
    })
}

/// Whether an error or one of its causes is of a kind.
fn any_cause(error: &(dyn Error + 'static), is_it: impl Fn(&(dyn Error + 'static)) -> bool) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if is_it(error) {
            return true;
        }
        // The cause that an io::Error with another error in it names is that error's own cause.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    false
}

/// Bounds of connections, with room for two that each side begins at the same moment.
pub(super) fn limits(max_members: usize) -> connection_limits::ConnectionLimits {
    let members = u32::try_from(max_members).unwrap_or(u32::MAX);
    connection_limits::ConnectionLimits::default()
        // A hundred nodes that start together; more wait in the kernel, or try again.
        .with_max_pending_incoming(Some(256))
        .with_max_pending_outgoing(Some(256))
        .with_max_established_per_peer(Some(3))
        .with_max_established(Some(members.saturating_add(64)))
}
