//! What a hostile member says: what the core says of a node that has everything it is told to get.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use darter_agent::swarm::control::{ControlEvent, ControlHandle};
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::{Action, Event, Limits, Message, Swarm, Time, Zone};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{Known, lock};

/// A deadline of the core is never so far away that its clock would matter.
const FAR: Duration = Duration::from_secs(60);

/// What a test wants of it.
pub(super) enum Order {
    Want(Digest, Layout),
    Claim(Digest, Layout),
}

pub(super) struct Mind {
    core: Swarm,
    control: ControlHandle,
    known: Arc<Known>,
    began: Instant,
    /// What it says that it has of the blobs that it wants.
    have: Vec<(Digest, Layout, Bitfield)>,
}

impl Mind {
    pub(super) fn new(control: ControlHandle, known: Arc<Known>) -> Self {
        let core = Swarm::new(control.me(), Zone::default(), Limits::default(), 1);
        Self { core, control, known, began: Instant::now(), have: Vec::new() }
    }

    pub(super) async fn run(mut self, mut events: mpsc::Receiver<ControlEvent>, mut orders: mpsc::Receiver<Order>) {
        loop {
            let due = self.due();
            tokio::select! {
                event = events.recv() => match event {
                    Some(ControlEvent::Members(members)) => {
                        let others = members.iter().map(|member| member.id).filter(|id| *id != self.control.me());
                        *lock(&self.known.others) = others.collect();
                        self.handle(Event::Members(members));
                    }
                    Some(ControlEvent::Lost(peer)) => self.handle(Event::PeerLost(peer)),
                    Some(ControlEvent::Message { from, blob, message, .. }) => {
                        self.handle(Event::Message { from, blob, message });
                    }
                    // It has TLS, and nobody with TLS speaks of tokens.
                    Some(ControlEvent::TokenWanted { .. } | ControlEvent::Token { .. }) => {}
                    Some(ControlEvent::SeenWanted { from, question, .. }) => {
                        if let Some(seen) = *lock(&self.known.word) {
                            self.control.tell_seen(from, question.number, Some(seen));
                        }
                    }
                    Some(ControlEvent::Seen { .. }) => {}
                    None => return,
                },
                order = orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                () = sleep_until(due) => self.handle(Event::Tick),
            }
        }
    }

    fn now(&self) -> Time {
        Time::from_micros(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn due(&self) -> Instant {
        let wait = self.core.deadline().since(self.now()).min(FAR);
        // Its clock knows milliseconds.
        Instant::now() + wait.max(Duration::from_millis(1))
    }

    fn obey(&mut self, order: Order) {
        let (blob, layout, message) = match order {
            Order::Want(blob, layout) => (blob, layout, None),
            Order::Claim(blob, layout) => {
                let have = Bitfield::full(layout.pieces());
                (blob, layout, Some(Message::Hello { have, wants_answer: false }))
            }
        };
        lock(&self.known.blobs).insert(blob, layout);
        let Some(hello) = message else {
            let have = Bitfield::new(layout.pieces());
            self.have.push((blob, layout, have.clone()));
            return self.handle(Event::Want { blob, layout, have, can_import: true, turn: 0 });
        };
        self.handle(Event::Proven { blob, layout });
        for to in lock(&self.known.others).iter() {
            self.control.send(*to, blob, Message::Holds { size: layout.size() });
            self.control.send(*to, blob, hello.clone());
        }
    }

    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.core.handle(self.now(), event) {
                match action {
                    Action::Send { to, blob, message } => self.control.send(to, blob, message),
                    Action::Import { blob, first, end, .. } => {
                        events.extend(
                            (first..end).flat_map(|piece| self.has(blob, piece, Event::Imported { blob, piece })),
                        );
                    }
                    Action::Fetch { blob, piece, peer } => {
                        events.extend(self.has(blob, piece, Event::Fetched { blob, piece, peer }));
                    }
                    // Nobody's word bans anybody here, and nothing is kept.
                    _ => {}
                }
            }
        }
    }

    /// It says that a piece is here: what its core is told.
    fn has(&mut self, blob: Digest, piece: u32, event: Event) -> Vec<Event> {
        let Some((_, layout, have)) = self.have.iter_mut().find(|(wanted, ..)| *wanted == blob) else {
            return vec![event];
        };
        have.set(u64::from(piece));
        if have.is_full() { vec![event, Event::Proven { blob, layout: *layout }] } else { vec![event] }
    }
}
