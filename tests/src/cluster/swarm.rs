//! Agents of a cluster that share: one key for all, and each told where the others are.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_agent::swarm::identity::Identity;
use darter_core::Digest;
use darter_core::swarm::score;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use toml_edit::Array;

use super::hostile::{Deed, Hostile};
use super::{Cluster, Plan, Seat};
use crate::agent::Options;
use crate::net::{Place, node_address};
use crate::scratch::Scratch;
use crate::stage::{bytes, eventually};
use crate::{process, tools};

/// Past this it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Its name in the directory of a swarm.
const KEY: &str = "swarm.key";

/// Nodes whose agents are one swarm.
pub struct Swarm {
    cluster: Cluster,
    // After them: agents read the key again when they are started again.
    dir: Scratch,
    // Last: the next swarm begins when nothing of this one runs.
    _turn: OwnedSemaphorePermit,
}

/// One swarm of this program for each processor at a time, and two at the least: its tests say how long something
/// takes over links with a rate, and a swarm by itself has a processor busy for half of its time.
fn turns() -> Arc<Semaphore> {
    static TURNS: OnceLock<Arc<Semaphore>> = OnceLock::new();
    let processors = || std::thread::available_parallelism().map_or(2, |processors| processors.get().max(2));
    TURNS.get_or_init(|| Arc::new(Semaphore::new(processors()))).clone()
}

impl Swarm {
    /// Starts a cluster of agents that share, and waits until all know all.
    pub async fn start(
        plan: Plan,
        configure: impl Fn(&Seat, Options) -> Options + Send + Sync + 'static,
    ) -> Result<Self> {
        let swarm = Self::start_apart(plan, configure).await?;
        swarm.complete().await?;
        Ok(swarm)
    }

    /// The same where not all are to know all: whoever starts it waits for whatever it is that they know.
    pub async fn start_apart(
        plan: Plan,
        configure: impl Fn(&Seat, Options) -> Options + Send + Sync + 'static,
    ) -> Result<Self> {
        // As long as those take that run: each test has its own patience.
        let turn = turns().acquire_owned().await?;
        let dir = Scratch::new()?;
        let file = dir.join(KEY);
        let mut command = Place::Host.command(tools::darter()?);
        command.args(["swarm", "key"]);
        let key = process::run("swarm key", command, PATIENCE).await?;
        ensure!(key.status.success(), "darter swarm key: {}", key.status);
        fs::write(&file, key.stdout)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        let file = file.display().to_string();
        let join = move |seat: &Seat, options: Options| {
            let others = seat.members.iter().filter(|member| **member != seat.address);
            let options = options
                .set("swarm.key_file", file.clone())
                .set("swarm.peers", Array::from_iter(others.map(|member| format!("{member}:4002"))));
            configure(seat, options)
        };
        Ok(Self { cluster: Cluster::start(plan, join).await?, dir, _turn: turn })
    }

    /// The file with the key of this swarm.
    pub fn key_file(&self) -> PathBuf {
        self.dir.join(KEY)
    }

    /// Adds a member that does not behave, once all agents know it.
    pub async fn add_hostile(&mut self, deed: Deed) -> Result<Hostile> {
        let place = self.cluster.add_stranger()?;
        let agents: Vec<_> = (0..self.cluster.len()).map(node_address).collect::<Result<_>>()?;
        let hostile = Hostile::start(&place, &self.key_file(), &agents, deed).await?;
        self.agents_know(self.cluster.len()).await?;
        Ok(hostile)
    }

    /// Waits until every agent that runs knows every other.
    pub async fn complete(&self) -> Result<()> {
        let running = (0..self.cluster.len()).filter_map(|node| self.cluster.node(node).running_agent()).count();
        self.agents_know(running.checked_sub(1).context("no agent runs")?).await
    }

    /// Waits until every agent that runs knows so many others.
    pub async fn agents_know(&self, others: usize) -> Result<()> {
        let running: Vec<_> =
            (0..self.cluster.len()).filter_map(|node| self.cluster.node(node).running_agent()).collect();
        let others = bytes(u64::try_from(others)?);
        eventually("all agents know each other", async || {
            for agent in &running {
                let peers = agent.metrics().await?.sum("darter_swarm_peers", &[]);
                if (peers - others).abs() > 0.5 {
                    return Ok(false);
                }
            }
            Ok(true)
        })
        .await
    }

    /// What all agents together counted under a name.
    pub async fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut sum = 0.0;
        for node in 0..self.cluster.len() {
            if let Some(agent) = self.cluster.node(node).running_agent() {
                sum += agent.metrics().await?.sum(name, labels);
            }
        }
        Ok(sum)
    }

    /// The node that coordinates a blob, by the rule that all of them know.
    pub fn coordinator(&self, blob: Digest) -> Result<usize> {
        let mut best = None;
        for node in 0..self.len() {
            let name = Identity::load_or_make(&self.agent(node)?.dir().join("data/identity.key"))?.id();
            best = best.max(Some((score(&blob, &name), name, node)));
        }
        best.map(|(_, _, node)| node).context("no nodes")
    }

    /// What agents say of pulls that went on without them, or without each other.
    pub fn told(&self) -> String {
        let tells = |line: &&str| {
            ["WARN", "goes to the registry", "of no help", "handed over", "pulled a blob", "did not come", "broke off"]
                .iter()
                .any(|word| line.contains(word))
        };
        let told = |node: usize| {
            let log = self.node(node).agent().map(crate::agent::Agent::log).unwrap_or_default();
            log.lines().filter(tells).map(|line| format!("node {node}: {line}\n")).collect::<String>()
        };
        (0..self.len()).map(told).collect()
    }

    /// No agent read alone.
    pub async fn ensure_nobody_alone(&self) -> Result<()> {
        let alone = self.sum("darter_swarm_fallbacks_total", &[]).await?;
        ensure!(alone == 0.0, "{alone} blobs were read alone\n{}", self.told());
        Ok(())
    }

    /// Waits until one of these has read so much of the registry, and says which.
    pub async fn reader(&self, among: std::ops::Range<usize>, least: u64) -> Result<usize> {
        let mut reader = None;
        eventually("somebody reads the registry", async || {
            for node in among.clone() {
                let read = self.agent(node)?.metrics().await?.sum("darter_origin_bytes_total", &[]);
                if read > bytes(least) {
                    reader = Some(node);
                    return Ok(true);
                }
            }
            Ok(false)
        })
        .await?;
        reader.context("nobody reads")
    }

    /// No agent read alone, and none took another for a liar or a stranger.
    pub async fn ensure_peaceful(&self) -> Result<()> {
        for node in 0..self.cluster.len() {
            let Some(agent) = self.cluster.node(node).running_agent() else { continue };
            let metrics = agent.metrics().await?;
            let is_trouble = |(name, value): &&(String, f64)| {
                ["darter_swarm_fallbacks_total", "darter_peer_rejected_total"]
                    .iter()
                    .any(|wanted| name.starts_with(wanted))
                    && *value > 0.0
            };
            let trouble: Vec<_> = metrics.series().iter().filter(is_trouble).collect();
            ensure!(trouble.is_empty(), "node {node}: {trouble:?}\n{}", self.cluster.story(node));
        }
        Ok(())
    }
}

impl std::ops::Deref for Swarm {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl std::ops::DerefMut for Swarm {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}
