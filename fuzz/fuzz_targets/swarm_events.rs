//! A node's part in the swarm through any sequence of events: peers that say anything which passes the wire, in any
//! order, and an agent that does what it is told, well or badly. The invariants hold after every event, and whatever
//! the node says is what another believes.

#![no_main]

use std::collections::BTreeSet;
use std::time::Duration;

use darter_agent::swarm::wire;
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::{
    Action, Event, FetchFailure, ImportFailure, Join, Lease, LeaseEnd, Limits, Member, Members, Message, PeerId,
    Reading, Refusal, RequestId, Swarm, Time, Zone,
};
use libfuzzer_sys::fuzz_target;

const MIB: u64 = 1 << 20;
/// Of one piece, of part of a segment, of some segments, of many, and of large ones.
const SIZES: [u64; 6] = [1, 3 * MIB + 5, 8 * MIB, 33 * MIB + 1, 70 * MIB, 5000 * MIB];
/// What a peer may say a size is: those, and the ends of the range.
const TOLD: [u64; 9] =
    [1, 3 * MIB + 5, 8 * MIB, 33 * MIB + 1, 70 * MIB, 5000 * MIB, 0, wire::PIECES_MAX * 8 * MIB, 40_000 * MIB];
const PAUSES_US: [u64; 8] = [0, 1, 900, 8_000, 60_000, 700_000, 5_000_000, 3_600_000_000];
/// Events of one sequence: the checks look at every piece of every blob after each.
const EVENTS_MAX: usize = 300;
/// The last two are no members. This node is the first of them, or the seed.
const PEERS: u8 = 10;
const SEED: u8 = 6;

/// The input, a byte at a time.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    fn peer(&mut self) -> PeerId {
        peer(self.byte() % PEERS)
    }

    fn peers(&mut self) -> Vec<PeerId> {
        (0..self.below(5)).map(|_| self.peer()).collect()
    }

    fn maybe_peer(&mut self) -> Option<PeerId> {
        self.flag().then(|| self.peer())
    }

    fn blob(&mut self) -> usize {
        self.below(SIZES.len())
    }

    /// An index, mostly of what there is.
    fn index(&mut self) -> u32 {
        match self.byte() {
            255 => u32::MAX,
            254 => 100_000,
            253 => 511,
            small => u32::from(small),
        }
    }

    fn indices(&mut self) -> Vec<u32> {
        (0..self.below(6)).map(|_| self.index()).collect()
    }

    fn bits(&mut self, len: u64) -> Bitfield {
        match self.below(4) {
            0 => Bitfield::new(len),
            1 => Bitfield::full(len),
            _ => {
                let (step, first) = (self.below(7) as u64 + 1, self.below(5) as u64);
                let mut some = Bitfield::new(len);
                (0..len).filter(|piece| piece % step == first).for_each(|piece| some.set(piece));
                some
            }
        }
    }

    fn period(&mut self) -> Duration {
        Duration::from_micros(PAUSES_US[self.below(PAUSES_US.len())])
    }

    fn message(&mut self, blob: usize) -> Message {
        // Mostly of the size that the blob has.
        let told = if self.flag() { SIZES[blob] } else { TOLD[self.below(TOLD.len())] };
        let pieces = Layout::new(told).pieces();
        match self.below(18) {
            0 | 1 => Message::Join(Join {
                size: told,
                have: self.bits(pieces),
                leased: self
                    .indices()
                    .into_iter()
                    .map(|segment| Reading { segment, from: self.maybe_peer() })
                    .collect(),
                can_import: self.flag(),
                is_going: self.flag(),
                neighbours: self.peers(),
            }),
            2 => Message::Welcome { neighbours: self.peers(), holders: self.peers(), interested: self.index() },
            3 | 4 => Message::Lease(Lease {
                segment: self.index(),
                from: self.maybe_peer(),
                is_whole: self.flag(),
                interested: self.index(),
            }),
            5 => Message::Released { piece: self.index(), is_whole: self.flag() },
            6 => {
                let end = match self.below(4) {
                    0 => LeaseEnd::Done,
                    1 => LeaseEnd::Throttled(self.period()),
                    2 => LeaseEnd::Forbidden,
                    _ => LeaseEnd::Broken,
                };
                let (segment, from, upload_time) = (self.index(), self.maybe_peer(), self.period());
                Message::LeaseEnd { segment, from, end, upload_time }
            }
            7 => Message::Missing { segments: self.indices(), without: self.peers() },
            8 | 9 => Message::Hello { have: self.bits(pieces), wants_answer: self.flag() },
            10 => Message::Have { pieces: self.indices(), free_slots: self.byte(), interested: self.index() },
            11 => Message::Slot,
            12 => Message::NoNeed,
            13 => Message::Holds { size: told },
            14 => Message::Leave,
            15 => Message::Take { size: told, is_for_elsewhere: self.flag() },
            16 if self.flag() => Message::RoomWanted,
            16 => Message::Room { bytes: told },
            _ => Message::TakeEnd { is_kept: self.flag() },
        }
    }
}

