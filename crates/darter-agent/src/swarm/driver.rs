//! The loop around `darter_core::swarm`: tells it what happens at this node, and does what it says.
//!
//! Bytes never come by here. Pulls carry out what concerns their blob (`Order`), the exchange is told
//! whom to serve, the control plane what to say to whom.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::{Action, Event, Limits, Message, PeerId, Rejection, RequestId, Swarm, Time, Zone};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, trace, warn};

use super::coming::Coming;
use super::control::{ControlEvent, ControlHandle};
use super::exchange::Client;
use super::handle::{Ending, Endings, Input, Order, Reply, Slot, SwarmHandle};
use super::tokens::Tokens;
use super::wire::{VALUES, feature_for};
use super::witnesses::Witnesses;
use crate::config::Scope;
use crate::metrics::{Metrics, ReasonLabels};
use crate::node::{Note, Notes};
use crate::store::Store;

/// Words of pulls and of the exchange that were not taken yet. Then whoever speaks waits.
pub(super) const INBOX: usize = 1024;
/// The timers of this machine know milliseconds; a deadline that has passed is met once in this time.
const TICK_MIN: Duration = Duration::from_micros(500);

/// What a wish is known by.
struct Wanted {
    id: u64,
    coming: Arc<Coming>,
    orders: mpsc::Sender<Order>,
}

/// What came and went is told together; a pull tells of its own blob at once.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);

/// The driver of one node.
pub(super) struct Driver {
    core: Swarm,
    /// The core's longest ban: that of a peer with three strikes.
    ban_last: Duration,
    control: ControlHandle,
    client: Arc<Client>,
    /// Where pieces go in plaintext.
    tokens: Option<Arc<Tokens>>,
    witnesses: Arc<Witnesses>,
    endings: Arc<Endings>,
    began: Instant,
    wanted: HashMap<Digest, Wanted>,
    /// Requests of peers that the core decides on right now.
    asked: BTreeMap<RequestId, (Digest, oneshot::Sender<Reply>)>,
    requests: u64,
    house: House,
    /// Who waits until everything that others will take is theirs.
    leaver: Option<oneshot::Sender<()>>,
}

/// What the driver has of this node besides the network.
pub(super) struct House {
    pub(super) store: Store,
    pub(super) metrics: Arc<Metrics>,
    /// Blobs to bring here that nobody on this node asks for.
    pub(super) errands: mpsc::Sender<Errand>,
    /// Who was banned is said of this node too.
    pub(super) notes: Notes,
}

/// A blob to bring here from other nodes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Errand {
    pub(super) blob: Digest,
    /// In bytes.
    pub(super) size: u64,
    pub(super) why: Why,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Why {
    /// Where there is room that nothing else needs.
    ItsHolderGoes,
    /// This node is a seed.
    ToKeep,
}

impl Driver {
    pub(super) fn new(
        control: ControlHandle,
        (zone, scope): (Zone, Scope),
        client: Arc<Client>,
        tokens: Option<Arc<Tokens>>,
        witnesses: Arc<Witnesses>,
        endings: Arc<Endings>,
        house: House,
    ) -> Self {
        let limits = Limits { scope_is_zone: scope == Scope::Zone, ..Limits::default() };
        Self {
            ban_last: limits.ban_last,
            core: Swarm::new(control.me(), zone, limits, seed()),
            control,
            client,
            tokens,
            witnesses,
            endings,
            began: Instant::now(),
            wanted: HashMap::new(),
            asked: BTreeMap::new(),
            requests: 0,
            house,
            leaver: None,
        }
    }

