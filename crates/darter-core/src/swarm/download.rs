//! One blob on its way to this node: which pieces are here, whom to ask for the others.
//!
//! A download joins at the blob's coordinator, learns neighbours from it, and takes pieces from
//! them; what it owns a lease for it reads from where it is scarce (`owner`). Not here: who gets a
//! lease (`coordinator`), who the neighbours are (`circle`), which piece comes next (`choice`).

use std::time::Duration;

use super::Cx;
use super::choice::Choice;
use super::event::{Action, FetchFailure, Join, Message, Refusal};
use super::neighbour::Neighbour;
use super::owner::{Leases, segment_of};
use super::peer::{Members, PeerId};
use super::seat::Seat;
use super::time::Time;
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

#[derive(Debug)]
pub(super) struct Download {
    pub(super) blob: Digest,
    pub(super) layout: Layout,
    pub(super) have: Bitfield,
    /// Missing, asked of nobody, and not being imported.
    pub(super) open: Bitfield,
    /// Pieces that are not here.
    pub(super) missing: u64,
    /// How many neighbours have each piece.
    pub(super) rarity: Vec<u16>,
    /// By ascending `PeerId`.
    pub(super) neighbours: Vec<Neighbour>,
    /// Who gave nothing of what it announced; the last of them.
    pub(super) shunned: Vec<PeerId>,
    /// For each neighbour, whether it is so slow that others are asked first.
    pub(super) slow: Vec<bool>,
    /// How long a piece takes from the neighbour in the middle; nothing before the first.
    pub(super) median: Option<Duration>,
    pub(super) requests: Vec<Request>,
    pub(super) leases: Leases,
    pub(super) seat: Seat,
    pub(super) can_import: bool,
    pub(super) interested: u32,
    /// Pieces that neighbours were not told of yet.
    pub(super) untold: Vec<u32>,
    pub(super) told: Time,
    /// A piece came, or could be asked for, at this time last.
    pub(super) progress: Time,
    /// A piece came at this time last.
    pub(super) came: Time,
    /// Time alone was looked at last.
    pub(super) ticked: Time,
    /// Neighbours died: more were asked for at this time.
    pub(super) refilled: Time,
    /// Nothing could be asked for, and nothing has changed since.
    pub(super) is_dry: bool,
    /// Those that have all of it and can be asked what its pieces are; the first two are. Nothing before any
    /// were named.
    pub(super) compared: Option<Vec<PeerId>>,
}

/// One piece that was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) piece: u32,
    pub(super) peer: PeerId,
    pub(super) since: Time,
    /// Asked of a second peer already, or itself a second request.
    pub(super) is_hedged: bool,
    /// Somebody else is asked for it too at this time.
    pub(super) hedge_at: Time,
    /// From then on it is not counted on: whoever was asked may be dead.
    pub(super) late_at: Time,
}

impl Download {
    pub(super) fn new(blob: Digest, layout: Layout, have: Bitfield, can_import: bool, cx: &mut Cx<'_>) -> Self {
        let pieces = layout.pieces();
        let mut open = Bitfield::full(pieces);
        have.iter().for_each(|piece| open.clear(piece));
        let have_count = have.count();
        let mut download = Self {
            blob,
            layout,
            have,
            open,
            missing: pieces - have_count,
            rarity: vec![0; usize::try_from(pieces).unwrap_or(0)],
            neighbours: Vec::new(),
            shunned: Vec::new(),
            slow: Vec::new(),
            median: None,
            requests: Vec::new(),
            leases: Leases::new(pieces),
            seat: Seat::new(cx.members.ranked(&blob)),
            can_import,
            interested: 1,
            untold: Vec::new(),
            told: Time::ZERO,
            progress: cx.now,
            came: cx.now,
            ticked: cx.now,
            refilled: cx.now,
            is_dry: false,
            compared: None,
        };
        download.join(cx);
        download
    }

