//! Which member coordinates a blob, as one node sees it: the best ranked that answers.

use std::time::Duration;

use super::Limits;
use super::peer::PeerId;
use super::time::Time;

#[derive(Debug)]
pub(super) struct Seat {
    /// Best first. Empty: this node is alone.
    ranked: Vec<PeerId>,
    /// Those of them that did not answer.
    unreachable: Vec<PeerId>,
    /// The coordinator was asked and did not answer yet.
    waiting: Option<Waiting>,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    /// When it was asked first.
    first: Time,
    tries: u32,
    /// When its answer is overdue.
    until: Time,
}

/// How long coordinators took to answer lately. A node that has no time to spare hears every answer late, and
/// must not take that for a death.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AnswerTime(Duration);

impl AnswerTime {
    fn took(&mut self, time: Duration) {
        self.0 = time.max(self.0 * 7 / 8);
    }

    fn patience(self, limits: &Limits) -> Duration {
        (self.0 * 4).clamp(limits.join_patience, limits.join_patience_max)
    }
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
    pub(super) fn asked(&mut self, now: Time, answers: AnswerTime, limits: &Limits) -> Option<PeerId> {
        let (first, tries) = self.waiting.map_or((now, 0), |waiting| (waiting.first, waiting.tries));
        self.waiting = Some(Waiting { first, tries: tries + 1, until: now + answers.patience(limits) });
        self.coordinator()
    }

    pub(super) fn answered(&mut self, now: Time, answers: &mut AnswerTime) {
        if let Some(waiting) = self.waiting.take() {
            answers.took(now.since(waiting.first));
        }
    }

    pub(super) const fn is_seated(&self) -> bool {
        self.waiting.is_none()
    }

    pub(super) fn is_overdue(&self, now: Time) -> bool {
        self.deadline() <= now
    }

    pub(super) fn deadline(&self) -> Time {
        self.waiting.map_or(Time::NEVER, |waiting| waiting.until)
    }

    /// The coordinator did not answer in time. After `join_tries` it is passed over.
    pub(super) fn give_up(&mut self, limits: &Limits) {
        let is_lost = self.waiting.is_some_and(|waiting| waiting.tries >= limits.join_tries);
        if let Some(coordinator) = self.coordinator().filter(|_| is_lost) {
            self.unreachable.push(coordinator);
            self.waiting = None;
        }
    }

    /// A member that was passed over speaks. True: it is the one to join.
    pub(super) fn heard_of(&mut self, id: &PeerId, answers: &mut AnswerTime, limits: &Limits) -> bool {
        let before = self.coordinator();
        if self.unreachable.contains(id) {
            // It was given less than it takes.
            answers.took(answers.patience(limits) * limits.join_tries);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::from_micros(millis * 1000)
    }

    #[test]
    fn who_hears_answers_late_waits_longer_for_the_next_and_again_less_when_they_are_quick() {
        let (limits, first) = (Limits::default(), PeerId::from_bytes([1; 32]));
        let mut answers = AnswerTime::default();
        let mut seat = Seat::new(vec![first, PeerId::from_bytes([2; 32])]);
        let mut waits = |answers: &mut AnswerTime, took: u64| {
            assert_eq!(seat.asked(at(0), *answers, &limits), Some(first));
            let until = seat.deadline();
            seat.answered(at(took), answers);
            until
        };
        assert_eq!(waits(&mut answers, 1), at(300));
        assert_eq!(waits(&mut answers, 200), at(300));
        assert_eq!(waits(&mut answers, 60_000), at(800));
        assert_eq!(waits(&mut answers, 1), at(2000), "no longer than this");
        let quick = (0..100).map(|_| waits(&mut answers, 1)).last();
        assert_eq!(quick, Some(at(300)));
        // One that comes when it was given up already says that there was too little time.
        seat.asked(at(0), answers, &limits);
        seat.asked(at(300), answers, &limits);
        seat.give_up(&limits);
        assert!(seat.coordinator() != Some(first) && seat.heard_of(&first, &mut answers, &limits));
        seat.asked(at(1000), answers, &limits);
        assert_eq!(seat.deadline(), at(3000));
    }
}
