//! Soft state about one blob at the member that coordinates it: who wants it, who reads what.
//!
//! The rule that decides everything: whatever is scarce (the origin, a lone holder, another zone)
//! gives each segment to one owner, and everybody else takes it from fellow receivers. Losing this
//! state costs bytes, never correctness: a backup rebuilds it from joins. Not here: which piece goes
//! from whom to whom, which is the receivers' choice.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use super::Cx;
use super::budget::Budget;
use super::complaints::Complaints;
use super::event::{Join, Lease, LeaseEnd, Message};
use super::hearing::Word;
use super::leases::Table;
use super::owner::segment_of;
use super::peer::{PeerId, Zone, mix, score};
use super::register::Charge;
use super::time::Time;
use crate::Digest;
use crate::pieces::Layout;

#[derive(Debug)]
pub(super) struct Coordinator {
    pub(super) blob: Digest,
    pub(super) layout: Layout,
    pub(super) interested: BTreeMap<PeerId, Interested>,
    /// The same peers, for a choice by lot.
    pub(super) order: Vec<PeerId>,
    /// Those of them that miss something.
    pub(super) incomplete: usize,
    /// Who has the whole blob and does not belong to `interested`, with the leases read from it.
    pub(super) holders: BTreeMap<PeerId, Holder>,
    /// What each zone has got so far.
    pub(super) tables: BTreeMap<Zone, Table>,
    pub(super) budget: Budget,
    /// Pieces that came from the origin since somebody began to want the blob.
    imported: u32,
    pub(super) complaints: Complaints,
    /// Those who wait were told last that the origin is left alone.
    pub(super) told: Time,
    /// Whether this node sees nobody who ranks higher; nothing: not looked at since the members changed.
    pub(super) is_first: Option<bool>,
    /// Somebody needs us although we see one who ranks higher.
    pub(super) is_needed: bool,
    /// The swarm is older than our part in it: whoever joins tells what is read already.
    is_inherited: bool,
    /// Until then those join who were in it before.
    pub(super) gathers_until: Time,
    /// Somebody spoke to us about the blob at this time.
    pub(super) used: Time,
    /// On whose account this is.
    _charge: Charge,
}

/// A node that wants the blob, or got it while others still want it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interested {
    pub(super) zone: Zone,
    pub(super) can_import: bool,
    is_going: bool,
    pub(super) is_complete: bool,
    /// Neighbours that it was given or was given to.
    degree: u16,
    /// Leases that it works on.
    pub(super) leases: u8,
    /// Leases that it was given in all: the work is spread evenly.
    pub(super) granted: u32,
    /// How many times slower than the fastest its uplink is.
    pub(super) weight: u32,
    /// Whoever was to read from it could not.
    is_no_source: bool,
    /// It let a lease lapse, or gave nobody what it read: others own what is to be read, until it
    /// shows progress.
    pub(super) is_late: bool,
}

#[derive(Debug)]
pub(super) struct Holder {
    pub(super) zone: Zone,
    pub(super) leases: u8,
}

impl Coordinator {
    pub(super) const fn new(blob: Digest, layout: Layout, charge: Charge, limits: &super::Limits) -> Self {
        Self {
            blob,
            layout,
            interested: BTreeMap::new(),
            order: Vec::new(),
            incomplete: 0,
            holders: BTreeMap::new(),
            tables: BTreeMap::new(),
            budget: Budget::new(limits.imports_start, limits.imports_max),
            imported: 0,
            complaints: Complaints::new(),
            told: Time::ZERO,
            is_first: None,
            is_needed: false,
            is_inherited: false,
            gathers_until: Time::ZERO,
            used: Time::ZERO,
            _charge: charge,
        }
    }

