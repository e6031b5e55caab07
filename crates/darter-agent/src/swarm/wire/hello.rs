//! What peers say about themselves and each other.

use std::net::{IpAddr, SocketAddr};

use darter_api::v1;
use darter_core::swarm::{Message, Zone};

use super::{PEERS_MAX, WireError};

/// A version for people; longer ones are somebody's joke.
const VERSION_MAX: usize = 64;

/// The feature of whoever knows `Take` and `TakeEnd`. Others take a kind of message that they do not know
/// for a broken peer.
const TAKES: u64 = 1;
/// The feature of whoever knows `SeenWanted` and `Seen`.
pub const SEES: u64 = 2;
/// The feature of whoever knows that a piece may come slowly: a `Released` that is not whole, and a `Have` of
/// nothing. Others take the first for the piece itself.
const SLOWLY: u64 = 4;
/// The feature of whoever tells the values of all pieces of a blob.
pub const VALUES: u64 = 8;
/// The feature of whoever knows `RoomWanted` and `Room`.
const ROOM: u64 = 16;

/// What this version can do.
pub const FEATURES: u64 = TAKES | SEES | SLOWLY | VALUES | ROOM;

/// The feature of whoever can be told this; 0: everybody can.
pub const fn feature_for(message: &Message) -> u64 {
    match message {
        Message::Take { .. } | Message::TakeEnd { .. } => TAKES,
        Message::RoomWanted | Message::Room { .. } => ROOM,
        Message::Released { is_whole: false, .. } => SLOWLY,
        Message::Have { pieces, .. } if pieces.is_empty() => SLOWLY,
        _ => 0,
    }
}

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Of darter.
    pub version: String,
    /// What it can do beyond the protocol's version.
    pub features: u64,
    /// Where it stands.
    pub zone: Zone,
    /// Where its control plane listens.
    pub control_port: u16,
    /// Where its blob exchange listens.
    pub exchange_port: u16,
    /// Whether it wants to hear of other members.
    pub wants_peers: bool,
    /// Whether it keeps a copy of what the others pull.
    pub is_seed: bool,
    /// Whether pieces go to and from it in plaintext. No version that has no word for that does.
    pub is_plain: bool,
}

impl Hello {
    /// For the wire.
    pub fn encode(&self) -> v1::Frame {
        let hello = v1::Hello {
            version: self.version.chars().take(VERSION_MAX / 4).collect(),
            features: self.features,
            zone: self.zone.0,
            control_port: self.control_port.into(),
            exchange_port: self.exchange_port.into(),
            wants_peers: self.wants_peers,
            is_seed: self.is_seed,
            is_plain: self.is_plain,
        };
        v1::Frame { kind: Some(v1::frame::Kind::Hello(hello)) }
    }

    /// As a peer sent it.
    pub fn decode(hello: v1::Hello) -> Result<Self, WireError> {
        let (found, max) = (hello.version.len() as u64, VERSION_MAX as u64);
        if found > max {
            return Err(WireError::TooMuch { field: "hello.version", found, max });
        }
        Ok(Self {
            // It goes into logs.
            version: hello.version.chars().filter(|c| !c.is_control()).collect(),
            features: hello.features,
            zone: Zone(hello.zone),
            control_port: port("hello.control_port", hello.control_port)?,
            exchange_port: port("hello.exchange_port", hello.exchange_port)?,
            wants_peers: hello.wants_peers,
            is_seed: hello.is_seed,
            is_plain: hello.is_plain,
        })
    }
}

/// Addresses of members, for the wire; no more than a peer accepts.
pub fn encode_peers(addresses: impl IntoIterator<Item = SocketAddr>) -> v1::Frame {
    let address = |address: SocketAddr| {
        let ip = match address.ip().to_canonical() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        v1::Address { ip, port: address.port().into() }
    };
    let addresses = addresses.into_iter().take(PEERS_MAX).map(address).collect();
    v1::Frame { kind: Some(v1::frame::Kind::Peers(v1::Peers { addresses })) }
}

/// Addresses of members, as a peer sent them.
pub fn decode_peers(peers: v1::Peers) -> Result<Vec<SocketAddr>, WireError> {
    let (found, max) = (peers.addresses.len() as u64, PEERS_MAX as u64);
    if found > max {
        return Err(WireError::TooMuch { field: "peers.addresses", found, max });
    }
    peers
        .addresses
        .into_iter()
        .map(|address| Ok(SocketAddr::new(ip(&address.ip)?, port("peers.port", address.port)?)))
        .collect()
}

