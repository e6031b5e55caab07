//! Networks of one test: a hub where registries live, and nodes, each a network namespace with its
//! own 127.0.0.1.
//!
//! The hub is a namespace too, and holds the bridge, so a test leaves the host's network alone, two
//! runs can use the same addresses at once, and deleting the namespaces deletes everything. Sockets
//! belong to the namespace they were made in: a fake registry in the test's own process listens in
//! the hub by making its socket on a thread that has moved there.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Once};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::process;
use crate::scratch::{is_left_over, unique};

/// The address of the hub, the same in every network.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// The address of a registry that has a network card of its own.
pub const ORIGIN: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 1);

/// Nobody's network card: what is sent to it is lost without a word.
const NOBODY: &str = "02:00:00:00:00:00";

/// Where `ip netns` keeps its names.
const NAMESPACES: &str = "/run/netns";

/// Where a process runs and a socket is made.
#[derive(Debug, Clone)]
pub enum Place {
    /// The network of the test itself. Needs no rights; only loopback is used.
    Host,
    /// A network namespace of this test.
    Namespace(Arc<Namespace>),
}

impl Place {
    /// A command that will run here and die with this program. Arguments follow as usual.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self {
            Self::Host => process::command(program),
            Self::Namespace(namespace) => {
                let mut command = process::command("nsenter");
                command.arg(format!("--net={}", namespace.path().display())).arg("--").arg(program);
                command
            }
        }
    }

    /// The address at which others reach a server that runs here.
    pub fn address(&self) -> IpAddr {
        match self {
            Self::Host => Ipv4Addr::LOCALHOST.into(),
            Self::Namespace(namespace) => namespace.address.into(),
        }
    }

    /// A second address of the same place, for a server that clients must take for another host:
    /// Go sends Authorization along with a redirect to another port of the same one.
    pub fn second_address(&self) -> IpAddr {
        match self {
            Self::Host => Ipv4Addr::new(127, 0, 0, 2).into(),
            Self::Namespace(namespace) => second(namespace.address).into(),
        }
    }

    /// Listens here. Port 0 is a free port; the address in use can be taken again at once.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        let socket = self.socket()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address).with_context(|| format!("cannot listen on {address}"))?;
        // As containerd expects of a mirror: a burst of short connections must find room.
        Ok(socket.listen(1024)?)
    }

    /// Connects from here.
    pub async fn connect(&self, address: SocketAddr) -> Result<TcpStream> {
        let stream = self.socket()?.connect(address).await;
        let stream = stream.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Waits until something listens at an address.
    pub async fn wait_for(&self, address: SocketAddr, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        while let Err(error) = self.connect(address).await {
            if Instant::now() > deadline {
                return Err(error.context(format!("nothing listens after {within:?}")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// A port for a server that cannot choose one itself.
    pub fn port(&self) -> Result<Port> {
        let held = self.socket()?;
        held.set_reuseaddr(true)?;
        held.bind(SocketAddr::new(self.address(), 0))?;
        Ok(Port { number: held.local_addr()?.port(), _held: held })
    }

    /// What the network card of this place received and sent so far, says the kernel. Headers are
    /// counted too, but only once for packets that the card cuts up itself.
    pub fn traffic(&self) -> Result<Traffic> {
        let devices = self.within(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        Traffic::parse(&devices.context("cannot read the counters of a network card")?).context("no eth0")
    }

    fn socket(&self) -> Result<TcpSocket> {
        Ok(self.within(TcpSocket::new_v4)??)
    }

    /// Runs work on a thread of its own that lives in this network, as all threads do that it starts.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>> {
        let file = match self {
            Self::Host => return Ok(std::thread::spawn(work)),
            Self::Namespace(namespace) => File::open(namespace.path()).context("cannot open a network namespace")?,
        };
        Ok(std::thread::spawn(move || {
            // Work that began elsewhere would find nobody: better none at all.
            if move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).is_ok() {
                work();
            }
        }))
    }

    /// Runs a short piece of work on a thread that lives in this network.
    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        match self {
            Self::Host => Ok(work()),
            Self::Namespace(namespace) => namespace.within(work),
        }
    }
}

/// Bytes through a network card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// That came in.
    pub received: u64,
    /// That went out.
    pub sent: u64,
}

impl Traffic {
    fn parse(devices: &str) -> Option<Self> {
        let card = devices.lines().find_map(|line| line.trim().strip_prefix("eth0:"))?;
        let mut fields = card.split_whitespace();
        // Eight counters of what came in, then the same of what went out.
        let received = fields.next()?.parse().ok()?;
        Some(Self { received, sent: fields.nth(7)?.parse().ok()? })
    }

    /// What went through since an earlier moment.
    pub const fn since(self, before: Self) -> Self {
        Self { received: self.received - before.received, sent: self.sent - before.sent }
    }
}

/// A port that is kept for a server: while this lives nobody else gets it by chance, neither to listen
/// nor as the other end of a connection. Whoever asks for it by number, with SO_REUSEADDR as servers
/// do, can listen on it, because this end does not.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _held: TcpSocket,
}

impl Port {
    /// Its number.
    pub const fn number(&self) -> u16 {
        self.number
    }
}

/// A network namespace, deleted when its last user drops it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    address: Ipv4Addr,
}

