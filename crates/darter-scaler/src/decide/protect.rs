//! Stage 6: which nodes may not go now, and why.
//!
//! A lease is given with an end and renewed while its reason lasts; nothing takes it away early. Own
//! reasons come first. Then each hot image gets as many nodes that stay as there are to be copies: the
//! first that have it, in an order that each node's own word decides.

use std::collections::BTreeSet;

use super::classify::work;
use super::scene::{Scene, Seen};
use super::trust::word;
use super::{Action, Class, Decision, Trust};
use crate::Millis;
use crate::reason::{Fact, Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};
use crate::state::{Report, Work};

/// What holds each node, in the order of the scene's nodes.
pub(super) struct Stays(Vec<Option<Hold>>);

/// What holds one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    pub(super) rule: Rule,
    /// When it ends, as far as that is known.
    until: Option<Millis>,
    /// The image, for the last copy of one.
    image: Option<u32>,
}

impl Stays {
    /// Whether something speaks for keeping this node.
    pub(super) fn holds(&self, n: usize) -> bool {
        self.0[n].is_some()
    }

    pub(super) fn rule(&self, n: usize) -> Option<Rule> {
        self.0[n].map(|hold| hold.rule)
    }
}

pub(super) fn all(scene: &Scene<'_>, decision: &mut Decision) -> Stays {
    let mut holds: Vec<_> = scene.nodes.iter().map(|seen| own(scene, seen)).collect();
    for (n, hold) in last_copies(scene, &holds) {
        holds[n] = Some(hold);
    }
    copies(scene, &holds, decision);
    let stays = Stays(holds);
    for (n, seen) in scene.nodes.iter().enumerate() {
        one(scene, seen, stays.0[n], decision);
    }
    stays
}

/// What a node itself says for being kept. The first that holds.
fn own(scene: &Scene<'_>, seen: &Seen<'_>) -> Option<Hold> {
    let hold = |rule, until| Some(Hold { rule, until, image: None });
    let report = word(seen.node, seen.trust)?;
    if matches!(seen.class, Class::Draining | Class::Launching) {
        return None;
    }
    let policy = scene.policy;
    if let Some(job) = report.jobs.iter().filter(|job| job.until > scene.now).max_by_key(|job| job.until) {
        return hold(Rule::Job, Some(job.until));
    }
    if report.gpus.iter().any(|gpu| gpu.work == Work::Unread && gpu.sick.is_none()) {
        return hold(Rule::GpuUnread, None);
    }
    if let Some(last) = newest_work(report).filter(|last| scene.age(*last) < policy.busy_ms) {
        return hold(Rule::GpuAtWork, Some(last.plus(policy.busy_ms)));
    }
    let doomed = matches!(seen.class, Class::Doomed { .. });
    let warming = match seen.class {
        Class::Warming { deadline } => Some(deadline),
        _ => seen.node.untainted.map(|at| at.plus(policy.warm.grace_ms)),
    };
    if let Some(until) = warming.filter(|until| *until > scene.now) {
        return hold(Rule::WarmUp, Some(until));
    }
    if !doomed && !report.pulls.is_empty() && scene.now < seen.node.created.plus(policy.warm.deadline_ms) {
        return hold(Rule::Pull, Some(seen.node.created.plus(policy.warm.deadline_ms)));
    }
    let serving = report.served.map(|at| at.plus(policy.serving_ms)).filter(|until| *until > scene.now);
    serving.and_then(|until| hold(Rule::Serving, Some(until)))
}

/// When any of its GPUs last worked.
fn newest_work(report: &Report) -> Option<Millis> {
    let worked = report.gpus.iter().filter_map(|gpu| match gpu.work {
        Work::Until(last) => Some(last),
        Work::Unread => None,
    });
    worked.max()
}

/// Whether a copy on this node counts: it is known to be there, and to stay there.
fn counts(seen: &Seen<'_>) -> bool {
    seen.trust == Trust::Fresh
        && !matches!(seen.class, Class::Draining | Class::Launching | Class::Doomed { .. } | Class::Sick { .. })
}

/// Copies that are missing of one image, among nodes that stay.
#[derive(Clone, Copy, Default)]
struct Copies {
    used: Millis,
    stay: u16,
}

