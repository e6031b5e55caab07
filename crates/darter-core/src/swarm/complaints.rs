//! What nodes complain of at the coordinator: nobody gives them a segment, somebody sent wrong bytes.
//!
//! Who misses something meets its owner, then others by lot. What nobody gets from its owner is read
//! again by another; so is all that was read by one who sent wrong bytes to two.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use super::Cx;
use super::coordinator::{Coordinator, Interested};
use super::event::Message;
use super::peer::{PeerId, Zone};
use super::time::Time;

/// Introductions remembered, so that the next complaint about a segment leads further.
const INTRODUCED_MAX: usize = 65_536;

/// So often a node that misses a segment is sent to somebody else, before the segment is read again.
const INTRODUCTIONS: u8 = 8;

/// One accuser may lie.
const ACCUSERS: usize = 2;

#[derive(Debug)]
pub(super) struct Complaints {
    /// How often somebody complained of a segment, and when first.
    introduced: BTreeMap<(u32, PeerId), (u8, Time)>,
    /// Who sent wrong bytes, as others say.
    accused: BTreeMap<PeerId, BTreeSet<PeerId>>,
}

impl Complaints {
    pub(super) const fn new() -> Self {
        Self { introduced: BTreeMap::new(), accused: BTreeMap::new() }
    }

    pub(super) fn is_trusted(&self, id: &PeerId) -> bool {
        self.accused.get(id).is_none_or(|accusers| accusers.len() < ACCUSERS)
    }

    /// How often `from` complained of the segment, this time included, and when first.
    fn count(&mut self, segment: u32, from: PeerId, now: Time) -> (u8, Time) {
        if self.introduced.len() >= INTRODUCED_MAX {
            self.introduced.clear();
        }
        let (times, first) = self.introduced.entry((segment, from)).or_insert((0, now));
        *times = times.saturating_add(1);
        (*times, *first)
    }

    /// How many complained of the segment more than once, first before this time: those who met its owner in vain.
    fn in_vain(&self, segment: u32, before: impl Fn(Time) -> bool) -> usize {
        let by_all = self.introduced.range(by_all(segment));
        by_all.filter(|(_, (times, first))| *times > 1 && before(*first)).count()
    }

    /// It touches no other segment: whoever complains of many must not make this node look at all of them
    /// for each.
    pub(super) fn settle(&mut self, segment: u32) {
        let settled: Vec<_> = self.introduced.range(by_all(segment)).map(|(entry, _)| *entry).collect();
        for entry in settled {
            self.introduced.remove(&entry);
        }
    }
}

/// The entries of one segment.
fn by_all(segment: u32) -> RangeInclusive<(u32, PeerId)> {
    (segment, PeerId::from_bytes([0; 32]))..=(segment, PeerId::from_bytes([u8::MAX; 32]))
}

impl Coordinator {
    /// Nobody around `from` has what it misses: it meets the owners, or somebody reads it again.
    pub(super) fn missing(&mut self, from: PeerId, segments: &[u32], without: &[PeerId], cx: &mut Cx<'_>) {
        self.used = cx.now;
        self.is_needed = true;
        let Some(zone) = self.interested.get(&from).map(|node| node.zone) else { return };
        for accused in without {
            self.accuse(from, *accused, cx.me);
        }
        if !self.complaints.is_trusted(&from) {
            return;
        }
        let mut met = Vec::new();
        for segment in segments.iter().take(cx.limits.missing_max) {
            met.extend(self.meet_for(from, zone, *segment, without, cx));
        }
        met.sort_unstable();
        met.dedup();
        if !met.is_empty() {
            let interested = self.count();
            cx.send(from, self.blob, Message::Welcome { neighbours: met, holders: Vec::new(), interested });
        }
        self.grant(cx);
    }

    /// Whom `from` should meet for a segment that it misses; nobody, where it has to be read again.
    fn meet_for(
        &mut self,
        from: PeerId,
        zone: Zone,
        segment: u32,
        without: &[PeerId],
        cx: &mut Cx<'_>,
    ) -> Option<PeerId> {
        let table = self.tables.get(&zone)?;
        let owner = table.owner(segment)?;
        if let Some(source) = table.source(segment).filter(|_| owner == from) {
            // It is its own to read: the lease was lost on its way.
            self.tell_lease(segment, source, owner, cx);
            return None;
        }
        let (times, first) = self.complaints.count(segment, from, cx.now);
        let gives = |id: &PeerId| self.interested.contains_key(id) && *id != from && !without.contains(id);
        if times == 1 && gives(&owner) {
            return Some(owner);
        }
        // The owner's word that it has it may be on its way to the others still.
        let is_old = |first| cx.now.since(first) >= cx.limits.vain_patience;
        // It may be that only those two cannot talk: then others have it from the owner by now.
        let is_given = self.complaints.in_vain(segment, is_old) * 2 < self.incomplete && times <= INTRODUCTIONS;
        if (is_given || !is_old(first)) && self.interested.contains_key(&owner) {
            return cx.dice.pick(&self.order).copied().filter(gives);
        }
        if self.tables.get_mut(&zone)?.free(segment) {
            self.complaints.settle(segment);
            if let Some(node) = self.interested.get_mut(&owner) {
                node.is_late = true;
            }
            self.give_to(zone, segment, from, cx);
        }
        None
    }

    /// Whoever misses a segment reads it itself, as far as it may read more: another might be one again that gives
    /// it nothing.
    fn give_to(&mut self, zone: Zone, segment: u32, from: PeerId, cx: &mut Cx<'_>) {
        let Some(source) = self.source(zone, segment, cx) else { return };
        let may = |node: &Interested| node.leases < cx.limits.leases_per_owner && (source.is_some() || node.can_import);
        if self.may_grant() && self.interested.get(&from).is_some_and(may) {
            self.give(zone, segment, source, from, cx);
        }
    }

    /// Somebody got wrong bytes from `accused`. Two who say so are believed: it owns nothing more,
    /// and what it read is read again by others.
    fn accuse(&mut self, by: PeerId, accused: PeerId, me: PeerId) {
        if !self.interested.contains_key(&accused) && !self.holders.contains_key(&accused) {
            return;
        }
        let accusers = self.complaints.accused.entry(accused).or_default();
        if accusers.len() >= ACCUSERS || !accusers.insert(by) {
            return;
        }
        if by == me {
            // What this node saw itself needs no second witness.
            accusers.insert(accused);
        }
        if accusers.len() < ACCUSERS {
            return;
        }
        let mut freed = Vec::new();
        for table in self.tables.values_mut() {
            freed.extend(table.free_leases_of(&accused));
            table.free_done_by(&accused);
        }
        self.unwind(&freed);
    }
}
