//! The swarm as one node decides it: whom to ask for a piece, whom to serve, who reads the origin.
//!
//! Sans-IO: `Swarm::handle` takes an event and the time and returns actions; the agent carries them
//! out, and the simulator plays thousands of the same machines against each other. `download` is one
//! blob on its way here, `coordinator` the soft state about a blob that this node coordinates,
//! `slots` what it serves, `handover` what of it outlives the node, `hearing` what other
//! nodes say; `attest`, `target` and `token` are texts of the data plane. Not here: bytes,
//! connections, hashes, how the messages look on the wire.

pub mod attest;
mod budget;
mod choice;
mod circle;
mod compare;
mod complaints;
mod coordinated;
mod coordinator;
mod cx;
mod depth;
mod download;
mod event;
mod handover;
mod hearing;
mod invariants;
mod leases;
mod limits;
mod neighbour;
mod owner;
mod peer;
mod register;
mod room;
mod seat;
mod seed;
mod slots;
mod slowly;
mod strikes;
pub mod target;
#[cfg(test)]
mod tests;
mod time;
pub mod token;
mod turns;
mod waits;

use std::collections::BTreeMap;

pub use event::{
    Action, Event, FetchFailure, ImportFailure, Join, Lease, LeaseEnd, Message, Reading, Refusal, Rejection, RequestId,
};
pub use limits::Limits;
pub use peer::{Member, Members, PeerId, Zone, score};
pub use time::Time;

use self::coordinated::Coordinated;
use self::cx::Cx;
use self::depth::Depth;
use self::download::Download;
use self::handover::Handover;
use self::peer::Dice;
use self::register::Register;
use self::seat::AnswerTime;
use self::seed::Seed;
use self::slots::Slots;
use self::strikes::Strikes;
use self::turns::Turns;
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

/// The part of one node in the swarm.
#[derive(Debug)]
pub struct Swarm {
    node: Node,
    /// Blobs on their way here, and by their turns.
    downloads: BTreeMap<Digest, Download>,
    turns: Turns,
    /// Blobs that are here whole.
    held: BTreeMap<Digest, Layout>,
    coordinated: Coordinated,
    handover: Handover,
    seed: Seed,
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
    register: Register,
    dice: Dice,
    answers: AnswerTime,
    depth: Depth,
    /// When it heard of members first.
    born: Option<Time>,
    /// Until then it may know only some of them.
    settled_at: Time,
    /// It was told that it is about to go.
    is_going: bool,
}

impl Node {
    /// A node that has just started hears of the members one after the other.
    fn meets(&mut self, now: Time, members: Members) -> Members {
        let is_more = members.iter().any(|member| self.members.get(&member.id).is_none());
        let born = *self.born.get_or_insert(now);
        if is_more {
            let quiet = (now + self.limits.settle_quiet).min(born + self.limits.settle_max);
            self.settled_at = self.settled_at.max(quiet);
        }
        std::mem::replace(&mut self.members, members)
    }

    /// Beyond this zone nothing goes that a node of `zone` has, where each zone reads for itself.
    fn scope(&self, zone: Zone) -> Option<Zone> {
        self.limits.scope_is_zone.then_some(zone)
    }

    /// Who is to know that a blob is held, each once: those that may be asked for it, and those that keep it.
    fn told_of_holders(&self, members: &Members, blob: &Digest) -> Vec<PeerId> {
        let mut told = members.ranked(blob);
        told.truncate(HOLDS_TOLD);
        for seed in seed::told(members, blob, self.scope(self.zone)) {
            if !told.contains(&seed) {
                told.push(seed);
            }
        }
        told
    }

    /// Whether nobody ranks higher for the blob, as far as this node sees.
    fn is_first(&self, blob: &Digest) -> bool {
        self.members.ranked(blob).first().is_none_or(|first| *first == self.me)
    }

    fn cx<'a>(&'a mut self, now: Time, out: &'a mut Vec<Action>) -> Cx<'a> {
        Cx {
            now,
            me: self.me,
            zone: self.zone,
            limits: &self.limits,
            members: &self.members,
            strikes: &self.strikes,
            register: &mut self.register,
            free_slots: self.slots.free(now, &self.limits),
            upload_time: self.slots.piece_time(),
            is_settled: now >= self.settled_at,
            is_going: self.is_going,
            dice: &mut self.dice,
            answers: &mut self.answers,
            depth: &mut self.depth,
            out,
        }
    }
}

