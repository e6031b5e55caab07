//! Which member coordinates a blob, as one node sees it: the best ranked that answers.

use super::Limits;
use super::peer::PeerId;
use super::time::Time;

#[derive(Debug)]
pub(super) struct Seat {
    /// Best first. Empty: this node is alone.
    ranked: Vec<PeerId>,
    /// Those of them that did not answer.
    unreachable: Vec<PeerId>,
    /// When the coordinator was asked first, how often since, without an answer yet.
    waiting: Option<(Time, u32)>,
}

impl Seat {
    pub(super) const fn new(ranked: Vec<PeerId>) -> Self {
        Self { ranked, unreachable: Vec::new(), waiting: None }
    }

    /// The best ranked that was not given up. Nobody: this node itself.
    pub(super) fn coordinator(&self) -> Option<PeerId> {
        self.ranked.iter().find(|id| !self.unreachable.contains(id)).copied()
    }

    /// The coordinator is asked now.
    pub(super) fn asked(&mut self, now: Time) -> Option<PeerId> {
        let tries = self.waiting.map_or(0, |(_, tries)| tries);
        self.waiting = Some((now, tries + 1));
        self.coordinator()
    }

    pub(super) const fn answered(&mut self) {
        self.waiting = None;
    }

    pub(super) const fn is_seated(&self) -> bool {
        self.waiting.is_none()
    }

    pub(super) fn is_overdue(&self, now: Time, limits: &Limits) -> bool {
        self.deadline(limits) <= now
    }

    pub(super) fn deadline(&self, limits: &Limits) -> Time {
        self.waiting.map_or(Time::NEVER, |(since, _)| since + limits.join_patience)
    }

    /// The coordinator did not answer in time. After `join_tries` it is passed over.
    pub(super) fn give_up(&mut self, limits: &Limits) {
        let is_lost = self.waiting.is_some_and(|(_, tries)| tries >= limits.join_tries);
        if let Some(coordinator) = self.coordinator().filter(|_| is_lost) {
            self.unreachable.push(coordinator);
            self.waiting = None;
        }
    }

    /// A member that was passed over speaks. True: it is the one to join.
    pub(super) fn heard_of(&mut self, id: &PeerId) -> bool {
        let before = self.coordinator();
        self.unreachable.retain(|other| other != id);
        let is_other = self.coordinator() != before;
        if is_other {
            self.waiting = None;
        }
        is_other
    }

    /// The ranking is new, or a peer was lost. True: there is another coordinator to join.
    pub(super) fn review(&mut self, ranked: Vec<PeerId>, lost: Option<PeerId>) -> bool {
        let before = self.coordinator();
        self.ranked = ranked;
        self.unreachable.retain(|id| self.ranked.contains(id));
        if let Some(lost) = lost.filter(|lost| self.ranked.contains(lost) && !self.unreachable.contains(lost)) {
            self.unreachable.push(lost);
        }
        let is_other = self.coordinator() != before;
        if is_other {
            self.waiting = None;
        }
        is_other
    }
}