    /// False: it wants too much for one node.
    pub(super) fn joined(&mut self, from: PeerId, join: &Join, cx: &mut Cx<'_>) -> bool {
        let (zone, segments) = (self.zone_of(&from, cx), self.layout.segments());
        if let Entry::Vacant(table) = self.tables.entry(zone) {
            let Some(charge) = cx.register.table(from, segments, cx.me, cx.limits) else { return false };
            table.insert(Table::new(segments, charge));
        }
        self.used = cx.now;
        self.is_needed |= from == cx.me;
        if join.have.count() > 0 || !join.leased.is_empty() {
            if !self.is_inherited && self.imported == 0 {
                self.gather(cx);
            }
            self.is_inherited = true;
        }
        self.holders.remove(&from);
        if self.interested.get(&from).is_some_and(|node| node.is_complete) {
            // It lost the blob and wants it again.
            self.change(from, |node| node.is_complete = false);
            self.incomplete += 1;
        }
        if !self.interested.contains_key(&from) {
            self.order.push(from);
            self.incomplete += 1;
            let node = Interested {
                zone,
                can_import: join.can_import,
                is_going: false,
                is_complete: false,
                degree: 0,
                leases: 0,
                granted: 0,
                weight: 1,
                is_no_source: false,
                is_late: false,
            };
            self.interested.insert(from, node);
        }
        self.change(from, |node| node.is_going = join.is_going);
        let node = self.interested.get(&from).copied();
        let adopted = self.tables.get_mut(&zone).map_or_else(Vec::new, |table| {
            table.turn(from, node.as_ref(), node.as_ref());
            table.adopt(self.layout, from, join, cx.now)
        });
        for source in adopted {
            if let Some(holder) = source.and_then(|source| self.holders.get_mut(&source)) {
                holder.leases = holder.leases.saturating_add(1);
            }
            self.change(from, |node| node.leases = node.leases.saturating_add(1));
        }
        let neighbours = self.neighbours_for(from, join, cx);
        let (holders, interested) = (self.holders_to_compare(&from, join, zone, cx), self.count());
        cx.send(from, self.blob, Message::Welcome { neighbours, holders, interested });
        self.grant(cx);
        true
    }

    /// Whether what is known may be forgotten for the word of one who says that the blob has another size.
    pub(super) fn gives_way_to(&self, from: &PeerId, word: Word) -> bool {
        let is_said_by_others = self.holders.keys().any(|id| id != from);
        self.interested.is_empty() && (word == Word::Wants || !is_said_by_others)
    }

    /// Others read it under somebody else, and join here one after the other.
    pub(super) fn gather(&mut self, cx: &Cx<'_>) {
        if cx.members.len() > 1 {
            self.gathers_until = cx.now + cx.limits.gather;
        }
    }

    /// Nobody wants the blob, and nobody has it.
    pub(super) fn is_idle(&self) -> bool {
        self.interested.is_empty() && self.holders.is_empty()
    }

    /// The blob is whole at `from`.
    pub(super) fn holds(&mut self, from: PeerId, cx: &mut Cx<'_>) {
        self.used = cx.now;
        match self.interested.get(&from) {
            Some(node) if !node.is_complete => {
                self.change(from, |node| node.is_complete = true);
                self.incomplete -= 1;
                self.end_session();
            }
            Some(_) => {}
            None => {
                let zone = cx.zone_of(&from);
                // It was one before, and broke: leases that are read from it may run still.
                let running = self.tables.values().flat_map(Table::running).filter(|(_, source)| *source == Some(from));
                let leases = u8::try_from(running.count()).unwrap_or(u8::MAX);
                self.holders.entry(from).or_insert(Holder { zone, leases });
            }
        }
        self.grant(cx);
    }

    /// Nobody misses anything any more: whoever comes next finds lone holders, not a running swarm.
    fn end_session(&mut self) {
        if self.incomplete > 0 {
            return;
        }
        for (id, node) in std::mem::take(&mut self.interested) {
            if node.is_complete {
                self.holders.insert(id, Holder { zone: node.zone, leases: 0 });
            }
        }
        self.order.clear();
        self.tables.clear();
        self.imported = 0;
        self.complaints = Complaints::new();
        (self.is_needed, self.is_inherited) = (false, false);
        self.holders.values_mut().for_each(|holder| holder.leases = 0);
    }

