//! All that is known of the cluster, and the state that is decided on made of it.
//!
//! Pure: what was heard comes in as values, the time as an argument. Who lies is refused here, with a reason.
//! Not here: who hears it, who may say it (`access`), what follows from it (`decide`).

pub mod acts;
mod check;
pub mod facts;
mod images;
pub mod known;
mod loads;
mod own;
mod refusal;
mod states;
mod tale;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use darter_api::report::Report as Told;

pub use acts::{Act, Actuator, Done, Outcome, Target};
pub use facts::{Claim, Fact, Kind, NodeFact, PodFact, PoolFact, WorkloadFact};
pub use loads::{Demand, NoAnswer, NotTaken};
pub use refusal::Refusal;

use crate::decide::Action;
use crate::state::{Freeze, NODES_MAX, Removal, WORKLOADS_MAX, Workload};
use crate::{Millis, Policy};
use images::Images;
use known::{PoolConfig, WorkloadConfig};
use loads::{DESCRIBED_MAX, Load, Loads};
use own::{KnownNode, KnownPod, Life, Own, OwnPool};
use tale::Tale;

/// A pod for each GPU of the largest cluster.
const PODS_MAX: usize = 100_000;
/// Pools of one cluster.
const POOLS_MAX: usize = 1000;
/// A node that said nothing for so long is gone, where nobody else says whether it is; and so is what it
/// said, where somebody else does.
const SILENT_MS: u64 = 3_600_000;
/// Longer ago than any window of a rail.
const REMOVALS_FOR_MS: u64 = 24 * 3_600_000;
const REMOVALS_MAX: usize = 10_000;

/// What the user says, and what does not change while the scaler runs.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// By name.
    pub pools: BTreeMap<String, PoolConfig>,
    /// By `namespace/name`.
    pub workloads: BTreeMap<String, WorkloadConfig>,
    /// Whether nodes, pods and pools are Kubernetes' word, and not their own.
    pub kubernetes: bool,
    /// What is decided by.
    pub policy: Policy,
}

/// All of it.
#[derive(Debug)]
pub struct Fleet {
    settings: Settings,
    images: Images,
    nodes: BTreeMap<String, KnownNode>,
    pods: BTreeMap<String, KnownPod>,
    pools: BTreeMap<String, PoolFact>,
    /// By the node's name.
    tales: BTreeMap<String, Tale>,
    lives: BTreeMap<String, Life>,
    /// By the node's uid.
    owns: BTreeMap<String, Own>,
    own_pools: BTreeMap<String, OwnPool>,
    loads: Loads,
    /// What a scaler before this one knew of workloads that are not known yet.
    left: BTreeMap<String, Workload>,
    removals: VecDeque<Removal>,
    freeze: Option<Freeze>,
    watched: Millis,
    listed: BTreeSet<Kind>,
}

/// What taking a report came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Under which key directives for this node are.
    pub node: String,
    /// It is the first of this node, or says something that decisions should not wait for.
    pub is_news: bool,
}

impl Fleet {
    /// Of which nothing was heard yet.
    pub fn new(settings: Settings, now: Millis) -> Self {
        let configured =
            |(name, config): (&String, &WorkloadConfig)| (name.clone(), Load::configured(config.clone(), now));
        let loads = settings.workloads.iter().map(configured).collect();
        Self {
            settings,
            images: Images::default(),
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            pools: BTreeMap::new(),
            tales: BTreeMap::new(),
            lives: BTreeMap::new(),
            owns: BTreeMap::new(),
            own_pools: BTreeMap::new(),
            loads,
            left: BTreeMap::new(),
            removals: VecDeque::new(),
            freeze: None,
            watched: now,
            listed: BTreeSet::new(),
        }
    }

