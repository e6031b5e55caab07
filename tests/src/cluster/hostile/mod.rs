//! A member of the swarm that lies: it holds the key, speaks the protocol on real sockets, and does on
//! demand what no agent does.
//!
//! It decides with the core that agents run, so that it is taken for one of them: it joins, is given
//! leases, announces what it has. But it reads no registry and asks nobody for a piece: every byte that it
//! gives is made up ([`Deed`]). Beside that it says whatever a test wants said. Not here: who does not
//! speak the protocol at all ([`garbage`](super::garbage)).

mod mind;
mod shop;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_agent::metrics::Metrics;
use darter_agent::swarm::control::{self, Control, ControlHandle, Setup};
use darter_agent::swarm::discovery::Discovery;
use darter_agent::swarm::exchange;
use darter_agent::swarm::identity::Identity;
use darter_agent::swarm::key;
use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::stale::{Question, Seen};
use darter_core::swarm::{Message, PeerId, Zone};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::mind::{Mind, Order};
use self::shop::Shop;
use crate::net::Place;
use crate::scratch::Scratch;

/// Where the agents of a cluster listen, and this too.
const CONTROL: u16 = 4002;
const EXCHANGE: u16 = 4003;

/// More than a test says before it waits for something.
const ORDERS: usize = 64;

/// What whoever asks it for a piece gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Bytes that the registry does not have, and its word that it read them there.
    Lie,
    /// The same, and it does not say what all its pieces are.
    LieAndBeSilent,
    /// Other bytes than those that it vouches for.
    Corrupt,
    /// A byte more than the piece has.
    TooLong,
    /// A body without a length and without an end.
    Endless,
    /// The answer that the piece is not here, whatever it announced.
    Nothing,
    /// No answer: it takes the request, and the connection stays open.
    Silence,
}

/// What its parts share.
#[derive(Default)]
struct Known {
    /// How each blob is cut that it speaks of.
    blobs: Mutex<BTreeMap<Digest, Layout>>,
    /// The members that it is connected to.
    others: Mutex<Vec<PeerId>>,
    /// What it says that it saw at registries, whatever it is asked for; nothing: it does not answer.
    word: Mutex<Option<Seen>>,
}

/// A hostile member, as a test holds it. It is gone when this is dropped.
pub struct Hostile {
    id: PeerId,
    control: ControlHandle,
    orders: mpsc::Sender<Order>,
    asked: Arc<AtomicU64>,
    known: Arc<Known>,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
    // Last: its identity is in it.
    _dir: Scratch,
}

impl Hostile {
    /// Calls the agents at these addresses with this key. They know it when they answered.
    pub async fn start(place: &Place, key_file: &Path, agents: &[Ipv4Addr], deed: Deed) -> Result<Self> {
        let dir = Scratch::new()?;
        let identity = Identity::load_or_make(&dir.join("identity.key"))?;
        let setup = Setup {
            listen: SocketAddr::new(place.address(), CONTROL),
            exchange_port: EXCHANGE,
            zone: Zone::default(),
            key: key::load(key_file)?,
            max_members: 100,
            wants_peers: false,
            is_seed: false,
            is_plain: false,
            version: "hostile".to_owned(),
            limits: control::Limits::default(),
        };
        let peers: Vec<String> = agents.iter().map(|agent| format!("{agent}:{CONTROL}")).collect();
        let (known, asked) = (Arc::new(Known::default()), Arc::new(AtomicU64::new(0)));
        let shown = exchange::Identity::new(identity.keypair().clone())?;
        let shop = Shop { deed, known: known.clone(), identity: shown, asked: asked.clone() };
        let (orders, inbox) = mpsc::channel(ORDERS);
        let (stop, id) = (CancellationToken::new(), identity.id());
        let (ready, bound) = oneshot::channel();
        let life = Life { identity, setup, peers, shop, known: known.clone(), inbox, stop: stop.clone(), ready };
        let address = SocketAddr::new(place.address(), EXCHANGE);
        // All its sockets are made on one thread, which lives in that network.
        let thread = place.spawn(move || life.live(address))?;
        let control = bound.await.context("a hostile member did not start")?;
        Ok(Self { id, control, orders, asked, known, stop, thread: Some(thread), _dir: dir })
    }

    /// Its name.
    pub const fn id(&self) -> PeerId {
        self.id
    }

    /// Takes part in the pull of a blob: it joins, and has read whatever it is given to read at once.
    pub async fn want(&self, blob: Digest, size: u64) -> Result<()> {
        Ok(self.orders.send(Order::Want(blob, Layout::new(size))).await?)
    }

    /// Says to everybody that it has a blob whole.
    pub async fn claim(&self, blob: Digest, size: u64) -> Result<()> {
        Ok(self.orders.send(Order::Claim(blob, Layout::new(size))).await?)
    }

    /// Says something to a member. It is lost where that one does not keep up, as for an agent.
    pub fn say(&self, to: PeerId, blob: Digest, message: Message) {
        self.control.send(to, blob, message);
    }

    /// What it answers from now on, whatever it is asked what it saw at a registry.
    pub fn swear(&self, seen: Option<Seen>) {
        *lock(&self.known.word) = seen;
    }

    /// Asks a member what that saw at a registry, and does not wait for the answer.
    pub fn ask(&self, to: PeerId, question: Question) {
        self.control.want_seen(to, question);
    }

    /// How many pieces it was asked for.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// The members that it is connected to.
    pub fn others(&self) -> Vec<PeerId> {
        lock(&self.known.others).clone()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.stop.cancel();
        // It may only have panicked, which the test has seen by what did not happen.
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Everything that its thread needs.
struct Life {
    identity: Identity,
    setup: Setup,
    peers: Vec<String>,
    shop: Shop,
    known: Arc<Known>,
    inbox: mpsc::Receiver<Order>,
    stop: CancellationToken,
    ready: oneshot::Sender<ControlHandle>,
}

impl Life {
    /// Until it is stopped. What fails is seen by the end of `ready`.
    fn live(self, address: SocketAddr) {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            if let Err(error) = self.run(address).await {
                eprintln!("a hostile member ended: {error:#}");
            }
        });
    }

    async fn run(self, address: SocketAddr) -> Result<()> {
        let Self { identity, setup, peers, shop, known, inbox, stop, ready } = self;
        let discovery = Discovery::new(&peers, None, CONTROL, Duration::from_secs(1), 100);
        let metrics = Arc::new(Metrics::new("hostile", "0"));
        let (control, handle, events) = Control::bind(setup, &identity, discovery, metrics).await?;
        let listener = TcpListener::bind(address).await?;
        let mind = Mind::new(handle.clone(), known);
        // The test may have given it up.
        let _ = ready.send(handle);
        tokio::select! {
            () = control.run(stop) => {}
            () = mind.run(events, inbox) => {}
            ended = shop.run(listener) => ended?,
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
