//! The data plane on real sockets: honest nodes here, lying and broken ones in the modules.

mod clients;
mod plain;
mod servers;
mod values;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use darter_core::pieces::{Layout, chaining_value};
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::activity::Activity;
use crate::metrics::Metrics;

const MIB: u64 = 1 << 20;

fn identity(n: u8) -> Identity {
    let keypair = libp2p_identity::Keypair::ed25519_from_bytes([n; 32]).unwrap();
    Identity::new(keypair).unwrap()
}

/// Three pieces and a short one.
fn content() -> Vec<u8> {
    (0..3 * MIB + 5).map(|n| u8::try_from(n * n % 251).unwrap()).collect()
}

/// A blob, and what its importer (identity 9) said about its pieces.
struct Blob {
    digest: Digest,
    layout: Layout,
    content: Vec<u8>,
    file: Arc<File>,
    importer: Identity,
}

impl Blob {
    fn new() -> Self {
        let content = content();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let layout = Layout::new(content.len() as u64);
        Self { digest: Digest::of(&content), layout, content, file: Arc::new(file), importer: identity(9) }
    }

    fn bytes(&self, piece: u32) -> &[u8] {
        let span = self.layout.piece(u64::from(piece));
        &self.content[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()]
    }

    fn attest(&self, piece: u32) -> Attest {
        let cv = chaining_value(self.layout.piece(u64::from(piece)).start, self.bytes(piece));
        self.importer.attest(&self.digest, &self.layout, piece, cv)
    }

    fn values(&self) -> Vec<[u8; 32]> {
        (0..4).map(|piece| self.attest(piece).cv).collect()
    }

    fn request(&self, from: &Identity, address: SocketAddr, piece: u32) -> PieceRequest {
        PieceRequest {
            peer: from.peer(),
            address,
            blob: self.digest,
            layout: self.layout,
            piece,
            known: None,
            token: None,
            patience: Duration::from_secs(5),
            activity: Activity::default(),
        }
    }
}

type Instead = fn(&Shelf) -> Decision;

/// A node's view of the others, and the one blob it has.
struct Shelf {
    blob: Blob,
    members: Mutex<BTreeSet<PeerId>>,
    /// What is answered instead of the piece.
    instead: Mutex<Option<Instead>>,
    /// How long it takes to say what all pieces are.
    values_take: Mutex<Duration>,
    slots: Arc<Slots>,
}

#[derive(Default)]
struct Slots {
    used: AtomicUsize,
    most: AtomicUsize,
    over: Notify,
}

struct Slot(Arc<Slots>);

impl Slot {
    fn take(slots: &Arc<Slots>) -> Box<Self> {
        let used = slots.used.fetch_add(1, Ordering::SeqCst) + 1;
        slots.most.fetch_max(used, Ordering::SeqCst);
        Box::new(Self(slots.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::SeqCst);
        self.0.over.notify_one();
    }
}

impl Shelf {
    /// A node whose members are these.
    fn of(members: &[&Identity]) -> Arc<Self> {
        let members = members.iter().map(|identity| identity.peer()).chain([identity(9).peer()]).collect();
        Arc::new(Self {
            blob: Blob::new(),
            members: Mutex::new(members),
            instead: Mutex::default(),
            values_take: Mutex::default(),
            slots: Arc::default(),
        })
    }

    fn answer_instead(&self, decision: Instead) {
        *self.instead.lock().unwrap() = Some(decision);
    }
}

impl Peers for Shelf {
    fn member(&self, peer: PeerId) -> Option<ZoneRelation> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).contains(&peer).then_some(ZoneRelation::Same)
    }

    fn may_attest(&self, importer: PeerId) -> bool {
        self.member(importer).is_some()
    }
}

impl Source for Shelf {
    async fn ask(&self, _: PeerId, blob: Digest, piece: u32) -> Decision {
        if let Some(instead) = *self.instead.lock().unwrap() {
            return instead(self);
        }
        let span = self.blob.layout.piece(u64::from(piece));
        if blob != self.blob.digest || span.is_empty() {
            return Decision::NotHere;
        }
        let slot = Slot::take(&self.slots);
        Decision::Serve(Upload { file: self.blob.file.clone(), span, attest: Some(self.blob.attest(piece)), slot })
    }

