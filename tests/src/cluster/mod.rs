//! Many nodes and one registry: what the swarm is tried and measured on.
//!
//! Every node is a network namespace with its own containerd, agent, mirror at 127.0.0.1:4001, admin
//! socket and data directory. The registry is a fake ECR in a namespace of its own. All hang on one
//! bridge by links with a rate each way, so a byte costs its sender's uplink and its receiver's
//! downlink, as it does between machines. Everything ends with the [`Cluster`], and also when the
//! test is killed; several can run at once.
//!
//! - [`copies`]: how often the registry gave each byte
//! - [`control`]: how fast bare TCP gives a blob to all nodes here
//! - [`measure`]: rates, the bound, and whether a run counts
//! - [`swarm`]: a cluster whose agents share
//! - [`hostile`], [`garbage`]: members of it that lie, and peers that do not even speak its protocol
//! - [`skew`]: members of another version

pub mod control;
pub mod copies;
pub mod garbage;
pub mod hostile;
pub mod measure;
mod node;
pub mod skew;
pub mod swarm;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use rustix::process::Signal;
use tokio::time::Instant;

use crate::agent::{Agent, Options};
use crate::emulator::{Emulator, Host};
use crate::fake_ecr::{self, Auth, FakeEcr};
use crate::image::{Format, Image};
use crate::net::{Network, Place, Traffic, node_address};
use crate::process::Usage;
use crate::stage::REPOSITORY;
use crate::tools::Release;

pub use copies::Copies;
pub use node::{Node, node_key};

/// Where every agent's mirror is, in its own namespace.
const MIRROR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 4001);

/// How many nodes, and how fast what is between them.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes at the start.
    pub nodes: usize,
    /// Bytes a second of a node's link, each way.
    pub link: u64,
    /// Bytes a second of the registry's link.
    pub origin: u64,
    /// Who may read the registry. With [`Auth::Ecr`] each agent has a role of its own ([`node_key`]).
    pub auth: Auth,
    /// Bytes a second of one connection to the registry; `None` is no limit.
    pub origin_connection: Option<u64>,
    /// Which containerd they run.
    pub release: Release,
    /// Whether it keeps layers that it has unpacked.
    pub keeps_layers: bool,
}

impl Plan {
    /// Nodes on links of so many Mbit/s, with a registry of so many times that.
    pub const fn new(nodes: usize, mbit: u64, share: u64) -> Self {
        let link = mbit * 125_000;
        Self {
            nodes,
            link,
            origin: link * share,
            auth: Auth::Public,
            origin_connection: None,
            release: Release::V2,
            keeps_layers: false,
        }
    }
}

/// What the configuration of an agent may depend on.
#[derive(Debug, Clone)]
pub struct Seat {
    /// Its number, from 0.
    pub number: usize,
    /// Its address.
    pub address: Ipv4Addr,
    /// The addresses of all nodes there are when it starts, its own too.
    pub members: Vec<Ipv4Addr>,
}

type Configure = Box<dyn Fn(&Seat, Options) -> Options + Send + Sync>;

/// An image in the registry of a cluster.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// What it is.
    pub image: Image,
    /// Its tag.
    pub tag: String,
    /// How pods name it.
    pub reference: String,
}

/// How the pull of one node went.
#[derive(Debug)]
pub struct Pull {
    /// Which node.
    pub node: usize,
    /// From the moment at which all started.
    pub took: Duration,
    /// Whether the node has the image, byte for byte.
    pub outcome: Result<()>,
}

/// Running nodes and their registry.
pub struct Cluster {
    nodes: Vec<Node>,
    ecr: FakeEcr,
    origin: Place,
    plan: Plan,
    configure: Configure,
    // Last: the namespaces go when all that lives in them is gone.
    network: Network,
}

impl Cluster {
    /// Starts a registry, and nodes with an agent each, whose options `configure` may change.
    pub async fn start(
        plan: Plan,
        configure: impl Fn(&Seat, Options) -> Options + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut network = Network::new(0)?;
        let origin = network.add_origin()?;
        network.limit_origin(plan.origin)?;
        let options = fake_ecr::Options { auth: plan.auth.clone(), ..fake_ecr::Options::default() };
        let ecr = FakeEcr::start(&origin, options)?;
        ecr.set_rate(None, plan.origin_connection);
        for _ in 0..plan.nodes {
            let number = network.add_node()?;
            network.limit_link(number, plan.link)?;
        }
        let configure = Box::new(configure);
        let mut cluster = Self { nodes: Vec::new(), ecr, origin, plan, configure, network };
        let numbers = 0..cluster.plan.nodes;
        cluster.nodes = try_join_all(numbers.map(|number| cluster.new_node(number, cluster.plan.nodes))).await?;
        Ok(cluster)
    }

    /// Adds a node that knows all that are there, and gives back its number.
    pub async fn add_node(&mut self) -> Result<usize> {
        let number = self.network.add_node()?;
        self.network.limit_link(number, self.plan.link)?;
        let node = self.new_node(number, number + 1).await?;
        self.nodes.push(node);
        Ok(number)
    }