fn peer(n: u8) -> PeerId {
    PeerId::from_bytes([n + 1; 32])
}

/// Those that are there, and this node.
fn members(me: PeerId, present: u8) -> Members {
    let member = |n| Member { id: peer(n), zone: Zone(u64::from(n % 2)), is_seed: n == SEED };
    Members::new((0..PEERS - 2).filter(|n| peer(*n) == me || present >> n & 1 == 1).map(member).collect())
}

/// The node, and what its agent has to do.
struct Node {
    me: PeerId,
    swarm: Swarm,
    now: Time,
    blobs: Vec<Digest>,
    wanted: BTreeSet<usize>,
    held: BTreeSet<usize>,
    /// Pieces that were asked for, also those whose cancel may come too late.
    fetches: Vec<(usize, u32, PeerId)>,
    /// Pieces that are still to be read.
    imports: Vec<(usize, u32)>,
    uploads: BTreeSet<RequestId>,
    requests: u64,
}

impl Node {
    fn new(script: &mut Script<'_>) -> Self {
        let choice = script.byte();
        let mut limits = Limits { scope_is_zone: choice & 1 == 1, ..Limits::default() };
        if choice & 2 == 2 {
            // Tables that are soon full.
            limits = Limits {
                waiting_max: 2,
                neighbours: 2,
                neighbours_max: 3,
                blobs_max: 3,
                blobs_per_peer: 2,
                tables_per_peer: 1,
                segments_per_peer: 8,
                takes_max: 1,
                seed_wanted_max: 2,
                missing_max: 2,
                few: 0,
                ..limits
            };
        }
        let me = peer(if choice & 4 == 4 { SEED } else { 0 });
        let blobs = (0..SIZES.len()).map(|n| Digest::of(&[choice >> 3, n as u8])).collect();
        Self {
            me,
            swarm: Swarm::new(me, Zone(0), limits, choice.into()),
            now: Time::from_micros(1_000_000),
            blobs,
            wanted: BTreeSet::new(),
            held: BTreeSet::new(),
            fetches: Vec::new(),
            imports: Vec::new(),
            uploads: BTreeSet::new(),
            requests: 0,
        }
    }

    fn layout(blob: usize) -> Layout {
        Layout::new(SIZES[blob])
    }

    /// What happens next; none where the script asks for what no agent does.
    fn event(&mut self, script: &mut Script<'_>) -> Option<Event> {
        let at = script.blob();
        let blob = self.blobs[at];
        Some(match script.byte() % 32 {
            0..=9 => {
                let message = script.message(at);
                // What does not pass the wire never comes here, nor what this node would say to itself.
                let from = Some(script.peer()).filter(|from| *from != self.me)?;
                let sent = wire::encode(&blob, &message).ok()?;
                let (blob, message) = wire::decode(sent).ok()?;
                Event::Message { from, blob, message }
            }
            10 | 11 => {
                self.now = self.now.max(self.swarm.deadline().min(self.now + Duration::from_secs(7200)));
                Event::Tick
            }
            12 => Event::Members(members(self.me, script.byte())),
            13 => Event::PeerLost(script.peer()),
            14..=16 => {
                if self.held.contains(&at) || !self.wanted.insert(at) {
                    return None;
                }
                let layout = Self::layout(at);
                let have = script.bits(layout.pieces());
                let (can_import, turn) = (script.flag(), script.below(3) as u64);
                Event::Want { blob, layout, have, can_import, turn }
            }
            17 => {
                self.ended(at);
                Event::Unwant(blob)
            }
            18 => {
                self.ended(at);
                self.held.insert(at);
                Event::Proven { blob, layout: Self::layout(at) }
            }
            19 => {
                self.held.remove(&at);
                Event::Gone(blob)
            }
            20 | 21 => {
                let (at, piece, peer) = self.one_fetch(script)?;
                Event::Fetched { blob: self.blobs[at], piece, peer }
            }
            22 => {
                let (at, piece, peer) = self.one_fetch(script)?;
                let reason = match script.below(6) {
                    0 => FetchFailure::Refused(Refusal::Busy(script.period())),
                    1 => FetchFailure::Refused(Refusal::NotHere),
                    2 => FetchFailure::Broken,
                    3 => FetchFailure::Stalled,
                    4 => FetchFailure::Unvouched,
                    _ => FetchFailure::Corrupt,
                };
                Event::FetchFailed { blob: self.blobs[at], piece, peer, reason }
            }
            23 => {
                let (at, piece) =
                    (!self.imports.is_empty()).then(|| self.imports.remove(script.below(self.imports.len())))?;
                Event::Imported { blob: self.blobs[at], piece }
            }
            24 => {
                let (at, piece) = *self.imports.get(script.below(self.imports.len()))?;
                if script.flag() {
                    return Some(Event::Importing { blob: self.blobs[at], piece });
                }
                let segment_of = |piece: u32| {
                    let layout = Self::layout(at);
                    u32::try_from(layout.piece(piece.into()).start / layout.segment_size()).expect("few segments")
                };
                let segment = segment_of(piece);
                self.imports.retain(|(other, piece)| *other != at || segment_of(*piece) != segment);
                let reason = match script.below(3) {
                    0 => ImportFailure::Throttled(script.period()),
                    1 => ImportFailure::Forbidden,
                    _ => ImportFailure::Broken,
                };
                Event::ImportFailed { blob: self.blobs[at], segment, reason }
            }
            25 | 26 => {
                self.requests += 1;
                let (from, piece, request) = (script.peer(), script.index(), RequestId(self.requests));
                Event::Asked { from, blob, piece, request }
            }
            27 => {
                let request = *self.uploads.iter().nth(script.below(self.uploads.len()))?;
                self.uploads.remove(&request);
                Event::Served(request)
            }
            28 => Event::Leave(self.held.iter().map(|at| self.blobs[*at]).collect()),
            29 => [Event::Stay, Event::Withdraw, Event::NotTaken(blob)][script.below(3)].clone(),
            30 => Event::NotCompared { blob, peer: script.peer() },
            _ => Event::Lied(script.peer()),
        })
    }

