//! Nodes and Karpenter's claims on them, joined: a claim whose node has not joined yet is a node that is coming.
//!
//! Pure, but for the wall clock that tells an age. Each change gives the facts that it changes, and no others.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use super::super::settings::Settings;
use super::shape::{self, amount};
use crate::fleet::{Claim, Fact, Kind, NodeFact};
use crate::state::NODES_MAX;

/// Taints of a node that is on its way out.
const LEAVING: [&str; 2] = ["karpenter.sh/disrupted", "ToBeDeletedByClusterAutoscaler"];
const ZONE: &str = "topology.kubernetes.io/zone";

/// A node or a claim, as far as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kept {
    fact: NodeFact,
    created: Option<Timestamp>,
    /// Of a claim: its node.
    node: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    nodes: BTreeMap<String, Kept>,
    claims: BTreeMap<String, Kept>,
    node_by_name: BTreeMap<String, String>,
    claim_by_node: BTreeMap<String, String>,
    /// What was said, without its age.
    said: BTreeMap<String, (NodeFact, Option<Timestamp>)>,
    /// Of a list that has begun anew.
    coming: [Option<BTreeSet<String>>; 2],
    /// Things that there was no room for since the last look.
    dropped: u64,
}

/// Which of the two a change is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Nodes,
    Claims,
}

impl Nodes {
    pub(super) fn node(&mut self, settings: &Settings, event: Event<shape::Node>, now: Timestamp) -> Vec<Fact> {
        let event = map(event, |node| keep_node(settings, &node));
        self.on(Of::Nodes, event, now)
    }

    pub(super) fn claim(&mut self, settings: &Settings, event: Event<shape::NodeClaim>, now: Timestamp) -> Vec<Fact> {
        let event = map(event, |claim| keep_claim(settings, &claim));
        self.on(Of::Claims, event, now)
    }

    /// How many there was no room for since the last look.
    pub(super) fn dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn on(&mut self, of: Of, event: Event<Kept>, now: Timestamp) -> Vec<Fact> {
        let mut facts = Vec::new();
        match event {
            Event::Init => self.coming[of as usize] = Some(BTreeSet::new()),
            Event::InitApply(kept) => {
                if let Some(coming) = &mut self.coming[of as usize] {
                    coming.insert(kept.fact.uid.clone());
                }
                self.put(of, kept, now, &mut facts);
            }
            Event::Apply(kept) => self.put(of, kept, now, &mut facts),
            Event::Delete(kept) => self.remove(of, &kept.fact.uid, now, &mut facts),
            Event::InitDone => {
                let there = self.coming[of as usize].take().unwrap_or_default();
                let gone: Vec<_> = self.table(of).keys().filter(|uid| !there.contains(*uid)).cloned().collect();
                for uid in gone {
                    self.remove(of, &uid, now, &mut facts);
                }
                let uids = self.said.keys().cloned().collect();
                facts.push(Fact::Only { kind: Kind::Node, uids });
            }
        }
        facts
    }

    fn table(&mut self, of: Of) -> &mut BTreeMap<String, Kept> {
        match of {
            Of::Nodes => &mut self.nodes,
            Of::Claims => &mut self.claims,
        }
    }

    fn put(&mut self, of: Of, kept: Kept, now: Timestamp, facts: &mut Vec<Fact>) {
        let (uid, name, node) = (kept.fact.uid.clone(), kept.fact.name.clone(), kept.node.clone());
        let table = self.table(of);
        if table.len() >= NODES_MAX && !table.contains_key(&uid) {
            self.dropped += 1;
            return;
        }
        table.insert(uid.clone(), kept);
        match (of, node) {
            (Of::Nodes, _) => _ = self.node_by_name.insert(name, uid.clone()),
            (Of::Claims, Some(node)) => _ = self.claim_by_node.insert(node, uid.clone()),
            (Of::Claims, None) => {}
        }
        self.tell(of, &uid, now, facts);
    }

    fn remove(&mut self, of: Of, uid: &str, now: Timestamp, facts: &mut Vec<Fact>) {
        let Some(kept) = self.table(of).remove(uid) else { return };
        // A name may be another one's by now.
        let names = match of {
            Of::Nodes => (&mut self.node_by_name, Some(&kept.fact.name)),
            Of::Claims => (&mut self.claim_by_node, kept.node.as_ref()),
        };
        if let (names, Some(name)) = names
            && names.get(name).is_some_and(|owner| owner == uid)
        {
            names.remove(name);
        }
        self.unsay(uid, facts);
        // The other one stands alone now.
        let other = match of {
            Of::Nodes => self.claim_by_node.get(&kept.fact.name).map(|uid| (Of::Claims, uid.clone())),
            Of::Claims => kept.node.and_then(|node| self.node_by_name.get(&node)).map(|uid| (Of::Nodes, uid.clone())),
        };
        if let Some((of, uid)) = other {
            self.tell(of, &uid, now, facts);
        }
    }

