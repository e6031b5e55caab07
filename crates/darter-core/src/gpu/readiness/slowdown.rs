//! A GPU that is slowed down for a moment is a GPU at work; one that is slowed down for minutes is ill.
//!
//! Two published rules, either of which is enough: 0.6 events a minute over ten minutes (gpud), and five
//! minutes on end (nvidia_gpu_exporter). An event is a minute in which it was seen, so that it does not matter
//! how often one looks, and five minutes on end touch six: one count answers both.

use crate::gpu::Time;

/// gpud's window, in minutes, and 0.6 times that.
const WINDOW: u32 = 10;
const EVENTS: u32 = 6;

/// One kind of slowdown of one GPU. 10 minutes in 10 bits.
#[derive(Debug, Clone, Default)]
pub(super) struct Slowdown {
    /// The newest minute that was seen, since the start of time, and those before it; bit 0 is the newest.
    minute: u64,
    seen: u16,
    counter: Option<u64>,
}

impl Slowdown {
    /// Notes what a look says: whether it is slowed down now, and for how many nanoseconds it ever was. Whether
    /// that goes on for minutes; `None` if the look says nothing.
    pub(super) fn note(&mut self, now: Time, is_active: Option<bool>, counter: Option<u64>) -> Option<bool> {
        let before = self.counter;
        self.counter = counter.or(before);
        let has_risen = counter.zip(before).map(|(now, before)| now > before);
        let is_slow = match (is_active, has_risen) {
            (None, None) => return None,
            (active, risen) => active == Some(true) || risen == Some(true),
        };
        let minute = now.as_micros() / 60_000_000;
        let passed = u32::try_from(minute.saturating_sub(self.minute)).unwrap_or(u32::MAX);
        self.seen = self.seen.checked_shl(passed).unwrap_or(0) & ((1 << WINDOW) - 1) | u16::from(is_slow);
        self.minute = minute.max(self.minute);
        Some(self.seen.count_ones() >= EVENTS)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Looks every 5 s, with `slow` saying of each second whether it is slow. When it was first found to last.
    fn first(seconds: u64, slow: impl Fn(u64) -> bool) -> Option<u64> {
        let mut slowdown = Slowdown::default();
        (0..seconds).step_by(5).find(|second| {
            let now = Time::ZERO + Duration::from_secs(*second);
            slowdown.note(now, Some(slow(*second)), None) == Some(true)
        })
    }

    #[test]
    fn five_minutes_on_end_are_long() {
        assert_eq!(first(900, |_| true), Some(300));
        assert_eq!(first(900, |second| second < 295), None);
    }

    #[test]
    fn six_minutes_of_ten_in_which_it_happens_are_many() {
        assert_eq!(first(3600, |second| second % 60 == 0), Some(300), "the sixth minute begins");
        assert_eq!(first(3600, |second| second % 120 == 0), None, "five of ten");
        assert_eq!(first(3600, |second| second % 300 < 240), Some(360), "four of five");
    }

    #[test]
    fn a_counter_that_rises_between_looks_says_the_same_as_a_flag() {
        let mut slowdown = Slowdown::default();
        let mut found = None;
        for second in (0..900).step_by(5) {
            let now = Time::ZERO + Duration::from_secs(second);
            // It has its slow moment between two looks.
            if slowdown.note(now, Some(false), Some(second / 60)) == Some(true) {
                found = found.or(Some(second));
            }
        }
        assert_eq!(found, Some(360));
        assert_eq!(slowdown.note(Time::ZERO, None, None), None);
    }

    #[test]
    fn it_is_over_when_ten_minutes_were_better() {
        let mut slowdown = Slowdown::default();
        let mut look = |second: u64, slow| slowdown.note(Time::ZERO + Duration::from_secs(second), Some(slow), None);
        assert_eq!((0..=360).step_by(5).map(|second| look(second, true)).last(), Some(Some(true)));
        assert_eq!(look(365, false), Some(true), "still six of ten");
        assert_eq!(look(660, false), Some(false), "four of ten");
        assert_eq!(look(100_000, false), Some(false));
    }
}
