//! What members saw at a registry that is away: asked of all of them at once, and answered to each.
//!
//! Only where both sides say `serve_stale = "cluster"`. What this node answers is what it saw at the
//! registry itself ([`Memory`]), never what it was told, so that no word goes round. Whoever says nothing
//! within `PATIENCE` counts as one that does not know.
//! Not here: what follows from the answers (`darter_core::stale`), and when to ask (`images`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use darter_core::Reference;
use darter_core::access::Place;
use darter_core::stale::{Allowances, Question, Seen};
use darter_core::swarm::PeerId;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::control::ControlHandle;
use super::wire::SEES;
use crate::images::Memory;
use crate::metrics::{Metrics, ReasonLabels};

/// Many round trips, also to a member that is busy. containerd waits meanwhile, for a tag that it would not
/// get at all.
const PATIENCE: Duration = Duration::from_secs(1);
/// Questions of this node that wait for answers. A node starts few images at once; what is past it gets the
/// answer of a node without a swarm.
const QUESTIONS_MAX: usize = 64;
/// Questions of one member that are answered, at once and after that again and again: a node that starts
/// asks for each of its images, and for the manifest of its platform. Past it there is no answer.
const AT_ONCE: u32 = 64;
const AGAIN: Duration = Duration::from_millis(125);
/// Askers remembered before those are looked for that asked nothing of late.
const ASKERS_MAX: usize = 1024;

/// What a member saw, and where it is; nothing where it does not know.
type Answer = Option<(IpAddr, Seen)>;

/// What became of a question.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Members that were asked.
    pub asked: usize,
    /// Members that answered, those included that do not know.
    pub answered: usize,
    /// What those saw that know, and where they are.
    pub said: Vec<(IpAddr, Seen)>,
}

/// The questions of this node, and those that it answers.
pub struct Witnesses {
    control: ControlHandle,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
    /// What this node saw; before it is known nothing is answered.
    memory: OnceLock<Memory>,
    askers: Mutex<Allowances<PeerId>>,
}

#[derive(Default)]
struct Table {
    number: u64,
    waiting: BTreeMap<u64, Waiting>,
}

/// A question that not all have answered.
struct Waiting {
    asked: BTreeMap<PeerId, IpAddr>,
    /// Closed with the last answer.
    answers: mpsc::Sender<Answer>,
}

impl Witnesses {
    /// Over this control plane.
    pub fn new(control: ControlHandle, metrics: Arc<Metrics>) -> Self {
        let askers = Mutex::new(Allowances::new(AGAIN, AT_ONCE));
        Self { control, metrics, table: Mutex::default(), memory: OnceLock::new(), askers }
    }

    /// From now on others get answers out of this.
    pub fn answer_from(&self, memory: Memory) {
        // There is one for the life of an agent.
        let _ = self.memory.set(memory);
    }

    /// Asks all members that are connected, and waits for all of them for a moment.
    pub async fn ask(&self, place: &Place, reference: &Reference) -> Heard {
        let members = self.control.all_that_can(SEES);
        let deadline = Instant::now() + PATIENCE;
        let mut heard = Heard { asked: members.len(), ..Heard::default() };
        let Some((guard, mut answers)) = self.note(&members) else { return Heard::default() };
        for (member, _) in &members {
            let (place, reference) = (place.clone(), reference.clone());
            self.control.want_seen(*member, Question { number: guard.number, place, reference });
        }
        while let Ok(Some(answer)) = timeout_at(deadline, answers.recv()).await {
            heard.answered += 1;
            heard.said.extend(answer);
        }
        heard
    }

    /// A question has begun, unless there are too many or there is nobody to ask.
    fn note(&self, members: &[(PeerId, IpAddr)]) -> Option<(Asking<'_>, mpsc::Receiver<Answer>)> {
        let mut table = self.table();
        if members.is_empty() || table.waiting.len() >= QUESTIONS_MAX {
            return None;
        }
        table.number += 1;
        let number = table.number;
        let (answers, receiver) = mpsc::channel(members.len());
        table.waiting.insert(number, Waiting { asked: members.iter().copied().collect(), answers });
        Some((Asking { number, witnesses: self }, receiver))
    }

    /// A member tells what it saw.
    pub fn came(&self, from: PeerId, number: u64, seen: Option<Seen>) {
        let mut table = self.table();
        let asked = table.waiting.get_mut(&number).and_then(|waiting| Some((waiting.asked.remove(&from)?, waiting)));
        let Some((address, waiting)) = asked else {
            debug!(peer = %from, "an answer that was not asked for, or came too late");
            return;
        };
        // There is room for an answer of each.
        let _ = waiting.answers.try_send(seen.map(|seen| (address, seen)));
        if waiting.asked.is_empty() {
            table.waiting.remove(&number);
        }
    }

    /// The last connection to a member is gone: it answers nothing any more.
    pub fn lost(&self, peer: PeerId) {
        self.table().waiting.retain(|_, waiting| waiting.asked.remove(&peer).is_none() || !waiting.asked.is_empty());
    }

    /// A member wants to know what this node saw.
    pub fn wanted(&self, from: PeerId, question: &Question) {
        let now = std::time::Instant::now();
        let is_allowed = {
            let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
            if askers.len() >= ASKERS_MAX {
                askers.forget_rested(now);
            }
            askers.take(now, from)
        };
        if !is_allowed {
            self.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "questions" }).inc();
            return;
        }
        let seen = self.memory.get().and_then(|memory| memory.recall(now, &question.place, &question.reference));
        self.control.tell_seen(from, question.number, seen);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that somebody waits for.
struct Asking<'a> {
    number: u64,
    witnesses: &'a Witnesses,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.witnesses.table().waiting.remove(&self.number);
    }
}
