//! The state that is decided on, made of all that is known; and what a decision changes of it.

use std::collections::BTreeMap;

use super::known::PoolConfig;
use super::loads::Load;
use super::own::{KnownNode, Own};
use super::tale::Tale;
use super::{Fleet, Outcome, REMOVALS_MAX};
use crate::Millis;
use crate::decide::Action;
use crate::state::{Node, Pod, Pool, Removal, Report, State, Workload};

/// Where nodes are of which nobody says in which pool.
pub(super) const NO_POOL: &str = "(unknown)";
/// By how much demand rises is looked at so often, where no workload of the pool says how long a start takes.
const LOOK_MS: u64 = 84_000;

impl Fleet {
    /// As of now.
    pub fn state(&mut self, now: Millis) -> State {
        self.look(now);
        let mut state = self.without_nodes(now);
        state.images = self.images.list();
        state.nodes = if self.settings.kubernetes { self.by_kubernetes(now) } else { self.by_their_word(now) };
        for node in state.nodes.values() {
            if !state.pools.contains_key(&node.pool) {
                state.pools.insert(node.pool.clone(), Pool::default());
            }
        }
        state.watched = if self.settings.kubernetes { self.watched } else { now };
        state
    }

    /// All but nodes and images.
    pub(super) fn without_nodes(&self, now: Millis) -> State {
        let names = self.settings.pools.keys().chain(self.pools.keys());
        let pools: BTreeMap<_, _> = names.map(|name| (name.clone(), self.pool(name))).collect();
        let workload = |(name, load): (&String, &Load)| {
            let workload = self.workload(load, &pools, now)?;
            Some((name.clone(), workload))
        };
        State {
            workloads: self.loads.iter().filter(|(_, load)| load.is_there(now)).filter_map(workload).collect(),
            pools,
            removals: self.removals.iter().cloned().collect(),
            freeze: self.freeze.clone(),
            watched: self.watched,
            ..State::default()
        }
    }

    fn workload(&self, load: &Load, pools: &BTreeMap<String, Pool>, now: Millis) -> Option<Workload> {
        let pool = self.pool_of(load)?;
        let known = pools.get(&pool)?;
        load.workload(&pool, known.micros_per_hour / u64::from(known.gpus.max(1)), now)
    }

    /// Where a workload runs: as somebody says, else where there is only one pool.
    pub(super) fn pool_of(&self, load: &Load) -> Option<String> {
        let is_known = |pool: &String| self.settings.pools.contains_key(pool) || self.pools.contains_key(pool);
        match load.words().pool {
            Some(pool) => Some(pool).filter(is_known),
            None => {
                let mut pools = self.settings.pools.keys().chain(self.pools.keys());
                let first = pools.next()?;
                pools.all(|other| other == first).then(|| first.clone())
            }
        }
    }

    /// As the user says, else as Kubernetes does.
    fn pool(&self, name: &str) -> Pool {
        let none = PoolConfig::default();
        let (config, fact) = (self.settings.pools.get(name).unwrap_or(&none), self.pools.get(name));
        let own = self.own_pools.get(name);
        Pool {
            micros_per_hour: config.micros_per_hour.or_else(|| fact?.micros_per_hour).unwrap_or(0),
            gpus: config.gpus.or_else(|| Some(fact?.gpus)).unwrap_or(1),
            nodes_least: config.nodes_least,
            // Nobody says: then it is not this that holds it.
            nodes_most: config.nodes_most.or_else(|| fact?.nodes_most).unwrap_or(u32::MAX),
            buffer: own.map_or(0, |own| own.buffer),
            buffer_least: config.buffer_least,
            increments: own.map(|own| own.increments.clone()).unwrap_or_default(),
            grew: own.and_then(|own| own.grew),
        }
    }

