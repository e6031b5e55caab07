//! Pods on nodes: the scheduler, Karpenter, and what a ReplicaSet ends first.

use std::collections::BTreeMap;

use super::{Event, Node, Pod, World};

/// An image that was used so lately is missed when its last copy goes.
const HOT_MS: u64 = 30 * 60 * 1000;

impl World<'_> {
    /// Has a workload have so many replicas.
    pub(super) fn scale(&mut self, workload: u32, replicas: u32) {
        self.loads[workload as usize].replicas = replicas;
        let have = u32::try_from(self.loads[workload as usize].pods.len()).unwrap_or(u32::MAX);
        for _ in have..replicas {
            let number = self.next;
            self.next += 1;
            self.pods.insert(number, Pod { workload, node: None, serves: None, work: None, cost: 0 });
            self.loads[workload as usize].pods.insert(number);
            self.outcome.starts += 1;
            self.place(number);
        }
        for _ in replicas..have {
            self.end_one(workload);
        }
    }

    /// Those without a node first, then those that do not serve yet, then by cost, then the newest.
    fn end_one(&mut self, workload: u32) {
        let pods =
            self.loads[workload as usize].pods.iter().filter_map(|number| Some((number, self.pods.get(number)?)));
        let first = pods.min_by_key(|(number, pod)| {
            (pod.node.is_some(), pod.serves.is_some(), pod.cost, std::cmp::Reverse(**number))
        });
        let Some(number) = first.map(|(number, _)| *number) else { return };
        self.loads[workload as usize].pods.remove(&number);
        self.pending.retain(|pending| *pending != number);
        let Some(pod) = self.pods.remove(&number) else { return };
        if let Some(waiting) = pod.work {
            self.outcome.killed += 1;
            self.loads[workload as usize].serving -= 1;
            self.loads[workload as usize].queue.push_front(waiting);
        }
        if let Some(node) = pod.node.and_then(|node| self.nodes.get_mut(&node)) {
            node.pod = None;
            node.empty = self.now;
        }
        self.settle();
    }

    /// Pods that wait go where there is room now.
    fn settle(&mut self) {
        while let Some(number) = self.pending.front().copied() {
            if !self.bind(number) {
                return;
            }
            self.pending.pop_front();
        }
    }

    fn place(&mut self, number: u32) {
        if self.bind(number) {
            return;
        }
        self.pending.push_back(number);
        let first = self.batch.map_or(self.now, |(first, _)| first);
        let due = (self.now + self.timers.batch_idle_ms).min(first + self.timers.batch_most_ms);
        self.batch = Some((first, due));
        self.at(due, Event::Batch);
    }

    /// Puts a pod on a node that has room: one that has its image, where there is one.
    fn bind(&mut self, number: u32) -> bool {
        let Some(pod) = self.pods.get_mut(&number) else { return true };
        let free = self.nodes.iter_mut().filter(|(_, node)| node.joined && node.pod.is_none() && !node.going);
        let best = free.min_by_key(|(n, node)| (!node.images.contains_key(&pod.workload), **n));
        let Some((n, node)) = best else { return false };
        node.pod = Some(number);
        pod.node = Some(*n);
        let here = node.images.contains_key(&pod.workload);
        let takes = if here { self.timers.start_ms } else { self.timers.pull_ms };
        self.at(self.now + takes, Event::PodServes(number));
        true
    }

    pub(super) fn serves(&mut self, number: u32) {
        let Some(pod) = self.pods.get_mut(&number) else { return };
        pod.serves = Some(self.now);
        let workload = pod.workload;
        if let Some(node) = pod.node.and_then(|node| self.nodes.get_mut(&node)) {
            node.images.insert(workload, self.now);
            node.worked = self.now;
        }
        let before = self.loads[workload as usize].backlog();
        self.serve(workload);
        self.changed(workload, before);
    }

    /// The end of a batch: as many nodes as there are pods that no node is coming for.
    pub(super) fn launch(&mut self) {
        if self.batch.is_none_or(|(_, due)| due > self.now) {
            return;
        }
        self.batch = None;
        let coming = self.nodes.values().filter(|node| !node.joined).count();
        for _ in coming..self.pending.len() {
            let number = self.next;
            self.next += 1;
            let node = Node {
                launched: self.now,
                joined: false,
                pod: None,
                images: BTreeMap::new(),
                worked: self.now,
                empty: self.now,
                lease: None,
                going: false,
            };
            self.nodes.insert(number, node);
            self.outcome.launches += 1;
            self.at(self.now + self.timers.launch_ms, Event::NodeJoins(number));
        }
    }

    pub(super) fn joins(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        node.joined = true;
        node.empty = self.now;
        node.worked = self.now;
        self.settle();
        self.think();
    }

    fn is_empty(&self, node: &Node) -> bool {
        let leased = node.lease.is_some_and(|lease| lease.until.0 > self.now);
        node.joined && node.pod.is_none() && !leased && self.now >= node.empty + self.timers.consolidate_after_ms
    }

    /// Karpenter looks for empty nodes, and looks again before it takes them away.
    pub(super) fn disrupt(&mut self) {
        self.at(self.now + self.timers.disruption_ms, Event::Disrupt);
        let nodes = u64::try_from(self.nodes.len()).unwrap_or(u64::MAX);
        let budget = (nodes * self.timers.budget_percent).div_ceil(100);
        let going = self.nodes.values().filter(|node| node.going).count();
        let room = usize::try_from(budget).unwrap_or(usize::MAX).saturating_sub(going);
        let found = self.nodes.iter().filter(|(_, node)| !node.going && self.is_empty(node)).map(|(n, _)| *n);
        let found: Vec<_> = found.take(room).collect();
        for number in found {
            if let Some(node) = self.nodes.get_mut(&number) {
                node.going = true;
            }
            self.at(self.now + self.timers.validation_ms, Event::Validate(number));
        }
    }

    pub(super) fn validate(&mut self, number: u32) {
        let Some(node) = self.nodes.get(&number) else { return };
        if self.is_empty(node) {
            self.leave(number);
        } else if let Some(node) = self.nodes.get_mut(&number) {
            node.going = false;
            self.settle();
        }
    }

    /// A node goes.
    pub(super) fn leave(&mut self, number: u32) {
        let Some(node) = self.nodes.remove(&number) else { return };
        self.outcome.node_ms += self.now - node.launched;
        self.outcome.leases_broken += u64::from(node.going && node.lease.is_some_and(|lease| lease.until.0 > self.now));
        let hot = node.images.iter().filter(|(_, used)| node.going && self.now - **used < HOT_MS);
        let lost = hot.filter(|(image, _)| !self.nodes.values().any(|other| other.images.contains_key(image)));
        self.outcome.last_copies_lost += lost.count() as u64;
    }
}
