//! What goes wrong in a run, and what everybody notices of it.

use super::Fault;
use super::queue::Due;
use super::wires::{ImportRun, Transfer, TransferState};
use super::world::{World, nanos, number};
use crate::swarm::{Event, FetchFailure, Members};

impl World<'_> {
    pub(super) fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Kill(n) => self.kill(n),
            Fault::KillCoordinator => {
                if let Some(id) = self.members.ranked(&self.blob).first() {
                    self.kill(number(id));
                }
            }
            Fault::KillImporter => {
                let nodes = &self.nodes;
                let reads = |run: &&mut ImportRun| {
                    run.piece < run.end && run.refusal.is_none() && nodes[run.to as usize].is_alive
                };
                let importer = self.imports.iter_mut().find(reads).map(|run| run.to);
                importer.into_iter().for_each(|n| self.kill(n));
            }
            Fault::Slow(n) => self.nodes[n as usize].up.slow_down(10),
            Fault::Corrupt(n) => {
                // Others shun it, so that it need not get the blob itself.
                let node = &mut self.nodes[n as usize];
                self.waiting -= u32::from(node.is_alive && !node.is_corrupt && node.finished.is_none());
                node.is_corrupt = true;
            }
            Fault::Throttle(period) => self.origin.throttled_until = self.now + nanos(period),
            Fault::Forbid(n) => self.nodes[n as usize].is_forbidden = true,
        }
    }

    fn kill(&mut self, n: u32) {
        let node = &mut self.nodes[n as usize];
        if !std::mem::replace(&mut node.is_alive, false) {
            return;
        }
        if node.finished.is_none() && !node.is_corrupt && n < self.scenario.nodes {
            self.waiting -= 1;
        }
        for transfer in self.transfers.iter_mut() {
            if (transfer.from == n || transfer.to == n) && transfer.state == TransferState::Running {
                transfer.state = TransferState::Broken;
            }
        }
        self.queue.at(self.now + nanos(self.scenario.detection), Due::Lost(n));
    }

    /// Everybody learns that a node is gone: by its connections, and by the membership.
    pub(super) fn lost(&mut self, gone: u32) {
        let id = self.ids[gone as usize];
        self.members = Members::new(self.members.iter().filter(|member| member.id != id).copied().collect());
        for n in 0..u32::try_from(self.nodes.len()).unwrap_or(u32::MAX) {
            let broken: Vec<Transfer> = {
                let incoming = std::mem::take(&mut self.nodes[n as usize].incoming);
                let (broken, kept) = incoming.into_iter().partition(|place| self.transfers.at(*place).from == gone);
                self.nodes[n as usize].incoming = kept;
                let broken: Vec<u32> = broken;
                broken.into_iter().map(|place| *self.transfers.at(place)).collect()
            };
            for transfer in broken {
                self.fetch_failed(&transfer, FetchFailure::Broken);
            }
            self.tell(n, Event::PeerLost(id));
            self.tell(n, Event::Members(self.members.clone()));
        }
    }
}