    /// Adds a place on the network for somebody who is no node. Nodes that come later get other numbers
    /// than those of their places: they have to be there before.
    pub fn add_stranger(&mut self) -> Result<Place> {
        let number = self.network.add_node()?;
        self.network.limit_link(number, self.plan.link)?;
        Ok(self.network.node(number))
    }

    async fn new_node(&self, number: usize, members: usize) -> Result<Node> {
        let members = (0..members).map(node_address).collect::<Result<Vec<_>>>()?;
        let seat = Seat { number, address: members[number], members };
        let place = self.network.node(number);
        let configure = |options| (self.configure)(&seat, options);
        let node = Node::start(number, &place, &self.plan, &self.ecr, configure);
        node.await.with_context(|| format!("node {number} does not start"))
    }

    /// How many nodes were ever started.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A node, counted from 0.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number]
    }

    /// The same, to change it.
    pub fn node_mut(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number]
    }

    /// Where the nodes are.
    pub fn places(&self) -> Vec<Place> {
        (0..self.len()).map(|number| self.network.node(number)).collect()
    }

    /// The registry.
    pub const fn ecr(&self) -> &FakeEcr {
        &self.ecr
    }

    /// Where the registry is.
    pub const fn origin(&self) -> &Place {
        &self.origin
    }

    /// The cables between them.
    pub const fn network(&self) -> &Network {
        &self.network
    }

    /// Puts an image with layers of these sizes into the registry. Another seed is another image.
    pub async fn push(&self, seed: u64, layers: &[u64]) -> Result<Pushed> {
        self.push_as(&format!("seed-{seed}"), seed, layers).await
    }

    /// The same under another tag. Images of one seed have the layers in common that are of one size, from
    /// the base up.
    pub async fn push_as(&self, tag: &str, seed: u64, layers: &[u64]) -> Result<Pushed> {
        let layers = layers.to_vec();
        let image = tokio::task::spawn_blocking(move || Image::index(Format::Oci, seed, &layers)).await??;
        let (image, tag) = (image.in_memory(), tag.to_owned());
        self.ecr.push(&image, REPOSITORY, &tag);
        let reference = format!("{}/{REPOSITORY}:{tag}", self.ecr.name());
        Ok(Pushed { image, tag, reference })
    }

    /// All living nodes pull an image at the same moment, by CRI, as their kubelets would.
    pub async fn pull_all(&self, pushed: &Pushed) -> Vec<Pull> {
        let living: Vec<_> = (0..self.len()).filter(|number| self.nodes[*number].is_alive()).collect();
        self.pull_on(&living, pushed).await
    }

    /// These nodes pull an image at the same moment. What they have is looked at when all are done.
    pub async fn pull_on(&self, nodes: &[usize], pushed: &Pushed) -> Vec<Pull> {
        let start = Instant::now();
        let pull = async |node: usize| {
            let outcome = self.nodes[node].pull(&pushed.reference).await;
            Pull { node, took: start.elapsed(), outcome }
        };
        let mut pulls = join_all(nodes.iter().map(|node| pull(*node))).await;
        for pull in pulls.iter_mut().filter(|pull| pull.outcome.is_ok()) {
            pull.outcome = self.nodes[pull.node].verify(pushed).await;
        }
        pulls
    }

    /// On all living nodes a client reads an image from the mirror alone and checks every sha256: what
    /// the agents take, without what containerd needs to unpack.
    pub async fn read_all(&self, pushed: &Pushed) -> Vec<Pull> {
        let living: Vec<_> = (0..self.len()).filter(|number| self.nodes[*number].is_alive()).collect();
        self.read_on(&living, pushed).await
    }

    /// The same on these nodes alone.
    pub async fn read_on(&self, nodes: &[usize], pushed: &Pushed) -> Vec<Pull> {
        self.read_from(MIRROR, nodes, pushed).await
    }

    /// On these nodes a client reads an image from the registry itself, each layer by one connection.
    pub async fn read_direct(&self, nodes: &[usize], pushed: &Pushed) -> Vec<Pull> {
        self.read_from(self.ecr.address(), nodes, pushed).await
    }

    async fn read_from(&self, host: SocketAddr, nodes: &[usize], pushed: &Pushed) -> Vec<Pull> {
        let start = Instant::now();
        let read = async |node: usize| {
            let client = Emulator::new(&self.network.node(node), &self.ecr.name(), &[Host::new(host)]);
            let outcome = client.pull(REPOSITORY, &pushed.tag).await.map(drop);
            Pull { node, took: start.elapsed(), outcome }
        };
        join_all(nodes.iter().map(|node| read(*node))).await
    }

    /// A pull of one node by CRI, which starts when it is first waited for and needs nothing of the
    /// cluster: nodes can come and go meanwhile. What the node has is looked at by [`verify`](Self::verify).
    pub fn pull_alone(&self, node: usize, pushed: &Pushed) -> impl Future<Output = Result<()>> + Send + 'static {
        let (cri, reference) = (self.nodes[node].containerd().cri().clone(), pushed.reference.clone());
        async move { cri.pull(&reference, None).await.map(drop) }
    }

    /// A node has an image, byte for byte.
    pub async fn verify(&self, node: usize, pushed: &Pushed) -> Result<()> {
        self.nodes[node].verify(pushed).await
    }

    /// Every containerd forgets every image.
    pub async fn forget(&self) -> Result<()> {
        let living = self.nodes.iter().filter(|node| node.is_alive());
        try_join_all(living.map(|node| node.containerd().forget())).await?;
        Ok(())
    }

    /// How often the registry gave each byte of an image.
    pub fn copies(&self, pushed: &Pushed) -> Copies {
        Copies::of_image(&self.ecr, &pushed.image)
    }

    /// How often it gave each byte of the largest layer, to whomever.
    pub fn copies_of_layer(&self, pushed: &Pushed) -> Copies {
        Copies::of_blob(&self.ecr.log(), &pushed.image.layers[0])
    }

    /// The same to agents alone: for where a containerd is meant to go on without one, and only there. It
    /// would hide any other that does.
    pub fn copies_by_agents(&self, pushed: &Pushed) -> Copies {
        let log = self.ecr.log();
        let by_agents: Vec<_> = log.into_iter().filter(|seen| !seen.agent.starts_with("containerd/")).collect();
        Copies::of_blob(&by_agents, &pushed.image.layers[0])
    }

    /// The agent of a node, which is to run.
    pub fn agent(&self, node: usize) -> Result<&Agent> {
        self.node(node).running_agent().with_context(|| format!("node {node} has no agent that runs"))
    }

    /// What the card of each node received and sent so far.
    pub fn traffic(&self) -> Result<Vec<Traffic>> {
        self.places().iter().map(Place::traffic).collect()
    }

    /// Processor time and memory of each agent; `None` for one that was killed or stopped.
    pub fn usage(&self) -> Vec<Option<Usage>> {
        // The kernel has no memory to report of a process that has ended.
        self.nodes.iter().map(|node| node.agent().and_then(|agent| agent.usage().ok())).collect()
    }

    /// Kills the agent of a node without a word. Its containerd and its network stay.
    pub fn kill_agent(&self, number: usize) -> Result<()> {
        self.nodes[number].signal_agent(Signal::KILL)
    }

    /// The power of a node fails: its cable is dead before its programs are, so nobody hears a FIN.
    pub async fn kill_node(&mut self, number: usize) -> Result<()> {
        self.network.unplug(number)?;
        self.nodes[number].kill().await
    }

    /// An agent stands still, with its sockets open.
    pub fn pause(&self, number: usize) -> Result<()> {
        self.nodes[number].signal_agent(Signal::STOP)
    }

    /// And goes on.
    pub fn resume(&self, number: usize) -> Result<()> {
        self.nodes[number].signal_agent(Signal::CONT)
    }

    /// Stops every agent as kubelet does: the nodes pull from the registry themselves from now on.
    pub async fn stop_agents(&mut self) -> Result<()> {
        try_join_all(self.nodes.iter_mut().filter(|node| node.is_alive()).map(Node::stop_agent)).await?;
        Ok(())
    }

    /// Starts the agents of all living nodes again that were stopped.
    pub async fn start_agents_again(&mut self) -> Result<()> {
        try_join_all(self.nodes.iter_mut().filter(|node| node.is_alive()).map(Node::start_agent_again)).await?;
        Ok(())
    }

    /// From now on nothing that nodes of one side send reaches the other. The registry reaches both.
    pub fn partition(&self, side: &[usize]) -> Result<()> {
        self.across(side, Network::lose)
    }

    /// Puts an end to [`partition`](Self::partition) with the same side.
    pub fn heal(&self, side: &[usize]) -> Result<()> {
        self.across(side, Network::find)
    }

    fn across(&self, side: &[usize], change: impl Fn(&Network, usize, usize) -> Result<()>) -> Result<()> {
        for here in side.iter().copied() {
            for there in (0..self.len()).filter(|node| !side.contains(node)) {
                change(&self.network, here, there)?;
                change(&self.network, there, here)?;
            }
        }
        Ok(())
    }

    /// The log ends of a node, for the message of a test that failed.
    pub fn story(&self, number: usize) -> String {
        self.nodes[number].story()
    }
}

/// The time of the last, if every pull is right; else what the first one that is not says.
pub fn last(pulls: Vec<Pull>) -> Result<Duration> {
    ensure!(!pulls.is_empty(), "nobody pulled");
    let mut last = Duration::ZERO;
    for Pull { node, took, outcome } in pulls {
        outcome.with_context(|| format!("node {node}, after {took:.1?}"))?;
        last = last.max(took);
    }
    Ok(last)
}
