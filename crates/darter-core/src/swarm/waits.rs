//! What time alone brings to a download: an answer that does not come, a neighbour that is slow.
//!
//! A request that takes too long is made a second time, of somebody else; the first to come wins and
//! the other is closed. Neighbours that are slow are asked after all others.

use std::time::Duration;

use super::Cx;
use super::download::{Download, Request};
use super::event::Message;
use super::limits::Limits;
use super::neighbour::Neighbour;
use super::owner::segment_of;
use super::time::Time;

impl Download {
    /// What time alone brings: hedges, retries, a coordinator that does not answer.
    pub(super) fn tick(&mut self, cx: &mut Cx<'_>) {
        self.ticked = cx.now;
        self.tell(cx);
        if self.seat.is_overdue(cx.now) {
            self.seat.give_up(cx.limits);
            self.join(cx);
        }
        self.hedge(cx);
        self.is_dry = false;
        let is_stuck = cx.now >= self.missing_at(cx.limits);
        if is_stuck && !self.is_complete() {
            self.progress = cx.now;
        }
        if is_stuck && !self.is_complete() && !self.leases.is_importing() {
            // A coordinator that has forgotten us does not answer what follows, nor does one that is dead. One
            // that owes an answer is asked again when that is overdue, and not for this too.
            if self.seat.is_seated() && cx.now.since(self.refilled) > cx.limits.join_patience {
                self.refilled = cx.now;
                self.join(cx);
            }
            // All wait for what this node is to read, and who has it is as good as dead.
            self.read_leases(true, cx);
            // What is late may come yet, but not from those that broke off or sent nothing the last time.
            if self.leases.is_importing() || self.requests.iter().any(|request| self.may_answer(request)) {
                return;
            }
            self.neighbours.iter_mut().for_each(Neighbour::may_be_free);
            // What a neighbour has comes when that has a slot free; unless it never does.
            let is_late = cx.now.since(self.came) >= self.slot_patience(cx.limits);
            let open = self.open.iter().filter(|piece| is_late || !self.can_be_had(*piece));
            let asked = self.requests.iter().map(|request| u64::from(request.piece));
            let mut segments: Vec<u32> = open.chain(asked).map(|piece| segment_of(self.layout, piece)).collect();
            segments.sort_unstable();
            segments.dedup();
            segments.truncate(cx.limits.missing_max);
            if segments.is_empty() {
                return;
            }
            let without = cx.strikes.banned(cx.now).take(cx.limits.neighbours).collect();
            let coordinator = self.coordinator(cx);
            cx.send(coordinator, self.blob, Message::Missing { segments, without });
        }
    }

    fn may_answer(&self, request: &Request) -> bool {
        self.place(&request.peer).is_ok_and(|at| self.neighbours[at].is_well())
    }

    /// Other blobs of this node have all the requests that there may be: whoever has pieces of this one is
    /// not to blame that they do not come.
    pub(super) fn waits_in_turn(&mut self, now: Time) {
        if self.requests.is_empty() {
            self.came = now;
        }
    }

    /// When so long nothing could be asked for, and nothing is on its way, that the coordinator should know.
    /// Requests that are late are as good as none: a peer that died in silence answers none of them, and
    /// may be the coordinator itself.
    fn missing_at(&self, limits: &Limits) -> Time {
        // On a link whose rate nobody knows yet the first piece may take long.
        let patience = self.median.map_or(limits.join_patience, |piece_time| piece_time * 4);
        let late_at = self.requests.iter().map(|request| request.late_at).max().unwrap_or(Time::ZERO);
        (self.progress + limits.missing_patience.max(patience)).max(late_at)
    }

    /// How long no piece at all may come from neighbours that have some and are busy.
    fn slot_patience(&self, limits: &Limits) -> Duration {
        limits.lease_patience.max(self.median.unwrap_or_default() * 16)
    }

    /// When `tick` is due next, where so many pieces may be asked for at a time.
    pub(super) fn deadline(&self, most: usize, limits: &Limits) -> Time {
        let mut at = self.seat.deadline();
        if !self.untold.is_empty() {
            at = at.min(self.told + limits.have_delay);
        }
        at = self.requests.iter().map(|request| request.hedge_at).fold(at, Time::min);
        if self.is_complete() {
            return at;
        }
        at = at.min(self.missing_at(limits));
        if self.requests.len() < most {
            let waits = self.neighbours.iter().map(|neighbour| neighbour.not_before);
            at = at.min(waits.filter(|wait| *wait > self.ticked).min().unwrap_or(Time::NEVER));
        }
        at
    }

    /// Duplicates requests that take too long to one other holder each.
    pub(super) fn hedge(&mut self, cx: &mut Cx<'_>) {
        for at in 0..self.requests.len() {
            let request = self.requests[at];
            if cx.now < request.hedge_at {
                continue;
            }
            let other = (0..self.neighbours.len())
                .filter(|at| {
                    let neighbour = &self.neighbours[*at];
                    neighbour.id != request.peer
                        && !neighbour.is_scarce
                        && neighbour.has(request.piece)
                        && neighbour.is_free(cx.now, cx.limits.in_flight_per_peer)
                })
                .min_by_key(|at| (self.neighbours[*at].in_flight, cx.dice.roll()));
            match other {
                Some(other) => {
                    self.requests[at].is_hedged = true;
                    self.requests[at].hedge_at = Time::NEVER;
                    self.ask(request.piece, other, true, cx);
                }
                None => self.requests[at].hedge_at = cx.now + cx.limits.hedge_min,
            }
        }
    }

    /// How long a request to a neighbour may take before somebody else is asked too.
    pub(super) fn patience(&self, at: usize, limits: &Limits) -> Duration {
        let patience = match (self.neighbours[at].piece_time(), self.median) {
            (Some(peer), Some(median)) => (peer * 3).max(median * 2),
            (None, Some(median)) => median * 3,
            _ => limits.lease_patience,
        };
        patience.max(limits.hedge_min)
    }

    /// So little is missing that each piece is worth two requests: they wait no longer than one takes.
    pub(super) fn enter_end_game(&mut self, limits: &Limits) {
        if self.missing > limits.in_flight as u64 {
            return;
        }
        for at in 0..self.requests.len() {
            let request = self.requests[at];
            let peer = self.place(&request.peer).ok().and_then(|at| self.neighbours[at].piece_time());
            let patience = peer.or(self.median).unwrap_or(limits.lease_patience).max(limits.hedge_min);
            self.requests[at].hedge_at = request.hedge_at.min(request.since + patience);
            if request.is_hedged {
                self.requests[at].hedge_at = Time::NEVER;
            }
        }
    }

    /// Marks the neighbours that are four times slower than the one in the middle.
    pub(super) fn judge_speed(&mut self) {
        let mut times: Vec<Duration> = self.neighbours.iter().filter_map(Neighbour::piece_time).collect();
        let middle = times.len() / 2;
        self.median = (!times.is_empty()).then(|| *times.select_nth_unstable(middle).1);
        let limit = self.median.unwrap_or_default() * 4;
        self.slow.clear();
        self.slow
            .extend(self.neighbours.iter().map(|neighbour| neighbour.piece_time().is_some_and(|time| time > limit)));
    }
}
