//! The model itself: nodes, what they are told and what they do, one event after the other.

use std::time::Duration;

use super::lies::Lies;
use super::queue::{Due, Nanos, Queue};
use super::reach::Reach;
use super::registry::Registry;
use super::wires::{ImportRun, Link, Slab, Transfer, block_time};
use super::{Outcome, Scenario};
use crate::Digest;
use crate::pieces::{Bitfield, Layout};
use crate::swarm::{Action, Event, FetchFailure, Member, Members, Message, PeerId, RequestId, Swarm, Time, Zone};

/// Nodes want the blob so long after they learned of each other: past what a young node waits.
const SETTLED: Duration = Duration::from_secs(10);

pub(super) struct World<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) blobs: Vec<(Digest, Layout)>,
    pub(super) now: Nanos,
    /// When the first node may want something.
    pub(super) first: Nanos,
    pub(super) queue: Queue,
    pub(super) nodes: Vec<Node>,
    pub(super) ids: Vec<PeerId>,
    pub(super) members: Members,
    post: Slab<Vec<Letter>>,
    /// What the node that acts sends now.
    outbox: Vec<Letter>,
    /// Messages by kind.
    sent: [u64; KINDS.len()],
    pub(super) transfers: Slab<Transfer>,
    pub(super) imports: Slab<ImportRun>,
    pub(super) origin: Registry,
    pub(super) reach: Reach,
    pub(super) lies: Lies,
    pub(super) waiting: u32,
    pub(super) outcome: Outcome,
    /// Transfers so far.
    pub(super) serial: u32,
}

pub(super) struct Node {
    pub(super) swarm: Swarm,
    pub(super) up: Link,
    pub(super) down: Link,
    pub(super) ingests: Vec<Ingest>,
    /// Whom it is connected to.
    pub(super) view: Members,
    pub(super) is_alive: bool,
    /// It is dead, and everybody knows.
    pub(super) is_gone: bool,
    /// Nobody waits for it.
    pub(super) is_out: bool,
    pub(super) is_corrupt: bool,
    pub(super) is_stalled: bool,
    pub(super) is_boasting: bool,
    pub(super) is_forbidden: bool,
    pub(super) has_no_room: bool,
    pub(super) paused_until: Nanos,
    /// What it will find when it goes on.
    pub(super) inbox: Vec<Event>,
    /// Its clock is ahead by this much.
    pub(super) ahead: Nanos,
    /// Its clock stands still between these times.
    pub(super) frozen: (Nanos, Nanos),
    started: Nanos,
    pub(super) finished: Option<Nanos>,
    /// The first piece of the first blob is here.
    pub(super) begun: Option<Nanos>,
    /// Transfers that it waits for.
    pub(super) incoming: Vec<u32>,
    /// When it is woken next.
    wake: Nanos,
}

/// One blob at one node.
pub(super) struct Ingest {
    pub(super) have: Bitfield,
    pub(super) count: u64,
    pub(super) is_proven: bool,
}

struct Letter {
    from: u32,
    to: u32,
    blob: u16,
    message: Message,
}

pub(super) fn nanos(time: Duration) -> Nanos {
    Nanos::try_from(time.as_nanos()).unwrap_or(Nanos::MAX)
}

/// The n-th peer: its number stands in front, so that it is found again.
fn peer(n: u32, seed: u64) -> PeerId {
    let mut bytes = *Digest::of(&[seed.to_le_bytes().as_slice(), &n.to_le_bytes()].concat()).as_bytes();
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    PeerId::from_bytes(bytes)
}

pub(super) fn number(id: &PeerId) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&id.to_bytes()[..4]);
    u32::from_le_bytes(bytes)
}