fn ip(bytes: &[u8]) -> Result<IpAddr, WireError> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(bytes.into());
    }
    let bytes = <[u8; 16]>::try_from(bytes).map_err(|_| WireError::Length { field: "peers.ip", found: bytes.len() })?;
    Ok(IpAddr::from(bytes).to_canonical())
}

fn port(field: &'static str, port: u32) -> Result<u16, WireError> {
    match u16::try_from(port) {
        Ok(0) => Err(WireError::Absent(field)),
        Ok(port) => Ok(port),
        Err(_) => Err(WireError::TooMuch { field, found: port.into(), max: u16::MAX.into() }),
    }
}

#[cfg(test)]
mod tests {
    use v1::frame::Kind;

    use super::*;

    fn hello() -> Hello {
        let version = "0.1.0".to_owned();
        let (features, zone, control_port, exchange_port) = (5, Zone(9), 4002, 4003);
        let (wants_peers, is_seed, is_plain) = (true, true, true);
        Hello { version, features, zone, control_port, exchange_port, wants_peers, is_seed, is_plain }
    }

    #[test]
    fn a_hello_comes_back_as_it_was() {
        let Some(Kind::Hello(sent)) = hello().encode().kind else { panic!("a hello") };
        assert_eq!(Hello::decode(sent), Ok(hello()));
    }

    #[test]
    fn who_knows_no_features_is_told_what_everybody_knows() {
        let have = |pieces: Vec<u32>| Message::Have { pieces, free_slots: 1, interested: 2 };
        let released = |is_whole| Message::Released { piece: 3, is_whole };
        for (message, feature) in [
            (Message::Leave, 0),
            (Message::Holds { size: 5 }, 0),
            (have(vec![7]), 0),
            (have(Vec::new()), SLOWLY),
            (released(true), 0),
            (released(false), SLOWLY),
            (Message::Take { size: 5, is_for_elsewhere: false }, TAKES),
            (Message::RoomWanted, ROOM),
        ] {
            assert_eq!(feature_for(&message), feature, "{message:?}");
        }
    }

    #[test]
    fn ports_and_versions_have_bounds() {
        let Some(Kind::Hello(sent)) = hello().encode().kind else { panic!("a hello") };
        for (port, is_good) in [(0, false), (1, true), (65_535, true), (65_536, false)] {
            assert_eq!(Hello::decode(v1::Hello { control_port: port, ..sent.clone() }).is_ok(), is_good, "{port}");
            assert_eq!(Hello::decode(v1::Hello { exchange_port: port, ..sent.clone() }).is_ok(), is_good, "{port}");
        }
        assert!(Hello::decode(v1::Hello { version: "9".repeat(65), ..sent.clone() }).is_err());
        let long = Hello { version: "ö".repeat(200), ..hello() };
        let Some(Kind::Hello(sent)) = long.encode().kind else { panic!("a hello") };
        assert!(Hello::decode(sent).is_ok(), "ours is cut to what others accept");
    }

    #[test]
    fn addresses_come_back_as_they_were() {
        let addresses: Vec<SocketAddr> =
            ["10.0.0.1:4002", "[2001:db8::1]:4002"].map(|text| text.parse().unwrap()).into();
        let Some(Kind::Peers(sent)) = encode_peers(addresses.clone()).kind else { panic!("peers") };
        assert_eq!(decode_peers(sent), Ok(addresses.clone()));
        let odd = v1::Peers { addresses: vec![v1::Address { ip: vec![1, 2, 3], port: 1 }] };
        assert!(matches!(decode_peers(odd), Err(WireError::Length { found: 3, .. })));
        let many = v1::Peers { addresses: vec![v1::Address { ip: vec![1, 2, 3, 4], port: 1 }; PEERS_MAX + 1] };
        assert!(matches!(decode_peers(many), Err(WireError::TooMuch { .. })));
        let Some(Kind::Peers(sent)) = encode_peers(vec![addresses[0]; PEERS_MAX + 1]).kind else { panic!("peers") };
        assert!(decode_peers(sent).is_ok());
    }
}