    fn by_kubernetes(&self, now: Millis) -> BTreeMap<String, Node> {
        let mut pods = BTreeMap::<&str, Vec<Pod>>::new();
        for (uid, known) in self.pods.iter().filter(|(_, known)| known.fact.gpus > 0 && !known.fact.agent) {
            let Some(node) = known.fact.node.as_deref() else { continue };
            let (workload, cost, ranked) = (known.fact.workload.clone(), known.cost(), known.ranked);
            pods.entry(node).or_default().push(Pod { uid: uid.clone(), workload, cost, ranked });
        }
        let none = Own::default();
        let node = |(uid, KnownNode { fact }): (&String, &KnownNode)| {
            let own = self.owns.get(uid).unwrap_or(&none);
            // What a node of the same name said before it says nothing of this one.
            let is_of = |tale: &&Tale| tale.uid.as_ref().is_none_or(|told| told == uid);
            let tale = self.tales.get(&fact.name).filter(is_of);
            let node = Node {
                name: fact.name.clone(),
                pool: fact.pool.clone().unwrap_or_else(|| self.pool_by_name(&fact.name)),
                zone: fact.zone.clone().unwrap_or_default(),
                created: own.created.unwrap_or(now),
                registered: fact.registered,
                tainted: fact.tainted,
                deleting: fact.deleting || own.is_leaving(now) || tale.is_some_and(|tale| tale.leaving),
                pods: pods.get(fact.name.as_str()).cloned().unwrap_or_default(),
                ..bare(own, tale, now)
            };
            (uid.clone(), node)
        };
        self.nodes.iter().map(node).collect()
    }

    fn by_their_word(&self, now: Millis) -> BTreeMap<String, Node> {
        let none = Own::default();
        let node = |(name, tale): (&String, &Tale)| {
            let uid = tale.uid.clone().unwrap_or_else(|| name.clone());
            let own = self.owns.get(&uid).unwrap_or(&none);
            let pods = tale.owners.iter().map(|(namespace, pod)| {
                let workload = self.workload_of(namespace, pod);
                Pod { uid: format!("{namespace}/{pod}"), workload, cost: 0, ranked: None }
            });
            let node = Node {
                name: name.clone(),
                pool: self.pool_by_name(name),
                zone: tale.zone.clone().unwrap_or_default(),
                created: own.created.unwrap_or(tale.since),
                registered: true,
                deleting: tale.leaving || own.is_leaving(now),
                pods: pods.collect(),
                ..bare(own, Some(tale), now)
            };
            (uid, node)
        };
        self.tales.iter().map(node).collect()
    }

    /// The pool whose nodes are called so; where there is one pool, that.
    fn pool_by_name(&self, node: &str) -> String {
        let pools = &self.settings.pools;
        let begins = |config: &PoolConfig| config.nodes.iter().any(|prefix| node.starts_with(prefix));
        let named = pools.iter().find(|(_, config)| begins(config)).map(|(name, _)| name);
        let only = || pools.iter().next().filter(|(_, config)| pools.len() == 1 && config.nodes.is_empty());
        named.or_else(|| only().map(|(name, _)| name)).cloned().unwrap_or_else(|| NO_POOL.to_owned())
    }

