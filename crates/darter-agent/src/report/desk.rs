//! Where directives arrive: what makes no sense is refused here, the rest waits here to be carried out, and what
//! became of it is told from here.
//!
//! Nothing queues. A lease has one wish, the newest; images have one list, the newest. Who floods this node with
//! directives is read slowly (`client`), and changes a few fields.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_api::report::{CarriedOut, Directive, Prewarm, PrewarmImages, PrewarmState, Protect, Protection, Refusal};
use darter_core::ImageName;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use super::clip;
use super::lease::SHORTEST;
use crate::metrics::{Metrics, ReasonLabels};

/// Images of one directive: as many as a node starts at once, and then some.
const IMAGES_MAX: usize = 16;
/// Bytes of a name. Registries allow less.
const NAME_MAX: usize = 512;
/// What is here is not ordered again by each heartbeat: it is asked for anew after this.
const DONE_FOR: Duration = Duration::from_secs(600);
/// And what failed after this.
const FAILED_FOR: Duration = Duration::from_secs(60);

/// What the lease on the own pod is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LeaseOrder {
    /// From receipt on, for so long at least.
    Protect { sequence: u64, received: Instant, length: Duration, reason: String },
    /// Not any more.
    Release { sequence: u64 },
}

impl LeaseOrder {
    /// Of the directive.
    pub(super) const fn sequence(&self) -> u64 {
        match self {
            Self::Protect { sequence, .. } | Self::Release { sequence } => *sequence,
        }
    }

    /// Whether it asks for nothing any more.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        match self {
            Self::Protect { received, length, .. } => now.saturating_duration_since(*received) >= *length,
            Self::Release { .. } => false,
        }
    }
}

/// One image that was ordered.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) told: Prewarm,
    /// When it was here, or was not to be had.
    ended: Option<Instant>,
}

#[derive(Default)]
struct State {
    /// Of the last directive that asked for something, on this stream.
    sequence: u64,
    /// The lease that is held: until when, and for what.
    held: Option<Held>,
    protection_refused: Option<Refusal>,
    items: Vec<Item>,
    prewarm_refused: Option<Refusal>,
    /// What the log said of what is refused, on this stream.
    said: BTreeSet<&'static str>,
    /// What the log said of leases that nobody waits for.
    troubles: BTreeSet<&'static str>,
}

/// A lease, as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) until: Instant,
    pub(super) reason: String,
    pub(super) sequence: u64,
    /// Until when it can be made to last.
    pub(super) most: Instant,
}

/// Takes directives.
pub(super) struct Desk {
    state: Mutex<State>,
    metrics: Arc<Metrics>,
    has_pod: bool,
    protect_max: Duration,
    lease: watch::Sender<Option<LeaseOrder>>,
    /// An image waits.
    pub(super) images: Notify,
    /// What is told is another.
    changes: watch::Sender<()>,
}

impl Desk {
    pub(super) fn new(has_pod: bool, protect_max: Duration, metrics: Arc<Metrics>) -> Self {
        let (lease, changes) = (watch::Sender::new(None), watch::Sender::new(()));
        Self { state: Mutex::default(), metrics, has_pod, protect_max, lease, images: Notify::new(), changes }
    }

    /// Another stream: its sequence begins anew.
    pub(super) fn begin_stream(&self) {
        let mut state = self.state();
        state.sequence = 0;
        state.said.clear();
    }

    /// Hears when what is told is another.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// What the lease is to be, the newest.
    pub(super) fn lease(&self) -> watch::Receiver<Option<LeaseOrder>> {
        self.lease.subscribe()
    }