    /// Says what there is to say of one of them, with the other that belongs to it.
    fn tell(&mut self, of: Of, uid: &str, now: Timestamp, facts: &mut Vec<Fact>) {
        let (node, claim) = match of {
            Of::Nodes => {
                let node = self.nodes.get(uid);
                let claim = node.and_then(|node| self.claim_by_node.get(&node.fact.name));
                (node, claim.and_then(|uid| self.claims.get(uid)))
            }
            Of::Claims => {
                let claim = self.claims.get(uid);
                let name = claim.and_then(|claim| claim.node.as_ref());
                let node = name.and_then(|name| self.node_by_name.get(name)).and_then(|uid| self.nodes.get(uid));
                (node, claim)
            }
        };
        let (fact, created) = match (node, claim) {
            (Some(node), Some(claim)) => {
                let hidden = claim.fact.uid.clone();
                let joined = join(node, claim);
                self.unsay(&hidden, facts);
                joined
            }
            (Some(alone), None) | (None, Some(alone)) => (alone.fact.clone(), alone.created),
            (None, None) => return,
        };
        if self.said.get(&fact.uid) == Some(&(fact.clone(), created)) {
            return;
        }
        self.said.insert(fact.uid.clone(), (fact.clone(), created));
        let age = created.map_or(0, |created| now.as_millisecond().saturating_sub(created.as_millisecond()));
        facts.push(Fact::Node(NodeFact { created_ms_ago: u64::try_from(age).unwrap_or(0), ..fact }));
    }

    fn unsay(&mut self, uid: &str, facts: &mut Vec<Fact>) {
        if self.said.remove(uid).is_some() {
            facts.push(Fact::NodeGone { uid: uid.to_owned() });
        }
    }
}

/// A node with the claim on it: it has existed since it was asked for.
fn join(node: &Kept, claim: &Kept) -> (NodeFact, Option<Timestamp>) {
    let mut fact = node.fact.clone();
    fact.claim = claim.fact.claim.clone();
    fact.deleting |= claim.fact.deleting;
    fact.pool = fact.pool.or_else(|| claim.fact.pool.clone());
    fact.zone = fact.zone.or_else(|| claim.fact.zone.clone());
    // Before its device plugin runs a node has none, and yet it is what it was bought as.
    fact.gpus = fact.gpus.max(claim.fact.gpus);
    (fact, node.created.into_iter().chain(claim.created).min())
}

fn keep_node(settings: &Settings, node: &shape::Node) -> Kept {
    let taints = &node.spec.taints;
    let capacity = node.status.as_ref().map(|status| &status.capacity);
    Kept {
        fact: NodeFact {
            uid: node.uid().unwrap_or_default(),
            name: node.name_any(),
            pool: pool(settings, node.labels()),
            zone: node.labels().get(ZONE).cloned(),
            created_ms_ago: 0,
            registered: true,
            tainted: taints.iter().any(|taint| taint.key == settings.startup_taint),
            deleting: node.metadata.deletion_timestamp.is_some()
                || taints.iter().any(|taint| LEAVING.contains(&taint.key.as_str())),
            claim: None,
            gpus: capacity.and_then(|capacity| amount(capacity, &settings.gpu_resource)).unwrap_or(0),
        },
        created: created(node.metadata.creation_timestamp.as_ref()),
        node: None,
    }
}

fn keep_claim(settings: &Settings, claim: &shape::NodeClaim) -> Kept {
    let (uid, name, gpu) = (claim.uid().unwrap_or_default(), claim.name_any(), &settings.gpu_resource);
    let status = claim.status.as_ref();
    let gpus = status.and_then(|status| amount(&status.capacity, gpu));
    Kept {
        fact: NodeFact {
            uid: uid.clone(),
            name: name.clone(),
            pool: pool(settings, claim.labels()),
            zone: claim.labels().get(ZONE).cloned(),
            created_ms_ago: 0,
            registered: false,
            tainted: false,
            deleting: claim.metadata.deletion_timestamp.is_some(),
            claim: Some(Claim { name, uid }),
            gpus: gpus.or_else(|| amount(&claim.spec.resources.requests, gpu)).unwrap_or(0),
        },
        created: created(claim.metadata.creation_timestamp.as_ref()),
        node: status.map(|status| status.node_name.clone()).filter(|name| !name.is_empty()),
    }
}

fn created(time: Option<&Time>) -> Option<Timestamp> {
    time.map(|time| time.0)
}

/// The pool that labels name.
pub(super) fn pool(settings: &Settings, labels: &BTreeMap<String, String>) -> Option<String> {
    settings.pool_labels.iter().find_map(|label| labels.get(label).cloned())
}

fn map<A, B>(event: Event<A>, mut keep: impl FnMut(A) -> B) -> Event<B> {
    match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(keep(object)),
        Event::Apply(object) => Event::Apply(keep(object)),
        Event::Delete(object) => Event::Delete(keep(object)),
    }
}

#[cfg(test)]
mod tests;
