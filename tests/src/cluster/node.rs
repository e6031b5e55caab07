//! One node: a containerd and an agent, and what is asked of both.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};

use super::{Plan, Pushed};
use crate::agent::{Agent, Options};
use crate::containerd::{self, Containerd, hosts_toml};
use crate::fake_ecr::{Auth, FakeEcr};
use crate::image::Item;
use crate::net::Place;
use crate::process::tail;

/// How long the kernel may take to end a process that was killed.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node that runs, or did.
pub struct Node {
    agent: Option<Agent>,
    containerd: Containerd,
    is_alive: bool,
}

impl Node {
    /// Starts both. The registry itself stands below the mirror in hosts.toml: `server` names the real
    /// ECR, which is not here.
    pub(super) async fn start(
        number: usize,
        place: &Place,
        plan: &Plan,
        ecr: &FakeEcr,
        configure: impl FnOnce(Options) -> Options,
    ) -> Result<Self> {
        let options = containerd::Options {
            discard_unpacked_layers: !plan.keeps_layers,
            // Else it reads no hosts.toml of two directories.
            use_local_image_pull: plan.keeps_layers,
            ..containerd::Options::default()
        };
        let containerd = Containerd::start(plan.release, place, &options).await?;
        containerd.write_hosts(&ecr.name(), &hosts_toml(&ecr.url(), None, &[]))?;
        let options = Options::new(place)
            .set("certs_d.path", containerd.certs_d().display().to_string())
            .set("containerd.config", containerd.config().display().to_string())
            .set("mirror.platform", "linux/amd64")
            .set("log.level", "info,darter_agent::pulls=debug")
            .set("agent.drain", "1s")
            .set("swarm.handover", "5s")
            .registry(
                &ecr.name(),
                &[("endpoint", ecr.url().into()), ("plain_http", true.into()), ("access", access(plan).into())],
            );
        let options = if plan.auth == Auth::Ecr { with_role(number, ecr, options) } else { options };
        let agent = Agent::start(configure(options)).await?;
        Ok(Self { agent: Some(agent), containerd, is_alive: true })
    }

    /// Its agent, unless it was stopped.
    pub const fn agent(&self) -> Option<&Agent> {
        self.agent.as_ref()
    }

    /// Its agent, if that runs.
    pub fn running_agent(&self) -> Option<&Agent> {
        // The kernel has no memory to report of a process that has ended.
        self.agent.as_ref().filter(|agent| agent.usage().is_ok())
    }

    /// Its containerd.
    pub const fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Whether it has power.
    pub const fn is_alive(&self) -> bool {
        self.is_alive
    }

    /// Starts an agent that was killed or stopped again, with the same files.
    pub async fn start_agent_again(&mut self) -> Result<()> {
        self.agent.as_mut().context("this node never had an agent")?.start_again().await
    }

    /// Asks its agent to end, as kubelet does, and waits until it has.
    pub async fn stop_agent(&mut self) -> Result<()> {
        self.agent.as_mut().context("no agent")?.stop().await
    }

    /// Waits until its agent has ended well after it was asked to.
    pub async fn ended(&mut self) -> Result<()> {
        let agent = self.agent.as_mut().context("no agent")?;
        let status = agent.process().exit(PATIENCE).await?;
        ensure!(status.success(), "darter agent: {status}\n{}", tail(&agent.log()));
        Ok(())
    }

    pub(super) fn signal_agent(&self, signal: Signal) -> Result<()> {
        self.agent.as_ref().context("no agent")?.signal(signal)
    }

    pub(super) async fn kill(&mut self) -> Result<()> {
        self.is_alive = false;
        if let Some(agent) = &mut self.agent {
            agent.kill().await?;
        }
        self.containerd.process().signal(Signal::KILL)?;
        self.containerd.process().exit(PATIENCE).await?;
        Ok(())
    }

    pub(super) async fn pull(&self, reference: &str) -> Result<()> {
        self.containerd.cri().pull(reference, None).await.with_context(|| self.story())?;
        Ok(())
    }

    /// The name leads to the right image, and what was unpacked of it is what was pushed: read from
    /// the disk, with nobody's word for it.
    pub(super) async fn verify(&self, pushed: &Pushed) -> Result<()> {
        let found = self.containerd.cri().status(&pushed.reference).await?.context("the image is not there")?;
        let expected = pushed.image.config.digest().to_string();
        ensure!(found.id == expected, "the image is {}, expected {expected}", found.id);
        for layer in &pushed.image.layers {
            let (root, layer) = (self.containerd.root(), layer.clone());
            tokio::task::spawn_blocking(move || verify_layer(&root, &layer)).await??;
        }
        Ok(())
    }

    pub(super) fn story(&self) -> String {
        let agent = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        format!("--- agent\n{}\n--- containerd\n{}", tail(&agent), tail(&self.containerd.log()))
    }
}

/// The access key of a node's role, where the registry is private.
pub fn node_key(number: usize) -> String {
    format!("AKIANODE{number}")
}

fn access(plan: &Plan) -> &'static str {
    if plan.auth == Auth::Public { "public" } else { "node" }
}

/// What is around an agent whose node may read the registry by a role, and nothing else of AWS.
fn with_role(number: usize, ecr: &FakeEcr, options: Options) -> Options {
    options
        .set("aws.ecr_endpoint", ecr.api_url())
        .env("AWS_ACCESS_KEY_ID", node_key(number))
        .env("AWS_SECRET_ACCESS_KEY", "secret-of-the-node")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
}

/// Packs the one file of a layer again and looks at the digest.
fn verify_layer(root: &Path, layer: &Item) -> Result<()> {
    let mut header = [0; 512];
    layer.content.read_at(0, &mut header);
    let name = header.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).context("a tar with a strange name")?;
    let path = containerd::unpacked(root, name)?.with_context(|| format!("{name} was not unpacked"))?;
    let mut file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    hash.update(header);
    let (mut length, mut buffer) = (header.len() as u64, vec![0; 1 << 20]);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        length += count as u64;
    }
    let padding = layer.size().checked_sub(length).with_context(|| format!("{} is too long", path.display()))?;
    ensure!(padding < 2048, "{} is too short by {padding} bytes", path.display());
    hash.update(vec![0; usize::try_from(padding)?]);
    let found = Digest::from_bytes(hash.finalize().into());
    ensure!(found == layer.digest(), "{} packs to {found}, not {}", path.display(), layer.digest());
    Ok(())
}
