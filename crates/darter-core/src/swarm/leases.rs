//! Which segments of a blob one zone has got, which are being read and by whom.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::coordinator::Interested;
use super::event::{Join, Reading};
use super::owner::pieces_of;
use super::peer::PeerId;
use super::register::Charge;
use super::time::Time;
use crate::pieces::Layout;

/// Leases that a joiner can bring.
const ADOPTED_MAX: usize = 64;

/// Who is slower than this many times gets hardly a lease anyway.
const WEIGHT_MAX: u32 = 64;

/// Pieces over which the pace is smoothed: those of all leases come in bursts.
const PACE_OVER: u32 = 16;

/// Who is so many times slower than the node in the middle gets its share and no more.
const SLOW: u32 = 4;

/// A lease is late that shows nothing while each of the others shows so many pieces.
const LATE: u32 = 4;

/// An owner's word that bytes come is taken for so many times the patience: it may say so and have nothing.
const WORD: u32 = 30;

#[derive(Debug)]
pub(super) struct Table {
    segments: Vec<Segment>,
    /// No segment before this one is free.
    first_free: usize,
    running: BTreeMap<u32, Running>,
    /// Nodes that may own more, those first that owned least.
    ready: BTreeSet<Turn>,
    /// How many of them have each weight.
    weights: BTreeMap<u32, usize>,
    /// How long it takes from one piece to the next, whoever reads it, smoothed.
    pace: Duration,
    /// When the last piece came, or the first lease of a time without any was given.
    moved: Time,
    /// When a piece came to the owner of a lease last, or all were told that one is coming.
    showed: Time,
    /// Pieces that came in all.
    arrivals: u64,
    /// The shortest time that an owner's uploads take.
    fastest: Duration,
    /// On whose account this is.
    _charge: Charge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Free,
    Leased,
    /// Its owner got it whole.
    Done(PeerId),
}

#[derive(Debug)]
struct Running {
    owner: PeerId,
    from: Option<PeerId>,
    touched: Time,
    /// When its owner last said that bytes come.
    at_it: Time,
    /// `arrivals` at that time.
    seen: u64,
    /// How many leases ran then, this one included: its turn may come after that of each.
    among: usize,
}

impl Running {
    /// One that begins while so many pieces have come in all, among so many leases.
    fn new(owner: PeerId, from: Option<PeerId>, now: Time, (seen, among): (u64, usize)) -> Self {
        Self { owner, from, touched: now, at_it: now, seen, among }
    }
}

/// Whose turn it is: fewest leases now, fewest in all for the uplink it has, then a fixed shuffle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    leases: u8,
    burden: u32,
    lot: u64,
    id: PeerId,
    weight: u32,
}

impl Turn {
    fn of(id: PeerId, node: &Interested) -> Self {
        Self {
            leases: node.leases,
            burden: node.granted.saturating_mul(node.weight),
            lot: id.lot(),
            id,
            weight: node.weight,
        }
    }
}

impl Table {
    pub(super) fn new(segments: u64, charge: Charge) -> Self {
        Self {
            segments: vec![Segment::Free; usize::try_from(segments).unwrap_or(0)],
            first_free: 0,
            running: BTreeMap::new(),
            ready: BTreeSet::new(),
            weights: BTreeMap::new(),
            pace: Duration::ZERO,
            moved: Time::ZERO,
            showed: Time::ZERO,
            arrivals: 0,
            fastest: Duration::MAX,
            _charge: charge,
        }
    }

    /// Takes over what a joiner brings: segments that it has, and those that it reads. The sources of
    /// the latter, which are its leases now. What it had once and has no more is to be read again, unless its
    /// next owner finds somebody who has it.
    pub(super) fn adopt(&mut self, layout: Layout, owner: PeerId, join: &Join, now: Time) -> Vec<Option<PeerId>> {
        let have = &join.have;
        let has_some = have.count() > 0;
        for segment in (0_u32..).take(self.segments.len()) {
            let is_whole = || pieces_of(layout, segment).all(|piece| have.has(u64::from(piece)));
            match self.segments[segment as usize] {
                Segment::Free if has_some && is_whole() => {
                    self.segments[segment as usize] = Segment::Done(owner);
                }
                Segment::Done(other) if other == owner && !is_whole() => _ = self.free(segment),
                _ => {}
            }
        }
        let mut adopted = Vec::new();
        // A node that has more at a time than anybody is given has made them up.
        for Reading { segment, from } in join.leased.iter().take(ADOPTED_MAX) {
            if self.segments.get(*segment as usize) == Some(&Segment::Free) {
                self.segments[*segment as usize] = Segment::Leased;
                self.running.insert(*segment, Running::new(owner, *from, now, (self.arrivals, self.running.len() + 1)));
                adopted.push(*from);
            }
        }
        self.skip_taken();
        adopted
    }

    fn skip_taken(&mut self) {
        let free = self.segments[self.first_free..].iter().position(|segment| *segment == Segment::Free);
        self.first_free = free.map_or(self.segments.len(), |more| self.first_free + more);
    }