    /// A peer is dead, or has nothing to do with the blob any more.
    pub(super) fn left(&mut self, peer: &PeerId, cx: &mut Cx<'_>) {
        if let Some(node) = self.interested.remove(peer) {
            self.tables.values_mut().for_each(|table| table.turn(*peer, Some(&node), None));
            self.order.retain(|id| id != peer);
            self.incomplete -= usize::from(!node.is_complete);
        }
        self.holders.remove(peer);
        let mut freed = Vec::new();
        for table in self.tables.values_mut() {
            freed.extend(table.free_leases_of(peer));
        }
        self.unwind(&freed);
        // What a zone has got is of no use once nobody of it is left.
        self.tables.retain(|zone, _| self.interested.values().any(|node| node.zone == *zone));
        self.end_session();
        self.grant(cx);
    }

    /// Accounts for leases that ended without an owner's word: (owner, source) of each.
    pub(super) fn unwind(&mut self, freed: &[(PeerId, Option<PeerId>)]) {
        for (owner, from) in freed {
            if let Some(holder) = from.and_then(|from| self.holders.get_mut(&from)) {
                holder.leases = holder.leases.saturating_sub(1);
            }
            self.change(*owner, |node| node.leases = node.leases.saturating_sub(1));
        }
    }

    pub(super) fn released(&mut self, from: PeerId, piece: u32, cx: &mut Cx<'_>) {
        self.used = cx.now;
        let zone = self.zone_of(&from, cx);
        let is_full = self.imports() >= self.reads(cx);
        let bytes = self.layout.piece(u64::from(piece)).len();
        let Some(table) = self.tables.get_mut(&zone) else { return };
        let source = table.touch(segment_of(self.layout, u64::from(piece)), &from, cx.now);
        if source.is_some()
            && let Some(node) = self.interested.get_mut(&from)
        {
            node.is_late = false;
        }
        if source == Some(None) {
            self.budget.arrived(cx.now, bytes, is_full);
            self.imported = self.imported.saturating_add(1);
            if self.imported <= cx.limits.imports_max {
                self.grant(cx);
            }
        }
    }

    pub(super) fn lease_ended(
        &mut self,
        from: PeerId,
        (segment, read_from): (u32, Option<PeerId>),
        (end, upload_time): (LeaseEnd, Duration),
        cx: &mut Cx<'_>,
    ) {
        self.used = cx.now;
        let zone = self.zone_of(&from, cx);
        let Some(table) = self.tables.get_mut(&zone) else { return };
        // A word of the lease before this one, which was to be read from elsewhere, does not end this one.
        if end != LeaseEnd::Done && table.source(segment) != Some(read_from) {
            return;
        }
        let Some(source) = table.end(segment, &from, end == LeaseEnd::Done) else { return };
        let weight = table.weigh(upload_time);
        self.change(from, |node| node.weight = weight);
        self.unwind(&[(from, source)]);
        match end {
            // Whoever complained before this met nobody in vain: nobody had it.
            LeaseEnd::Done => self.complaints.settle(segment),
            LeaseEnd::Throttled(wait) => self.throttled(from, source, wait, cx),
            LeaseEnd::Forbidden => {
                if let Some(node) = self.interested.get_mut(&from) {
                    node.can_import = false;
                }
            }
            LeaseEnd::Broken => match source {
                // Whoever else reads from it, or would, reads elsewhere.
                Some(source) if self.holders.remove(&source).is_some() => {
                    let tables = self.tables.values_mut();
                    let freed: Vec<_> = tables.flat_map(|table| table.free_reads_from(&source)).collect();
                    self.unwind(&freed);
                }
                Some(source) => {
                    if let Some(node) = self.interested.get_mut(&source) {
                        node.is_no_source = true;
                    }
                }
                // The next owner asks it, and not at once: it may be down for all of them.
                None => self.budget.broke(cx.now),
            },
        }
        self.grant(cx);
    }

    /// Leases that show no progress go to somebody else.
    pub(super) fn tick(&mut self, cx: &mut Cx<'_>) {
        let mut freed = Vec::new();
        for table in self.tables.values_mut() {
            freed.extend(table.free_overdue(cx.now, cx.limits.lease_patience));
        }
        for (owner, _) in &freed {
            self.budget.lapsed();
            if let Some(node) = self.interested.get_mut(owner) {
                node.is_late = true;
            }
        }
        self.unwind(&freed);
        self.grant(cx);
        self.tell_of_pause(cx);
    }