impl Node {
    fn new(member: Member, seed: u64, scenario: &Scenario) -> Self {
        let block = scenario.layout.piece_size() / u64::from(scenario.blocks);
        let ingest = |layout: Layout| Ingest { have: Bitfield::new(layout.pieces()), count: 0, is_proven: false };
        Self {
            swarm: Swarm::new(member.id, member.zone, scenario.limits, seed),
            up: Link::new(block, scenario.uplink),
            down: Link::new(block, scenario.downlink),
            ingests: scenario.layouts().map(ingest).collect(),
            view: Members::default(),
            is_alive: true,
            is_gone: false,
            is_out: false,
            is_corrupt: false,
            is_stalled: false,
            is_boasting: false,
            is_forbidden: false,
            has_no_room: false,
            paused_until: 0,
            inbox: Vec::new(),
            ahead: 0,
            frozen: (0, 0),
            started: 0,
            finished: None,
            begun: None,
            incoming: Vec::new(),
            wake: Nanos::MAX,
        }
    }

    /// What its clock shows, in whole microseconds.
    fn clock(&self, now: Nanos) -> Time {
        let (from, until) = self.frozen;
        let now = if (from..until).contains(&now) { from } else { now };
        Time::from_micros((now + self.ahead) / 1000)
    }
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario) -> Self {
        let block = scenario.layout.piece_size() / u64::from(scenario.blocks);
        let count = scenario.nodes + scenario.holders;
        let zone = |n: u32| Zone(u64::from(n % scenario.zones.max(1)));
        let ids: Vec<Member> =
            (0..count).map(|n| Member { id: peer(n, scenario.seed), zone: zone(n), is_seed: false }).collect();
        let seed = |n: u64| scenario.seed.wrapping_mul(1_000_003) ^ n;
        let name = |n: u64| match n {
            0 => Digest::of(&scenario.seed.to_le_bytes()),
            n => Digest::of(&[scenario.seed.to_le_bytes(), n.to_le_bytes()].concat()),
        };
        let origin = Registry {
            link: Link::new(block, scenario.origin.rate),
            pace: block_time(block, scenario.origin.connection_rate),
            latency: nanos(scenario.origin.latency),
            throttled_until: 0,
        };
        Self {
            scenario,
            blobs: (0..).map(name).zip(scenario.layouts()).collect(),
            now: 0,
            first: nanos(SETTLED),
            queue: Queue::default(),
            nodes: ids.iter().zip(0..).map(|(member, n)| Node::new(*member, seed(n), scenario)).collect(),
            ids: ids.iter().map(|member| member.id).collect(),
            members: Members::new(ids),
            post: Slab::default(),
            outbox: Vec::new(),
            sent: [0; KINDS.len()],
            transfers: Slab::default(),
            imports: Slab::default(),
            origin,
            reach: Reach::default(),
            lies: Lies::default(),
            waiting: scenario.nodes,
            outcome: Outcome::default(),
            serial: 0,
        }
    }

    pub(super) fn digest(&self, blob: u16) -> Digest {
        self.blobs[usize::from(blob)].0
    }

    /// Size of a piece.
    pub(super) fn bytes(&self, blob: u16, piece: u32) -> u64 {
        self.blobs[usize::from(blob)].1.piece(u64::from(piece)).len()
    }

    pub(super) fn run(mut self) -> Outcome {
        self.begin();
        let end = self.first + nanos(self.scenario.end);
        while self.waiting > 0 {
            let Some((time, due)) = self.queue.next().filter(|(time, _)| *time <= end) else { break };
            self.now = time;
            // Letters are counted one by one.
            self.outcome.events += u64::from(!matches!(due, Due::Messages(_)));
            self.play(due);
        }
        self.report()
    }

    fn begin(&mut self) {
        let count = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        if self.scenario.introductions.is_zero() {
            self.look();
        }
        self.introduce();
        for n in self.scenario.nodes..count {
            for (blob, layout) in self.blobs.clone() {
                self.tell(n, Event::Proven { blob, layout });
            }
        }
        for n in 0..self.scenario.nodes {
            // By lot, as a hash of the number: the same for the same seed.
            let lot = crate::swarm::score(&self.digest(0), &peer(n, self.scenario.seed)) >> 32;
            let late = (u128::from(lot) * self.scenario.spread.as_nanos()) >> 32;
            self.queue.at(self.first + Nanos::try_from(late).unwrap_or(0), Due::Start(n));
        }
        for (at, (time, _)) in self.scenario.faults.iter().enumerate() {
            self.queue.at(self.first + nanos(*time), Due::Fault(u32::try_from(at).unwrap_or(u32::MAX)));
        }
    }

    fn play(&mut self, due: Due) {
        match due {
            Due::Start(n) => self.start(n),
            Due::Messages(place) => self.deliver(place),
            Due::Ask(place) => self.ask(place),
            Due::NoPiece(place) => self.no_piece(place),
            Due::Broke(place) => self.broke(place),
            Due::GiveUp(place, serial) => self.give_up(place, serial),
            Due::Cut { to, from, blob, piece } => {
                let (blob, peer) = (self.digest(blob), self.ids[from as usize]);
                self.tell(to, Event::FetchFailed { blob, piece, peer, reason: FetchFailure::Broken });
            }
            Due::Block(place) => self.block(place),
            Due::Piece(place) => self.piece(place),
            Due::OriginReady(place) => self.origin_ready(place),
            Due::OriginBlock(place) => self.origin_block(place),
            Due::OriginPiece { to, blob, piece } => self.origin_piece(to, blob, piece),
            Due::Tick(n) => {
                if self.nodes[n as usize].wake == self.now {
                    self.nodes[n as usize].wake = Nanos::MAX;
                    self.tell(n, Event::Tick);
                }
            }
            Due::Fault(at) => self.fault(self.scenario.faults[at as usize].1),
            Due::Resume(n) => self.resume(n),
            Due::Lost(n) => {
                self.nodes[n as usize].is_gone = true;
                self.look();
            }
            Due::Look => self.look(),
        }
    }

    fn start(&mut self, n: u32) {
        self.nodes[n as usize].started = self.now;
        for (at, (blob, layout)) in self.blobs.clone().into_iter().enumerate() {
            if self.scenario.wants(n, at) && !self.nodes[n as usize].has_no_room {
                let have = self.nodes[n as usize].ingests[at].have.clone();
                self.tell(n, Event::Want { blob, layout, have, can_import: true, turn: 0 });
            }
        }
    }

    /// A blob is whole at a node: is it all that the node wanted?
    pub(super) fn finish(&mut self, n: u32) {
        let node = &self.nodes[n as usize];
        let is_done = (0..self.blobs.len()).all(|blob| node.ingests[blob].is_proven || !self.scenario.wants(n, blob));
        if is_done && n < self.scenario.nodes && node.finished.is_none() {
            self.waiting -= u32::from(!node.is_out);
            self.nodes[n as usize].finished = Some(self.now);
        }
    }

    /// Hands an event to a node and carries out what it says.
    pub(super) fn tell(&mut self, n: u32, event: Event) {
        let node = &mut self.nodes[n as usize];
        if !node.is_alive {
            return;
        }
        if node.paused_until > self.now {
            return node.inbox.push(event);
        }
        let now = node.clock(self.now);
        let actions = node.swarm.handle(now, event);
        self.outcome.neighbours = self.outcome.neighbours.max(node.swarm.neighbours());
        let every = self.scenario.check_every;
        if every > 0
            && self.outcome.events.is_multiple_of(every)
            && let Err(broken) = node.swarm.check_invariants()
        {
            self.outcome.violations.insert(broken);
        }
        let deadline = node.swarm.deadline();
        if deadline != Time::NEVER {
            let wait = nanos(deadline.since(now)).max(1000);
            let at = self.now - self.now % 1000 + wait;
            if at < node.wake {
                node.wake = at;
                self.queue.at(at, Due::Tick(n));
            }
        }
        for action in actions {
            self.act(n, action);
        }
        if !self.outbox.is_empty() {
            let letters = std::mem::take(&mut self.outbox);
            let place = self.post.put(letters);
            self.queue.at(self.now + nanos(self.scenario.latency), Due::Messages(place));
        }
    }

    fn act(&mut self, n: u32, action: Action) {
        match action {
            Action::Send { to, blob, message } => self.send(n, number(&to), self.index(&blob), message),
            Action::Fetch { blob, piece, peer } => self.fetch(n, self.index(&blob), piece, &peer),
            Action::CancelFetch { blob, piece, peer } => self.cancel(n, self.index(&blob), piece, number(&peer)),
            Action::Import { blob, segment, first, end } => self.import(n, self.index(&blob), segment, (first, end)),
            Action::Serve(RequestId(place)) => self.serve(n, u32::try_from(place).unwrap_or(u32::MAX)),
            Action::Refuse { request: RequestId(place), reason } => {
                self.refuse(u32::try_from(place).unwrap_or(u32::MAX), reason);
            }
            Action::Ban { peer, .. } => self.ban(n, number(&peer)),
            Action::Reject { .. } => {}
            // What pieces consist of is not simulated.
            Action::Compare { .. } => {}
            // No node goes here but by a fault, and none is a seed.
            Action::TellRoom { .. }
            | Action::Take { .. }
            | Action::Keep { .. }
            | Action::Used(_)
            | Action::Wait(_)
            | Action::Left => {}
        }
    }

    /// The number of a blob.
    fn index(&self, digest: &Digest) -> u16 {
        let at = self.blobs.iter().position(|(blob, _)| blob == digest);
        at.and_then(|at| u16::try_from(at).ok()).unwrap_or(0)
    }

    fn send(&mut self, from: u32, to: u32, blob: u16, mut message: Message) {
        self.sent[kind(&message)] += 1;
        self.outcome.message_bytes += self.scenario.weigh.map_or(0, |weigh| weigh(&self.digest(blob), &message));
        if let Message::Hello { have, .. } = &mut message
            && self.nodes[from as usize].is_boasting
        {
            *have = Bitfield::full(have.len());
        }
        if self.is_lost(from, to, &message) {
            return;
        }
        self.outbox.push(Letter { from, to, blob, message });
    }

    fn deliver(&mut self, place: u32) {
        let letters = std::mem::take(self.post.at(place));
        self.post.release(place);
        for Letter { from, to, blob, message } in letters {
            self.outcome.events += 1;
            if !self.is_cut(from, to) {
                let (from, blob) = (self.ids[from as usize], self.digest(blob));
                self.tell(to, Event::Message { from, blob, message });
            }
        }
    }

    fn report(mut self) -> Outcome {
        let seconds = |time: Nanos| time as f64 / 1e9;
        let wanting = self.nodes.iter().take(self.scenario.nodes as usize);
        let first = wanting.clone().map(|node| node.started).min().unwrap_or(0);
        self.outcome.alive = wanting.clone().map(|node| !node.is_out).collect();
        self.outcome.finished =
            wanting.clone().map(|node| node.finished.map(|time| seconds(time - node.started))).collect();
        self.outcome.first_pieces =
            wanting.clone().map(|node| node.begun.map(|time| seconds(time - node.started))).collect();
        self.outcome.messages = KINDS.into_iter().zip(self.sent).filter(|(_, sent)| *sent > 0).collect();
        let last = wanting.clone().filter_map(|node| node.finished).max().unwrap_or(0);
        self.outcome.last = seconds(last.saturating_sub(first));
        self.outcome
    }
}

/// Names of messages, as `kind` counts them.
const KINDS: [&str; 16] = [
    "join",
    "welcome",
    "lease",
    "released",
    "lease-end",
    "missing",
    "hello",
    "have",
    "slot",
    "no-need",
    "holds",
    "leave",
    "take",
    "take-end",
    "room-wanted",
    "room",
];

const fn kind(message: &Message) -> usize {
    match message {
        Message::Join(_) => 0,
        Message::Welcome { .. } => 1,
        Message::Lease(_) => 2,
        Message::Released { .. } => 3,
        Message::LeaseEnd { .. } => 4,
        Message::Missing { .. } => 5,
        Message::Hello { .. } => 6,
        Message::Have { .. } => 7,
        Message::Slot => 8,
        Message::NoNeed => 9,
        Message::Holds { .. } => 10,
        Message::Leave => 11,
        Message::Take { .. } => 12,
        Message::TakeEnd { .. } => 13,
        Message::RoomWanted => 14,
        Message::Room { .. } => 15,
    }
}
