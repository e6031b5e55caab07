//! A member of another version: it says hello as that one does, and keeps what it is told.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_agent::swarm::control::raw::{StreamEvent, Streams, multiaddr, transport};
use darter_agent::swarm::identity::Identity;
use darter_agent::swarm::{frame, key};
use futures_util::{AsyncWriteExt as _, StreamExt as _};
use libp2p::Swarm;
use libp2p::swarm::{Config, SwarmEvent};
use tokio_util::sync::CancellationToken;

use crate::net::Place;
use crate::scratch::Scratch;

/// For a handshake.
const PATIENCE: Duration = Duration::from_secs(20);

/// Field 100, which no version has given a meaning yet, with the value 1.
const UNKNOWN: [u8; 3] = [0xa0, 0x06, 1];

/// A member of another version, as a test holds it. It is gone when this is dropped.
pub struct Other {
    heard: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
    // Last: its identity is in it.
    _dir: Scratch,
}

impl Other {
    /// Connects to an agent, and says that it can do what the bits of `features` say.
    pub fn start(place: &Place, key_file: &Path, agent: SocketAddr, features: u64) -> Result<Self> {
        let (dir, key) = (Scratch::new()?, key::load(key_file)?);
        let identity = Identity::load_or_make(&dir.join("identity.key"))?;
        let (heard, stop) = (Arc::<Mutex<Vec<String>>>::default(), CancellationToken::new());
        let (words, ended) = (heard.clone(), stop.clone());
        let thread = place.spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                let transport = transport(key, &identity, PATIENCE).context("no transport");
                let Ok(transport) = transport else { return };
                let name = identity.keypair().public().to_peer_id();
                let swarm = Swarm::new(transport, Streams::default(), name, Config::with_tokio_executor());
                let life = live(swarm, agent, hello(features), words);
                // The test may be over before anything is said.
                let _ = ended.run_until_cancelled(life).await;
            });
        })?;
        Ok(Self { heard, stop, thread: Some(thread), _dir: dir })
    }

    /// Every frame that it was sent, in words.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.stop.cancel();
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn live(
    mut swarm: Swarm<Streams>,
    agent: SocketAddr,
    hello: Vec<u8>,
    heard: Arc<Mutex<Vec<String>>>,
) -> Result<()> {
    swarm.dial(multiaddr(agent))?;
    let mut said = Vec::new();
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::Behaviour((_, _, StreamEvent::Out(mut stream))) => {
                stream.write_all(&hello).await?;
                stream.flush().await?;
                said.push(stream);
            }
            SwarmEvent::Behaviour((_, _, StreamEvent::In(mut stream))) => {
                let heard = heard.clone();
                tokio::spawn(async move {
                    while let Ok(kind) = frame::read(&mut stream).await {
                        heard.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{kind:?}"));
                    }
                });
            }
            _ => {}
        }
    }
}

/// A hello with a part that no version knows, as bytes: it is not made of the types of this one.
fn hello(features: u64) -> Vec<u8> {
    let mut body = vec![0x0a, 3, b'9', b'.', b'9', 0x10];
    varint(&mut body, features);
    for (port, tag) in [(4002, 0x20), (4003, 0x28)] {
        body.push(tag);
        varint(&mut body, port);
    }
    body.extend(UNKNOWN);
    let mut frame = vec![0x0a];
    varint(&mut frame, body.len() as u64);
    frame.extend(body);
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&length[..], &frame].concat()
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        bytes.push(0x80 | (value & 0x7f) as u8);
        value >>= 7;
    }
    bytes.push((value & 0x7f) as u8);
}