    /// Asks the coordinator for neighbours and leases.
    pub(super) fn join(&mut self, cx: &mut Cx<'_>) {
        let join = Join {
            size: self.layout.size(),
            have: self.have.clone(),
            leased: self.leases.readings().collect(),
            can_import: self.can_import,
            is_going: cx.is_going,
            neighbours: self.neighbours.iter().map(|neighbour| neighbour.id).collect(),
        };
        let coordinator = self.seat.asked(cx.now, *cx.answers, cx.limits).unwrap_or(cx.me);
        cx.send(coordinator, self.blob, Message::Join(join));
    }

    /// Whom leases and neighbours come from.
    pub(super) fn coordinator(&self, cx: &Cx<'_>) -> PeerId {
        self.seat.coordinator().unwrap_or(cx.me)
    }

    pub(super) const fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// How many want it, as far as is known, and how large its pieces are.
    pub(super) fn company(&self) -> (u32, u64) {
        (self.interested, self.layout.piece_size())
    }

    pub(super) const fn requests(&self) -> usize {
        self.requests.len()
    }

    /// The members changed, or one cannot be reached: is the coordinator still the one?
    pub(super) fn reseat(&mut self, lost: Option<PeerId>, before: &Members, cx: &mut Cx<'_>) {
        if let Some(lost) = lost {
            self.drop_neighbour(&lost, cx);
        }
        // We were told of them before we reached them.
        let is_new = |id: &&PeerId| before.get(id).is_none() && cx.members.get(id).is_some();
        let met: Vec<PeerId> = self.neighbours.iter().map(|neighbour| &neighbour.id).filter(is_new).copied().collect();
        met.into_iter().for_each(|id| self.hello(id, true, cx));
        if self.seat.review(cx.members.ranked(&self.blob), lost) {
            self.join(cx);
        }
    }

    /// Asks the sources of our leases for what is still open. The number of pieces asked for.
    fn fill_leases(&mut self, cx: &mut Cx<'_>) -> usize {
        let mut asked = 0;
        for (from, piece) in self.leases.duties(self.layout) {
            let is_open = self.open.has(u64::from(piece));
            let Some(at) = self.place(&from).ok().filter(|_| is_open) else { continue };
            let neighbour = &self.neighbours[at];
            if neighbour.has(piece) && neighbour.is_free(cx.now, cx.limits.in_flight_per_peer) {
                self.open.clear(u64::from(piece));
                self.ask(piece, at, false, cx);
                asked += 1;
            }
        }
        asked
    }

    /// A piece is here, verified: from a peer, or from the origin.
    pub(super) fn arrived(&mut self, piece: u32, peer: Option<PeerId>, cx: &mut Cx<'_>) {
        if let Some(peer) = peer {
            self.delivered(piece, peer, cx);
        }
        self.progress = cx.now;
        self.came = cx.now;
        self.is_dry = false;
        let index = u64::from(piece);
        if index >= self.layout.pieces() || self.have.has(index) {
            return;
        }
        self.have.set(index);
        self.missing -= 1;
        self.open.clear(index);
        // Whoever else was asked for it need not send it.
        for at in (0..self.requests.len()).rev() {
            if self.requests[at].piece == piece {
                let request = self.requests.swap_remove(at);
                if let Ok(at) = self.place(&request.peer) {
                    self.neighbours[at].cancelled();
                }
                cx.out.push(Action::CancelFetch { blob: self.blob, piece, peer: request.peer });
            }
        }
        self.enter_end_game(cx.limits);
        self.untold.push(piece);
        self.owner_got(piece, cx);
        self.tell(cx);
    }

    /// Everything is here, whatever was told of it.
    pub(super) fn is_whole(&mut self, cx: &mut Cx<'_>) {
        // Told one by one, those that are not told yet would look missing: nothing is read for them.
        self.open = Bitfield::new(self.layout.pieces());
        for piece in 0..u32::try_from(self.layout.pieces()).unwrap_or(u32::MAX) {
            if !self.have.has(u64::from(piece)) {
                self.arrived(piece, None, cx);
            }
        }
    }