    /// Where a node was when it joined: its leases stand in the table of that zone.
    pub(super) fn zone_of(&self, id: &PeerId, cx: &Cx<'_>) -> Zone {
        self.interested.get(id).map_or_else(|| cx.zone_of(id), |node| node.zone)
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.interested.len()).unwrap_or(u32::MAX)
    }

    /// Origin leases that run.
    fn imports(&self) -> u32 {
        self.tables.values().map(Table::imports).sum()
    }

    /// Changes what is known of a node, and its place in the turn with it.
    fn change(&mut self, id: PeerId, change: impl FnOnce(&mut Interested)) {
        let Some(node) = self.interested.get_mut(&id) else { return };
        let before = *node;
        change(node);
        if let Some(table) = self.tables.get_mut(&node.zone) {
            table.turn(id, Some(&before), Some(node));
        }
    }

    pub(super) fn may_grant(&self) -> bool {
        self.is_first != Some(false) || self.is_needed
    }

    /// Hands out leases as long as a source, an owner and a segment are free. Not while somebody ranks
    /// higher: who came here will hear of that one too, and it must not all be read twice.
    pub(super) fn grant(&mut self, cx: &mut Cx<'_>) {
        if !self.may_grant() {
            return;
        }
        let zones: Vec<Zone> = self.tables.keys().copied().collect();
        for zone in zones {
            while let Some((segment, from, owner)) = self.next_lease(zone, cx) {
                self.give(zone, segment, from, owner, cx);
            }
        }
    }

    fn next_lease(&self, zone: Zone, cx: &Cx<'_>) -> Option<(u32, Option<PeerId>, PeerId)> {
        let table = self.tables.get(&zone)?;
        // The one before gave them out from the first on, and who reads them is still to come here: each may
        // have as many as this.
        let others = cx.members.len() * usize::from(cx.limits.leases_per_owner);
        let gathers = cx.now < self.gathers_until;
        let segment = if gathers { table.last_free(others) } else { table.next_free() }?;
        let from = self.source(zone, segment, cx)?;
        // The first to come would get all of a small blob, a moment before the others are here: it has
        // its share one by one, as fast as what it reads arrives.
        let share = self.budget.limit(cx.now).div_ceil(self.count().max(1)).min(self.imported);
        let is_few = from.is_none() && self.count() <= cx.limits.few;
        let own = if is_few { cx.limits.leases_per_owner_few } else { cx.limits.leases_per_owner };
        let cap = own.saturating_add(u8::try_from(share).unwrap_or(u8::MAX));
        // Nobody is to wait for a seed, whom the others serve last.
        let is_incomplete = |id: &&PeerId| self.interested.get(id).is_some_and(|node| !node.is_complete);
        let seeds_too = cx.members.seeds().iter().filter(is_incomplete).count() == self.incomplete;
        let is_in_turn = |id: &PeerId| (seeds_too || !cx.members.is_seed(id)) && self.complaints.is_trusted(id);
        let stays = |node: &Interested| node.can_import && !node.is_going && !node.is_complete;
        // Who is about to go reads what nobody else can. Looked at where one does, and once: all may.
        let others_read = LazyCell::new(|| self.interested.iter().any(|(id, node)| stays(node) && is_in_turn(id)));
        let fits = |id: &PeerId, late_too: bool| {
            let is_late = |node: &Interested| node.is_late || (from.is_none() && self.budget.is_throttled_by(id));
            let can_read = |node: &Interested| from.is_some() || (node.can_import && !(node.is_going && *others_read));
            is_in_turn(id) && self.interested.get(id).is_some_and(|node| can_read(node) && (late_too || !is_late(node)))
        };
        let in_time = table.owner_for(cap, |id| fits(id, false));
        let owner = in_time.or_else(|| table.owner_for(cap, |id| fits(id, true)))?;
        Some((segment, from, owner))
    }

    /// Where the zone reads the segment, if it can be read now: `Some(None)` is the origin.
    pub(super) fn source(&self, zone: Zone, segment: u32, cx: &Cx<'_>) -> Option<Option<PeerId>> {
        let holders = || self.holders.iter().filter(|(id, _)| self.complaints.is_trusted(id));
        let mut near = holders().filter(|(_, holder)| holder.zone == zone).peekable();
        if near.peek().is_some() {
            return self.least_busy(near, segment, cx).map(Some);
        }
        if !cx.limits.scope_is_zone {
            let reads_elsewhere = |from: &PeerId| self.interested.contains_key(from);
            let elsewhere = self.tables.iter().filter(|(other, _)| **other != zone);
            let roots = elsewhere.filter_map(|(_, table)| table.root(segment, reads_elsewhere));
            let owner = roots.into_iter().find(|id| self.interested.get(id).is_some_and(|node| !node.is_no_source));
            if owner.is_some() {
                return Some(owner);
            }
            if holders().next().is_some() {
                return self.least_busy(holders(), segment, cx).map(Some);
            }
        }
        let may_read = cx.is_settled || self.is_inherited;
        (may_read && self.imports() < self.reads(cx)).then_some(None)
    }

    /// Origin leases that there may be now.
    fn reads(&self, cx: &Cx<'_>) -> u32 {
        self.budget.limit(cx.now).min(cx.limits.imports_first.saturating_add(self.imported))
    }

    /// Holders share the segments by rendezvous hashing, as far as each can serve.
    fn least_busy<'a>(
        &self,
        holders: impl Iterator<Item = (&'a PeerId, &'a Holder)>,
        segment: u32,
        cx: &Cx<'_>,
    ) -> Option<PeerId> {
        holders
            .filter(|(_, holder)| holder.leases < cx.limits.leases_per_holder)
            .max_by_key(|(id, _)| mix(score(&self.blob, id) ^ u64::from(segment)))
            .map(|(id, _)| *id)
    }

    pub(super) fn give(&mut self, zone: Zone, segment: u32, from: Option<PeerId>, owner: PeerId, cx: &mut Cx<'_>) {
        if let Some(holder) = from.and_then(|from| self.holders.get_mut(&from)) {
            holder.leases += 1;
        }
        if let Some(table) = self.tables.get_mut(&zone) {
            table.lease(segment, owner, from, cx.now);
        }
        self.change(owner, |node| {
            node.leases = node.leases.saturating_add(1);
            node.granted = node.granted.saturating_add(1);
        });
        self.tell_lease(segment, from, owner, cx);
    }

    pub(super) fn tell_lease(&self, segment: u32, from: Option<PeerId>, owner: PeerId, cx: &mut Cx<'_>) {
        let is_whole = from.is_some_and(|from| self.holders.contains_key(&from));
        let lease = Lease { segment, from, is_whole, interested: self.count() };
        cx.send(owner, self.blob, Message::Lease(lease));
    }

    /// Peers for `id` to exchange pieces with: of its zone, by lot, those with few neighbours first.
    fn neighbours_for(&mut self, id: PeerId, join: &Join, cx: &mut Cx<'_>) -> Vec<PeerId> {
        let zone = self.zone_of(&id, cx);
        let mut wanted = cx.limits.neighbours.saturating_sub(join.neighbours.len());
        let is_new = |other: &PeerId| *other != id && !join.neighbours.contains(other);
        let fits = |other: &PeerId| self.interested.get(other).is_some_and(|node| node.zone == zone) && is_new(other);
        let mut chosen: Vec<PeerId> = if self.order.len() <= cx.limits.neighbours {
            self.order.iter().copied().filter(fits).collect()
        } else {
            // Half: the others look for it in turn.
            wanted = wanted.div_ceil(2);
            let lots = (0..wanted * 4).map(|_| self.order[cx.dice.below(self.order.len())]);
            let mut drawn: Vec<PeerId> = lots.filter(fits).collect();
            drawn.sort_unstable();
            drawn.dedup();
            drawn.sort_by_key(|other| self.interested.get(other).map_or(u16::MAX, |node| node.degree));
            drawn
        };
        chosen.truncate(wanted);
        for other in &chosen {
            if let Some(node) = self.interested.get_mut(other) {
                node.degree = node.degree.saturating_add(1);
            }
        }
        if let Some(node) = self.interested.get_mut(&id) {
            node.degree = node.degree.saturating_add(u16::try_from(chosen.len()).unwrap_or(u16::MAX));
        }
        chosen
    }
}
