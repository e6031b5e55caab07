//! What was answered, for a while: fresh at first, then good enough where nobody can be asked.

use std::collections::BTreeMap;
use std::time::Duration;

use super::moment::Moment;

/// How old an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    /// It need not be asked for again.
    Fresh,
    /// It should be asked for again.
    Stale,
}

/// Answers, at most so many of them: the oldest goes for a new one.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    most: usize,
    fresh: Duration,
    lasts: Duration,
    answers: BTreeMap<K, (V, Moment)>,
    /// In the order in which they came, with a number that makes two of one moment differ.
    order: BTreeMap<(Moment, u64), K>,
    places: BTreeMap<K, (Moment, u64)>,
    count: u64,
}

impl<K: Ord + Clone, V: Clone> Table<K, V> {
    pub(super) const fn new(most: usize, fresh: Duration, lasts: Duration) -> Self {
        Self { most, fresh, lasts, answers: BTreeMap::new(), order: BTreeMap::new(), places: BTreeMap::new(), count: 0 }
    }

    /// None of what is too old to count.
    pub(super) fn get(&mut self, key: &K, now: Moment) -> Option<(V, Age)> {
        let (value, at) = self.answers.get(key)?;
        let age = now.since(*at);
        if age >= self.lasts {
            self.remove(key);
            return None;
        }
        Some((value.clone(), if age < self.fresh { Age::Fresh } else { Age::Stale }))
    }

    pub(super) fn put(&mut self, key: K, value: V, now: Moment) {
        self.remove(&key);
        if self.answers.len() >= self.most
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.answers.remove(&oldest);
            self.places.remove(&oldest);
        }
        self.count += 1;
        let place = (now, self.count);
        self.order.insert(place, key.clone());
        self.places.insert(key.clone(), place);
        self.answers.insert(key, (value, now));
    }

    pub(super) fn remove(&mut self, key: &K) {
        self.answers.remove(key);
        if let Some(place) = self.places.remove(key) {
            self.order.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    #[test]
    fn an_answer_is_fresh_then_stale_then_gone() {
        let mut table = Table::new(4, Duration::from_secs(2), Duration::from_secs(10));
        table.put("a", 1, at(0));
        let found = [1, 2, 9, 10].map(|second| table.get(&"a", at(second)));
        assert_eq!(found, [Some((1, Age::Fresh)), Some((1, Age::Stale)), Some((1, Age::Stale)), None]);
        assert!(table.answers.is_empty() && table.order.is_empty() && table.places.is_empty());
    }

    #[test]
    fn there_are_never_more_than_the_bound_and_the_oldest_goes() {
        let mut table = Table::new(3, Duration::from_secs(2), Duration::from_secs(10));
        for (key, second) in [("a", 0), ("b", 0), ("c", 1), ("a", 2), ("d", 2)] {
            table.put(key, second, at(second));
        }
        let there: Vec<_> = table.answers.keys().copied().collect();
        assert_eq!(there, ["a", "c", "d"], "a was asked about again, b was the oldest");
        assert_eq!((table.order.len(), table.places.len()), (3, 3));
    }
}
