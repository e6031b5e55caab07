//! The model itself: nodes, links, the origin, and one event after the other.

use std::time::Duration;

use super::queue::{Due, Nanos, Queue};
use super::wires::{ImportRun, Link, Slab, Transfer, TransferState, block_time};
use super::{Outcome, Scenario};
use crate::Digest;
use crate::pieces::{Bitfield, Layout};
use crate::swarm::{
    Action, Event, FetchFailure, ImportFailure, Member, Members, Message, PeerId, Refusal, RequestId, Swarm, Time, Zone,
};

/// Joiners of a warm swarm start this long after its holders spoke.
const SETTLE: Duration = Duration::from_millis(20);

pub(super) struct World<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) blob: Digest,
    layout: Layout,
    pub(super) now: Nanos,
    pub(super) queue: Queue,
    pub(super) nodes: Vec<Node>,
    pub(super) ids: Vec<PeerId>,
    pub(super) members: Members,
    post: Slab<Option<Letter>>,
    pub(super) transfers: Slab<Transfer>,
    pub(super) imports: Slab<ImportRun>,
    pub(super) origin: OriginState,
    pub(super) waiting: u32,
    outcome: Outcome,
}

pub(super) struct Node {
    pub(super) swarm: Swarm,
    pub(super) up: Link,
    down: Link,
    have: Bitfield,
    count: u64,
    pub(super) is_alive: bool,
    pub(super) is_corrupt: bool,
    pub(super) is_forbidden: bool,
    started: Nanos,
    pub(super) finished: Option<Nanos>,
    /// Transfers that it waits for.
    pub(super) incoming: Vec<u32>,
    /// When it is woken next.
    wake: Nanos,
}

struct Letter {
    from: u32,
    to: u32,
    message: Message,
}