    /// Takes a report of whoever may speak for the node `speaks_for`, or for any.
    pub fn report(&mut self, told: Told, speaks_for: Option<&str>, now: Millis) -> Result<Taken, Refusal> {
        check::check(&told)?;
        let node = told.node.as_ref().map(|node| node.name.clone()).unwrap_or_default();
        if let Some(of) = speaks_for.filter(|of| **of != node) {
            return Err(Refusal::Identity { of: of.to_owned(), says: node });
        }
        if let Some((uid, of)) = self.taken_uid(&node, &told) {
            return Err(Refusal::Uid { node, uid, of });
        }
        if !self.tales.contains_key(&node) && self.tales.len() >= NODES_MAX {
            return Err(Refusal::Full { what: "nodes", most: NODES_MAX });
        }
        let (instance, sequence) = (told.instance.clone(), told.sequence);
        if let Some(life) = self.lives.get(&node) {
            if life.was(&instance) {
                return Err(Refusal::Instance { node });
            }
            if life.instance == instance && sequence <= life.sequence {
                return Err(Refusal::Sequence { node, had: life.sequence, came: sequence });
            }
        }
        let tale = Tale::read(told, &mut self.images, now)?;
        let life = self.lives.entry(node.clone()).or_default();
        life.moves_on(&instance);
        life.sequence = sequence;
        let before = self.tales.remove(&node);
        if let Some(before) = &before {
            before.release(&mut self.images);
        }
        let is_news = before.is_none_or(|before| {
            (before.notice.is_some(), before.leaving, before.warm) != (tale.notice.is_some(), tale.leaving, tale.warm)
        });
        let uid = self.uid(&node, &tale);
        let own = self.owns.entry(uid).or_default();
        own.hears(&tale, now);
        for image in own.overdue(&tale.held, now) {
            self.images.forget(image);
        }
        self.tales.insert(node.clone(), tale);
        Ok(Taken { node, is_news })
    }

    /// The uid that a node says is its own, and is another's; and whose. What is remembered of a node is kept by it.
    fn taken_uid(&self, node: &str, told: &Told) -> Option<(String, String)> {
        let uid = told.node.as_ref()?.uid.as_ref().filter(|uid| !uid.is_empty())?;
        let before = self.tales.get(node).and_then(|tale| tale.uid.as_ref());
        // It has said so before, and nobody else did then.
        if before == Some(uid) && !self.settings.kubernetes {
            return None;
        }
        let of = match self.settings.kubernetes {
            true => self.nodes.get(uid).map(|known| &known.fact.name).filter(|name| *name != node),
            false => {
                let others = self.tales.iter().filter(|(name, _)| *name != node);
                others.filter(|(_, tale)| tale.uid.as_ref() == Some(uid)).map(|(name, _)| name).next()
            }
        };
        of.map(|of| (uid.clone(), of.clone()))
    }

    /// By what a node is known: Kubernetes' uid, else its own word, else its name.
    fn uid(&self, name: &str, tale: &Tale) -> String {
        tale.uid.clone().unwrap_or_else(|| {
            let found = self.nodes.values().find(|node| self.settings.kubernetes && node.fact.name == name);
            found.map_or_else(|| name.to_owned(), |node| node.fact.uid.clone())
        })
    }

    /// Takes what Kubernetes says.
    pub fn fact(&mut self, fact: Fact, now: Millis) {
        self.watched = now;
        match fact {
            Fact::Node(fact) => self.node(fact, now),
            Fact::NodeGone { uid } => drop((self.nodes.remove(&uid), self.forget(&uid))),
            Fact::Pod(fact) => self.pod(fact),
            Fact::PodGone { uid } => drop(self.pods.remove(&uid)),
            Fact::Pool(fact) => {
                if self.pools.len() < POOLS_MAX || self.pools.contains_key(&fact.name) {
                    self.pools.insert(fact.name.clone(), fact);
                }
            }
            Fact::PoolGone { name } => drop(self.pools.remove(&name)),
            Fact::Workload(fact) => {
                if self.loads.len() < WORKLOADS_MAX || self.loads.contains_key(&fact.name) {
                    let name = fact.name.clone();
                    self.load(&name, now).fact = Some(fact);
                }
            }
            Fact::WorkloadGone { name } => self.workload_gone(&name, now),
            Fact::Watched => {}
            Fact::Only { kind, uids } => self.only(kind, &uids, now),
        }
    }

