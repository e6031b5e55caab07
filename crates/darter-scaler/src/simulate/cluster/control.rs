//! How many replicas: KEDA between none and one, the HPA above that.

use super::{Event, World};

/// The HPA leaves a change of a tenth alone.
const TOLERANCE_PERCENT: u32 = 10;
/// What the scaler asks users to allow the HPA at once.
const STEP: u32 = 100;
/// Pushes that come together are one: as long as a decision may take to be made and told.
const PUSH_MS: u64 = 100;

impl World<'_> {
    fn level(&self, workload: u32) -> u32 {
        self.loads[workload as usize].backlog().div_ceil(self.timers.target.max(1)).min(self.timers.most)
    }

    /// What KEDA is told.
    fn told(&self, workload: u32) -> u32 {
        match &self.brain {
            Some(brain) => brain.answered(workload),
            None => self.level(workload),
        }
    }

    fn workloads(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.loads.len()).unwrap_or(u32::MAX)
    }

    /// KEDA's own loop.
    pub(super) fn poll(&mut self) {
        self.at(self.now + self.timers.poll_ms, Event::Poll);
        // The scaler holds its answer for as long as it wants a replica: nothing is added to that.
        let cooldown = if self.brain.is_some() { 0 } else { self.timers.cooldown_ms };
        for workload in self.workloads() {
            let active = self.told(workload) > 0;
            let load = &mut self.loads[workload as usize];
            if active {
                load.active = Some(self.now);
                if load.replicas == 0 {
                    self.scale(workload, 1);
                }
            } else if load.replicas > 0 && load.active.is_none_or(|at| self.now >= at + cooldown) {
                self.scale(workload, 0);
            }
        }
    }

    /// The HPA's.
    pub(super) fn sync(&mut self) {
        self.at(self.now + self.timers.sync_ms, Event::Sync);
        for workload in self.workloads() {
            let told = self.told(workload).max(1);
            let decides = self.brain.is_some();
            let load = &mut self.loads[workload as usize];
            let have = load.replicas;
            if have == 0 {
                continue;
            }
            let wanted = if decides {
                told.min(have + STEP)
            } else {
                let near = told.abs_diff(have) * 100 <= have * TOLERANCE_PERCENT;
                let found = if near { have } else { told };
                load.found.push_back((self.now, found));
                let old = self.now.saturating_sub(self.timers.stabilisation_ms);
                load.found.retain(|(at, _)| *at >= old);
                let most = load.found.iter().map(|(_, found)| *found).max().unwrap_or(found);
                // Down only as far as all of the window agrees.
                let down = most.min(have);
                if found > have { found.min((have + 4).max(have * 2)) } else { down }
            };
            if wanted != have {
                self.scale(workload, wanted);
            }
        }
    }

    /// Something is different now: the scaler hears of it.
    pub(super) fn changed(&mut self, workload: u32, before: u32) {
        let after = self.loads[workload as usize].backlog();
        if let Some(brain) = &mut self.brain {
            brain.hear(self.now, workload, before, after);
        }
        self.think();
    }

    pub(super) fn think(&mut self) {
        let due = self.now + PUSH_MS;
        if let Some(brain) = &mut self.brain
            && brain.wakes_before(due)
        {
            self.at(due, Event::Decide);
        }
    }

    /// The scaler decides; KEDA is pushed, agents are told.
    pub(super) fn decide(&mut self) {
        let Some(mut brain) = self.brain.take() else { return };
        let backlogs: Vec<_> = self.loads.iter().map(super::Load::backlog).collect();
        let wake = brain.decide(self.now, &mut self.nodes, &mut self.pods, &backlogs, self.note);
        self.brain = Some(brain);
        if let Some(wake) = wake {
            self.at(wake, Event::Decide);
        }
        for workload in self.workloads() {
            if self.told(workload) > 0 && self.loads[workload as usize].replicas == 0 {
                self.loads[workload as usize].active = Some(self.now);
                self.scale(workload, 1);
            }
        }
    }
}
