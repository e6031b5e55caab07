//! Gathers one report out of what the parts of the agent know, and says which of it is news.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use darter_api::report::{Check, CheckState, Going, GoingReason, Image, Node, Pull, Readiness, Report, Store, Swarm};
use darter_core::ready::{self, State};
use tokio::sync::watch;

use super::desk::Desk;
use super::gpus::gpus;
use super::{clip, ms};
use crate::admin::Watched;
use crate::going::Reason;
use crate::images::{Catalogue, KnownImage};
use crate::metrics::Metrics;
use crate::pulls::Pulls;
use crate::store;

/// Images of a report: far more than a node runs, and a report of some 60 KB.
const IMAGES_MAX: usize = 200;
/// Blobs on their way: a node has 64 ingests at most.
const PULLS_MAX: usize = 64;

/// Where a report comes from.
pub(super) struct Sources {
    /// Of the node: its names, and what does not change.
    pub(super) node: Node,
    pub(super) instance: String,
    pub(super) began: Instant,
    pub(super) watched: Watched,
    pub(super) metrics: Arc<Metrics>,
    pub(super) pulls: Pulls,
    pub(super) catalogue: Catalogue,
    /// Of the own pod, once it is known.
    pub(super) namespace: watch::Receiver<Option<String>>,
    pub(super) going: watch::Receiver<Option<Reason>>,
    /// Since when the reason is what it is.
    pub(super) going_since: Mutex<Option<(Reason, Instant)>>,
    pub(super) desk: Arc<Desk>,
    /// Of the last report, over all connections.
    pub(super) sequence: AtomicU64,
}

impl Sources {
    /// A report of this moment. Its sequence is given when it is sent.
    pub(super) async fn gather(&self) -> Report {
        let readiness = self.watched.refresh(&self.metrics).await;
        let (images, images_left_out) = self.images();
        let (pulls, pulls_left_out) = self.on_their_way();
        Report {
            node: Some(self.node()),
            instance: self.instance.clone(),
            sequence: 0,
            running_ms: ms(self.began.elapsed()),
            readiness: Some(of_checks(&readiness)),
            gpus: Some(gpus(&self.watched.gpus)),
            store: Some(self.store()),
            images,
            images_left_out,
            pulls,
            pulls_left_out,
            swarm: self.watched.swarm.as_ref().map(|standing| {
                let standing = *standing.borrow();
                Swarm { members: count(standing.peers), addresses: count(standing.addresses) }
            }),
            going: self.going(),
            carried_out: Some(self.desk.told()),
        }
    }

    /// The next sequence: each is used once.
    pub(super) fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn node(&self) -> Node {
        let facts = self.watched.node.facts();
        let uid = facts.as_ref().map(|facts| facts.uid.clone()).filter(|uid| !uid.is_empty());
        let provider_id = facts.and_then(|facts| facts.provider_id.clone());
        Node { uid, provider_id, namespace: self.namespace.borrow().clone(), ..self.node.clone() }
    }

    fn store(&self) -> Store {
        let store::Usage { bytes, limit_bytes, pinned_bytes, .. } = self.watched.store.usage();
        let is_taking = self.watched.store.state() == store::State::Ok;
        Store { used_bytes: bytes, limit_bytes, pinned_bytes, is_taking }
    }

    fn images(&self) -> (Vec<Image>, u32) {
        newest(self.catalogue.images().into_iter().map(|known| self.image(known)).collect())
    }

    fn image(&self, KnownImage { digest, names, blobs }: KnownImage) -> Image {
        let held = self.watched.store.holding(blobs.iter().map(|(digest, _)| digest));
        Image {
            digest: digest.to_string(),
            references: names.iter().map(|name| clip(name)).collect(),
            size_bytes: blobs.iter().map(|(_, size)| *size).fold(0, u64::saturating_add),
            held_bytes: held.bytes,
            is_complete: held.is_complete,
            is_pinned: held.is_pinned,
            used_ms: held.unused.map(ms),
        }
    }

    fn on_their_way(&self) -> (Vec<Pull>, u32) {
        let pulls = self.pulls.on_their_way();
        let left_out = pulls.len().saturating_sub(PULLS_MAX);
        let pull = |pull: crate::pulls::OnItsWay| Pull {
            digest: pull.digest.to_string(),
            done_bytes: pull.done,
            total_bytes: pull.size,
            is_ahead: pull.is_ahead,
        };
        (pulls.into_iter().take(PULLS_MAX).map(pull).collect(), count(left_out))
    }

    fn going(&self) -> Option<Going> {
        let told = *self.going.borrow();
        let mut since = self.going_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = match (told, *since) {
            (Some(reason), Some((before, at))) if before == reason => Some((reason, at)),
            (told, _) => told.map(|reason| (reason, Instant::now())),
        };
        since.map(|(reason, at)| {
            let reason = match reason {
                Reason::SpotNotice => GoingReason::SpotNotice,
                Reason::Taint => GoingReason::Taint,
                Reason::Rebalance => GoingReason::Rebalance,
                Reason::Scheduled => GoingReason::Scheduled,
            };
            Going { reason: reason.into(), since_ms: ms(at.elapsed()) }
        })
    }
}

