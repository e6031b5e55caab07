//! Facts on their way to the controller: the newest of each thing, so that no burst makes a queue.
//!
//! Its bound is the number of things there are, which each watch bounds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc};

use crate::fleet::{Fact, Kind};

/// What was not taken yet.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: Mutex<Waiting>,
    bell: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    facts: BTreeMap<(Kind, String), Fact>,
    /// All that there is of a kind; said after the facts of that kind.
    only: BTreeMap<Kind, BTreeSet<String>>,
    watched: bool,
}

impl Outbox {
    /// Puts in a fact, in the place of what was said of the same thing.
    pub(super) fn say(&self, fact: Fact) {
        let mut waiting = self.lock();
        let key = match &fact {
            Fact::Node(node) => (Kind::Node, node.uid.clone()),
            Fact::NodeGone { uid } => (Kind::Node, uid.clone()),
            Fact::Pod(pod) => (Kind::Pod, pod.uid.clone()),
            Fact::PodGone { uid } => (Kind::Pod, uid.clone()),
            Fact::Pool(pool) => (Kind::Pool, pool.name.clone()),
            Fact::PoolGone { name } => (Kind::Pool, name.clone()),
            Fact::Workload(workload) => (Kind::Workload, workload.name.clone()),
            Fact::WorkloadGone { name } => (Kind::Workload, name.clone()),
            Fact::Watched => {
                waiting.watched = true;
                self.bell.notify_one();
                return;
            }
            Fact::Only { kind, uids } => {
                waiting.only.insert(*kind, uids.clone());
                self.bell.notify_one();
                return;
            }
        };
        let is_there = matches!(fact, Fact::Node(_) | Fact::Pod(_) | Fact::Pool(_) | Fact::Workload(_));
        // What came after the list is there too, though the list did not name it.
        if let Some(uids) = waiting.only.get_mut(&key.0) {
            match is_there {
                true => uids.insert(key.1.clone()),
                false => uids.remove(&key.1),
            };
        }
        waiting.facts.insert(key, fact);
        waiting.watched = true;
        self.bell.notify_one();
    }

    /// Hands everything on, and waits where that is slow. Ends when nobody listens any more.
    pub(super) async fn forward(&self, facts: &mpsc::Sender<Fact>) {
        loop {
            let next = self.lock().next();
            match next {
                Some(fact) => {
                    if facts.send(fact).await.is_err() {
                        return;
                    }
                }
                None => self.bell.notified().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn next(&mut self) -> Option<Fact> {
        if std::mem::take(&mut self.watched) {
            return Some(Fact::Watched);
        }
        if let Some((_, fact)) = self.facts.pop_first() {
            return Some(fact);
        }
        self.only.pop_first().map(|(kind, uids)| Fact::Only { kind, uids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::PodFact;

    fn pod(uid: &str, cost: i32) -> Fact {
        Fact::Pod(PodFact { uid: uid.to_owned(), cost, ..PodFact::default() })
    }

    fn all(outbox: &Outbox) -> Vec<Fact> {
        std::iter::from_fn(|| outbox.lock().next()).collect()
    }

    #[test]
    fn the_newest_of_each_thing_goes_out_and_the_list_after_what_it_names() {
        let outbox = Outbox::default();
        outbox.say(Fact::Only { kind: Kind::Pod, uids: BTreeSet::from(["a".to_owned(), "b".to_owned()]) });
        for cost in 0..1000 {
            outbox.say(pod("a", cost));
        }
        outbox.say(pod("b", 1));
        let uids = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let told = all(&outbox);
        assert_eq!(told, [Fact::Watched, pod("a", 999), pod("b", 1), Fact::Only { kind: Kind::Pod, uids }]);
    }

    #[test]
    fn what_comes_or_goes_while_a_list_waits_changes_the_list() {
        let outbox = Outbox::default();
        outbox.say(Fact::Only { kind: Kind::Pod, uids: BTreeSet::from(["a".to_owned(), "b".to_owned()]) });
        outbox.say(pod("c", 0));
        outbox.say(Fact::PodGone { uid: "a".to_owned() });
        let uids = BTreeSet::from(["b".to_owned(), "c".to_owned()]);
        assert_eq!(all(&outbox).last(), Some(&Fact::Only { kind: Kind::Pod, uids }));
    }
}