pub(super) struct OriginState {
    link: Link,
    pace: Nanos,
    latency: Nanos,
    pub(super) throttled_until: Nanos,
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

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario) -> Self {
        let layout = scenario.layout;
        let block = layout.piece_size() / u64::from(scenario.blocks);
        let count = scenario.nodes + scenario.holders;
        let zone = |n: u32| Zone(u64::from(n % scenario.zones.max(1)));
        let ids: Vec<Member> = (0..count).map(|n| Member { id: peer(n, scenario.seed), zone: zone(n) }).collect();
        let nodes = ids.iter().zip(0_u64..).map(|(member, n)| Node {
            swarm: Swarm::new(member.id, member.zone, scenario.limits, scenario.seed.wrapping_mul(1_000_003) ^ n),
            up: Link::new(block, scenario.uplink),
            down: Link::new(block, scenario.downlink),
            have: Bitfield::new(layout.pieces()),
            count: 0,
            is_alive: true,
            is_corrupt: false,
            is_forbidden: false,
            started: 0,
            finished: None,
            incoming: Vec::new(),
            wake: Nanos::MAX,
        });
        let origin = OriginState {
            link: Link::new(block, scenario.origin.rate),
            pace: block_time(block, scenario.origin.connection_rate),
            latency: nanos(scenario.origin.latency),
            throttled_until: 0,
        };
        Self {
            scenario,
            blob: Digest::of(&scenario.seed.to_le_bytes()),
            layout,
            now: 0,
            queue: Queue::default(),
            nodes: nodes.collect(),
            ids: ids.iter().map(|member| member.id).collect(),
            members: Members::new(ids),
            post: Slab::default(),
            transfers: Slab::default(),
            imports: Slab::default(),
            origin,
            waiting: scenario.nodes,
            outcome: Outcome::default(),
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        self.begin();
        let end = nanos(self.scenario.end);
        while self.waiting > 0 {
            let Some((time, due)) = self.queue.next().filter(|(time, _)| *time <= end) else { break };
            self.now = time;
            self.outcome.events += 1;
            self.play(due);
        }
        self.report()
    }

    fn begin(&mut self) {
        let count = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        for n in 0..count {
            self.tell(n, Event::Members(self.members.clone()));
        }
        for n in self.scenario.nodes..count {
            self.tell(n, Event::Proven { blob: self.blob, layout: self.layout });
        }
        let first = if self.scenario.holders > 0 { nanos(SETTLE) } else { 0 };
        for n in 0..self.scenario.nodes {
            // By lot, as a hash of the number: the same for the same seed.
            let lot = crate::swarm::score(&self.blob, &peer(n, self.scenario.seed)) >> 32;
            let late = (u128::from(lot) * self.scenario.spread.as_nanos()) >> 32;
            self.queue.at(first + Nanos::try_from(late).unwrap_or(0), Due::Start(n));
        }
        for (at, (time, _)) in self.scenario.faults.iter().enumerate() {
            self.queue.at(first + nanos(*time), Due::Fault(u32::try_from(at).unwrap_or(u32::MAX)));
        }
    }

    fn play(&mut self, due: Due) {
        match due {
            Due::Start(n) => self.start(n),
            Due::Message(place) => self.deliver(place),
            Due::Ask(place) => self.ask(place),
            Due::NoPiece(place) => self.no_piece(place),
            Due::Block(place) => self.block(place),
            Due::Piece(place) => self.piece(place),
            Due::OriginReady(place) => {
                let departure = self.origin.link.carry(self.now);
                self.queue.at(departure, Due::OriginBlock(place));
            }
            Due::OriginBlock(place) => self.origin_block(place),
            Due::OriginPiece(place, piece) => self.origin_piece(place, piece),
            Due::Tick(n) => {
                if self.nodes[n as usize].wake == self.now {
                    self.nodes[n as usize].wake = Nanos::MAX;
                    self.tell(n, Event::Tick);
                }
            }
            Due::Fault(at) => self.fault(self.scenario.faults[at as usize].1),
            Due::Lost(n) => self.lost(n),
        }
    }

    fn start(&mut self, n: u32) {
        self.nodes[n as usize].started = self.now;
        let have = self.nodes[n as usize].have.clone();
        self.tell(n, Event::Want { blob: self.blob, layout: self.layout, have, can_import: true, turn: 0 });
    }

    /// Hands an event to a node and carries out what it says.
    pub(super) fn tell(&mut self, n: u32, event: Event) {
        let node = &mut self.nodes[n as usize];
        if !node.is_alive {
            return;
        }
        let now = Time::from_micros(self.now / 1000);
        let actions = node.swarm.handle(now, event);
        let every = self.scenario.check_every;
        if every > 0
            && self.outcome.events.is_multiple_of(every)
            && let Err(broken) = node.swarm.check_invariants()
        {
            self.outcome.violations.insert(broken);
        }
        let deadline = node.swarm.deadline(now);
        if deadline != Time::NEVER {
            let at = deadline.as_micros().saturating_mul(1000).max(self.now + 1000);
            if at < node.wake {
                node.wake = at;
                self.queue.at(at, Due::Tick(n));
            }
        }
        for action in actions {
            self.act(n, action);
        }
    }

    fn act(&mut self, n: u32, action: Action) {
        match action {
            Action::Send { to, message, .. } => {
                *self.outcome.messages.entry(kind(&message)).or_default() += 1;
                let place = self.post.put(Some(Letter { from: n, to: number(&to), message }));
                self.queue.at(self.now + nanos(self.scenario.latency), Due::Message(place));
            }
            Action::Fetch { piece, peer, .. } => {
                let (from, left) = (number(&peer), self.scenario.blocks);
                let state = TransferState::Asked;
                let place = self.transfers.put(Transfer {
                    from,
                    to: n,
                    piece,
                    left,
                    request: RequestId(0),
                    state,
                    refusal: None,
                });
                self.transfers.at(place).request = RequestId(u64::from(place));
                self.nodes[n as usize].incoming.push(place);
                self.queue.at(self.now + nanos(self.scenario.latency), Due::Ask(place));
            }
            Action::CancelFetch { piece, peer, .. } => self.cancel(n, piece, number(&peer)),
            Action::Import { segment, first, end, .. } => self.import(n, segment, first, end),
            Action::Serve(RequestId(place)) => {
                let place = u32::try_from(place).unwrap_or(u32::MAX);
                if self.transfers.at(place).state == TransferState::Asked {
                    self.transfers.at(place).state = TransferState::Running;
                }
                let departure = self.nodes[n as usize].up.carry(self.now);
                self.queue.at(departure, Due::Block(place));
            }
            Action::Refuse { request: RequestId(place), reason } => {
                let place = u32::try_from(place).unwrap_or(u32::MAX);
                self.outcome.refused += 1;
                self.transfers.at(place).refusal = Some(reason);
                self.queue.at(self.now + nanos(self.scenario.latency), Due::NoPiece(place));
            }
            Action::Ban { .. } => self.outcome.bans += 1,
            // No node goes here but by a fault.
            Action::Take { .. } | Action::Left => {}
        }
    }

    fn deliver(&mut self, place: u32) {
        let letter = self.post.at(place).take();
        self.post.release(place);
        let Some(Letter { from, to, message }) = letter else { return };
        let from = self.ids[from as usize];
        self.tell(to, Event::Message { from, blob: self.blob, message });
    }

    fn ask(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        if !self.nodes[transfer.from as usize].is_alive {
            // Nothing answers: the loss of the node ends it.
            return;
        }
        if transfer.state != TransferState::Asked {
            return self.transfers.release(place);
        }
        let from = self.ids[transfer.to as usize];
        let (blob, piece, request) = (self.blob, transfer.piece, transfer.request);
        self.tell(transfer.from, Event::Asked { from, blob, piece, request });
    }

    fn no_piece(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        self.transfers.release(place);
        if transfer.state != TransferState::Asked {
            return;
        }
        self.forget(transfer.to, place);
        let reason = FetchFailure::Refused(transfer.refusal.unwrap_or(Refusal::NotHere));
        self.fetch_failed(&transfer, reason);
    }

    pub(super) fn fetch_failed(&mut self, transfer: &Transfer, reason: FetchFailure) {
        let peer = self.ids[transfer.from as usize];
        self.tell(transfer.to, Event::FetchFailed { blob: self.blob, piece: transfer.piece, peer, reason });
    }

    fn block(&mut self, place: u32) {
        let now = self.now;
        let transfer = self.transfers.at(place);
        if transfer.state != TransferState::Running {
            let (from, request) = (transfer.from, transfer.request);
            self.transfers.release(place);
            return self.tell(from, Event::Served(request));
        }
        transfer.left -= 1;
        let transfer = *transfer;
        let arrival = self.nodes[transfer.to as usize].down.carry(now + nanos(self.scenario.latency));
        if transfer.left > 0 {
            let departure = self.nodes[transfer.from as usize].up.carry(now);
            return self.queue.at(departure, Due::Block(place));
        }
        self.queue.at(arrival, Due::Piece(place));
        self.tell(transfer.from, Event::Served(transfer.request));
    }

    fn piece(&mut self, place: u32) {
        let transfer = *self.transfers.at(place);
        self.transfers.release(place);
        let bytes = self.layout.piece(u64::from(transfer.piece)).len();
        self.outcome.peer_bytes += bytes;
        let zones = self.scenario.zones.max(1);
        if transfer.from % zones != transfer.to % zones {
            self.outcome.cross_zone_bytes += bytes;
        }
        if transfer.state != TransferState::Running {
            self.outcome.duplicate_bytes += bytes;
            return;
        }
        self.forget(transfer.to, place);
        if self.nodes[transfer.from as usize].is_corrupt {
            return self.fetch_failed(&transfer, FetchFailure::Corrupt);
        }
        let peer = self.ids[transfer.from as usize];
        self.got(transfer.to, transfer.piece, |blob, piece| Event::Fetched { blob, piece, peer });
    }

    /// A verified piece is at a node.
    fn got(&mut self, n: u32, piece: u32, event: impl FnOnce(Digest, u32) -> Event) {
        let node = &mut self.nodes[n as usize];
        if !node.is_alive {
            return;
        }
        if node.have.has(u64::from(piece)) {
            self.outcome.duplicate_bytes += self.layout.piece(u64::from(piece)).len();
        } else {
            node.have.set(u64::from(piece));
            node.count += 1;
        }
        let is_done = node.finished.is_none() && !node.is_corrupt && node.count == self.layout.pieces();
        self.tell(n, event(self.blob, piece));
        if is_done {
            self.nodes[n as usize].finished = Some(self.now);
            self.waiting -= 1;
            self.tell(n, Event::Proven { blob: self.blob, layout: self.layout });
        }
    }

    fn cancel(&mut self, n: u32, piece: u32, from: u32) {
        let incoming = &self.nodes[n as usize].incoming;
        let found = incoming.iter().copied().find(|place| {
            let transfer = self.transfers.at(*place);
            transfer.piece == piece && transfer.from == from
        });
        if let Some(place) = found {
            self.transfers.at(place).state = TransferState::Cancelled;
            self.forget(n, place);
        }
    }

    fn forget(&mut self, n: u32, place: u32) {
        self.nodes[n as usize].incoming.retain(|other| *other != place);
    }

    fn import(&mut self, n: u32, segment: u32, first: u32, end: u32) {
        let reason = if self.nodes[n as usize].is_forbidden {
            Some(ImportFailure::Forbidden)
        } else if self.now < self.origin.throttled_until {
            let wait = Duration::from_nanos(self.origin.throttled_until - self.now);
            self.outcome.throttled += 1;
            Some(ImportFailure::Throttled(wait))
        } else {
            None
        };
        let left = self.scenario.blocks;
        let run = ImportRun { to: n, segment, piece: first, end, left, paced_until: 0, refusal: reason };
        let place = self.imports.put(run);
        self.queue.at(self.now + self.origin.latency, Due::OriginReady(place));
    }

    fn origin_block(&mut self, place: u32) {
        let blocks = self.scenario.blocks;
        let now = self.now;
        let pace = self.origin.pace;
        let run = self.imports.at(place);
        let (to, segment) = (run.to, run.segment);
        if let Some(reason) = run.refusal {
            self.imports.release(place);
            return self.tell(to, Event::ImportFailed { blob: self.blob, segment, reason });
        }
        if !self.nodes[to as usize].is_alive {
            return self.imports.release(place);
        }
        run.left -= 1;
        run.paced_until = run.paced_until.max(now) + pace;
        let (piece, is_piece) = (run.piece, run.left == 0);
        if is_piece {
            run.piece += 1;
            run.left = blocks;
        }
        let (ready, is_over) = (run.paced_until, run.piece == run.end);
        // With its last block: a piece may be smaller than its blocks.
        self.outcome.origin_bytes += if is_piece { self.layout.piece(u64::from(piece)).len() } else { 0 };
        let arrival = self.nodes[to as usize].down.carry(now);
        if is_piece {
            self.queue.at(arrival, Due::OriginPiece(to, piece));
        }
        if is_over {
            self.imports.release(place);
        } else {
            // The first block shows that the connection may send the next one this much later.
            self.queue.at(ready.saturating_sub(pace).max(now), Due::OriginReady(place));
        }
    }

    fn origin_piece(&mut self, n: u32, piece: u32) {
        self.got(n, piece, |blob, piece| Event::Imported { blob, piece });
    }

    fn report(mut self) -> Outcome {
        let seconds = |time: Nanos| time as f64 / 1e9;
        let wanting = self.nodes.iter().take(self.scenario.nodes as usize);
        let first = wanting.clone().map(|node| node.started).min().unwrap_or(0);
        self.outcome.alive = wanting.clone().map(|node| node.is_alive && !node.is_corrupt).collect();
        self.outcome.finished =
            wanting.clone().map(|node| node.finished.map(|time| seconds(time - node.started))).collect();
        let last = wanting.clone().filter_map(|node| node.finished).max().unwrap_or(0);
        self.outcome.last = seconds(last.saturating_sub(first));
        self.outcome
    }
}

fn kind(message: &Message) -> &'static str {
    match message {
        Message::Join(_) => "join",
        Message::Welcome { .. } => "welcome",
        Message::Lease(_) => "lease",
        Message::Released { .. } => "released",
        Message::LeaseEnd { .. } => "lease-end",
        Message::Missing { .. } => "missing",
        Message::Hello { .. } => "hello",
        Message::Have { .. } => "have",
        Message::Slot => "slot",
        Message::NoNeed => "no-need",
        Message::Holds { .. } => "holds",
        Message::Leave => "leave",
        Message::Take { .. } => "take",
        Message::TakeEnd { .. } => "take_end",
    }
}