/// Nodes that are held for an image that too few others have that stay.
fn last_copies(scene: &Scene<'_>, own: &[Option<Hold>]) -> Vec<(usize, Hold)> {
    let protect = &scene.policy.protect;
    let mut images = vec![Copies::default(); scene.state.images.len()];
    for (n, seen) in scene.nodes.iter().enumerate() {
        let Some(report) = &seen.node.report else { continue };
        let stays = own[n].is_some() && counts(seen);
        for held in &report.held {
            let Some(image) = images.get_mut(held.image as usize) else { continue };
            // Whoever said it, and however long ago: that it was used then stays true.
            image.used = image.used.max(held.used);
            image.stay += u16::from(stays);
        }
    }
    let mut held = Vec::new();
    for n in order(scene, own) {
        let Some(report) = &scene.nodes[n].node.report else { continue };
        let mut most: Option<(Millis, u64, u32)> = None;
        for held in &report.held {
            let Some(image) = images.get_mut(held.image as usize) else { continue };
            if image.stay < protect.copies && scene.age(image.used) < protect.hot_ms {
                image.stay += 1;
                let bytes = scene.state.images[held.image as usize].bytes;
                let digest = |image: u32| scene.state.images[image as usize].digest;
                // The one that holds it longest; then the largest; then by name, as numbers mean nothing.
                let better = most.is_none_or(|(used, size, other)| {
                    (image.used, bytes, digest(held.image)) > (used, size, digest(other))
                });
                if better {
                    most = Some((image.used, bytes, held.image));
                }
            }
        }
        if let Some((used, _, image)) = most {
            let until = Some(used.plus(protect.hot_ms));
            held.push((n, Hold { rule: Rule::LastCopy, until, image: Some(image) }));
        }
    }
    held
}

/// Nodes that nothing else holds and whose copies count: those that have a lease first, then the cheapest,
/// then by UID.
fn order(scene: &Scene<'_>, own: &[Option<Hold>]) -> Vec<usize> {
    let mut nodes: Vec<_> = (0..own.len()).filter(|n| own[*n].is_none() && counts(&scene.nodes[*n])).collect();
    nodes.sort_by_key(|n| {
        let seen = &scene.nodes[*n];
        let leased = seen.node.lease.is_some_and(|lease| lease.until > scene.now);
        (!leased, scene.pool(&seen.node.pool).micros_per_hour, seen.uid)
    });
    nodes
}

/// Copies that are asked for by one decision: each is a pull of its own.
const COPIES_MOST: usize = 16;

/// Asks nodes that stay anyway to bring what another one is held for.
fn copies(scene: &Scene<'_>, holds: &[Option<Hold>], decision: &mut Decision) {
    let wanted = holds.iter().flatten().filter_map(|hold| hold.image);
    let small = |image: &u32| scene.state.images[*image as usize].bytes <= scene.policy.protect.copy_bytes;
    let mut wanted: Vec<_> = wanted.filter(small).collect();
    wanted.sort_by_key(|image| scene.state.images[*image as usize].digest);
    wanted.dedup();
    let asked: BTreeSet<u32> = scene.nodes.iter().flat_map(|seen| &seen.node.asked).copied().collect();
    let stays = |(seen, hold): &(&Seen<'_>, &Option<Hold>)| {
        let works = hold.is_some_and(|hold| matches!(hold.rule, Rule::GpuAtWork | Rule::Job));
        works && counts(seen) && seen.node.asked.is_empty()
    };
    // One image each.
    let nodes = scene.nodes.iter().zip(holds).filter(stays);
    let wanted = wanted.into_iter().filter(|image| !asked.contains(image)).take(COPIES_MOST);
    for (image, (seen, _)) in wanted.zip(nodes) {
        let digest = scene.state.images[image as usize].digest.to_string();
        let bytes = scene.state.images[image as usize].bytes;
        decision.actions.push(Action::Copy { node: seen.uid.to_owned(), image });
        decision.reasons.push(
            Reason::new(Subject::Image(digest), Verdict::Copied, Rule::LastCopy)
                .knowing(Fact::Image, Some(seen.node.name.clone()), Some(bytes), None)
                .until(When::Pulled, None, None),
        );
    }
}

fn one(scene: &Scene<'_>, seen: &Seen<'_>, hold: Option<Hold>, decision: &mut Decision) {
    let now = scene.now;
    let lease = seen.node.lease.filter(|lease| lease.until > now);
    let subject = Subject::Node(seen.node.name.clone());
    let age_ms = seen.node.report.as_ref().map(|report| scene.age(report.heard));
    let base = |verdict, rule| {
        let reason = Reason::new(subject.clone(), verdict, rule);
        match age_ms {
            Some(_) => reason.knowing(Fact::Report, None, None, age_ms),
            None => reason,
        }
    };
    let Some(hold) = hold else {
        decision.reasons.push(free(scene, seen, lease.map(|lease| lease.until), base));
        return;
    };
    let protect = &scene.policy.protect;
    let since = lease.map_or(now, |lease| lease.since);
    let last = since.plus(protect.most_ms);
    let mut reason = explain(scene, seen, hold, base(Verdict::Kept, hold.rule));
    if last <= now {
        let found = scene.age(since);
        reason.verdict = Verdict::Held;
        reason = reason.against(RailHit { rail: Rail::Protection, limit: protect.most_ms, found });
        decision.reasons.push(reason.until(When::Time, None, lease.map(|lease| lease.until)));
        return;
    }
    let until = now.plus(protect.lease_ms).min(last);
    let left = lease.map_or(0, |lease| lease.until.since(now));
    // Near its last moment a renewal would gain nothing.
    if left < protect.renew_ms && lease.is_none_or(|lease| lease.until < until) {
        decision.actions.push(Action::Protect { node: seen.uid.to_owned(), until });
        decision.wake(until.max(now.plus(protect.renew_ms)).min(now.plus(protect.renew_ms)));
    } else if let Some(lease) = lease {
        let renew = Millis(lease.until.0.saturating_sub(protect.renew_ms)).plus(1);
        decision.wake(if renew > now { renew } else { lease.until });
    }
    if let Some(at) = hold.until.filter(|at| *at > now) {
        decision.wake(at);
    }
    decision.reasons.push(reason);
}

