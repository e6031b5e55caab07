//! How much one registry is asked at once, and how fast it is read.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_core::units::Rate;
use tokio::time::Instant;

use super::line::{Claim, Line, Slot};

/// Connections to one registry. A slot lives as long as the body of its response.
///
/// Small requests have some of their own: a manifest that waits for the last of sixteen large
/// layers would miss `mirror.answer_within`.
pub(super) struct Slots {
    small: Arc<Line>,
    bodies: Arc<Line>,
}

/// What a request is about to bring.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    Small,
    Body,
}

impl Slots {
    pub(super) fn new(connections: usize) -> Self {
        let small = connections / 4;
        let bodies = Line::new(connections - small);
        // With three connections or fewer there is nothing to divide.
        let small = if small == 0 { bodies.clone() } else { Line::new(small) };
        Self { small, bodies }
    }

    /// Waits for one, for a request of `claim` that begins at the byte `at`.
    pub(super) async fn take(&self, weight: Weight, claim: &Claim, at: u64) -> Option<Slot> {
        let line = match weight {
            Weight::Small => &self.small,
            Weight::Body => &self.bodies,
        };
        line.take(claim, at).await
    }
}

/// Spreads the bytes read from a registry over time.
pub(super) struct Throttle {
    bytes_per_second: u64,
    /// When what was read so far is paid for.
    paid: Mutex<Instant>,
}

impl Throttle {
    pub(super) fn new(rate: Rate) -> Self {
        Self { bytes_per_second: rate.0.max(1), paid: Mutex::new(Instant::now()) }
    }

    /// Until when whoever read so many bytes reads no more.
    pub(super) fn owes(&self, bytes: usize) -> Instant {
        self.book(Instant::now(), bytes as u64)
    }

    fn book(&self, now: Instant, bytes: u64) -> Instant {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        // Silence earns nothing: a burst after it would be what the limit is against.
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).min(MAX_PAUSE_NANOS));
        *paid = (*paid).max(now) + cost;
        *paid
    }
}

/// One chunk never waits for more than an hour, whatever rate was typed; times stay in range.
const MAX_PAUSE_NANOS: u64 = 3_600_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spread_over_time_and_silence_earns_nothing() {
        let throttle = Throttle::new(Rate(1000));
        let t0 = Instant::now() + Duration::from_secs(60);
        assert_eq!(throttle.book(t0, 500), t0 + Duration::from_millis(500));
        assert_eq!(throttle.book(t0, 500), t0 + Duration::from_secs(1));
        let later = t0 + Duration::from_secs(100);
        assert_eq!(throttle.book(later, 100), later + Duration::from_millis(100));
    }

    #[tokio::test]
    async fn layers_leave_connections_for_manifests() {
        let (slots, claim) = (Slots::new(4), Claim::once());
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(slots.take(Weight::Body, &claim, 0).await);
        }
        assert!(tokio::time::timeout(Duration::from_millis(20), slots.take(Weight::Body, &claim, 0)).await.is_err());
        assert!(slots.take(Weight::Small, &claim, 0).await.is_some());
    }
}
