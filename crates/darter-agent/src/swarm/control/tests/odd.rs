//! Peers that hold the swarm key and do not behave: they reach this node's streams, and no further.

use darter_api::v1;
use futures_util::{AsyncWriteExt, StreamExt};
use libp2p::Swarm;
use libp2p::swarm::{Stream, SwarmEvent};

use super::*;
use crate::swarm::control::streams::{StreamEvent, Streams};
use crate::swarm::control::transport::{multiaddr, transport};
use crate::swarm::wire::Hello;

/// A peer of which this node believes nothing yet.
pub(super) struct Odd {
    swarm: Swarm<Streams>,
    at: SocketAddr,
    id: PeerId,
    /// Kept open: the end of one must be the node's doing.
    streams: Vec<Stream>,
}

impl Odd {
    pub(super) fn new(node: &Node) -> Self {
        let identity = identity();
        let transport = transport(key(1), &identity, PATIENCE).unwrap();
        let name = identity.keypair().public().to_peer_id();
        let config = libp2p::swarm::Config::with_tokio_executor();
        let swarm = Swarm::new(transport, Streams::default(), name, config);
        Self { swarm, at: node.control.address(), id: identity.id(), streams: Vec::new() }
    }

    /// Connects, and says these bytes on its stream.
    pub(super) async fn says(&mut self, bytes: &[u8]) {
        self.swarm.dial(multiaddr(self.at)).unwrap();
        let said = async {
            loop {
                match self.swarm.select_next_some().await {
                    SwarmEvent::Behaviour((_, _, StreamEvent::Out(mut stream))) => {
                        stream.write_all(bytes).await.unwrap();
                        stream.flush().await.unwrap();
                        self.streams.push(stream);
                        return;
                    }
                    SwarmEvent::Behaviour((_, _, StreamEvent::In(stream))) => self.streams.push(stream),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, said).await.expect("the node takes a stream");
    }

    /// Says more on the stream that it spoke on last.
    pub(super) async fn says_more(&mut self, bytes: &[u8]) {
        let stream = self.streams.last_mut().expect("it has spoken");
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
    }

    pub(super) const fn id(&self) -> PeerId {
        self.id
    }

    /// Says more than may be taken at once, and keeps the connection going until it is dropped.
    pub(super) async fn floods(&mut self, bytes: &[u8]) {
        let mut stream = self.streams.pop().expect("it has spoken");
        let said = async {
            stream.write_all(bytes).await.unwrap();
            stream.flush().await.unwrap();
        };
        let goes_on = async {
            loop {
                if let SwarmEvent::Behaviour((_, _, StreamEvent::In(stream))) = self.swarm.select_next_some().await {
                    self.streams.push(stream);
                }
            }
        };
        futures_util::future::join(said, goes_on).await;
    }

    /// Waits until the node ends the connection.
    pub(super) async fn is_cut_off(&mut self) {
        let cut = async {
            loop {
                match self.swarm.select_next_some().await {
                    SwarmEvent::ConnectionClosed { .. } => return,
                    SwarmEvent::Behaviour((_, _, StreamEvent::In(stream) | StreamEvent::Out(stream))) => {
                        self.streams.push(stream);
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, cut).await.expect("the node ends the connection");
    }
}

pub(super) fn hello() -> Vec<u8> {
    hello_with(u64::MAX)
}

/// The hello of a version that can do this.
pub(super) fn hello_with(features: u64) -> Vec<u8> {
    let version = "odd".to_owned();
    let (zone, control_port, exchange_port) = (Zone(1), 1, 1);
    let (wants_peers, is_seed, is_plain) = (false, false, false);
    let hello = Hello { version, features, zone, control_port, exchange_port, wants_peers, is_seed, is_plain };
    let mut bytes = Vec::new();
    assert!(crate::swarm::frame::append(&mut bytes, &hello.encode()));
    bytes
}

pub(super) fn frame(kind: v1::frame::Kind) -> Vec<u8> {
    let mut bytes = Vec::new();
    assert!(crate::swarm::frame::append(&mut bytes, &v1::Frame { kind: Some(kind) }));
    bytes
}

#[tokio::test]
async fn a_bad_frame_ends_the_connection_and_bans_the_peer() {
    let bad_blob = v1::BlobMessage { blob: vec![1; 31], body: None };
    for bad in [
        [hello(), vec![0, 0, 0, 2, 255, 255]].concat(),
        [hello(), vec![255; 8]].concat(),
        [hello(), hello()].concat(),
        [hello(), frame(v1::frame::Kind::Message(bad_blob))].concat(),
        frame(v1::frame::Kind::Peers(v1::Peers::default())),
    ] {
        let mut node = start(setup(), &[]).await;
        let mut odd = Odd::new(&node);
        odd.says(&bad).await;
        odd.is_cut_off().await;
        assert_eq!((node.rejected("bad_frame"), node.rejected("banned")), (1, 0), "{bad:?}");
        // It may have been a member until then; it is none any more.
        node.stands(|standing| standing.peers == 0 && standing.connections == 0).await;
        odd.swarm.dial(multiaddr(odd.at)).unwrap();
        odd.is_cut_off().await;
        node.rejects("banned").await;
        node.events.close();
    }
}

#[tokio::test]
async fn a_peer_of_another_version_is_cut_off_and_counted() {
    let node = start(setup(), &[]).await;
    let identity = identity();
    let transport = transport(key(1), &identity, PATIENCE).unwrap();
    let name = identity.keypair().public().to_peer_id();
    let config = libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(PATIENCE * 6);
    // It speaks what every agent does below this protocol, and no version of it that is known here.
    let mut swarm = Swarm::new(transport, libp2p::ping::Behaviour::default(), name, config);
    swarm.dial(multiaddr(node.control.address())).unwrap();
    let cut = async { while !matches!(swarm.select_next_some().await, SwarmEvent::ConnectionClosed { .. }) {} };
    tokio::time::timeout(PATIENCE, cut).await.expect("the node ends the connection");
    assert_eq!(node.rejected("protocol"), 1);
    node.stands(|standing| standing.peers == 0 && standing.connections == 0).await;
}

#[tokio::test]
async fn a_peer_that_says_no_hello_is_cut_off() {
    let node = start(setup(), &[]).await;
    let mut odd = Odd::new(&node);
    odd.says(&hello()[..3]).await;
    odd.is_cut_off().await;
    assert_eq!(node.rejected("hello"), 1);
}

#[tokio::test]
async fn a_ban_ends_with_its_time() {
    let mut node =
        start(Setup { limits: Limits { ban: Duration::from_millis(300), ..setup().limits }, ..setup() }, &[]).await;
    let mut odd = Odd::new(&node);
    odd.says(&[255; 4]).await;
    odd.is_cut_off().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    odd.says(&hello()).await;
    node.sees([node.control.me(), odd.id]).await;
    // The rest of the agent can ban too: for bytes that were wrong.
    node.control.ban(odd.id, PATIENCE);
    odd.is_cut_off().await;
    node.sees([node.control.me()]).await;
}

#[tokio::test]
async fn more_than_the_limit_are_refused_and_counted() {
    // 64 more connections than members are allowed, for those that dial each other.
    // None of them runs out of time before the last has come.
    let hour = Duration::from_secs(3600);
    let limits = Limits { handshake: hour, hello: hour, ..Limits::default() };
    let node = start(Setup { max_members: 0, limits, ..setup() }, &[]).await;
    let mut odd: Vec<Odd> = (0..64).map(|_| Odd::new(&node)).collect();
    for peer in &mut odd {
        peer.swarm.dial(multiaddr(peer.at)).unwrap();
        while !matches!(peer.swarm.select_next_some().await, SwarmEvent::ConnectionEstablished { .. }) {}
    }
    let mut last = Odd::new(&node);
    last.swarm.dial(multiaddr(last.at)).unwrap();
    last.is_cut_off().await;
    node.rejects("limit").await;
}
