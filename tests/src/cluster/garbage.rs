//! A peer that holds the swarm key and does not speak the protocol: it says bytes, and waits to be cut off.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_agent::swarm::control::raw::{StreamEvent, Streams, multiaddr, transport};
use darter_agent::swarm::identity::Identity;
use darter_agent::swarm::key;
use futures_util::{AsyncWriteExt as _, StreamExt as _};
use libp2p::Swarm;
use libp2p::swarm::{Config, SwarmEvent};
use tokio::sync::oneshot;

use crate::net::Place;
use crate::scratch::Scratch;

/// How long an agent may take to do something about it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connects to an agent from `place`, says `bytes` on its stream and waits until the agent ends the
/// connection.
pub async fn say(place: &Place, key_file: &Path, agent: SocketAddr, bytes: Vec<u8>) -> Result<()> {
    let key = key::load(key_file)?;
    let dir = Scratch::new()?;
    let identity = Identity::load_or_make(&dir.join("identity.key"))?;
    let (done, ended) = oneshot::channel();
    let thread = place.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
            runtime.block_on(async {
                let transport = transport(key, &identity, PATIENCE)?;
                let name = identity.keypair().public().to_peer_id();
                let swarm = Swarm::new(transport, Streams::default(), name, Config::with_tokio_executor());
                let said = tokio::time::timeout(PATIENCE, speak(swarm, agent, &bytes));
                said.await.context("the agent does not end the connection")?
            })
        });
        // The test may have given it up.
        let _ = done.send(outcome);
    })?;
    let outcome = ended.await.context("a peer that talks garbage ended without a word")?;
    let _ = thread.join();
    outcome
}

async fn speak(mut swarm: Swarm<Streams>, agent: SocketAddr, bytes: &[u8]) -> Result<()> {
    swarm.dial(multiaddr(agent))?;
    // Kept open: their end must be the agent's doing.
    let mut streams = Vec::new();
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::Behaviour((_, _, StreamEvent::Out(mut stream))) => {
                stream.write_all(bytes).await?;
                stream.flush().await?;
                streams.push(stream);
            }
            SwarmEvent::Behaviour((_, _, StreamEvent::In(stream))) => streams.push(stream),
            SwarmEvent::ConnectionClosed { .. } if !streams.is_empty() => return Ok(()),
            SwarmEvent::OutgoingConnectionError { error, .. } => return Err(error).context("no connection"),
            _ => {}
        }
    }
}