    /// Takes what a directive asks for, or refuses it.
    pub(super) fn take(&self, directive: Directive) {
        let Directive { accepted, sequence, protect, release, prewarm } = directive;
        if protect.is_none() && release.is_none() && prewarm.is_none() {
            if accepted == 0 || sequence != 0 {
                self.refuse(&mut self.state(), sequence, "empty", "it asks for nothing".to_owned());
            }
            return;
        }
        let mut state = self.state();
        if sequence <= state.sequence {
            let detail = format!("its sequence is {sequence}, and one came with {}", state.sequence);
            self.refuse(&mut state, sequence, "replayed", detail);
            return;
        }
        state.sequence = sequence;
        self.metrics.report_directives.inc();
        match (protect, release) {
            (Some(_), Some(_)) => {
                let detail = "it asks for a lease and for none".to_owned();
                state.protection_refused = Some(self.refuse(&mut state, sequence, "contradiction", detail));
            }
            (Some(protect), None) => match self.protect(sequence, protect) {
                Ok(order) => drop(self.lease.send_replace(Some(order))),
                Err((reason, detail)) => {
                    state.protection_refused = Some(self.refuse(&mut state, sequence, reason, detail));
                }
            },
            (None, Some(_)) if self.has_pod => drop(self.lease.send_replace(Some(LeaseOrder::Release { sequence }))),
            (None, Some(_)) => {
                state.protection_refused = Some(self.refuse(&mut state, sequence, NO_POD.0, NO_POD.1.to_owned()));
            }
            (None, None) => {}
        }
        match prewarm.map(names) {
            Some(Ok(images)) => {
                state.prewarm_refused = None;
                state.order(images);
                self.images.notify_one();
            }
            Some(Err((reason, detail))) => {
                state.prewarm_refused = Some(self.refuse(&mut state, sequence, reason, detail));
            }
            None => {}
        }
        drop(state);
        self.changes.send_replace(());
    }

    fn protect(
        &self,
        sequence: u64,
        Protect { for_ms, reason }: Protect,
    ) -> Result<LeaseOrder, (&'static str, String)> {
        let length = Duration::from_millis(for_ms);
        if !self.has_pod {
            return Err((NO_POD.0, NO_POD.1.to_owned()));
        }
        if length < SHORTEST {
            return Err(("too_short", format!("a lease of {for_ms} ms is over before it is written")));
        }
        if length > self.protect_max {
            let most = self.protect_max.as_secs();
            return Err(("too_long", format!("a lease of {for_ms} ms is longer than {most} s (report.protect_max)")));
        }
        let reason = clip(&reason);
        Ok(LeaseOrder::Protect { sequence, received: Instant::now(), length, reason })
    }

    /// What was wrong with a directive; counted, and said once.
    fn refuse(&self, state: &mut State, sequence: u64, reason: &'static str, detail: String) -> Refusal {
        self.metrics.report_refusals.get_or_create(&ReasonLabels { reason }).inc();
        if state.said.insert(reason) {
            warn!(reason, detail, "a directive of the scaler is not carried out");
        }
        Refusal { sequence, reason: reason.to_owned(), detail: clip(&detail) }
    }

    /// A directive was larger than any may be.
    pub(super) fn too_large(&self, detail: String) {
        self.refuse(&mut self.state(), 0, "too_large", detail);
    }

    /// The lease is this now. What was refused before does not count any more.
    pub(super) fn holds(&self, held: Option<Held>) {
        let mut state = self.state();
        if held.is_some() != state.held.is_some() {
            match &held {
                Some(held) => info!(reason = held.reason, "the scaler protects this node from being taken away"),
                None => info!("the scaler's protection of this node is over"),
            }
        }
        self.metrics.report_protected.get_or_create(&[]).set(i64::from(held.is_some()));
        state.held = held;
        state.protection_refused = None;
        drop(state);
        self.changes.send_replace(());
    }

    /// The lease could not be made what was asked for.
    pub(super) fn lease_refused(&self, sequence: u64, reason: &'static str, detail: String) {
        let mut state = self.state();
        let refusal = self.refuse(&mut state, sequence, reason, detail);
        let is_news = state.protection_refused.as_ref() != Some(&refusal);
        state.protection_refused = Some(refusal);
        drop(state);
        if is_news {
            self.changes.send_replace(());
        }
    }

    /// What a lease needs that nobody asked for did not work; counted, and said once.
    pub(super) fn lease_trouble(&self, reason: &'static str, detail: &str) {
        self.metrics.report_refusals.get_or_create(&ReasonLabels { reason }).inc();
        if self.state().troubles.insert(reason) {
            warn!(
                reason,
                detail,
                "a lease that may be on this agent's own pod is not read, or one that is over is not taken off; \
                 it is tried again"
            );
        }
    }