    /// Whose replica a pod is, by its name: `<deployment>-<hash of the ReplicaSet>-<five letters>`.
    fn workload_of(&self, namespace: &str, pod: &str) -> Option<String> {
        let (rest, letters) = pod.rsplit_once('-')?;
        let (deployment, hash) = rest.rsplit_once('-')?;
        let is_hash = letters.len() == 5 && !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_alphanumeric());
        let name = format!("{namespace}/{deployment}");
        (is_hash && self.loads.contains_key(&name)).then_some(name)
    }

    /// By how much demand of each pool rose within a lead time; and replicas that are there already.
    fn look(&mut self, now: Millis) {
        let mut needed = BTreeMap::<String, (u64, u64)>::new();
        for load in self.loads.values() {
            let told = load.newest().filter(|_| load.until().is_some_and(|until| until > now));
            let (Some(pool), Some(sample)) = (self.pool_of(load), told) else { continue };
            let words = load.words();
            let replicas = sample.backlog_milli.div_ceil(words.target_milli.unwrap_or(1000).max(1));
            let replicas = replicas.min(words.most.unwrap_or(0).into());
            let (gpus, lead_ms) = needed.entry(pool).or_insert((0, 0));
            *gpus += replicas * u64::from(words.gpus.unwrap_or(1));
            *lead_ms = (*lead_ms).max(words.lead_ms.unwrap_or(LOOK_MS));
        }
        for (pool, (gpus, lead_ms)) in needed {
            self.own_pools.entry(pool).or_default().looks(gpus, lead_ms, now);
        }
        let mut found = BTreeMap::<&str, u32>::new();
        for pod in self.pods.values() {
            if let Some(workload) = pod.fact.workload.as_deref() {
                *found.entry(workload).or_default() += 1;
            }
        }
        for (name, replicas) in found {
            if let Some(load) = self.loads.get_mut(name) {
                load.found(replicas);
            }
        }
    }

    /// When time alone changes what is said: the end of a sample.
    pub fn next_end(&self, now: Millis) -> Option<Millis> {
        self.loads.values().filter_map(Load::until).filter(|until| *until > now).min()
    }

    /// A decision was made on a state that was just taken.
    pub fn decided(&mut self, state: &State) {
        // Demand that came since was not looked at yet.
        for (name, _) in state.workloads.iter().filter(|(_, workload)| !workload.samples.is_empty()) {
            if let Some(load) = self.loads.get_mut(name) {
                load.decided();
            }
        }
    }

    /// An action is done, or goes on as if it were: it is not asked for again at once.
    pub fn acted(&mut self, action: &Action, now: Millis) {
        match action {
            Action::Answer { workload, replicas } => {
                let Some(load) = self.loads.get_mut(workload) else { return };
                if load.told(*replicas, now)
                    && let Some(pool) = self.loads.get(workload).and_then(|load| self.pool_of(load))
                {
                    self.own_pools.entry(pool).or_default().grew = Some(now);
                }
            }
            Action::Protect { node, until } => self.owns.entry(node.clone()).or_default().protected(*until, now),
            Action::Rank { pod, cost, .. } => {
                if let Some(known) = self.pods.get_mut(pod) {
                    (known.ours, known.ranked) = (Some(*cost), Some(now));
                }
            }
            Action::Buffer { pool, gpus } => {
                let own = self.own_pools.entry(pool.clone()).or_default();
                if *gpus > own.buffer {
                    own.grew = Some(now);
                }
                own.buffer = *gpus;
            }
            Action::Copy { node, image } => {
                let digest = self.images.digest(*image);
                let named = digest.and_then(|digest| self.images.name(digest, 0));
                match (named, self.owns.get_mut(node)) {
                    (Some(number), Some(own)) => own.asked.push((number, now)),
                    (Some(number), None) => self.images.forget(number),
                    (None, _) => {}
                }
            }
            Action::Remove { node } => {
                let fact = self.nodes.get(node).map(|known| &known.fact);
                let pool = fact.and_then(|fact| fact.pool.clone()).unwrap_or_else(|| self.pool_by_name(node));
                let zone = fact.and_then(|fact| fact.zone.clone()).unwrap_or_default();
                self.owns.entry(node.clone()).or_default().removing = Some(now);
                if self.removals.len() >= REMOVALS_MAX {
                    self.removals.pop_front();
                }
                self.removals.push_back(Removal { at: now, pool, zone });
            }
        }
    }

    /// What was done at Kubernetes did not come about: it is decided again.
    pub fn undone(&mut self, action: &Action, outcome: Outcome) {
        if outcome == Outcome::Done {
            return;
        }
        match action {
            Action::Rank { pod, .. } => {
                if let Some(known) = self.pods.get_mut(pod) {
                    known.ours = None;
                }
            }
            // Whatever it is now, it is written again.
            Action::Buffer { pool, .. } => {
                self.own_pools.entry(pool.clone()).or_default().buffer = 0;
            }
            // The removal stands in the window all the same: what failed may have been half done.
            Action::Remove { node } => {
                if let Some(own) = self.owns.get_mut(node) {
                    own.removing = None;
                }
            }
            _ => {}
        }
    }
}

/// What of a node comes from its agent and from ourselves.
fn bare(own: &Own, tale: Option<&Tale>, now: Millis) -> Node {
    Node {
        name: String::new(),
        pool: String::new(),
        zone: String::new(),
        created: Millis(0),
        registered: false,
        tainted: false,
        untainted: own.untainted,
        deleting: false,
        pods: Vec::new(),
        lease: own.lease.filter(|lease| lease.until > now),
        asked: own.asked.iter().map(|(image, _)| *image).collect(),
        report: tale.map(|tale| Report {
            heard: tale.heard,
            gpus: own.gpus(tale),
            held: tale.held.clone(),
            pulls: tale.pulls.clone(),
            jobs: Vec::new(),
            notice: tale.notice,
            served: None,
            warm: tale.warm,
        }),
    }
}