    fn one_fetch(&mut self, script: &mut Script<'_>) -> Option<(usize, u32, PeerId)> {
        (!self.fetches.is_empty()).then(|| self.fetches.remove(script.below(self.fetches.len())))
    }

    /// The agent's own pull of it is over.
    fn ended(&mut self, at: usize) {
        self.wanted.remove(&at);
        self.fetches.retain(|(blob, ..)| *blob != at);
        self.imports.retain(|(blob, _)| *blob != at);
    }

    fn number(&self, blob: &Digest) -> usize {
        self.blobs.iter().position(|other| other == blob).expect("a blob that somebody spoke of")
    }

    fn handle(&mut self, event: Event) {
        let asked = if let Event::Asked { request, .. } = &event { Some(*request) } else { None };
        let said = event.clone();
        let actions = self.swarm.handle(self.now, event);
        if let Err(broken) = self.swarm.check_invariants() {
            panic!("{broken}, after {said:?} at {:?}: {actions:?}", self.now);
        }
        let mut answers = 0;
        for action in actions {
            match action {
                Action::Send { blob, message, .. } => {
                    let sent = wire::encode(&blob, &message).expect("what is said is within the bounds");
                    // A duration of days is cut on its way, and nothing else is.
                    let (blob, message) = wire::decode(sent.clone()).expect("what is said is believed");
                    assert_eq!(wire::encode(&blob, &message), Ok(sent), "after {said:?}");
                }
                Action::Fetch { blob, piece, peer } => {
                    let at = self.number(&blob);
                    assert!(self.wanted.contains(&at), "a piece of what nobody wants, after {said:?}");
                    assert!(u64::from(piece) < Self::layout(at).pieces(), "a piece that there is not, after {said:?}");
                    self.fetches.push((at, piece, peer));
                }
                Action::Import { blob, segment, first, end } => {
                    let at = self.number(&blob);
                    let layout = Self::layout(at);
                    assert!(self.wanted.contains(&at), "a read of what nobody wants, after {said:?}");
                    assert!(first < end, "a read of nothing, after {said:?}");
                    let (segment, last) = (layout.segment(segment.into()), layout.piece(u64::from(end) - 1));
                    let starts = layout.piece(first.into()).start >= segment.start;
                    assert!(starts && last.end <= segment.end && !last.is_empty(), "past its segment, after {said:?}");
                    self.imports.extend((first..end).map(|piece| (at, piece)));
                }
                Action::Serve(request) => {
                    assert_eq!(Some(request), asked, "nobody asked");
                    answers += 1;
                    self.uploads.insert(request);
                }
                Action::Refuse { request, .. } => {
                    assert_eq!(Some(request), asked, "nobody asked");
                    answers += 1;
                }
                _ => {}
            }
        }
        assert_eq!(answers, usize::from(asked.is_some()), "who asks gets one answer");
    }

    /// A machine that is looked at when it says so must not always want to be looked at now.
    fn comes_to_rest(&mut self) {
        for _ in 0..200 {
            let deadline = self.swarm.deadline();
            if deadline > self.now {
                return;
            }
            // As its driver does.
            self.now = self.now + Duration::from_micros(500);
            self.handle(Event::Tick);
        }
        panic!("it is never done with what is due at {:?}", self.now);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut script = Script(bytes);
    let mut node = Node::new(&mut script);
    node.handle(Event::Members(members(node.me, script.byte() | 0b1110)));
    for _ in 0..EVENTS_MAX {
        if script.0.is_empty() {
            break;
        }
        node.now = node.now + script.period();
        if let Some(event) = node.event(&mut script) {
            node.handle(event);
        }
    }
    node.comes_to_rest();
});
