//! Who reaches whom, who knows whom, and what is lost between them.

use std::collections::BTreeSet;

use super::queue::{Due, Nanos};
use super::wires::{Transfer, TransferState};
use super::world::{World, nanos};
use crate::swarm::{Event, FetchFailure, Member, Members, Message};

/// Nodes that have just started hear of each other in so many steps.
const STEPS: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Reach {
    /// Even and odd nodes do not reach each other before.
    pub(super) split_until: Nanos,
    /// Pairs that do not reach each other, the lower number first.
    pub(super) severed: BTreeSet<(u32, u32)>,
    /// The first cannot ask the second for pieces.
    pub(super) unreachable: BTreeSet<(u32, u32)>,
    /// So many of a thousand messages are lost.
    pub(super) lost: u32,
    /// Nodes that know nothing of kept slots.
    pub(super) old: BTreeSet<u32>,
    /// Messages so far, for the lot.
    sent: u64,
}

impl World<'_> {
    /// Whether nothing passes between two nodes.
    pub(super) fn is_cut(&self, a: u32, b: u32) -> bool {
        let reach = &self.reach;
        a != b
            && (self.now < reach.split_until && (a ^ b) & 1 == 1
                || !reach.severed.is_empty() && reach.severed.contains(&(a.min(b), a.max(b)))
                || !self.have_met(a, b))
    }

    /// Whether `from` cannot ask `to` for pieces.
    pub(super) fn is_out_of_reach(&self, from: u32, to: u32) -> bool {
        self.is_cut(from, to) || self.reach.unreachable.contains(&(from, to))
    }

    fn have_met(&self, a: u32, b: u32) -> bool {
        let all = nanos(self.scenario.introductions);
        let gone = self.now.saturating_sub(self.first);
        if gone >= all {
            return true;
        }
        let step = u128::from(gone) * u128::from(STEPS) / u128::from(all);
        let lot = lot(self.scenario.seed ^ u64::from(a.min(b)) << 32 ^ u64::from(a.max(b)));
        u128::from(lot % u64::from(STEPS)) < step
    }

    /// Whether a message is lost on its way.
    pub(super) fn is_lost(&mut self, from: u32, to: u32, message: &Message) -> bool {
        let reach = &mut self.reach;
        reach.sent += 1;
        let is_unlucky =
            reach.lost > 0 && lot(self.scenario.seed ^ reach.sent.rotate_left(32)) % 1000 < u64::from(reach.lost);
        let is_new = matches!(message, Message::Slot | Message::NoNeed);
        is_unlucky || is_new && (reach.old.contains(&from) || reach.old.contains(&to))
    }

    /// Nodes that know nobody meet, a few more with each step.
    pub(super) fn introduce(&mut self) {
        let all = self.scenario.introductions;
        for step in (0..=STEPS).filter(|_| !all.is_zero()) {
            self.queue.at(self.first + nanos(all * step / STEPS), Due::Look);
        }
    }

    /// What runs between nodes that no longer reach each other is broken; they notice it later.
    pub(super) fn cut(&mut self) {
        let running: Vec<(u32, Transfer)> = self.transfers.all().map(|(place, transfer)| (place, *transfer)).collect();
        for (place, transfer) in running {
            if transfer.state == TransferState::Running && self.is_cut(transfer.from, transfer.to) {
                self.transfers.at(place).state = TransferState::Broken;
                // Also where the two reach each other again by then.
                self.forget(transfer.to, place);
                let Transfer { to, from, blob, piece, .. } = transfer;
                self.queue.at(self.now + nanos(self.scenario.detection), Due::Cut { to, from, blob, piece });
            }
        }
        self.queue.at(self.now + nanos(self.scenario.detection), Due::Look);
    }

    /// A node closes its connection to another, and takes none from it for longer than any run lasts.
    pub(super) fn ban(&mut self, n: u32, other: u32) {
        self.outcome.bans += 1;
        self.reach.severed.insert((n.min(other), n.max(other)));
        self.cut();
        let count = self.nodes.len();
        let cut_off = (0_u32..).take(count).filter(|n| self.is_cut(*n, other)).count();
        if cut_off * 2 > count {
            // What it reads alone from then on is no matter of the swarm.
            for (blob, _) in self.blobs.clone() {
                self.tell(other, Event::Unwant(blob));
            }
        }
    }

    /// Whom a node is connected to.
    fn view(&self, n: u32) -> Members {
        let is_whole = self.now >= self.reach.split_until && self.reach.severed.is_empty() && self.have_all_met();
        if is_whole {
            return self.members.clone();
        }
        let known = |member: &&Member| !self.is_cut(n, super::world::number(&member.id));
        Members::new(self.members.iter().filter(known).copied().collect())
    }

    fn have_all_met(&self) -> bool {
        self.now.saturating_sub(self.first) >= nanos(self.scenario.introductions)
    }

    /// Everybody learns who is there and who is not: by its connections, and by the membership.
    pub(super) fn look(&mut self) {
        let nodes = &self.nodes;
        let here = self.members.iter().filter(|member| !nodes[super::world::number(&member.id) as usize].is_gone);
        self.members = Members::new(here.copied().collect());
        for n in 0..u32::try_from(self.nodes.len()).unwrap_or(u32::MAX) {
            let view = self.view(n);
            let before = std::mem::replace(&mut self.nodes[n as usize].view, view.clone());
            let gone: Vec<u32> = before
                .iter()
                .filter(|member| view.get(&member.id).is_none())
                .map(|member| super::world::number(&member.id))
                .collect();
            gone.iter().for_each(|gone| self.miss(n, *gone));
            if !gone.is_empty() || before.len() != view.len() {
                self.tell(n, Event::Members(view));
            }
        }
    }

    /// The connection of `n` to a node is gone, and what came over it.
    fn miss(&mut self, n: u32, gone: u32) {
        let incoming = std::mem::take(&mut self.nodes[n as usize].incoming);
        let (broken, kept) = incoming.into_iter().partition(|place| self.transfers.at(*place).from == gone);
        self.nodes[n as usize].incoming = kept;
        let broken: Vec<u32> = broken;
        for place in broken {
            let transfer = *self.transfers.at(place);
            self.transfers.at(place).state = TransferState::Broken;
            self.fetch_failed(&transfer, FetchFailure::Broken);
        }
        self.tell(n, Event::PeerLost(self.ids[gone as usize]));
    }
}

/// A number by lot (the finaliser of splitmix64).
fn lot(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}
