//! What the scaler itself remembers of nodes, pods and pools: what it did, and since when things are as they are.

use std::collections::{BTreeMap, VecDeque};

use super::tale::Tale;
use super::{NodeFact, PodFact};
use crate::Millis;
use crate::state::{Gpu, INCREMENTS_MAX, Lease};

/// Lives of an agent whose names are kept, so that none of their reports is taken again.
const LIVES_MAX: usize = 8;
/// An image that was asked for and is not there after this was not brought.
const ASKED_FOR_MS: u64 = 600_000;
/// A lease that was asked for shows in a report by then, or it was not given.
pub(super) const LEASE_SHOWS_MS: u64 = 15_000;
/// A node that was to be removed and is still there after this, and not on its way out, was not.
pub(super) const REMOVAL_SHOWS_MS: u64 = 600_000;

/// The lives of one node's agent.
#[derive(Debug, Default)]
pub(super) struct Life {
    pub(super) instance: String,
    pub(super) sequence: u64,
    earlier: VecDeque<String>,
}

impl Life {
    /// Whether it was in this life before.
    pub(super) fn was(&self, instance: &str) -> bool {
        self.earlier.iter().any(|earlier| earlier == instance)
    }

    pub(super) fn moves_on(&mut self, instance: &str) {
        if self.instance == instance {
            return;
        }
        let ended = std::mem::replace(&mut self.instance, instance.to_owned());
        if ended.is_empty() {
            return;
        }
        if self.earlier.len() == LIVES_MAX {
            self.earlier.pop_front();
        }
        self.earlier.push_back(ended);
    }
}

/// What is remembered of one node, by its uid.
#[derive(Debug, Default)]
pub(super) struct Own {
    pub(super) created: Option<Millis>,
    pub(super) lease: Option<Lease>,
    /// The lease was asked for at this moment, and no report shows it yet.
    pub(super) asked_lease: Option<Millis>,
    /// Images that it was asked to bring, by number, and when.
    pub(super) asked: Vec<(u32, Millis)>,
    pub(super) untainted: Option<Millis>,
    pub(super) removing: Option<Millis>,
    /// Since when each GPU cannot be given work, by name.
    sick: BTreeMap<String, Millis>,
}

impl Own {
    /// Takes in what the agent says of its lease and its GPUs.
    pub(super) fn hears(&mut self, tale: &Tale, now: Millis) {
        let waits = self.asked_lease.is_some_and(|asked| now.since(asked) < LEASE_SHOWS_MS);
        match tale.protected {
            Some(until) if until > now => {
                let since = self.lease.filter(|lease| lease.until > now).map_or(now, |lease| lease.since);
                let until = if waits { self.lease.map_or(until, |lease| lease.until.max(until)) } else { until };
                self.lease = Some(Lease { since, until });
            }
            _ if waits => {}
            _ => self.lease = None,
        }
        let mut sick = BTreeMap::new();
        for gpu in tale.gpus.iter().filter(|gpu| gpu.is_sick) {
            let since = self.sick.get(&gpu.name).copied().unwrap_or(now);
            sick.insert(gpu.name.clone(), since);
        }
        self.sick = sick;
    }

    pub(super) fn gpus(&self, tale: &Tale) -> Vec<Gpu> {
        tale.gpus.iter().map(|gpu| gpu.gpu(self.sick.get(&gpu.name).copied())).collect()
    }

    /// It is protected, by our word.
    pub(super) fn protected(&mut self, until: Millis, now: Millis) {
        let since = self.lease.filter(|lease| lease.until > now).map_or(now, |lease| lease.since);
        (self.lease, self.asked_lease) = (Some(Lease { since, until }), Some(now));
    }

    /// Images that are still on their way by our word; the others are given back to the caller.
    pub(super) fn overdue(&mut self, held: &[crate::state::Held], now: Millis) -> Vec<u32> {
        let is_over = |(image, at): &(u32, Millis)| {
            now.since(*at) >= ASKED_FOR_MS || held.iter().any(|held| held.image == *image)
        };
        let (over, waits): (Vec<_>, Vec<_>) = self.asked.drain(..).partition(is_over);
        self.asked = waits;
        over.into_iter().map(|(image, _)| image).collect()
    }

    pub(super) fn is_leaving(&self, now: Millis) -> bool {
        self.removing.is_some_and(|at| now.since(at) < REMOVAL_SHOWS_MS)
    }
}

/// A node, as Kubernetes has it.
#[derive(Debug)]
pub(super) struct KnownNode {
    pub(super) fact: NodeFact,
}

/// A pod, as Kubernetes has it, and what we wrote there.
#[derive(Debug)]
pub(super) struct KnownPod {
    pub(super) fact: PodFact,
    pub(super) ranked: Option<Millis>,
    /// The cost that we gave it, until Kubernetes shows it.
    pub(super) ours: Option<i32>,
}

impl KnownPod {
    pub(super) fn cost(&self) -> i32 {
        self.ours.unwrap_or(self.fact.cost)
    }
}

/// What is remembered of one pool.
#[derive(Debug, Default)]
pub(super) struct OwnPool {
    pub(super) buffer: u32,
    pub(super) grew: Option<Millis>,
    pub(super) increments: Vec<u32>,
    /// GPUs that were needed when that was last looked at.
    looked: Option<(Millis, u64)>,
}

impl OwnPool {
    /// Once each lead time: by how much demand rose since.
    pub(super) fn looks(&mut self, needed: u64, lead_ms: u64, now: Millis) {
        let Some((at, before)) = self.looked else {
            self.looked = Some((now, needed));
            return;
        };
        if now.since(at) < lead_ms {
            return;
        }
        if self.increments.len() >= INCREMENTS_MAX {
            self.increments.remove(0);
        }
        self.increments.push(u32::try_from(needed.saturating_sub(before)).unwrap_or(u32::MAX));
        self.looked = Some((now, needed));
    }
}
