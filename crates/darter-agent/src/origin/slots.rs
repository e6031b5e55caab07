//! A bounded table of values that are got one at a time: the first who needs one gets it, the
//! others wait and find it there.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use super::OriginError;

/// One value, or none yet. Whoever holds the lock may get it.
pub(super) type Slot<V> = OwnedMutexGuard<Option<V>>;

type Shared<V> = Arc<tokio::sync::Mutex<Option<V>>>;

pub(super) struct Slots<K, V> {
    table: Mutex<Table<K, V>>,
    max: usize,
    patience: Duration,
}

struct Table<K, V> {
    slots: HashMap<K, (Shared<V>, u64)>,
    /// Counts uses, to know the one that was used longest ago.
    clock: u64,
}

impl<K: Hash + Eq + Clone, V> Slots<K, V> {
    /// At most `max` values; nobody waits for longer than `patience` for another to get one.
    pub(super) fn new(max: usize, patience: Duration) -> Self {
        Self { table: Mutex::new(Table { slots: HashMap::new(), clock: 0 }), max, patience }
    }

    /// The slot of `key`, locked.
    pub(super) async fn lock(&self, key: &K) -> Result<Slot<V>, OriginError> {
        let slot = self.slot(key);
        let waited = tokio::time::timeout(self.patience, slot.lock_owned()).await;
        waited.map_err(|_| OriginError::TimedOut { host: "another request".to_owned(), after: self.patience })
    }

    /// The value of `key`, where it is there and nobody is getting another.
    pub(super) fn peek(&self, key: &K) -> Option<V>
    where
        V: Clone,
    {
        let slot = self.table.lock().unwrap_or_else(PoisonError::into_inner).slots.get(key)?.0.clone();
        slot.try_lock().ok()?.clone()
    }

    #[cfg(test)]
    pub(super) fn keys(&self) -> Vec<K> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).slots.keys().cloned().collect()
    }

    fn slot(&self, key: &K) -> Shared<V> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.clock += 1;
        let clock = table.clock;
        if !table.slots.contains_key(key) && table.slots.len() >= self.max {
            let idlest = table.slots.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            idlest.map(|key| table.slots.remove(&key));
        }
        let (slot, used) = table.slots.entry(key.clone()).or_insert_with(|| (Arc::default(), clock));
        *used = clock;
        slot.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_table_is_bounded_and_forgets_what_was_used_longest_ago() {
        let slots = Slots::new(2, Duration::from_millis(20));
        for key in ["a", "b", "a", "c"] {
            *slots.lock(&key).await.unwrap() = Some(key);
        }
        assert_eq!(*slots.lock(&"a").await.unwrap(), Some("a"));
        assert_eq!(*slots.lock(&"c").await.unwrap(), Some("c"));
        assert_eq!(*slots.lock(&"b").await.unwrap(), None);
        let _held = slots.lock(&"c").await.unwrap();
        assert!(slots.lock(&"c").await.is_err(), "a wait has an end");
    }
}