    /// Until `stop`, or until nobody tells it anything any more.
    pub(super) async fn run(
        mut self,
        mut events: mpsc::Receiver<ControlEvent>,
        mut inbox: mpsc::Receiver<Input>,
        stop: CancellationToken,
    ) {
        let mut ticked = self.began;
        loop {
            let due = self.due().max(ticked + TICK_MIN);
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.recv() => match event {
                    Some(event) => self.hear(event),
                    None => return,
                },
                input = inbox.recv() => match input {
                    Some(input) => self.take(input),
                    None => return,
                },
                () = self.endings.more.notified() => self.take_endings(),
                () = sleep_until(due) => {
                    ticked = Instant::now();
                    self.handle(Event::Tick);
                }
            }
        }
    }

    fn due(&self) -> Instant {
        let deadline = self.core.deadline();
        let far = Instant::now() + Duration::from_secs(60);
        if deadline == Time::NEVER {
            return far;
        }
        self.began.checked_add(Duration::from_micros(deadline.as_micros())).map_or(far, |due| due.min(far))
    }

    fn now(&self) -> Time {
        Time::from_micros(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn hear(&mut self, event: ControlEvent) {
        match event {
            ControlEvent::Members(members) => self.handle(Event::Members(members)),
            ControlEvent::Lost(peer) => {
                self.client.forget(peer);
                if let Some(tokens) = &self.tokens {
                    tokens.lost(peer);
                }
                self.witnesses.lost(peer);
                self.handle(Event::PeerLost(peer));
            }
            ControlEvent::Message { from, blob, message, turn } => {
                self.handle(Event::Message { from, blob, message });
                drop(turn);
            }
            ControlEvent::SeenWanted { from, question, turn } => {
                self.witnesses.wanted(from, &question);
                drop(turn);
            }
            ControlEvent::Seen { from, number, seen, turn } => {
                self.witnesses.came(from, number, seen);
                drop(turn);
            }
            ControlEvent::TokenWanted { from, blob, turn } => {
                if let Some(tokens) = &self.tokens {
                    tokens.wanted(from, blob);
                }
                drop(turn);
            }
            ControlEvent::Token { from, blob, token, turn } => {
                if let Some(tokens) = &self.tokens {
                    tokens.came(from, blob, token);
                }
                drop(turn);
            }
        }
    }

    fn take_endings(&mut self) {
        for ending in self.endings.take() {
            match ending {
                Ending::Upload(request) => self.handle(Event::Served(request)),
                Ending::Wish { id, blob, proven } => {
                    if self.wanted.get(&blob).is_some_and(|wanted| wanted.id == id) {
                        self.wanted.remove(&blob);
                        self.handle(proven.map_or(Event::Unwant(blob), |layout| Event::Proven { blob, layout }));
                        self.tell_of_containerds(blob, proven);
                    }
                }
            }
        }
    }

    /// What did not come may be here all the same: containerd has it, which was not told while it was wished for.
    fn tell_of_containerds(&mut self, blob: Digest, proven: Option<Layout>) {
        if let Some(size) = self.house.store.offers(&blob).filter(|_| proven.is_none()) {
            self.handle(Event::Proven { blob, layout: Layout::new(size) });
        }
    }

    fn take(&mut self, input: Input) {
        // A wish that was taken back before this one was made must not end it.
        self.take_endings();
        match input {
            Input::Want { id, blob, have, place: (turn, can_import), coming, orders } => {
                if self.wanted.contains_key(&blob) {
                    // Its orders end at once, and it goes to the origin by itself: a manifest that two
                    // repositories have, say, each of which proves its own access.
                    debug!(%blob, "a blob is wanted twice");
                    return;
                }
                let layout = coming.layout();
                self.wanted.insert(blob, Wanted { id, coming, orders });
                // Where it was here and went a moment ago, that is told late.
                self.handle(Event::Gone(blob));
                self.handle(Event::Want { blob, layout, have, can_import, turn });
            }
            Input::Report { id, blob, event } => {
                if self.wanted.get(&blob).is_some_and(|wanted| wanted.id == id) {
                    self.handle(event);
                }
            }
            Input::Event(event) => {
                if let Event::Proven { blob, .. } = &event {
                    // containerd has it. Its pull goes on all the same: it would read the origin alone.
                    if self.wanted.contains_key(blob) && !self.house.store.holds(blob) {
                        return;
                    }
                    self.wanted.remove(blob);
                }
                self.handle(event);
            }
            Input::Leave { blobs, left } => {
                self.leaver = Some(left);
                self.handle(Event::Leave(blobs));
            }
            Input::Asked { from, blob, piece, reply } => {
                self.requests += 1;
                let request = RequestId(self.requests);
                self.asked.insert(request, (blob, reply));
                self.handle(Event::Asked { from, blob, piece, request });
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            trace!(?event);
            for action in self.core.handle(self.now(), event) {
                events.extend(self.act(action));
            }
        }
    }

    /// Does it, or says what happened instead.
    fn act(&mut self, action: Action) -> Option<Event> {
        trace!(?action);
        match action {
            Action::Send { to, blob, message } if !self.knows(to, &message) => return unsaid(to, blob, &message),
            Action::Send { to, blob, message } => self.control.send(to, blob, message),
            Action::Compare { holders, .. } if holders.iter().any(|peer| !self.control.can(*peer, VALUES)) => {}
            Action::Compare { blob, holders } => return self.order(blob, Order::Compare(holders)),
            Action::Fetch { blob, piece, peer } => return self.order(blob, Order::Fetch { piece, peer }),
            Action::CancelFetch { blob, piece, peer } => return self.order(blob, Order::Cancel { piece, peer }),
            Action::Import { blob, segment, first, end } => {
                return self.order(blob, Order::Import { segment, first, end });
            }
            Action::Wait(blob) => return self.order(blob, Order::Wait),
            Action::Serve(request) => {
                // Made in any case: a peer that went away meanwhile gives its slot back.
                let slot = Slot::new(request, self.endings.clone());
                if let Some((blob, reply)) = self.asked.remove(&request) {
                    let coming = self.wanted.get(&blob).map(|wanted| wanted.coming.clone());
                    // Nobody waits any more: then the slot comes back with the reply.
                    drop(reply.send(Reply::Serve(slot, coming)));
                }
            }
            Action::Refuse { request, reason } => {
                if let Some((_, reply)) = self.asked.remove(&request) {
                    drop(reply.send(Reply::Refuse(reason)));
                }
            }
            Action::Reject { peer, reason } => self.reject(peer, reason),
            Action::Ban { peer, period } => self.ban(peer, period),
            Action::Take { blob, size } => return self.send_out(Errand { blob, size, why: Why::ItsHolderGoes }),
            Action::Keep { blob, size } => return self.send_out(Errand { blob, size, why: Why::ToKeep }),
            Action::TellRoom { to, blob } => {
                let bytes = self.house.store.room();
                self.control.send(to, blob, Message::Room { bytes });
            }
            Action::Used(blob) => self.house.store.used(&blob),
            Action::Left => {
                if let Some(left) = self.leaver.take() {
                    // Nobody waits any more who ran out of time.
                    let _ = left.send(());
                }
            }
        }
        None
    }

    /// Whether a peer can be told this: others take a word that they do not know for that of a broken peer.
    fn knows(&self, peer: PeerId, message: &Message) -> bool {
        let feature = feature_for(message);
        feature == 0 || self.control.can(peer, feature)
    }

    fn send_out(&self, errand: Errand) -> Option<Event> {
        self.house.errands.try_send(errand).err().map(|_| Event::NotTaken(errand.blob))
    }

    fn order(&mut self, blob: Digest, order: Order) -> Option<Event> {
        match self.wanted.get(&blob)?.orders.try_send(order) {
            // Closed: its pull is gone, and its ending says so in a moment.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => None,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // Its orders end, and it goes to the origin by itself.
                warn!(%blob, "a pull does not keep up with the swarm");
                self.wanted.remove(&blob);
                Some(Event::Unwant(blob))
            }
        }
    }

    fn reject(&self, peer: PeerId, reason: Rejection) {
        let reason = match reason {
            Rejection::Flood => "flood",
            Rejection::Boast => "boast",
        };
        debug!(%peer, reason, "a peer was not listened to");
        self.house.metrics.peer_rejected.get_or_create(&ReasonLabels { reason }).inc();
    }

    fn ban(&self, peer: PeerId, period: Duration) {
        warn!(%peer, ?period, "a peer did what no node does; it is left alone for a while");
        // Once may be a bit that flipped on its way.
        if period >= self.ban_last {
            self.house.notes.say(Note::PeerBanned { peer: peer.to_string(), period });
        }
        self.control.ban(peer, period);
        self.client.forget(peer);
    }
}

/// What follows where a peer of an earlier version is not told something: it takes nothing, and has no room.
const fn unsaid(to: PeerId, blob: Digest, message: &Message) -> Option<Event> {
    let answer = match message {
        Message::Take { .. } => Message::TakeEnd { is_kept: false },
        Message::RoomWanted => Message::Room { bytes: 0 },
        _ => return None,
    };
    Some(Event::Message { from: to, blob, message: answer })
}

/// Choices by lot differ from node to node, and from start to start.
fn seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// What others may have of this node: told at the start, and whenever something comes or goes.
pub(super) async fn announce(store: Store, swarm: SwarmHandle) {
    let mut told: Vec<(Digest, u64)> = Vec::new();
    loop {
        let changed = store.changed();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let held = store.blobs();
        for (blob, _) in told.iter().filter(|blob| held.binary_search(blob).is_err()) {
            swarm.gone(*blob).await;
        }
        for (blob, size) in held.iter().filter(|blob| told.binary_search(blob).is_err()) {
            swarm.proven(*blob, Layout::new(*size)).await;
        }
        if held.len() != told.len() {
            debug!(blobs = held.len(), "told the swarm what is here");
        }
        told = held;
        changed.await;
        // What somebody asked for in vain is taken back at once.
        let _ = tokio::time::timeout(ANNOUNCE_EVERY, store.lost()).await;
    }
}