    pub(super) fn next_free(&self) -> Option<u32> {
        (self.first_free < self.segments.len()).then(|| u32::try_from(self.first_free).ok()).flatten()
    }

    /// The last of at least so many that are free.
    pub(super) fn last_free(&self, of: usize) -> Option<u32> {
        let free = || self.segments.iter().enumerate().rev().filter(|(_, segment)| **segment == Segment::Free);
        free().nth(of.saturating_sub(1)).and_then(|_| u32::try_from(free().next()?.0).ok())
    }

    /// Who reads the segment, or read it.
    pub(super) fn owner(&self, segment: u32) -> Option<PeerId> {
        match self.segments.get(segment as usize)? {
            Segment::Free => None,
            Segment::Leased => self.running.get(&segment).map(|running| running.owner),
            Segment::Done(owner) => Some(*owner),
        }
    }

    /// Where the segment is being read.
    pub(super) fn source(&self, segment: u32) -> Option<Option<PeerId>> {
        self.running.get(&segment).map(|running| running.from)
    }

    /// Who has the segment or reads it otherwise than from another zone: two zones that wait for each
    /// other would wait for ever.
    pub(super) fn root(&self, segment: u32, is_elsewhere: impl Fn(&PeerId) -> bool) -> Option<PeerId> {
        match self.segments.get(segment as usize)? {
            Segment::Free => None,
            Segment::Leased => {
                let running = self.running.get(&segment)?;
                (!running.from.as_ref().is_some_and(is_elsewhere)).then_some(running.owner)
            }
            Segment::Done(owner) => Some(*owner),
        }
    }

    /// The next in turn with fewer than `cap` leases that fits. A slow node has read what it was given long
    /// before the others have it from there, so that its turn comes soon: it gets its share of all and no
    /// more, and the rest waits for those that are busy now, if any other fits.
    pub(super) fn owner_for(&self, cap: u8, fits: impl Fn(&PeerId) -> bool) -> Option<PeerId> {
        let next = self.ready.iter().take_while(|turn| turn.leases < cap).find(|turn| fits(&turn.id))?;
        let slow = self.median_weight().saturating_mul(SLOW);
        if next.weight <= slow {
            return Some(next.id);
        }
        let others = || self.ready.iter().filter(|turn| turn.weight <= slow && fits(&turn.id));
        match others().map(|turn| turn.burden).min() {
            Some(least) if next.burden > least => others().find(|turn| turn.leases < cap).map(|turn| turn.id),
            _ => Some(next.id),
        }
    }

    /// That of the node in the middle.
    fn median_weight(&self) -> u32 {
        let middle = self.ready.len() / 2;
        let mut below = 0;
        let found = self.weights.iter().find(|(_, nodes)| {
            below += **nodes;
            below > middle
        });
        found.map_or(1, |(weight, _)| *weight)
    }

    /// A node's leases changed: it moves to another place in the turn. `None`: it had or has none.
    pub(super) fn turn(&mut self, id: PeerId, before: Option<&Interested>, after: Option<&Interested>) {
        let before = before.map(|node| Turn::of(id, node)).filter(|turn| self.ready.remove(turn));
        if let Some(nodes) = before.and_then(|turn| self.weights.get_mut(&turn.weight)) {
            *nodes -= 1;
        }
        let after = after.filter(|node| !node.is_complete).map(|node| Turn::of(id, node));
        if let Some(turn) = after.filter(|turn| self.ready.insert(*turn)) {
            *self.weights.entry(turn.weight).or_default() += 1;
        }
    }

    pub(super) fn lease(&mut self, segment: u32, owner: PeerId, from: Option<PeerId>, now: Time) {
        if self.running.is_empty() {
            self.moved = now;
        }
        self.segments[segment as usize] = Segment::Leased;
        self.running.insert(segment, Running::new(owner, from, now, (self.arrivals, self.running.len() + 1)));
        self.skip_taken();
    }

    /// An owner got a piece: it is at work, and comes to its other leases in turn, whose sources may be slower
    /// than this one. Where it reads the segment, if it is its own.
    pub(super) fn touch(&mut self, segment: u32, owner: &PeerId, now: Time) -> Option<Option<PeerId>> {
        let among = self.running.len();
        let from = self.running.get(&segment).filter(|running| running.owner == *owner)?.from;
        self.arrivals += 1;
        self.showed = now;
        for running in self.running.values_mut().filter(|running| running.owner == *owner) {
            (running.touched, running.seen, running.among) = (now, self.arrivals, among);
        }
        // The last segment may be a few bytes, which say nothing of how long the others take.
        if segment as usize + 1 < self.segments.len() {
            let gap = now.since(self.moved);
            self.pace = if self.pace.is_zero() { gap } else { (self.pace * (PACE_OVER - 1) + gap) / PACE_OVER };
            self.moved = now;
        }
        Some(from)
    }

