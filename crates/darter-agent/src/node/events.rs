//! What happens to this node, as Events that `kubectl describe node` shows: transitions only, and not too many.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::{mpsc, watch};
use tracing::debug;

use super::door::Door;
use super::{Known, MANAGER};
use crate::metrics::{Metrics, ReasonLabels};

/// Events that wait while the API server is away: more have nothing new to say.
const WAITING_MAX: usize = 16;
/// So many at once, and one more in each of these times: every node of a cluster writes, and each Event is
/// kept for an hour.
const BURST: u32 = 10;
const EACH: Duration = Duration::from_secs(60);
/// Tries for one; then it is old.
const TRIES: u32 = 5;
/// The API server takes no longer texts.
const NOTE_MAX: usize = 1024;
const INSTANCE_MAX: usize = 128;

/// One Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) is_warning: bool,
    pub(super) reason: &'static str,
    pub(super) action: &'static str,
    pub(super) note: String,
}

/// Takes Events, and never waits.
pub(super) struct Events<'a> {
    sender: mpsc::Sender<Said>,
    allowance: Mutex<Allowance>,
    metrics: &'a Metrics,
}

/// How many may still be said.
struct Allowance {
    left: u32,
    /// Until when what comes back was counted.
    counted: Instant,
}

impl Allowance {
    fn takes(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.counted).as_secs() / EACH.as_secs();
        self.counted += EACH * u32::try_from(passed).unwrap_or(u32::MAX).min(BURST);
        self.left = self.left.saturating_add(u32::try_from(passed).unwrap_or(u32::MAX)).min(BURST);
        if self.left == BURST {
            self.counted = now;
        }
        self.left.checked_sub(1).map(|left| self.left = left).is_some()
    }
}

impl<'a> Events<'a> {
    pub(super) fn new(metrics: &'a Metrics) -> (Self, mpsc::Receiver<Said>) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let allowance = Mutex::new(Allowance { left: BURST, counted: Instant::now() });
        (Self { sender, allowance, metrics }, receiver)
    }

    /// Says it, unless too much is said.
    pub(super) fn say(&self, said: Said) {
        let is_allowed = super::lock(&self.allowance).takes(Instant::now());
        if !is_allowed || self.sender.try_send(said).is_err() {
            debug!("too many Events: one is not written");
            self.metrics.node_write_errors.get_or_create(&ReasonLabels { reason: "too_many_events" }).inc();
        }
    }
}

/// Writes what is said of the node `name`. Never ends.
pub(super) async fn write(
    name: &str,
    mut known: watch::Receiver<Known>,
    mut said: mpsc::Receiver<Said>,
    mut door: Door<'_>,
) {
    while let Some(said) = said.recv().await {
        // Whom it is about has to be known first.
        let uid = match known.wait_for(Option::is_some).await {
            Ok(facts) => facts.as_ref().map(|facts| facts.uid.clone()),
            Err(_) => break,
        };
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(name.to_owned()),
            uid,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: if said.is_warning { EventType::Warning } else { EventType::Normal },
            reason: said.reason.to_owned(),
            note: Some(cut(&said.note, NOTE_MAX).to_owned()),
            action: said.action.to_owned(),
            secondary: None,
        };
        let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(cut(name, INSTANCE_MAX).to_owned()) };
        for _ in 0..TRIES {
            let asked = door.ask(|client| {
                let (recorder, event, node) = (Recorder::new(client, reporter.clone()), &event, &node);
                async move { recorder.publish(event, node).await }
            });
            match asked.await {
                Ok(()) => break,
                Err(_) => door.pause().await,
            }
        }
    }
    std::future::pending().await
}

fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_a_bound_and_come_back_one_by_one() {
        let start = Instant::now();
        let mut allowance = Allowance { left: BURST, counted: start };
        let taken = |allowance: &mut Allowance, at: u64| {
            (0..100).filter(|_| allowance.takes(start + Duration::from_secs(at))).count()
        };
        assert_eq!(taken(&mut allowance, 0), 10);
        assert_eq!(taken(&mut allowance, 59), 0);
        assert_eq!(taken(&mut allowance, 60), 1);
        assert_eq!(taken(&mut allowance, 119), 0);
        assert_eq!(taken(&mut allowance, 185), 2);
        assert_eq!(taken(&mut allowance, 1_000_000), 10, "no more than at first, after however long");
        assert_eq!(taken(&mut allowance, 1_000_059), 0);
    }

    #[test]
    fn a_text_is_cut_between_letters() {
        assert_eq!((cut("äö", 3), cut("äö", 4), cut("", 4)), ("ä", "äö", ""));
    }
}
