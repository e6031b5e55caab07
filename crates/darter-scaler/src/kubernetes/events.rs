//! What is done, as Events that `kubectl describe` shows: changes only, and not too many.
//!
//! Nobody waits for one. The same sentence about the same thing is not said again as long as the API server keeps
//! it; a pod whose place in the row changed has none at all, there are too many.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_base::kubernetes::{Teller, refusal};
use darter_base::metrics::ReasonLabels;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::debug;

use super::MANAGER;
use super::fence::is_not_leading;
use super::metrics::Metrics;
use super::moment::Moment;
use super::table::Table;

/// Events that wait while the API server is slow: more have nothing new to say.
const WAITING_MAX: usize = 64;
/// So many at once, and one more in each of these times.
const BURST: u32 = 50;
const EACH: Duration = Duration::from_secs(10);
/// The API server keeps one for an hour.
const KEPT: Duration = Duration::from_secs(3600);
/// Things and reasons that are remembered: those that change within an hour.
const REMEMBERED_MAX: usize = 10_000;
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The API server takes no longer texts.
const NOTE_MAX: usize = 1024;
const INSTANCE_MAX: usize = 128;
const RIGHTS: &str = "a ClusterRole that lets it create and patch events (events.k8s.io)";

/// What an Event is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct About {
    /// As in an object.
    pub api_version: String,
    /// As in an object.
    pub kind: String,
    /// Where it is in one.
    pub namespace: Option<String>,
    /// metadata.name.
    pub name: String,
    /// metadata.uid, where it is known.
    pub uid: Option<String>,
}

impl About {
    /// A node.
    pub fn node(name: &str, uid: &str) -> Self {
        Self {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            namespace: None,
            name: name.to_owned(),
            uid: Some(uid.to_owned()),
        }
    }

    /// A ScaledObject.
    pub fn scaled_object(namespace: &str, name: &str) -> Self {
        Self {
            api_version: "keda.sh/v1alpha1".to_owned(),
            kind: "ScaledObject".to_owned(),
            namespace: Some(namespace.to_owned()),
            name: name.to_owned(),
            uid: None,
        }
    }
}

/// One Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// About what.
    pub about: About,
    /// Whether somebody should look.
    pub is_warning: bool,
    /// A word, for programs.
    pub reason: &'static str,
    /// What was done, in a word.
    pub action: &'static str,
    /// A sentence.
    pub note: String,
}

/// Takes Events, and never waits. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::Sender<Said>,
    state: Arc<Mutex<State>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct State {
    said: Table<(About, &'static str), String>,
    left: u32,
    /// Until when what comes back was counted.
    counted: Moment,
}

impl State {
    fn takes(&mut self, said: &Said, now: Moment) -> Result<(), &'static str> {
        let key = (said.about.clone(), said.reason);
        if self.said.get(&key, now).is_some_and(|(note, _)| note == said.note) {
            return Err("repeated");
        }
        let passed = now.since(self.counted).as_secs() / EACH.as_secs();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX).min(BURST);
        self.left = self.left.saturating_add(passed).min(BURST);
        self.counted = if self.left == BURST { now } else { self.counted.plus(EACH * passed) };
        self.left = self.left.checked_sub(1).ok_or("too_many_events")?;
        self.said.put(key, said.note.clone(), now);
        Ok(())
    }
}

impl Events {
    /// And who writes them ([`write`]).
    pub fn new(metrics: Arc<Metrics>) -> (Self, mpsc::Receiver<Said>) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let said = Table::new(REMEMBERED_MAX, KEPT, KEPT);
        let state = Arc::new(Mutex::new(State { said, left: BURST, counted: Moment::now() }));
        (Self { sender, state, metrics }, receiver)
    }

    /// Says it, unless it was said or too much is.
    pub fn say(&self, said: Said) {
        let taken = self.state.lock().unwrap_or_else(PoisonError::into_inner).takes(&said, Moment::now());
        let taken = taken.and_then(|()| self.sender.try_send(said).map_err(|_| "too_many_events"));
        if let Err(reason @ "too_many_events") = taken {
            debug!("too many Events: one is not written");
            self.metrics.event_errors.get_or_create(&ReasonLabels { reason }).inc();
        }
    }
}

/// Writes what is said, in the name of `instance`. Ends when nobody can say anything any more.
pub async fn write(client: Client, instance: &str, mut said: mpsc::Receiver<Said>, metrics: &Metrics) {
    let mut teller = Teller::new("cannot write Events".to_owned(), &metrics.event_errors);
    while let Some(said) = said.recv().await {
        let About { api_version, kind, namespace, name, uid } = said.about;
        let about = ObjectReference {
            api_version: Some(api_version),
            kind: Some(kind),
            namespace,
            name: Some(name),
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
        let reporter =
            Reporter { controller: MANAGER.to_owned(), instance: Some(cut(instance, INSTANCE_MAX).to_owned()) };
        // A recorder of its own: one that remembers counts up an old sentence instead of saying the new one.
        let recorder = Recorder::new(client.clone(), reporter);
        match tokio::time::timeout(PATIENCE, recorder.publish(&event, &about)).await {
            Ok(Ok(())) => _ = teller.works(),
            Ok(Err(error)) if is_not_leading(&error) => {}
            Ok(Err(error)) => {
                let (reason, text) = refusal(&error, RIGHTS).unwrap_or_else(|| ("answer", error.to_string()));
                teller.fails(reason, &text);
            }
            Err(_) => teller.fails("unreachable", &format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }
}

fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, note: &str) -> Said {
        let about = About::node(name, "u");
        Said { about, is_warning: false, reason: "Removed", action: "Remove", note: note.to_owned() }
    }

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(100_000 + seconds))
    }

    fn state() -> State {
        State { said: Table::new(REMEMBERED_MAX, KEPT, KEPT), left: BURST, counted: at(0) }
    }

    #[test]
    fn the_same_sentence_about_the_same_thing_is_said_once_in_an_hour() {
        let mut state = state();
        let mut takes = |name, note, second| state.takes(&said(name, note), at(second));
        assert_eq!(takes("a", "one", 0), Ok(()));
        assert_eq!(takes("a", "one", 3599), Err("repeated"));
        assert_eq!(takes("b", "one", 3599), Ok(()));
        assert_eq!(takes("a", "two", 3599), Ok(()), "a change is news");
        assert_eq!(takes("a", "two", 7198), Err("repeated"));
        assert_eq!(takes("a", "two", 7199), Ok(()), "the first is not kept any more");
    }

    #[test]
    fn events_have_a_bound_and_come_back_one_by_one() {
        let mut state = state();
        let mut count = 0;
        let mut taken = |second: u64| {
            let takes = |_| {
                count += 1;
                state.takes(&said("a", &count.to_string()), at(second)).is_ok()
            };
            (0..100).map(takes).filter(|taken| *taken).count()
        };
        assert_eq!([0, 9, 10, 19, 45].map(&mut taken), [50, 0, 1, 0, 3]);
        assert_eq!([1_000_000, 1_000_009].map(&mut taken), [50, 0], "no more than at first, after however long");
    }
}
