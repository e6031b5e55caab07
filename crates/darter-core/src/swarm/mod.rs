//! The swarm as one node decides it: whom to ask for a piece, whom to serve, who reads the origin.
//!
//! Sans-IO: `Swarm::handle` takes an event and the time and returns actions; the agent carries them
//! out, and the simulator plays thousands of the same machines against each other. `download` is one
//! blob on its way here, `coordinator` the soft state about a blob that this node coordinates,
//! `slots` what it serves, `handover` what of it outlives the node; `attest`, `target` and `token` are texts of the data plane. Not here: bytes,
//! connections, hashes, how the messages look on the wire.

pub mod attest;
mod budget;
mod choice;
mod coordinator;
mod download;
mod event;
mod handover;
mod invariants;
mod leases;
mod limits;
mod neighbour;
mod owner;
mod peer;
mod seat;
mod slots;
mod strikes;
pub mod target;
#[cfg(test)]
mod tests;
mod time;
pub mod token;
mod waits;

use std::collections::BTreeMap;
use std::time::Duration;

pub use event::{Action, Event, FetchFailure, ImportFailure, Join, Lease, LeaseEnd, Message, Refusal, RequestId};
pub use limits::Limits;
pub use peer::{Member, Members, PeerId, Zone, score};
pub use time::Time;

use self::coordinator::Coordinator;
use self::download::Download;
use self::handover::Handover;
use self::peer::Dice;
use self::slots::Slots;
use self::strikes::Strikes;
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

/// How many of the ranked know who holds a blob: its coordinator, and the first backup.
const HOLDS_TOLD: usize = 2;

/// The part of one node in the swarm.
#[derive(Debug)]
pub struct Swarm {
    node: Node,
    /// Blobs on their way here, and by their turns.
    downloads: BTreeMap<Digest, Download>,
    order: Vec<(u64, Digest)>,
    /// Blobs that are here whole.
    held: BTreeMap<Digest, Layout>,
    coordinated: BTreeMap<Digest, Coordinator>,
    handover: Handover,
}

/// What belongs to no blob.
#[derive(Debug)]
struct Node {
    me: PeerId,
    zone: Zone,
    limits: Limits,
    members: Members,
    slots: Slots,
    strikes: Strikes,
    dice: Dice,
}

impl Node {
    fn cx<'a>(&'a mut self, now: Time, out: &'a mut Vec<Action>) -> Cx<'a> {
        Cx {
            now,
            me: self.me,
            zone: self.zone,
            limits: &self.limits,
            members: &self.members,
            strikes: &self.strikes,
            free_slots: self.slots.free(now, &self.limits),
            upload_time: self.slots.piece_time(),
            dice: &mut self.dice,
            out,
        }
    }
}

/// What every part needs of the whole while it handles an event.
struct Cx<'a> {
    now: Time,
    me: PeerId,
    zone: Zone,
    limits: &'a Limits,
    members: &'a Members,
    strikes: &'a Strikes,
    dice: &'a mut Dice,
    free_slots: u8,
    upload_time: Duration,
    out: &'a mut Vec<Action>,
}

impl Cx<'_> {
    fn send(&mut self, to: PeerId, blob: Digest, message: Message) {
        self.out.push(Action::Send { to, blob, message });
    }

    fn zone_of(&self, id: &PeerId) -> Zone {
        if *id == self.me { self.zone } else { self.members.get(id).map_or(self.zone, |member| member.zone) }
    }
}

impl Swarm {
    /// A node that knows nobody yet. `seed` makes its choices by lot differ from those of others,
    /// and repeat when it is the same.
    pub fn new(me: PeerId, zone: Zone, limits: Limits, seed: u64) -> Self {
        let (slots, strikes, dice) = (Slots::default(), Strikes::default(), Dice::new(seed));
        Self {
            node: Node { me, zone, limits, members: Members::default(), slots, strikes, dice },
            downloads: BTreeMap::new(),
            order: Vec::new(),
            held: BTreeMap::new(),
            coordinated: BTreeMap::new(),
            handover: Handover::default(),
        }
    }