    async fn values(&self, blob: Digest) -> Option<Vec<[u8; 32]>> {
        let _slot = Slot::take(&self.slots);
        let time = *self.values_take.lock().unwrap();
        tokio::time::sleep(time).await;
        (blob == self.blob.digest).then(|| self.blob.values())
    }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("0", "test"))
}

/// The value of a line of the exposition; 0 where there is none.
fn count(metrics: &Metrics, line: &str) -> u64 {
    let text = metrics.render();
    let value = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
    value.unwrap_or(0)
}

fn rejected(metrics: &Metrics, reason: &str) -> u64 {
    count(metrics, &format!("darter_peer_rejected_total{{reason=\"{reason}\"}}"))
}

/// A server of `shelf`, stopped when the guard goes.
struct Node {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    _stop: DropGuard,
}

fn serve(gate: Gate, shelf: &Arc<Shelf>, limits: Limits) -> Node {
    let metrics = metrics();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(any, gate, shelf.clone(), limits, metrics.clone()).unwrap();
    let (address, stop) = (server.address().unwrap(), CancellationToken::new());
    tokio::spawn(server.run(stop.clone()));
    Node { address, metrics, _stop: stop.drop_guard() }
}

/// A wire to `node` that counts the connections made through it.
async fn counting(node: &Node) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, to, made) = (listener.local_addr().unwrap(), node.address, Arc::<AtomicUsize>::default());
    let count = made.clone();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let mut to = tokio::net::TcpStream::connect(to).await.unwrap();
            // Either end may hang up as it likes.
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    (address, made)
}

fn client(identity: &Identity, shelf: &Arc<Shelf>, limits: Limits) -> (Client, Arc<Metrics>) {
    let metrics = metrics();
    (Client::new(Some(identity.clone()), shelf.clone(), limits, metrics.clone()), metrics)
}

/// A server and a client that are members for each other.
fn pair(limits: Limits) -> (Arc<Shelf>, Node, Client, Arc<Metrics>) {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&one, &two]);
    let node = serve(Gate::Tls(one), &shelf, limits.clone());
    let (client, metrics) = client(&two, &shelf, limits);
    (shelf, node, client, metrics)
}

#[tokio::test]
async fn pieces_arrive_verified_over_one_connection_each_way_counted() {
    let (shelf, node, client, metrics) = pair(Limits::default());
    let (address, connections) = counting(&node).await;
    let blob = &shelf.blob;
    for piece in 0..4 {
        let request = blob.request(&identity(1), address, piece);
        let got = client.fetch(&request).await.unwrap();
        assert!(*got.bytes == *blob.bytes(piece), "piece {piece}");
        assert_eq!(got.attest, blob.attest(piece));
    }
    let bytes = blob.layout.size();
    let line = |direction| format!("darter_peer_bytes_total{{direction=\"{direction}\",zone_relation=\"same\"}}");
    assert_eq!(count(&metrics, &line("received")), bytes);
    while shelf.slots.used.load(Ordering::SeqCst) > 0 {
        shelf.slots.over.notified().await;
    }
    assert_eq!(count(&node.metrics, &line("sent")), bytes);
    assert_eq!(connections.load(Ordering::SeqCst), 1, "a second connection was not needed");
}