fn free(scene: &Scene<'_>, seen: &Seen<'_>, leased: Option<Millis>, base: impl Fn(Verdict, Rule) -> Reason) -> Reason {
    let policy = scene.policy;
    let reason = match seen.class {
        Class::Draining => base(Verdict::Free, Rule::Leaving),
        Class::Doomed { at } => base(Verdict::Free, Rule::Doomed).until(When::Time, None, Some(at)),
        Class::Unknown | Class::Launching => {
            let mut reason = base(Verdict::Held, Rule::Unknown);
            match seen.node.report.as_ref() {
                Some(report) => {
                    let age = scene.age(report.heard);
                    reason = reason.comparing(Quantity::ReportAgeMs, age, policy.report_lifetime_ms);
                }
                None => reason = reason.knowing(Fact::Node, None, None, Some(scene.age(seen.node.created))),
            }
            reason.until(When::Report, None, None)
        }
        Class::OccupiedIdle { since } => base(Verdict::Free, Rule::NothingHoldsIt)
            .comparing(Quantity::IdleMs, scene.age(since), policy.idle_proof_ms)
            .until(When::Work, None, None),
        _ => match word(seen.node, seen.trust).and_then(work) {
            Some(last) => base(Verdict::Free, Rule::NothingHoldsIt)
                .comparing(Quantity::IdleMs, scene.age(last), policy.busy_ms)
                .until(When::Work, None, None),
            None => base(Verdict::Free, Rule::NothingHoldsIt).until(When::Work, None, None),
        },
    };
    // What was given stays given.
    match leased {
        Some(until) => reason.until(When::Time, None, Some(until)),
        None => reason,
    }
}

fn explain(scene: &Scene<'_>, seen: &Seen<'_>, hold: Hold, reason: Reason) -> Reason {
    let Some(report) = &seen.node.report else { return reason };
    let policy = scene.policy;
    match hold.rule {
        Rule::Job => {
            let job = report.jobs.iter().max_by_key(|job| job.until);
            reason.knowing(Fact::Job, job.map(|job| job.name.clone()), None, None).until(
                When::JobEnds,
                None,
                hold.until,
            )
        }
        Rule::GpuUnread => reason.knowing(Fact::GpuWork, None, None, None).until(When::GpuRead, None, None),
        Rule::GpuAtWork => {
            let idle = newest_work(report).map_or(0, |last| scene.age(last));
            reason.comparing(Quantity::IdleMs, idle, policy.busy_ms).until(When::Time, None, hold.until)
        }
        Rule::WarmUp => {
            let untainted = seen.node.untainted.filter(|_| !matches!(seen.class, Class::Warming { .. }));
            let reason = match untainted {
                Some(at) => reason.knowing(Fact::Untainted, None, None, Some(scene.age(at))),
                None => reason.knowing(Fact::Node, None, None, Some(scene.age(seen.node.created))),
            };
            reason.until(When::Time, None, hold.until)
        }
        Rule::Pull => {
            let left = report.pulls.iter().map(|pull| pull.bytes_left).fold(0, u64::saturating_add);
            reason.knowing(Fact::Pull, None, Some(left), None).until(When::Pulled, None, hold.until)
        }
        Rule::Serving => {
            let age = report.served.map(|at| scene.age(at));
            reason.knowing(Fact::Serving, None, None, age).until(When::Time, None, hold.until)
        }
        _ => last_copy(scene, hold, reason),
    }
}

fn last_copy(scene: &Scene<'_>, hold: Hold, reason: Reason) -> Reason {
    let protect = &scene.policy.protect;
    let Some(image) = hold.image.and_then(|image| scene.state.images.get(image as usize)) else { return reason };
    let used = hold.until.map(|until| protect.hot_ms.saturating_sub(until.since(scene.now)));
    reason
        .knowing(Fact::Image, Some(image.digest.to_string()), Some(image.bytes), used)
        .comparing(Quantity::Copies, 0, protect.copies.into())
        .until(When::Copies, Some(u64::from(protect.copies) + 1), hold.until)
}
