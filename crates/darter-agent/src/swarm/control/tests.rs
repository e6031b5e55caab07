//! Real sockets on loopback: agents that find each other, and those that do not behave.

mod apart;
mod loud;
mod odd;
mod witnesses;

use std::collections::BTreeSet;

use darter_core::swarm::Member;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::swarm::discovery::Discovery;
use crate::swarm::identity::Identity;

/// Nothing here takes so long, unless it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(40);

struct Node {
    control: ControlHandle,
    events: mpsc::Receiver<ControlEvent>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

fn key(n: u8) -> PreSharedKey {
    PreSharedKey::new([n; 32])
}

fn identity() -> Identity {
    let dir = tempfile::tempdir().unwrap();
    Identity::load_or_make(&dir.path().join("identity.key")).unwrap()
}

fn setup() -> Setup {
    Setup {
        listen: "127.0.0.1:0".parse().unwrap(),
        exchange_port: 4003,
        zone: Zone(7),
        key: key(1),
        max_members: 100,
        wants_peers: true,
        is_seed: false,
        is_plain: false,
        version: "0.0.0".to_owned(),
        // On a machine that is busy a handshake takes a second; who waits for one that never ends waits for this.
        limits: Limits { handshake: Duration::from_secs(8), hello: Duration::from_secs(8), ..Limits::default() },
    }
}

async fn start(setup: Setup, peers: &[SocketAddr]) -> Node {
    let peers: Vec<String> = peers.iter().map(ToString::to_string).collect();
    let discovery = Discovery::new(&peers, None, 4002, Duration::from_secs(1), 100);
    let metrics = Arc::new(Metrics::new("0", "0"));
    let (control, handle, events) = Control::bind(setup, &identity(), discovery, metrics.clone()).await.unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(control.run(stop.clone()));
    Node { control: handle, events, metrics, stop, running }
}

impl Node {
    async fn next(&mut self) -> ControlEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event").expect("a running control plane")
    }

    /// Waits until these are the members, in any order.
    async fn sees(&mut self, wanted: impl IntoIterator<Item = PeerId>) {
        let wanted: BTreeSet<PeerId> = wanted.into_iter().collect();
        loop {
            if let ControlEvent::Members(members) = self.next().await
                && members.iter().map(|member| member.id).collect::<BTreeSet<_>>() == wanted
            {
                return;
            }
        }
    }

    async fn stands(&self, wanted: impl Fn(&Standing) -> bool) -> Standing {
        let mut standing = self.control.standing();
        let waited = tokio::time::timeout(PATIENCE, standing.wait_for(wanted)).await.map(|standing| *standing.unwrap());
        waited.unwrap_or_else(|_| panic!("it stays at {:?}", self.control.standing().borrow()))
    }

    fn rejected(&self, reason: &'static str) -> u64 {
        self.metrics.peer_rejected.get_or_create(&ReasonLabels { reason }).get()
    }

    /// Waits for a count that nothing else tells of.
    async fn rejects(&self, reason: &'static str) {
        let counted = async {
            while self.rejected(reason) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, counted).await;
        waited.unwrap_or_else(|_| panic!("nobody was rejected for {reason}:\n{}", self.metrics.render()));
    }

    async fn kill(self) {
        self.running.abort();
        let _ = self.running.await;
    }
}

fn blob(n: u8) -> Digest {
    Digest::from_bytes([n; 32])
}

#[tokio::test]
async fn three_find_each_other_through_one_speak_and_notice_a_death() {
    let mut a = start(setup(), &[]).await;
    let seed = [a.control.address()];
    let mut b = start(setup(), &seed).await;
    let mut c = start(Setup { zone: Zone(8), ..setup() }, &seed).await;
    let all = [a.control.me(), b.control.me(), c.control.me()];
    for node in [&mut a, &mut b, &mut c] {
        node.sees(all).await;
    }
    b.control.send(all[2], blob(1), Message::Holds { size: 42 });
    let (from, about, said) = loop {
        if let ControlEvent::Message { from, blob, message, .. } = c.next().await {
            break (from, blob, message);
        }
    };
    assert_eq!((from, about, said), (all[1], blob(1), Message::Holds { size: 42 }));
    let died = Instant::now();
    c.kill().await;
    for node in [&mut a, &mut b] {
        node.sees([all[0], all[1]]).await;
        assert!(matches!(node.next().await, ControlEvent::Lost(peer) if peer == all[2]));
        assert_eq!(node.metrics.swarm_peers.get(), 1);
    }
    assert!(died.elapsed() < Duration::from_secs(2), "{:?}", died.elapsed());
}