    /// The next image to bring, which comes from now on.
    pub(super) fn next_image(&self) -> Option<String> {
        let mut state = self.state();
        let waiting = PrewarmState::Waiting;
        let item = state.items.iter_mut().find(|item| item.told.state() == waiting)?;
        item.told.set_state(PrewarmState::Coming);
        Some(item.told.image.clone())
    }

    /// Something is known of an image that comes; nobody may want to know any more.
    pub(super) fn note_image(&self, image: &str, note: impl FnOnce(&mut Prewarm)) {
        let mut state = self.state();
        let Some(item) = state.items.iter_mut().find(|item| item.told.image == image) else { return };
        let before = item.told.state();
        note(&mut item.told);
        let after = item.told.state();
        if matches!(after, PrewarmState::Done | PrewarmState::Failed) {
            item.ended = Some(Instant::now());
        }
        drop(state);
        // Bytes alone wait for the next report.
        if before != after {
            self.changes.send_replace(());
        }
    }

    /// What is told of all that.
    pub(super) fn told(&self) -> CarriedOut {
        let state = self.state();
        let now = Instant::now();
        let ms = |until: Instant| super::ms(until.saturating_duration_since(now));
        let protection = state.held.as_ref().filter(|held| held.until > now).map(|held| Protection {
            remaining_ms: ms(held.until),
            reason: held.reason.clone(),
            sequence: held.sequence,
            most_ms: ms(held.most),
        });
        CarriedOut {
            sequence: state.sequence,
            protection,
            protection_refused: state.protection_refused.clone(),
            prewarm: state.items.iter().map(|item| item.told.clone()).collect(),
            prewarm_refused: state.prewarm_refused.clone(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reason, and the way out.
const NO_POD: (&str, &str) = (
    "no_pod",
    "this agent does not know its own pod: set kubernetes.pod to its metadata.name (DARTER_KUBERNETES_POD), and \
     outside of Kubernetes there is none",
);

impl State {
    /// These images are wanted, in place of what was. What is under way or was tried just now is not begun again.
    fn order(&mut self, images: Vec<String>) {
        let before = std::mem::take(&mut self.items);
        for image in images {
            if self.items.iter().any(|item| item.told.image == image) {
                continue;
            }
            let known = before.iter().find(|item| item.told.image == image).filter(|item| item.counts());
            self.items.push(known.cloned().unwrap_or_else(|| Item::new(image)));
        }
    }
}

impl Item {
    fn new(image: String) -> Self {
        let mut told = Prewarm { image, ..Prewarm::default() };
        told.set_state(PrewarmState::Waiting);
        Self { told, ended: None }
    }

    fn counts(&self) -> bool {
        let age = self.ended.map_or(Duration::ZERO, |ended| ended.elapsed());
        match self.told.state() {
            PrewarmState::Done => age < DONE_FOR,
            PrewarmState::Failed => age < FAILED_FOR,
            _ => true,
        }
    }
}

/// The images of a directive, if all of them are.
fn names(PrewarmImages { images }: PrewarmImages) -> Result<Vec<String>, (&'static str, String)> {
    if images.len() > IMAGES_MAX {
        return Err(("too_many", format!("{} images at once, and at most {IMAGES_MAX} are taken", images.len())));
    }
    for image in &images {
        let fault = match image.parse::<ImageName>() {
            _ if image.len() > NAME_MAX => Some("it is too long".to_owned()),
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(fault) = fault {
            return Err(("bad_image", format!("`{}` is no name of an image: {fault}", clip(image))));
        }
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desk(has_pod: bool) -> Desk {
        Desk::new(has_pod, Duration::from_secs(3600), Arc::new(Metrics::new("0", "none")))
    }

    fn protect(sequence: u64, for_ms: u64) -> Directive {
        let protect = Some(Protect { for_ms, reason: "busy".to_owned() });
        Directive { sequence, protect, ..Directive::default() }
    }

    fn images(sequence: u64, images: &[&str]) -> Directive {
        let images = images.iter().map(|image| (*image).to_owned()).collect();
        Directive { sequence, prewarm: Some(PrewarmImages { images }), ..Directive::default() }
    }

    fn counted(desk: &Desk, reason: &'static str) -> u64 {
        desk.metrics.report_refusals.get_or_create(&ReasonLabels { reason }).get()
    }

    fn reason(refusal: Option<Refusal>) -> String {
        refusal.map(|refusal| format!("{} {}", refusal.sequence, refusal.reason)).unwrap_or_default()
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name_and_changes_nothing() {
        let desk = desk(true);
        let mut lease = desk.lease();
        desk.take(Directive { accepted: 3, ..Directive::default() });
        desk.take(Directive::default());
        assert_eq!(counted(&desk, "empty"), 1, "an answer to a report asks for nothing and is none");
        for (directive, wanted) in [
            (protect(1, 0), "1 too_short"),
            (protect(2, 3_600_001), "2 too_long"),
            // What a negative number looks like.
            (protect(3, u64::MAX - 4), "3 too_long"),
            (Directive { release: Some(Default::default()), ..protect(4, 60_000) }, "4 contradiction"),
        ] {
            desk.take(directive);
            assert_eq!(reason(desk.told().protection_refused), wanted);
        }
        assert!(!lease.has_changed().unwrap());
        desk.take(protect(5, 60_000));
        assert!(lease.has_changed().unwrap());
        let first = lease.borrow_and_update().clone();
        assert!(matches!(&first, Some(LeaseOrder::Protect { sequence: 5, .. })), "{first:?}");
        desk.take(protect(5, 1000));
        desk.take(protect(0, 1000));
        assert_eq!((counted(&desk, "replayed"), lease.has_changed().unwrap()), (2, false));
        // A scaler that was started again counts from 1.
        desk.begin_stream();
        desk.take(protect(1, 1000));
        assert!(lease.has_changed().unwrap() && desk.told().sequence == 1);
        assert_eq!(desk.metrics.report_directives.get(), 6);
    }

    #[test]
    fn a_node_that_does_not_know_its_pod_says_what_to_set() {
        let desk = desk(false);
        desk.take(protect(1, 60_000));
        let refusal = desk.told().protection_refused.unwrap();
        assert!(refusal.reason == "no_pod" && refusal.detail.contains("kubernetes.pod"), "{refusal:?}");
        desk.take(Directive { sequence: 2, release: Some(Default::default()), ..Directive::default() });
        assert_eq!((counted(&desk, "no_pod"), desk.lease().borrow().is_none()), (2, true));
    }

    #[test]
    fn images_are_the_newest_list_and_what_was_brought_is_not_brought_again_by_each_heartbeat() {
        let desk = desk(true);
        let many: Vec<_> = (0..=IMAGES_MAX).map(|n| format!("r.example/a:{n}")).collect();
        desk.take(images(1, &many.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(reason(desk.told().prewarm_refused), "1 too_many");
        desk.take(images(2, &["r.example/a:1", "no image"]));
        assert_eq!(reason(desk.told().prewarm_refused), "2 bad_image");
        assert!(desk.told().prewarm.is_empty() && desk.next_image().is_none());
        desk.take(images(3, &["r.example/a:1", "r.example/b:1", "r.example/a:1"]));
        let told = desk.told();
        assert!(told.prewarm_refused.is_none() && told.prewarm.len() == 2);
        assert_eq!(desk.next_image().as_deref(), Some("r.example/a:1"));
        desk.note_image("r.example/a:1", |told| told.set_state(PrewarmState::Done));
        desk.take(images(4, &["r.example/c:1", "r.example/a:1"]));
        let states: Vec<_> = desk.told().prewarm.iter().map(|told| (told.image.clone(), told.state())).collect();
        assert_eq!(
            states,
            [("r.example/c:1".to_owned(), PrewarmState::Waiting), ("r.example/a:1".to_owned(), PrewarmState::Done)]
        );
        assert_eq!(desk.next_image().as_deref(), Some("r.example/c:1"));
        assert_eq!(desk.next_image(), None);
        // What nobody wants any more is told nobody.
        desk.take(images(5, &[]));
        desk.note_image("r.example/c:1", |told| told.set_state(PrewarmState::Failed));
        assert!(desk.told().prewarm.is_empty());
    }
}