    fn delivered(&mut self, piece: u32, peer: PeerId, cx: &mut Cx<'_>) {
        let Some(request) = self.take_request(piece, peer) else { return };
        cx.depth.came(cx.now.since(request.since));
        if let Ok(at) = self.place(&peer) {
            self.neighbours[at].delivered(cx.now.since(request.since));
            self.judge_speed();
        }
    }

    pub(super) fn fetch_failed(&mut self, piece: u32, peer: PeerId, reason: FetchFailure, cx: &mut Cx<'_>) {
        let Some(request) = self.take_request(piece, peer) else { return };
        if matches!(reason, FetchFailure::Refused(_)) {
            cx.depth.refused(cx.now.since(request.since));
        }
        self.reopen(piece);
        self.is_dry = false;
        let Ok(at) = self.place(&peer) else { return };
        let coordinator = self.coordinator(cx);
        let is_not_given = !matches!(reason, FetchFailure::Refused(Refusal::Busy(_)) | FetchFailure::Broken);
        let neighbour = &mut self.neighbours[at];
        let keep = match reason {
            FetchFailure::Refused(Refusal::Busy(wait)) => {
                neighbour.refused(cx.now, wait);
                true
            }
            FetchFailure::Refused(Refusal::NotHere) | FetchFailure::Unvouched => {
                neighbour.cancelled();
                if reason != FetchFailure::Unvouched {
                    neighbour.breaks_promise(cx.now);
                }
                if neighbour.lacks(piece) {
                    let count = &mut self.rarity[piece as usize];
                    *count = count.saturating_sub(1);
                }
                if self.neighbours[at].boasts(cx.now, cx.limits) {
                    return self.shun(&peer, cx);
                }
                true
            }
            FetchFailure::Broken | FetchFailure::Stalled => neighbour.failed(cx.now),
            FetchFailure::Corrupt => {
                let segments = vec![segment_of(self.layout, u64::from(piece))];
                cx.send(coordinator, self.blob, Message::Missing { segments, without: vec![peer] });
                false
            }
        };
        if !keep {
            self.drop_neighbour(&peer, cx);
        } else if is_not_given {
            // It stays a neighbour: it may hear us well, and need what we have.
            self.lost_source(&peer, cx);
        }
        self.work_leases(cx);
    }

    /// `from` keeps a slot for us. False: there is nothing to ask it for.
    pub(super) fn offered(&mut self, from: PeerId, room: usize, cx: &mut Cx<'_>) -> bool {
        let Ok(at) = self.place(&from) else { return false };
        self.neighbours[at].offers_slot(cx.now);
        if room == 0 {
            return false;
        }
        let window = self.window(cx);
        let Some(piece) = self.choice(at..at + 1, cx).make(cx.now, window, cx.dice).map(|(piece, _)| piece) else {
            return false;
        };
        self.open.clear(u64::from(piece));
        self.ask(piece, at, false, cx);
        true
    }

    fn choice<'a>(&'a self, among: std::ops::Range<usize>, cx: &Cx<'_>) -> Choice<'a> {
        Choice {
            neighbours: &self.neighbours[among.clone()],
            open: &self.open,
            owned: self.leases.owned(),
            rarity: &self.rarity,
            slow: &self.slow[among],
            in_flight_per_peer: cx.limits.in_flight_per_peer,
        }
    }

    /// Asks for as many pieces as `room` allows, and for those of our leases beyond it: others wait
    /// for them. The number asked for.
    pub(super) fn fill(&mut self, room: usize, cx: &mut Cx<'_>) -> usize {
        let mut asked = self.fill_leases(cx);
        while asked < room && !self.is_dry {
            let window = self.window(cx);
            let Some((piece, at)) = self.choice(0..self.neighbours.len(), cx).make(cx.now, window, cx.dice) else {
                self.is_dry = true;
                break;
            };
            self.open.clear(u64::from(piece));
            self.ask(piece, at, false, cx);
            asked += 1;
        }
        asked
    }

