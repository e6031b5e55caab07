//! What the parts of the machine share while one event is handled: the time, this node, and where actions go.

use std::time::Duration;

use super::depth::Depth;
use super::event::{Action, Message};
use super::limits::Limits;
use super::peer::{Dice, Members, PeerId, Zone};
use super::register::Register;
use super::seat::AnswerTime;
use super::strikes::Strikes;
use super::time::Time;
use crate::Digest;

/// What every part needs of the whole while it handles an event.
pub(super) struct Cx<'a> {
    pub(super) now: Time,
    pub(super) me: PeerId,
    pub(super) zone: Zone,
    pub(super) limits: &'a Limits,
    pub(super) members: &'a Members,
    pub(super) strikes: &'a Strikes,
    pub(super) register: &'a mut Register,
    pub(super) dice: &'a mut Dice,
    pub(super) answers: &'a mut AnswerTime,
    pub(super) depth: &'a mut Depth,
    pub(super) free_slots: u8,
    pub(super) upload_time: Duration,
    /// Whether this node has heard of all members that there are, as far as it can tell.
    pub(super) is_settled: bool,
    /// Whether this node is about to go.
    pub(super) is_going: bool,
    pub(super) out: &'a mut Vec<Action>,
}

impl Cx<'_> {
    pub(super) fn send(&mut self, to: PeerId, blob: Digest, message: Message) {
        self.out.push(Action::Send { to, blob, message });
    }

    pub(super) fn zone_of(&self, id: &PeerId) -> Zone {
        if *id == self.me { self.zone } else { self.members.get(id).map_or(self.zone, |member| member.zone) }
    }
}
