//! One asker at a time of each thing: the others wait, and mostly find the answer there.
//!
//! What containerd, a prefetch and a second pod want at the same moment is asked of the origin once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

type Lock = tokio::sync::Mutex<()>;

/// Turns at things that `K` names. As many are remembered as are asked for at once: requests of the
/// mirror (`mirror.max_connections`) and prefetches.
pub(super) struct Turns<K>(Mutex<HashMap<K, Weak<Lock>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Turns<K> {
    /// Waits until it is our turn, which it is until the guard is dropped. Look again then: who had
    /// the turn before may have brought what is wanted.
    pub(super) async fn take(&self, key: K) -> OwnedMutexGuard<()> {
        self.lock_of(key).lock_owned().await
    }

    fn lock_of(&self, key: K) -> Arc<Lock> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = turns.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        turns.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::<Lock>::default();
        turns.insert(key, Arc::downgrade(&lock));
        lock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_has_the_turn_and_nothing_is_left_of_those_that_are_over() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let other = turns.take("b").await;
        let second = tokio::time::timeout(std::time::Duration::from_millis(10), turns.take("a"));
        assert!(second.await.is_err(), "two have the same turn");
        drop((first, other));
        drop(turns.take("a").await);
        drop(turns.take("c").await);
        assert_eq!(turns.0.lock().unwrap().len(), 1, "only the last is remembered");
    }
}