impl Namespace {
    fn new(address: Ipv4Addr) -> Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let name = unique();
        ip(&["netns", "add", &name])?;
        let namespace = Self { name, address };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.name)
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    fn add_addresses(&self, device: &str) -> Result<()> {
        self.ip(&["addr", "add", &format!("{}/16", self.address), "dev", device])?;
        self.ip(&["addr", "add", &format!("{}/16", second(self.address)), "dev", device])
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).context("cannot open a network namespace")?;
        std::thread::scope(|scope| {
            // The thread ends in that namespace and is never used for anything else.
            let thread = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("cannot enter a network namespace")?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// A hub and its nodes, and a registry apart if wanted.
#[derive(Debug)]
pub struct Network {
    hub: Arc<Namespace>,
    nodes: Vec<Arc<Namespace>>,
    origin: Option<Arc<Namespace>>,
}

impl Network {
    /// A hub at `HUB` and so many nodes, all of which reach each other. Needs root.
    pub fn new(nodes: u8) -> Result<Self> {
        let hub = Namespace::new(HUB)?;
        hub.ip(&["link", "add", "br0", "type", "bridge"])?;
        hub.add_addresses("br0")?;
        hub.ip(&["link", "set", "br0", "up"])?;
        let mut network = Self { hub: Arc::new(hub), nodes: Vec::new(), origin: None };
        for _ in 0..nodes {
            network.add_node()?;
        }
        Ok(network)
    }

    /// Adds a node and gives back its number.
    pub fn add_node(&mut self) -> Result<usize> {
        let number = self.nodes.len();
        self.nodes.push(self.attach(node_address(number)?, &port(number))?);
        Ok(number)
    }

    /// Adds a place for a registry, with a card of its own that can be limited.
    pub fn add_origin(&mut self) -> Result<Place> {
        let origin = self.attach(ORIGIN, ORIGIN_PORT)?;
        self.origin = Some(origin.clone());
        Ok(Place::Namespace(origin))
    }

    /// Where registries and clients that are no nodes live.
    pub fn hub(&self) -> Place {
        Place::Namespace(self.hub.clone())
    }

    /// A node, counted from 0.
    pub fn node(&self, number: usize) -> Place {
        Place::Namespace(self.nodes[number].clone())
    }

    /// Limits a node's network card to so many bytes a second, each way.
    pub fn shape_node(&self, number: usize, bytes_per_second: u64) -> Result<()> {
        shape(&self.nodes[number], "eth0", bytes_per_second)?;
        shape(&self.hub, &port(number), bytes_per_second)
    }

    /// Limits what the programs of a node say to each other to so many bytes a second.
    pub fn shape_loopback(&self, number: usize, bytes_per_second: u64) -> Result<()> {
        shape(&self.nodes[number], "lo", bytes_per_second)
    }

    /// Limits what all nodes together get from the hub. Nodes reach each other unlimited.
    pub fn shape_hub(&self, bytes_per_second: u64) -> Result<()> {
        // Only what the hub itself sends leaves through the bridge's own device.
        shape(&self.hub, "br0", bytes_per_second)
    }

    /// Limits a node's link to so many bytes a second, each way, with the short queue of a real card:
    /// what one sender keeps in it delays the others by 20 ms at most.
    pub fn limit_link(&self, number: usize, bytes_per_second: u64) -> Result<()> {
        limit(&self.nodes[number], "eth0", bytes_per_second)?;
        limit(&self.hub, &port(number), bytes_per_second)
    }

    /// The same of the registry's link.
    pub fn limit_origin(&self, bytes_per_second: u64) -> Result<()> {
        limit(self.origin.as_ref().context("no origin was added")?, "eth0", bytes_per_second)?;
        limit(&self.hub, ORIGIN_PORT, bytes_per_second)
    }

    /// Takes the limit of the registry's link away again.
    pub fn unlimit_origin(&self) -> Result<()> {
        let origin = self.origin.as_ref().context("no origin was added")?;
        for (namespace, device) in [(origin, "eth0"), (&self.hub, ORIGIN_PORT)] {
            execute("tc", &["-n", &namespace.name, "qdisc", "del", "dev", device, "root"])?;
        }
        Ok(())
    }

    /// Pulls a node's cable out: it hears nothing, and nobody hears it.
    pub fn unplug(&self, number: usize) -> Result<()> {
        self.hub.ip(&["link", "set", &port(number), "down"])
    }

    /// Puts it in again.
    pub fn plug_in(&self, number: usize) -> Result<()> {
        self.hub.ip(&["link", "set", &port(number), "up"])
    }

    /// What `from` sends to `to` is lost from now on, in silence. The other way it is not.
    pub fn lose(&self, from: usize, to: usize) -> Result<()> {
        let to = self.nodes[to].address;
        for address in [to, second(to)] {
            let entry = ["neigh", "replace", &address.to_string(), "lladdr", NOBODY, "nud", "permanent", "dev", "eth0"];
            self.nodes[from].ip(&entry)?;
        }
        Ok(())
    }

    /// Takes [`lose`](Self::lose) back.
    pub fn find(&self, from: usize, to: usize) -> Result<()> {
        let to = self.nodes[to].address;
        for address in [to, second(to)] {
            self.nodes[from].ip(&["neigh", "del", &address.to_string(), "dev", "eth0"])?;
        }
        Ok(())
    }

    fn attach(&self, address: Ipv4Addr, port: &str) -> Result<Arc<Namespace>> {
        let node = Namespace::new(address)?;
        self.hub.ip(&["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", &node.name])?;
        self.hub.ip(&["link", "set", port, "master", "br0", "up"])?;
        node.add_addresses("eth0")?;
        node.ip(&["link", "set", "eth0", "up"])?;
        node.ip(&["route", "add", "default", "via", &HUB.to_string()])?;
        Ok(Arc::new(node))
    }
}

/// The address that a node of this number has, or will have.
pub fn node_address(number: usize) -> Result<Ipv4Addr> {
    let last = u8::try_from(number + 1).ok().filter(|last| *last < u8::MAX).context("too many nodes")?;
    Ok(Ipv4Addr::new(10, 77, 1, last))
}

/// 10.77.0.1 also has 10.77.100.1, and so on.
fn second(address: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c + 100, d)
}

/// The hub's end of a node's cable.
fn port(number: usize) -> String {
    format!("port{number}")
}

const ORIGIN_PORT: &str = "origin";

fn shape(namespace: &Namespace, device: &str, bytes_per_second: u64) -> Result<()> {
    // Above 64 KiB, the largest segment a virtual card hands over, and 4 ms of the rate: below that
    // the timer, not the bucket, sets the speed.
    let burst = (bytes_per_second / 250).max(256 * 1024).to_string();
    bucket(namespace, device, bytes_per_second, &burst, "50ms")
}

fn limit(namespace: &Namespace, device: &str, bytes_per_second: u64) -> Result<()> {
    bucket(namespace, device, bytes_per_second, "128kb", "20ms")
}

fn bucket(namespace: &Namespace, device: &str, bytes_per_second: u64, burst: &str, latency: &str) -> Result<()> {
    let rate = format!("{}bit", bytes_per_second * 8);
    let tbf = ["root", "tbf", "rate", &rate, "burst", burst, "latency", latency];
    execute("tc", &[&["-n", &namespace.name, "qdisc", "replace", "dev", device], tbf.as_slice()].concat())
}

fn ip(arguments: &[&str]) -> Result<()> {
    execute("ip", arguments)
}

fn execute(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Deletes the namespaces of runs that were killed. Their processes died with them.
fn sweep() {
    let Ok(entries) = fs::read_dir(NAMESPACES) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_left_over(&name) {
            let _ = ip(&["netns", "del", &name]);
        }
    }
}
