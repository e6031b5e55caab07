//! What goes wrong in a run.

use std::time::Duration;

use super::Fault;
use super::queue::Due;
use super::wires::{ImportRun, TransferState};
use super::world::{World, nanos, number};
use crate::swarm::Event;

impl World<'_> {
    pub(super) fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Kill(n) => self.kill(n),
            Fault::KillCoordinator => self.coordinator().into_iter().for_each(|n| self.kill(n)),
            Fault::KillImporter => self.importer().into_iter().for_each(|n| self.kill(n)),
            Fault::Pause(n, period) => self.pause(n, period),
            Fault::PauseCoordinator(period) => self.coordinator().into_iter().for_each(|n| self.pause(n, period)),
            Fault::Partition(period) => {
                self.reach.split_until = self.now + nanos(period);
                self.cut();
                self.queue.at(self.reach.split_until + nanos(self.scenario.detection), Due::Look);
            }
            Fault::Sever(a, b) => {
                self.reach.severed.insert((a.min(b), a.max(b)));
                self.cut();
            }
            Fault::Unreachable(from, to) => drop(self.reach.unreachable.insert((from, to))),
            Fault::Lose(per_mille) => self.reach.lost = per_mille,
            Fault::Slow(n) => self.nodes[n as usize].up.slow_down(10),
            Fault::Stall(n) => self.nodes[n as usize].is_stalled = true,
            Fault::Corrupt(n) => {
                // Others shun it, so that it need not get the blob itself.
                self.wait_no_more(n);
                self.nodes[n as usize].is_corrupt = true;
            }
            Fault::Lie(n) => {
                self.wait_no_more(n);
                self.lies.liars.insert(n);
            }
            Fault::Boast(n) => self.nodes[n as usize].is_boasting = true,
            Fault::DiskFull(n) => self.fill_disk(n),
            Fault::Old(n) => drop(self.reach.old.insert(n)),
            Fault::Leap(n, by) => self.nodes[n as usize].ahead += nanos(by),
            Fault::Freeze(n, period) => {
                self.nodes[n as usize].frozen = (self.now, self.now + nanos(period));
            }
            Fault::Throttle(period) => self.throttle(period),
            Fault::Forbid(n) => self.nodes[n as usize].is_forbidden = true,
        }
    }

    fn coordinator(&self) -> Option<u32> {
        self.members.ranked(&self.digest(0)).first().map(number)
    }

    /// A node that reads the origin now.
    fn importer(&mut self) -> Option<u32> {
        let nodes = &self.nodes;
        let reads = |run: &&ImportRun| run.piece < run.end && run.refusal.is_none() && nodes[run.to as usize].is_alive;
        self.imports.all().map(|(_, run)| run).find(reads).map(|run| run.to)
    }

    fn kill(&mut self, n: u32) {
        if !self.nodes[n as usize].is_alive {
            return;
        }
        self.wait_no_more(n);
        self.nodes[n as usize].is_alive = false;
        for transfer in self.transfers.all_mut() {
            if (transfer.from == n || transfer.to == n) && transfer.state == TransferState::Running {
                transfer.state = TransferState::Broken;
            }
        }
        self.queue.at(self.now + nanos(self.scenario.detection), Due::Lost(n));
    }

    fn pause(&mut self, n: u32, period: Duration) {
        let until = self.now + nanos(period);
        self.nodes[n as usize].paused_until = until;
        self.queue.at(until, Due::Resume(n));
    }

    /// A node goes on, and finds what came while it stood still.
    pub(super) fn resume(&mut self, n: u32) {
        if self.nodes[n as usize].paused_until > self.now {
            return;
        }
        for event in std::mem::take(&mut self.nodes[n as usize].inbox) {
            self.tell(n, event);
        }
        self.tell(n, Event::Tick);
    }

    fn fill_disk(&mut self, n: u32) {
        self.wait_no_more(n);
        for blob in 0..self.blobs.len() {
            if !self.nodes[n as usize].ingests[blob].is_proven && self.scenario.wants(n, blob) {
                self.tell(n, Event::Unwant(self.blobs[blob].0));
            }
        }
        self.nodes[n as usize].has_no_room = true;
    }

    /// The run may end without this node.
    fn wait_no_more(&mut self, n: u32) {
        let is_awaited = n < self.scenario.nodes && !std::mem::replace(&mut self.nodes[n as usize].is_out, true);
        if is_awaited && self.nodes[n as usize].finished.is_none() {
            self.waiting -= 1;
        }
    }
}