    /// Bytes of a piece come to an owner. Whether it is its own, and nothing was shown or told for so long that
    /// all are to be told.
    pub(super) fn reads_on(&mut self, segment: u32, owner: &PeerId, now: Time, silence: Duration) -> bool {
        let Some(running) = self.running.get_mut(&segment).filter(|running| running.owner == *owner) else {
            return false;
        };
        running.at_it = now;
        let is_news = now.since(self.showed) >= silence;
        if is_news {
            self.showed = now;
        }
        is_news
    }

    /// An owner ends its lease. Where it read the segment, if it was its own.
    pub(super) fn end(&mut self, segment: u32, owner: &PeerId, is_done: bool) -> Option<Option<PeerId>> {
        let running = self.running.get(&segment).filter(|running| running.owner == *owner)?;
        let from = running.from;
        self.running.remove(&segment);
        if is_done {
            self.segments[segment as usize] = Segment::Done(*owner);
        } else {
            self.free(segment);
        }
        Some(from)
    }

    /// How many times slower than the fastest owner one is whose uploads take `upload_time`.
    pub(super) fn weigh(&mut self, upload_time: Duration) -> u32 {
        if upload_time.is_zero() {
            return 1;
        }
        self.fastest = self.fastest.min(upload_time);
        let times = upload_time.as_micros() / self.fastest.as_micros().max(1);
        u32::try_from(times).unwrap_or(WEIGHT_MAX).clamp(1, WEIGHT_MAX)
    }

    /// The segment has to be read again. False: somebody reads it already.
    pub(super) fn free(&mut self, segment: u32) -> bool {
        let Some(state) = self.segments.get_mut(segment as usize) else { return false };
        let is_read = self.running.contains_key(&segment);
        if !is_read {
            *state = Segment::Free;
            self.first_free = self.first_free.min(segment as usize);
        }
        !is_read
    }

    /// Frees what a dead peer read, or what was read from it: (owner, source) of each.
    pub(super) fn free_leases_of(&mut self, peer: &PeerId) -> Vec<(PeerId, Option<PeerId>)> {
        self.free_where(|_, running| running.owner == *peer || running.from == Some(*peer))
    }

    /// Frees what is read from a peer.
    pub(super) fn free_reads_from(&mut self, source: &PeerId) -> Vec<(PeerId, Option<PeerId>)> {
        self.free_where(|_, running| running.from == Some(*source))
    }

    /// What a peer read is worth nothing: it has to be read again.
    pub(super) fn free_done_by(&mut self, owner: &PeerId) {
        for segment in (0_u32..).take(self.segments.len()) {
            if self.segments[segment as usize] == Segment::Done(*owner) {
                self.free(segment);
            }
        }
    }

    /// When a lease is late. All share the source: whose owner shows nothing while each of the others showed some
    /// pieces is dead, or as good as dead, and holds up everybody. Where the others show nothing either,
    /// the source may be slow.
    fn late_at(&self, running: &Running, least: Duration) -> Time {
        let leases = u32::try_from(self.running.len().max(running.among)).unwrap_or(u32::MAX);
        let is_outrun = self.arrivals - running.seen >= u64::from(leases.saturating_mul(LATE));
        let slow = self.pace.saturating_mul(leases).saturating_mul(LATE);
        if is_outrun {
            return running.touched + least;
        }
        let said = (running.at_it + least * 2).min(running.touched + least * WORD);
        (running.touched + slow.max(least * 2)).max(said)
    }

    pub(super) fn free_overdue(&mut self, now: Time, least: Duration) -> Vec<(PeerId, Option<PeerId>)> {
        let late = self.running.iter().filter(|(_, running)| self.late_at(running, least) <= now);
        let late: BTreeSet<u32> = late.map(|(segment, _)| *segment).collect();
        self.free_where(|segment, _| late.contains(&segment))
    }

    fn free_where(&mut self, is_over: impl Fn(u32, &Running) -> bool) -> Vec<(PeerId, Option<PeerId>)> {
        let over: Vec<u32> = self
            .running
            .iter()
            .filter(|(segment, running)| is_over(**segment, running))
            .map(|(segment, _)| *segment)
            .collect();
        over.into_iter()
            .filter_map(|segment| {
                let running = self.running.remove(&segment)?;
                self.free(segment);
                Some((running.owner, running.from))
            })
            .collect()
    }

    /// When the next lease is late, unless it shows something before.
    pub(super) fn deadline(&self, least: Duration) -> Time {
        self.running.values().map(|running| self.late_at(running, least)).min().unwrap_or(Time::NEVER)
    }

    /// Owner and source of each lease that runs.
    pub(super) fn running(&self) -> impl Iterator<Item = (PeerId, Option<PeerId>)> {
        self.running.values().map(|running| (running.owner, running.from))
    }

    /// Origin reads that run.
    pub(super) fn imports(&self) -> u32 {
        u32::try_from(self.running.values().filter(|running| running.from.is_none()).count()).unwrap_or(u32::MAX)
    }
}