#[tokio::test]
async fn a_member_tells_its_zone_and_a_lone_node_is_its_own_swarm() {
    let mut a = start(setup(), &[]).await;
    a.sees([a.control.me()]).await;
    assert_eq!(a.stands(|_| true).await, Standing::default());
    let b = start(Setup { zone: Zone(99), ..setup() }, &[a.control.address()]).await;
    let ControlEvent::Members(members) = a.next().await else { panic!("a member came") };
    let (me, id) = (Member { id: a.control.me(), zone: Zone(7), is_seed: false }, b.control.me());
    assert_eq!(
        (members.get(&id), members.get(&me.id)),
        (Some(&Member { id, zone: Zone(99), is_seed: false }), Some(&me))
    );
    b.stop.cancel();
    b.running.await.unwrap();
    assert!(matches!(a.next().await, ControlEvent::Members(members) if members.len() == 1));
}

#[tokio::test]
async fn two_that_dial_each_other_end_up_with_one_connection() {
    let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second] = ports.map(|listener| listener.local_addr().unwrap());
    let everybody = [first, second];
    let one = start(Setup { listen: first, ..setup() }, &everybody).await;
    let mut two = start(Setup { listen: second, ..setup() }, &everybody).await;
    for node in [&one, &two] {
        // Its own address is in the list too, and is not one of others.
        let standing = node.stands(|s| s.peers == 1 && s.connections == 1 && s.addresses == 1).await;
        assert_eq!(standing.strangers, 0);
    }
    one.control.send(two.control.me(), blob(1), Message::Slot);
    // Over the one that stayed.
    while !matches!(two.next().await, ControlEvent::Message { message: Message::Slot, .. }) {}
    assert_eq!(one.metrics.swarm_dropped.get_or_create(&ReasonLabels { reason: "gone" }).get(), 0);
}

#[tokio::test]
async fn garbage_at_the_door_is_cut_off_and_counted() {
    let a = start(setup(), &[]).await;
    let mut stream = TcpStream::connect(a.control.address()).await.unwrap();
    stream.write_all(&[b'x'; 4096]).await.unwrap();
    let mut heard = Vec::new();
    // Ends: by FIN, or by RST because not all of the garbage was read.
    let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard)).await;
    assert!(ended.is_ok(), "the connection stays open");
    a.rejects("handshake").await;
    assert!(!String::from_utf8_lossy(&heard).contains("multistream"), "it told what it is: {heard:?}");
    a.stands(|standing| standing.connections == 0).await;
}

#[tokio::test]
async fn another_key_is_refused_and_counted_on_both_sides() {
    let mut a = start(setup(), &[]).await;
    let mut b = start(Setup { key: key(2), ..setup() }, &[a.control.address()]).await;
    a.rejects("handshake").await;
    // Whether the caller notices before its own time is up is a matter of luck; it does not belong.
    for node in [&mut a, &mut b] {
        assert!(matches!(node.next().await, ControlEvent::Members(members) if members.len() == 1));
        assert_eq!(node.metrics.swarm_peers.get(), 0);
    }
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_no_stranger() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let b = start(setup(), &[]).await;
    let mut a = start(setup(), &[nobody, b.control.address()]).await;
    // Whoever dials both hears "refused" long before it has shaken hands with the other.
    a.sees([a.control.me(), b.control.me()]).await;
    let refused = a.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "handshake" }).get();
    assert_eq!((refused, a.control.standing().borrow().strangers), (0, 0));
}

#[tokio::test]
async fn what_a_peer_does_not_take_is_dropped_and_counted() {
    let mut a = start(setup(), &[]).await;
    let mut b = start(setup(), &[a.control.address()]).await;
    let both = [a.control.me(), b.control.me()];
    a.sees(both).await;
    b.sees(both).await;
    // At once: on this one thread nothing is written in between.
    for n in 0..300 {
        a.control.send(b.control.me(), blob(1), Message::Holds { size: n });
    }
    let dropped = |node: &Node, reason| node.metrics.swarm_dropped.get_or_create(&ReasonLabels { reason }).get();
    assert_eq!(dropped(&a, "full"), 300 - session::QUEUE as u64);
    for n in 0..session::QUEUE as u64 {
        let event = b.next().await;
        assert!(
            matches!(&event, ControlEvent::Message { message: Message::Holds { size }, .. } if *size == n),
            "{event:?}"
        );
    }
    a.control.send(PeerId::from_bytes([9; 32]), blob(1), Message::Slot);
    assert_eq!(dropped(&a, "gone"), 1);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let discovery = Discovery::new(&[], None, 4002, Duration::from_secs(1), 100);
    let metrics = Arc::new(Metrics::new("0", "0"));
    let error = Control::bind(Setup { listen, ..setup() }, &identity(), discovery, metrics).await.err().unwrap();
    assert!(error.to_string().contains(&listen.to_string()) && error.to_string().contains("swarm.listen"), "{error}");
}