#[tokio::test]
async fn refusals_keep_the_connection_and_say_why() {
    let (shelf, node, client, _) = pair(Limits::default());
    let (address, connections) = counting(&node).await;
    let request = shelf.blob.request(&identity(1), address, 0);
    shelf.answer_instead(|_| Decision::Busy(Duration::from_millis(7)));
    let busy = client.fetch(&request).await.unwrap_err();
    assert!(matches!(busy, FetchError::Busy(after) if after == Duration::from_millis(7)), "{busy:?}");
    shelf.answer_instead(|_| Decision::NotHere);
    assert!(matches!(client.fetch(&request).await, Err(FetchError::NotHere)));
    shelf.answer_instead(|_| Decision::Forbidden);
    assert!(matches!(client.fetch(&request).await, Err(FetchError::Broken(client::Broken::Refused(403)))));
    *shelf.instead.lock().unwrap() = None;
    assert!(client.fetch(&request).await.is_ok());
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let none = PieceRequest { piece: 4, ..request };
    assert!(matches!(client.fetch(&none).await, Err(FetchError::Broken(client::Broken::NoSuchPiece))));
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_is_no_failure() {
    let (shelf, node, client, _) = pair(Limits { idle: Duration::from_millis(1), ..Limits::default() });
    for piece in 0..4 {
        let request = shelf.blob.request(&identity(1), node.address, piece);
        client.fetch(&request).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_fetches_at_once_stay_within_their_memory_and_connections() {
    let limits = Limits { fetch_bytes: usize::try_from(4 * MIB).unwrap(), ..Limits::default() };
    let (shelf, node, client, metrics) = pair(limits);
    let (address, connections) = counting(&node).await;
    let client = Arc::new(client);
    let least = Arc::new(AtomicUsize::new(usize::MAX));
    let fetches: Vec<_> = (0..64)
        .map(|number| {
            let request = shelf.blob.request(&identity(1), address, number % 4);
            let (client, shelf, least) = (client.clone(), shelf.clone(), least.clone());
            tokio::spawn(async move {
                let piece = client.fetch(&request).await.unwrap();
                least.fetch_min(client.available(), Ordering::SeqCst);
                assert!(*piece.bytes == *shelf.blob.bytes(number % 4));
            })
        })
        .collect();
    for fetch in fetches {
        fetch.await.unwrap();
    }
    assert!(least.load(Ordering::SeqCst) <= usize::try_from(3 * MIB).unwrap(), "the bound was never felt");
    assert_eq!(client.available(), usize::try_from(4 * MIB).unwrap(), "all of it is back");
    assert_eq!(connections.load(Ordering::SeqCst), 2, "two connections to a peer carry all of them");
    assert_eq!((rejected(&node.metrics, "too_many"), rejected(&metrics, "corrupt")), (0, 0));
}

#[tokio::test]
async fn a_dropped_fetch_gives_back_its_slot_memory_and_place() {
    let (shelf, node, client, _) = pair(Limits { pool_per_peer: 1, ..Limits::default() });
    shelf.answer_instead(|shelf| {
        // A file with nothing in it but a length.
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * MIB).unwrap();
        let (span, slot) = (Span { start: 0, end: 8 * MIB }, Slot::take(&shelf.slots));
        Decision::Serve(Upload { file: Arc::new(file), span, attest: None, slot })
    });
    let mut request = shelf.blob.request(&identity(1), node.address, 0);
    request.layout = Layout::new(8192 * MIB);
    request.known = Some(shelf.blob.attest(0));
    let started = async {
        while shelf.slots.used.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        fetched = client.fetch(&request) => panic!("it was not to end: {fetched:?}"),
        () = started => {}
    }
    while shelf.slots.used.load(Ordering::SeqCst) > 0 {
        shelf.slots.over.notified().await;
    }
    assert_eq!(client.available(), Limits::default().fetch_bytes);
    *shelf.instead.lock().unwrap() = None;
    let request = shelf.blob.request(&identity(1), node.address, 1);
    assert!(client.fetch(&request).await.is_ok(), "the only place is free again");
}

#[tokio::test]
async fn a_node_that_stops_closes_idle_connections_and_takes_no_new_ones() {
    let (shelf, node, client, _) = pair(Limits::default());
    let request = shelf.blob.request(&identity(1), node.address, 0);
    client.fetch(&request).await.unwrap();
    drop(node);
    // The idle connection is closed, and a new one is refused: not a wait.
    let broken = client.fetch(&request).await.unwrap_err();
    assert!(matches!(broken, FetchError::Broken(_)), "{broken:?}");
}