/// As many as a report has room for of those that are here, those first that were used last, the larger before the
/// smaller; and how many were left out.
fn newest(mut images: Vec<Image>) -> (Vec<Image>, u32) {
    // Nothing of it is here: it was evicted, or never came.
    images.retain(|image| image.held_bytes > 0);
    images.sort_by(|one, other| {
        let key = |image: &Image| (image.used_ms.unwrap_or(u64::MAX) / 1000, Reverse(image.size_bytes));
        key(one).cmp(&key(other)).then_with(|| one.digest.cmp(&other.digest))
    });
    let left_out = images.len().saturating_sub(IMAGES_MAX);
    images.truncate(IMAGES_MAX);
    (images, count(left_out))
}

fn of_checks(readiness: &ready::Readiness) -> Readiness {
    let check = |check: &ready::Check| {
        let state = match check.state {
            State::Ok => CheckState::Ok,
            State::Degraded => CheckState::Degraded,
            State::Failed => CheckState::Failed,
        };
        Check { check: check.check.to_owned(), state: state.into(), reason: clip(&check.reason) }
    };
    Readiness { ready: readiness.ready, checks: readiness.checks.iter().map(check).collect() }
}

fn count(things: usize) -> u32 {
    u32::try_from(things).unwrap_or(u32::MAX)
}

/// What of a report is news at once: all of it but what moves by itself, which waits for its turn.
pub(super) fn news(report: &Report) -> Report {
    let mut news = report.clone();
    (news.sequence, news.running_ms) = (0, 0);
    // Their reasons have ages and bytes in them.
    for check in news.readiness.iter_mut().flat_map(|readiness| &mut readiness.checks) {
        check.reason.clear();
    }
    if let Some(gpus) = &mut news.gpus {
        gpus.hung_ms = gpus.hung_ms.map(|_| 0);
        gpus.judged_ms = gpus.judged_ms.map(|_| 0);
        for reason in &mut gpus.reasons {
            reason.detail.clear();
        }
        for gpu in &mut gpus.gpus {
            // Nor that there is a reading: what follows from it is.
            (gpu.memory_used_bytes, gpu.memory_total_bytes) = (None, None);
            (gpu.power_milliwatts, gpu.sample_ms) = (None, None);
            if let Some(idleness) = &mut gpu.idleness {
                (idleness.since_ms, idleness.busy_ratio) = (0, None);
                idleness.idle_ms = idleness.idle_ms.map(|_| 0);
                idleness.evidence.clear();
            }
        }
    }
    if let Some(store) = &mut news.store {
        *store = Store { is_taking: store.is_taking, ..Store::default() };
    }
    news.images.sort_by(|one, other| one.digest.cmp(&other.digest));
    for image in &mut news.images {
        (image.used_ms, image.held_bytes) = (None, 0);
    }
    for pull in &mut news.pulls {
        (pull.done_bytes, pull.total_bytes) = (0, None);
    }
    if let Some(going) = &mut news.going {
        going.since_ms = 0;
    }
    if let Some(out) = &mut news.carried_out {
        if let Some(protection) = &mut out.protection {
            (protection.remaining_ms, protection.most_ms) = (0, 0);
        }
        for prewarm in &mut out.prewarm {
            (prewarm.done_bytes, prewarm.total_bytes) = (0, None);
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn image(n: u64, used_ms: u64, bytes: u64) -> Image {
        let digest = darter_core::Digest::of(&n.to_le_bytes()).to_string();
        let references = vec!["r".repeat(super::super::TEXT_MAX); 4];
        Image { digest, references, size_bytes: bytes, held_bytes: bytes, used_ms: Some(used_ms), ..Image::default() }
    }

    #[test]
    fn of_ten_thousand_images_the_newest_are_told_and_the_rest_is_counted() {
        let images = (0..10_000).map(|n| image(n, n * 1000, 1 + n % 7)).chain([image(10_000, 0, 0)]).collect();
        let (told, left_out) = newest(images);
        assert_eq!((told.len(), left_out), (IMAGES_MAX, 9_800), "what is not here is not left out");
        assert!(told.iter().map(|image| image.used_ms.unwrap()).eq((0..200).map(|n| n * 1000)));
        // However long their names are it is far from the 4 MiB that a gRPC server takes.
        let report = Report { images: told, ..Report::default() };
        assert!(report.encoded_len() < 512 * 1024, "{}", report.encoded_len());
        // Of the same second the larger comes first.
        let (told, _) = newest(vec![image(1, 900, 5), image(2, 100, 6), image(3, 1100, 9)]);
        assert_eq!(told.iter().map(|image| image.size_bytes).collect::<Vec<_>>(), [6, 5, 9]);
    }

    #[test]
    fn what_moves_by_itself_is_no_news_and_the_rest_is() {
        let with = |change: fn(&mut Report)| {
            let mut report = Report { images: vec![image(1, 5, 9)], ..Report::default() };
            change(&mut report);
            news(&report)
        };
        let same = with(|_| {});
        assert_eq!(with(|report| report.running_ms = 7), same);
        assert_eq!(with(|report| report.images[0].used_ms = Some(9)), same);
        assert_eq!(with(|report| report.images[0].held_bytes = 3), same);
        assert_ne!(with(|report| report.images[0].is_complete = true), same);
        assert_ne!(with(|report| report.going = Some(Going::default())), same);
        assert_ne!(with(|report| report.images.clear()), same);
    }
}