    fn node(&mut self, fact: NodeFact, now: Millis) {
        if self.nodes.len() >= NODES_MAX && !self.nodes.contains_key(&fact.uid) {
            return;
        }
        let own = self.owns.entry(fact.uid.clone()).or_default();
        // Once: it does not become younger by being told again.
        own.created.get_or_insert_with(|| Millis(now.0.saturating_sub(fact.created_ms_ago)));
        let before = self.nodes.get(&fact.uid);
        if before.is_some_and(|before| before.fact.tainted) && !fact.tainted {
            own.untainted = Some(now);
        }
        self.nodes.insert(fact.uid.clone(), KnownNode { fact });
    }

    fn pod(&mut self, fact: PodFact) {
        if let Some(known) = self.pods.get_mut(&fact.uid) {
            known.ours = known.ours.filter(|ours| *ours != fact.cost);
            known.fact = fact;
        } else if self.pods.len() < PODS_MAX {
            self.pods.insert(fact.uid.clone(), KnownPod { fact, ranked: None, ours: None });
        }
    }

    fn workload_gone(&mut self, name: &str, now: Millis) {
        let Some(load) = self.loads.get_mut(name) else { return };
        load.fact = None;
        if !load.is_there(now) {
            self.loads.remove(name);
        }
    }

    fn only(&mut self, kind: Kind, uids: &BTreeSet<String>, now: Millis) {
        self.listed.insert(kind);
        match kind {
            Kind::Node => {
                let gone: Vec<_> = self.nodes.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
                for uid in gone {
                    self.nodes.remove(&uid);
                    self.forget(&uid);
                }
            }
            Kind::Pod => self.pods.retain(|uid, _| uids.contains(uid)),
            Kind::Pool => self.pools.retain(|name, _| uids.contains(name)),
            Kind::Workload => {
                let gone = self.loads.iter().filter(|(name, load)| load.fact.is_some() && !uids.contains(*name));
                for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
                    self.workload_gone(&name, now);
                }
            }
        }
    }

    /// Nothing is remembered of this node any more.
    fn forget(&mut self, uid: &str) {
        for (image, _) in self.owns.remove(uid).map(|own| own.asked).unwrap_or_default() {
            self.images.forget(image);
        }
    }

    /// Drops what nobody speaks of any more.
    pub fn sweep(&mut self, now: Millis) {
        let silent = |tale: &Tale| now.since(tale.heard) >= SILENT_MS;
        let gone: Vec<_> = self.tales.iter().filter(|(_, tale)| silent(tale)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            if let Some(tale) = self.tales.remove(&name) {
                tale.release(&mut self.images);
            }
            self.lives.remove(&name);
        }
        let told: BTreeSet<_> = self.tales.iter().map(|(name, tale)| self.uid(name, tale)).collect();
        let is_there = |uid: &String| self.nodes.contains_key(uid) || told.contains(uid);
        let gone: Vec<_> = self.owns.keys().filter(|uid| !is_there(uid)).cloned().collect();
        for uid in gone {
            self.forget(&uid);
        }
        self.loads.retain(|_, load| load.is_there(now));
        while self.removals.front().is_some_and(|gone| now.since(gone.at) >= REMOVALS_FOR_MS) {
            self.removals.pop_front();
        }
    }

    /// KEDA asks for a workload, and its trigger says this of it.
    pub fn described(&mut self, name: &str, words: WorkloadConfig, now: Millis) {
        if let Some(load) = self.loads.get_mut(name) {
            load.describe(words, now);
            return;
        }
        let described = self.loads.values().filter(|load| load.is_described_only()).count();
        let has_room = described < DESCRIBED_MAX && self.loads.len() < WORKLOADS_MAX;
        // A trigger that says nothing describes nothing.
        if has_room && words != WorkloadConfig::default() {
            self.load(name, now).describe(words, now);
        }
    }

    /// A workload; one that was not known is as a scaler before this one left it.
    fn load(&mut self, name: &str, now: Millis) -> &mut Load {
        let left = self.left.remove(name);
        let load = self.loads.entry(name.to_owned()).or_insert_with(|| Load::new(now));
        if let Some(left) = left {
            load.resume(&left);
        }
        load
    }

    /// Takes a sample of demand.
    pub fn demand(&mut self, name: &str, demand: Demand, now: Millis) -> Result<(), NotTaken> {
        let kept_ms = || {
            let state = self.without_nodes(now);
            crate::decide::kept_ms(&state, &self.settings.policy, name)
        };
        // Only where a time without work may begin.
        let kept_ms = if demand.backlog_milli == 0 { kept_ms() } else { 0 };
        let load = self.loads.get_mut(name).filter(|load| load.is_there(now)).ok_or(NotTaken::Unknown)?;
        load.demand(demand, &self.settings.policy, || kept_ms, now)
    }

    /// Replicas that KEDA is told, or why it is not told.
    pub fn answer(&self, name: &str, now: Millis) -> Result<u32, NoAnswer> {
        let load = self.loads.get(name).ok_or(NoAnswer::Unknown)?;
        load.answer(self.pool_of(load).is_some(), now)
    }

    /// Holds everything, or does not any more.
    pub fn freeze(&mut self, freeze: Option<Freeze>) {
        self.freeze = freeze;
    }

    /// Whether everything is held.
    pub const fn frozen(&self) -> Option<&Freeze> {
        self.freeze.as_ref()
    }

    /// Workloads as a scaler before this one left them: what they were told, and what was learnt of them. Of those
    /// that are not known yet, once they are.
    pub fn resume(&mut self, left: BTreeMap<String, Workload>) {
        self.left = left;
        let known: Vec<_> = self.loads.keys().cloned().collect();
        for name in known {
            if let (Some(left), Some(load)) = (self.left.remove(&name), self.loads.get_mut(&name)) {
                load.resume(&left);
            }
        }
        while self.left.len() > WORKLOADS_MAX {
            self.left.pop_last();
        }
    }

    /// How many of each there are, for the metrics.
    pub fn counts(&self) -> Counts {
        Counts { nodes: self.nodes.len().max(self.tales.len()), images: self.images.len(), workloads: self.loads.len() }
    }

    /// Ages of the newest report of each node, by name.
    pub fn report_ages(&self, now: Millis) -> Vec<(String, u64)> {
        self.tales.iter().map(|(name, tale)| (name.clone(), now.since(tale.heard))).collect()
    }

    /// Newest demand of each workload that has some: name, thousandths, age, and whether it says something.
    pub fn demands(&self, now: Millis) -> Vec<(String, u64, u64, bool)> {
        let one = |(name, load): (&String, &Load)| {
            let newest = load.newest()?;
            let is_told = load.until().is_some_and(|until| until > now);
            Some((name.clone(), newest.backlog_milli, now.since(newest.at), is_told))
        };
        self.loads.iter().filter_map(one).collect()
    }

    /// What was said of an action's target, for whoever carries it out.
    pub fn target(&self, action: &Action) -> Target {
        match action {
            Action::Answer { workload, .. } => Target::Workload { name: workload.clone() },
            Action::Buffer { pool, .. } => Target::Pool { name: pool.clone() },
            Action::Rank { pod, .. } => {
                let fact = self.pods.get(pod).map(|known| known.fact.clone()).unwrap_or_default();
                Target::Pod { uid: pod.clone(), namespace: fact.namespace, name: fact.name }
            }
            Action::Protect { node, .. } | Action::Copy { node, .. } | Action::Remove { node } => {
                let fact = self.nodes.get(node).map(|known| &known.fact);
                Target::Node {
                    uid: node.clone(),
                    name: fact.map_or_else(|| self.name_of(node), |fact| fact.name.clone()),
                    claim: fact.and_then(|fact| fact.claim.clone()),
                }
            }
        }
    }

    /// The name of a node that only its own word made known.
    fn name_of(&self, uid: &str) -> String {
        let told = self.tales.iter().find(|(name, tale)| tale.uid.as_deref() == Some(uid) || *name == uid);
        told.map_or_else(|| uid.to_owned(), |(name, _)| name.clone())
    }

    /// What an image of the state can be asked for under: a name that some node had it by, and its digest.
    pub fn image_name(&self, image: u32) -> Option<String> {
        self.images.called(image).map(ToOwned::to_owned)
    }
}

/// How many of each there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Nodes.
    pub nodes: usize,
    /// Different images.
    pub images: usize,
    /// Workloads.
    pub workloads: usize,
}