    pub(super) fn ask(&mut self, piece: u32, at: usize, is_hedged: bool, cx: &mut Cx<'_>) {
        self.neighbours[at].asked();
        let peer = self.neighbours[at].id;
        let late_at = cx.now + self.patience(at, cx.limits);
        let hedge_at = if is_hedged { Time::NEVER } else { late_at };
        self.requests.push(Request { piece, peer, since: cx.now, is_hedged, hedge_at, late_at });
        self.progress = cx.now;
        cx.out.push(Action::Fetch { blob: self.blob, piece, peer });
    }

    /// Where rarest-first looks: from the first missing piece on. Wide enough that what is newest in
    /// the swarm lies inside, narrow enough that containerd can read along.
    fn window(&self, cx: &Cx<'_>) -> (u32, u32) {
        let pieces = u32::try_from(self.layout.pieces()).unwrap_or(u32::MAX);
        let width = cx.limits.window_min.max(self.interested.saturating_mul(2)).max(pieces / 4);
        let first = u32::try_from(self.have.first_missing()).unwrap_or(u32::MAX);
        (first, first.saturating_add(width).min(pieces))
    }

    /// Tells neighbours what is new, not more often than `have_delay` unless there is much, or it is rare.
    pub(super) fn tell(&mut self, cx: &mut Cx<'_>) {
        let is_rare = |piece: &u32| self.rarity[*piece as usize] < cx.limits.have_rare;
        let is_due = cx.now.since(self.told) >= cx.limits.have_delay || self.untold.len() >= cx.limits.have_batch;
        if is_due || self.untold.iter().any(is_rare) {
            self.tell_now(cx);
        }
    }

    /// Tells neighbours what is new, however little.
    pub(super) fn tell_now(&mut self, cx: &mut Cx<'_>) {
        if self.untold.is_empty() {
            return;
        }
        self.told = cx.now;
        let pieces = std::mem::take(&mut self.untold);
        for neighbour in &self.neighbours {
            if pieces.iter().any(|piece| !neighbour.has(*piece)) {
                let have =
                    Message::Have { pieces: pieces.clone(), free_slots: cx.free_slots, interested: self.interested };
                cx.send(neighbour.id, self.blob, have);
            }
        }
    }

    pub(super) fn interest(&mut self, interested: u32, cx: &Cx<'_>) {
        // Anybody may say anything, and much follows from it: no more want it than there are.
        let most = u32::try_from(cx.members.len()).unwrap_or(u32::MAX);
        self.interested = self.interested.max(interested.min(most));
    }

    /// Closes what is on its way.
    pub(super) fn cancel(&mut self, cx: &mut Cx<'_>) {
        for request in std::mem::take(&mut self.requests) {
            cx.out.push(Action::CancelFetch { blob: self.blob, piece: request.piece, peer: request.peer });
        }
    }

    /// Nobody here wants the blob any more.
    pub(super) fn leave(&mut self, cx: &mut Cx<'_>) {
        self.cancel(cx);
        let coordinator = self.coordinator(cx);
        for id in self.neighbours.iter().map(|neighbour| neighbour.id).chain([coordinator]) {
            cx.send(id, self.blob, Message::Leave);
        }
    }

    fn take_request(&mut self, piece: u32, peer: PeerId) -> Option<Request> {
        let at = self.requests.iter().position(|request| request.piece == piece && request.peer == peer)?;
        Some(self.requests.swap_remove(at))
    }

    /// A request for the piece ended without it: it may be asked for again, unless another runs.
    pub(super) fn reopen(&mut self, piece: u32) {
        let is_asked = self.requests.iter().any(|request| request.piece == piece);
        if !is_asked && !self.have.has(u64::from(piece)) {
            self.open.set(u64::from(piece));
        }
    }
}