    /// Takes in what happened and says what to do, in this order.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.dispatch(now, event, &mut out);
        // What this node tells itself, as coordinator of what it wants, needs no wire.
        let mut actions = Vec::with_capacity(out.len());
        let mut pending: std::collections::VecDeque<Action> = out.into();
        while let Some(action) = pending.pop_front() {
            match action {
                Action::Send { to, blob, message } if to == self.node.me => {
                    let mut more = Vec::new();
                    self.heard(now, self.node.me, blob, message, &mut more);
                    pending.extend(more);
                }
                action => actions.push(action),
            }
        }
        self.fill(now, &mut actions);
        self.call(now, &mut actions);
        actions
    }

    /// When `Event::Tick` is due, unless something else happens before.
    pub fn deadline(&self, now: Time) -> Time {
        let downloads = self.downloads.values().map(|download| download.deadline(&self.node.limits));
        let coordinated = self.coordinated.values().map(|coordinator| coordinator.deadline(now, &self.node.limits));
        downloads.chain(coordinated).min().unwrap_or(Time::NEVER).min(self.node.slots.deadline())
    }

    fn dispatch(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Members(members) => {
                let before = std::mem::replace(&mut self.node.members, members);
                self.reseat(now, None, out);
                self.tell_new_coordinators(&before, out);
            }
            Event::PeerLost(peer) => {
                self.node.slots.forget(&peer);
                self.reseat(now, Some(peer), out);
                for coordinator in self.coordinated.values_mut() {
                    coordinator.left(&peer, &mut self.node.cx(now, out));
                }
                self.lost_taker(&peer, out);
            }
            Event::Message { from, blob, message } => self.heard(now, from, blob, message, out),
            Event::Want { blob, layout, have, can_import, turn } => {
                if self.want(now, blob, layout, have, can_import, out) {
                    let at = self.order.partition_point(|(other, _)| *other <= turn);
                    self.order.insert(at, (turn, blob));
                }
            }
            Event::Unwant(blob) => {
                self.order.retain(|(_, other)| *other != blob);
                if let Some(mut download) = self.downloads.remove(&blob) {
                    download.leave(&mut self.node.cx(now, out));
                }
                self.taken(&blob, false, out);
            }
            Event::Proven { blob, layout } => {
                self.proven(now, blob, layout, out);
                self.taken(&blob, true, out);
            }
            Event::Leave(blobs) => self.leave(blobs, out),
            Event::Withdraw => self.handover.is_withdrawn = true,
            Event::NotTaken(blob) => self.taken(&blob, false, out),
            Event::Gone(blob) => {
                if self.held.remove(&blob).is_some() {
                    for id in self.node.members.ranked(&blob).into_iter().take(HOLDS_TOLD) {
                        out.push(Action::Send { to: id, blob, message: Message::Leave });
                    }
                }
            }
            Event::Fetched { blob, piece, peer } => {
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.arrived(piece, Some(peer), &mut self.node.cx(now, out));
                }
            }
            Event::FetchFailed { blob, piece, peer, reason } => {
                if reason == FetchFailure::Corrupt {
                    self.strike(now, peer, out);
                }
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.fetch_failed(piece, peer, reason, &mut self.node.cx(now, out));
                }
            }
            Event::Imported { blob, piece } => {
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.arrived(piece, None, &mut self.node.cx(now, out));
                }
            }
            Event::ImportFailed { blob, segment, reason } => {
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.import_failed(segment, reason, &mut self.node.cx(now, out));
                }
            }
            Event::Lied(peer) => self.strike(now, peer, out),
            Event::Asked { from, blob, piece, request } => self.asked(now, from, &blob, piece, request, out),
            Event::Served(request) => self.node.slots.give_back(now, request),
            Event::Tick => {
                self.node.slots.tick(now);
                for download in self.downloads.values_mut() {
                    download.tick(&mut self.node.cx(now, out));
                }
                for coordinator in self.coordinated.values_mut() {
                    coordinator.tick(&mut self.node.cx(now, out));
                }
            }
        }
    }

    /// A peer sent, or vouched for, wrong bytes.
    fn strike(&mut self, now: Time, peer: PeerId, out: &mut Vec<Action>) {
        let period = self.node.strikes.strike(now, peer, &self.node.limits);
        out.push(Action::Ban { peer, period });
    }

    fn heard(&mut self, now: Time, from: PeerId, blob: Digest, message: Message, out: &mut Vec<Action>) {
        match message {
            Message::Join(join) => {
                if let Some(coordinator) = coordinate(&mut self.coordinated, blob, join.size, from, &self.node) {
                    coordinator.joined(from, &join, &mut self.node.cx(now, out));
                }
            }
            Message::Holds { size } => {
                if let Some(coordinator) = coordinate(&mut self.coordinated, blob, size, from, &self.node) {
                    coordinator.holds(from, &mut self.node.cx(now, out));
                }
            }
            Message::Leave => {
                if let Some(coordinator) = self.coordinated.get_mut(&blob) {
                    coordinator.left(&from, &mut self.node.cx(now, out));
                }
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.drop_neighbour(&from, &mut self.node.cx(now, out));
                }
            }
            Message::Take { size } => self.asked_to_take(now, from, blob, size, out),
            Message::TakeEnd { is_kept } => self.take_ended(from, &blob, is_kept, out),
            Message::Slot => self.offered(now, from, blob, out),
            Message::NoNeed => self.node.slots.not_needed(&from, &blob),
            Message::Hello { have, wants_answer } => self.heard_hello(now, from, blob, have, wants_answer, out),
            message => self.heard_in_session(now, from, blob, message, out),
        }
    }

    /// A neighbour keeps a slot for us: the piece is chosen now.
    fn offered(&mut self, now: Time, from: PeerId, blob: Digest, out: &mut Vec<Action>) {
        let room = self.room();
        let is_used = self
            .downloads
            .get_mut(&blob)
            .is_some_and(|download| download.offered(from, room, &mut self.node.cx(now, out)));
        if !is_used {
            out.push(Action::Send { to: from, blob, message: Message::NoNeed });
        }
    }

    /// Pieces that may be asked for now.
    fn room(&self) -> usize {
        let asked: usize = self.downloads.values().map(Download::requests).sum();
        self.node.limits.in_flight.saturating_sub(asked)
    }

    /// What only those say and hear that know each other about the blob already.
    fn heard_in_session(&mut self, now: Time, from: PeerId, blob: Digest, message: Message, out: &mut Vec<Action>) {
        let coordinator = self.coordinated.get_mut(&blob);
        let download = self.downloads.get_mut(&blob);
        match (message, coordinator, download) {
            (Message::Welcome { neighbours, interested }, _, Some(download)) => {
                download.welcomed(from, &neighbours, interested, &mut self.node.cx(now, out));
            }
            (Message::Lease(lease), _, Some(download)) => download.leased(from, lease, &mut self.node.cx(now, out)),
            (Message::Have { pieces, free_slots, interested }, _, Some(download)) => {
                download.heard_have(from, &pieces, free_slots, interested, now);
            }
            (Message::Released { piece }, Some(coordinator), _) => {
                coordinator.released(from, piece, &mut self.node.cx(now, out));
            }
            (Message::LeaseEnd { segment, end, upload_time }, Some(coordinator), _) => {
                coordinator.lease_ended(from, segment, (end, upload_time), &mut self.node.cx(now, out));
            }
            (Message::Missing { segments, without }, Some(coordinator), _) => {
                coordinator.missing(from, &segments, &without, &mut self.node.cx(now, out));
            }
            // Late words about a blob that is done with, here or there.
            _ => {}
        }
    }

    fn heard_hello(
        &mut self,
        now: Time,
        from: PeerId,
        blob: Digest,
        have: Bitfield,
        answer: bool,
        out: &mut Vec<Action>,
    ) {
        if let Some(download) = self.downloads.get_mut(&blob) {
            download.heard_hello(from, have, answer, &mut self.node.cx(now, out));
        } else if let Some(layout) = self.held.get(&blob).filter(|_| answer) {
            let have = Bitfield::full(layout.pieces());
            out.push(Action::Send { to: from, blob, message: Message::Hello { have, wants_answer: false } });
        } else if answer {
            out.push(Action::Send { to: from, blob, message: Message::Leave });
        }
    }

    /// Whether it is news.
    fn want(
        &mut self,
        now: Time,
        blob: Digest,
        layout: Layout,
        have: Bitfield,
        can_import: bool,
        out: &mut Vec<Action>,
    ) -> bool {
        if self.downloads.contains_key(&blob) || have.len() != layout.pieces() {
            return false;
        }
        let download = Download::new(blob, layout, have, can_import, &mut self.node.cx(now, out));
        self.downloads.insert(blob, download);
        true
    }

    fn proven(&mut self, now: Time, blob: Digest, layout: Layout, out: &mut Vec<Action>) {
        self.order.retain(|(_, other)| *other != blob);
        let mut told = self.node.members.ranked(&blob);
        told.truncate(HOLDS_TOLD);
        if let Some(mut download) = self.downloads.remove(&blob) {
            let cx = &mut self.node.cx(now, out);
            // The word about the last pieces may come later than that about the whole.
            download.is_whole(cx);
            download.tell_now(cx);
            // Where the blob came by another way, what is on its way is of no use any more.
            download.cancel(cx);
            told.push(download.coordinator(cx));
        }
        told.sort_unstable();
        told.dedup();
        for to in told {
            out.push(Action::Send { to, blob, message: Message::Holds { size: layout.size() } });
        }
        self.held.insert(blob, layout);
    }

    /// Tells those that came to coordinate a blob that is here: a warm blob must not be read again
    /// because its coordinator died.
    fn tell_new_coordinators(&self, before: &Members, out: &mut Vec<Action>) {
        for (blob, layout) in &self.held {
            let known = before.ranked(blob);
            for to in self.node.members.ranked(blob).into_iter().take(HOLDS_TOLD) {
                if !known.iter().take(HOLDS_TOLD).any(|id| *id == to) {
                    out.push(Action::Send { to, blob: *blob, message: Message::Holds { size: layout.size() } });
                }
            }
        }
    }

    fn reseat(&mut self, now: Time, lost: Option<PeerId>, out: &mut Vec<Action>) {
        for download in self.downloads.values_mut() {
            download.reseat(lost, &mut self.node.cx(now, out));
        }
    }

    fn asked(&mut self, now: Time, from: PeerId, blob: &Digest, piece: u32, request: RequestId, out: &mut Vec<Action>) {
        let index = u64::from(piece);
        let is_here = self.held.get(blob).is_some_and(|layout| index < layout.pieces())
            || self.downloads.get(blob).is_some_and(|download| download.have.has(index));
        let is_here = is_here && !self.handover.is_withdrawn;
        let Node { slots, limits, .. } = &mut self.node;
        out.push(if !is_here {
            Action::Refuse { request, reason: Refusal::NotHere }
        } else if let Err(wait) = slots.take(now, request, from, *blob, limits) {
            Action::Refuse { request, reason: Refusal::Busy(wait) }
        } else {
            Action::Serve(request)
        });
    }

    /// Calls those that were refused, now that slots are free.
    fn call(&mut self, now: Time, out: &mut Vec<Action>) {
        let Self { node, downloads, .. } = self;
        let wealth = |peer: &PeerId, blob: &Digest| downloads.get(blob).map_or(0, |download| download.wealth(peer));
        while let Some((to, blob)) = node.slots.call(now, &node.limits, wealth) {
            out.push(Action::Send { to, blob, message: Message::Slot });
        }
    }

    /// Asks for pieces as far as the node's requests in flight allow, first blob first.
    fn fill(&mut self, now: Time, out: &mut Vec<Action>) {
        let mut room = self.room();
        for (_, blob) in &self.order {
            if let Some(download) = self.downloads.get_mut(blob) {
                room -= download.fill(room, &mut self.node.cx(now, out)).min(room);
            }
        }
    }
}

/// The state about a blob, made when somebody speaks of it first.
///
/// Who names another size than those before is wrong, or they were; sha256 tells neither. Somebody who
/// wants the blob is believed over what others said who do not; the one that is not heard goes to the
/// next in rank, in the end to itself.
fn coordinate<'a>(
    coordinated: &'a mut BTreeMap<Digest, Coordinator>,
    blob: Digest,
    size: u64,
    from: PeerId,
    node: &Node,
) -> Option<&'a mut Coordinator> {
    if !coordinated.contains_key(&blob) && coordinated.len() >= node.limits.blobs_max {
        let oldest = coordinated.iter().min_by_key(|(_, state)| state.used).map(|(blob, _)| *blob);
        oldest.map(|blob| coordinated.remove(&blob));
    }
    let made = || Coordinator::new(blob, Layout::new(size), &node.limits);
    let state = coordinated.entry(blob).or_insert_with(made);
    if state.layout.size() != size && (state.interested.is_empty() || from == node.me) {
        *state = made();
    }
    (state.layout.size() == size).then_some(state)
}