impl Swarm {
    /// A node that knows nobody yet. `seed` makes its choices by lot differ from those of others,
    /// and repeat when it is the same.
    pub fn new(me: PeerId, zone: Zone, limits: Limits, seed: u64) -> Self {
        let (slots, strikes, dice) = (Slots::default(), Strikes::default(), Dice::new(seed));
        Self {
            node: Node {
                me,
                zone,
                limits,
                members: Members::default(),
                slots,
                strikes,
                register: Register::default(),
                dice,
                answers: AnswerTime::default(),
                depth: Depth::default(),
                born: None,
                settled_at: Time::ZERO,
                is_going: false,
            },
            downloads: BTreeMap::new(),
            turns: Turns::new(me),
            held: BTreeMap::new(),
            coordinated: Coordinated::default(),
            handover: Handover::default(),
            seed: Seed::default(),
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
        self.coordinated.settle(now, self.node.settled_at, &self.node.limits);
        actions
    }

    /// When `Event::Tick` is due, unless something else happens before.
    pub fn deadline(&self) -> Time {
        let most = self.most();
        let downloads = self.downloads.values().map(|download| download.deadline(most, &self.node.limits));
        let others = [
            self.coordinated.deadline(),
            self.node.slots.deadline(),
            self.seed.deadline(&self.node.limits),
            self.handover.rooms.deadline(),
        ];
        downloads.chain(others).min().unwrap_or(Time::NEVER)
    }

    /// Members that it exchanges pieces of one blob with, for the blob with the most of them.
    pub fn neighbours(&self) -> usize {
        self.downloads.values().map(|download| download.neighbours.len()).max().unwrap_or(0)
    }

    fn dispatch(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Members(members) => {
                let before = self.node.meets(now, members);
                self.review(now, out);
                self.reseat(now, None, &before, out);
                self.tell_new_coordinators(&before, out);
            }
            Event::PeerLost(peer) => {
                self.node.slots.forget(&peer);
                let members = self.node.members.clone();
                self.reseat(now, Some(peer), &members, out);
                for (_, coordinator) in self.coordinated.iter_mut() {
                    coordinator.left(&peer, &mut self.node.cx(now, out));
                }
                self.coordinated.forget_idle();
                self.lost_room(peer, out);
                self.lost_taker(&peer, out);
            }
            // Its connection ends in a moment. What it said before that is no further offence.
            Event::Message { from, .. } if self.node.strikes.is_banned(now, &from) => {}
            Event::Message { from, blob, message } => self.heard(now, from, blob, message, out),
            Event::Want { blob, layout, have, can_import, turn } => {
                if self.want(now, blob, layout, have, can_import, out) {
                    self.turns.insert(turn, blob, layout.segments() == 1);
                }
            }
            Event::Unwant(blob) => {
                self.turns.remove(&blob);
                if let Some(mut download) = self.downloads.remove(&blob) {
                    download.leave(&mut self.node.cx(now, out));
                }
                self.taken(&blob, false, out);
            }
            Event::Proven { blob, layout } => {
                self.proven(now, blob, layout, out);
                self.taken(&blob, true, out);
                if self.seed.is_here(&blob) {
                    out.push(Action::Used(blob));
                }
                self.came(blob, out);
            }
            Event::Leave(blobs) => {
                self.goes(now, true, out);
                self.leave(now, blobs, out);
            }
            Event::Stay => {
                self.stay();
                self.goes(now, false, out);
            }
            Event::Withdraw => self.handover.is_withdrawn = true,
            Event::NotTaken(blob) => {
                self.taken(&blob, false, out);
                self.seed.failed(now, &blob, &self.node.limits);
            }
            Event::Gone(blob) => {
                if self.held.remove(&blob).is_some() {
                    for id in self.node.told_of_holders(&self.node.members, &blob) {
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
            Event::Importing { blob, piece } => {
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.importing(piece, &mut self.node.cx(now, out));
                }
            }
            Event::NotCompared { blob, peer } => {
                if let Some(download) = self.downloads.get_mut(&blob) {
                    download.not_compared(peer, &mut self.node.cx(now, out));
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
                let is_full = self.room() == 0;
                for download in self.downloads.values_mut() {
                    if is_full {
                        download.waits_in_turn(now);
                    }
                    download.tick(&mut self.node.cx(now, out));
                }
                for blob in self.coordinated.due_by(now) {
                    if let Some(coordinator) = self.coordinated.get_mut(&blob) {
                        coordinator.tick(&mut self.node.cx(now, out));
                    }
                }
                self.seed.tick(now, &self.node.limits, out);
                self.tick_rooms(now, out);
            }
        }
    }

    /// A peer sent, or vouched for, wrong bytes.
    fn strike(&mut self, now: Time, peer: PeerId, out: &mut Vec<Action>) {
        let period = self.node.strikes.strike(now, peer, &self.node.limits);
        out.push(Action::Ban { peer, period });
    }

    /// Pieces that may be asked for at a time.
    fn most(&self) -> usize {
        let of_one = self.downloads.values().map(Download::company);
        let (interested, size) = of_one.fold((0, 0), |(some, size), (more, larger)| (some.max(more), size.max(larger)));
        self.node.depth.most(&self.node.limits, interested, size)
    }

    /// Uploads to one peer at a time. Where nothing is on its way here, nobody knows how many want it.
    fn share(&self) -> u8 {
        let interested = self.downloads.values().map(|download| download.company().0).max().unwrap_or(0);
        let limits = &self.node.limits;
        if interested <= limits.few { limits.slots_per_peer_few } else { limits.slots_per_peer }
    }

    /// Pieces that may be asked for now.
    fn room(&self) -> usize {
        let asked: usize = self.downloads.values().map(Download::requests).sum();
        self.most().saturating_sub(asked)
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
        self.turns.remove(&blob);
        let mut told = self.node.told_of_holders(&self.node.members, &blob);
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
            let known = self.node.told_of_holders(before, blob);
            for to in self.node.told_of_holders(&self.node.members, blob) {
                if !known.contains(&to) {
                    out.push(Action::Send { to, blob: *blob, message: Message::Holds { size: layout.size() } });
                }
            }
        }
    }

    fn reseat(&mut self, now: Time, lost: Option<PeerId>, before: &Members, out: &mut Vec<Action>) {
        for download in self.downloads.values_mut() {
            download.reseat(lost, before, &mut self.node.cx(now, out));
        }
    }

    /// The members changed: does this node rank first now for what it coordinates?
    fn review(&mut self, now: Time, out: &mut Vec<Action>) {
        for (blob, coordinator) in self.coordinated.iter_mut() {
            let was_first = coordinator.is_first.take();
            coordinator.is_needed = false;
            // The others are looked at when somebody asks.
            if coordinator.incomplete > 0 {
                coordinator.is_first = Some(self.node.is_first(blob));
                if (was_first, coordinator.is_first) == (Some(false), Some(true)) {
                    coordinator.gather(&self.node.cx(now, out));
                }
                coordinator.grant(&mut self.node.cx(now, out));
            }
        }
    }

    fn asked(&mut self, now: Time, from: PeerId, blob: &Digest, piece: u32, request: RequestId, out: &mut Vec<Action>) {
        let index = u64::from(piece);
        let is_here = self.held.get(blob).is_some_and(|layout| index < layout.pieces())
            || self.downloads.get(blob).is_some_and(|download| download.have.has(index));
        let is_here = is_here && !self.handover.is_withdrawn;
        let share = self.share();
        let Node { slots, limits, members, .. } = &mut self.node;
        out.push(if !is_here {
            Action::Refuse { request, reason: Refusal::NotHere }
        } else if members.is_seed(&from) && !slots.are_at_leisure(now, limits) {
            // It keeps copies for later, and whoever else asks wants them now.
            Action::Refuse { request, reason: Refusal::Busy(limits.seed_pause) }
        } else if let Err(wait) = slots.take(now, request, from, *blob, (share, limits)) {
            Action::Refuse { request, reason: Refusal::Busy(wait) }
        } else {
            Action::Serve(request)
        });
    }

    /// Calls those that were refused, now that slots are free.
    fn call(&mut self, now: Time, out: &mut Vec<Action>) {
        let share = self.share();
        let Self { node, downloads, .. } = self;
        let wealth = |peer: &PeerId, blob: &Digest| downloads.get(blob).map_or(0, |download| download.wealth(peer));
        while let Some((to, blob)) = node.slots.call(now, (share, &node.limits), wealth) {
            out.push(Action::Send { to, blob, message: Message::Slot });
        }
    }

    /// Asks for pieces as far as the node's requests in flight allow, first blob first.
    fn fill(&mut self, now: Time, out: &mut Vec<Action>) {
        let mut room = self.room();
        for blob in self.turns.iter() {
            if let Some(download) = self.downloads.get_mut(blob) {
                room -= download.fill(room, &mut self.node.cx(now, out)).min(room);
                if room == 0 {
                    download.waits_in_turn(now);
                }
            }
        }
    }
}

/// How many of the ranked know who holds a blob: its coordinator, and the first backup.
const HOLDS_TOLD: usize = 2;
