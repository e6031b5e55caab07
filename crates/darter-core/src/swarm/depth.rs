//! How many pieces a node asks for at a time.
//!
//! Too few, and its link waits; too many, and all ask for the newest piece of one neighbour. What counts is
//! how many are on their way: a request that is not answered yet, or was refused, brings nothing. Where
//! answers take long beside the pieces themselves, more are asked for, by as much.

use std::time::Duration;

use super::limits::Limits;

/// Parts of one that the share is counted in.
const WHOLE: u128 = 1024;
/// Pieces over which it is smoothed.
const OVER: u128 = 16;
/// Bytes on their way at a time, whatever the size of pieces: they are held in memory.
const BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How long requests wait for answers beside what pieces take to come.
#[derive(Debug, Default)]
pub(super) struct Depth {
    /// What refusals took since a piece came.
    refused: Duration,
    /// What the last one took, and less with every piece that comes without one: as long as any answer takes.
    answer: Duration,
    share: u128,
}

impl Depth {
    /// A request was refused after this time.
    pub(super) fn refused(&mut self, took: Duration) {
        self.refused += took;
        self.answer = took;
    }

    /// A piece came this long after it was asked for.
    pub(super) fn came(&mut self, took: Duration) {
        if self.refused.is_zero() {
            self.answer = self.answer * 7 / 8;
        }
        let asking = std::mem::take(&mut self.refused) + self.answer;
        let coming = took.saturating_sub(self.answer).max(Duration::from_micros(1));
        let share = (asking.as_micros() * WHOLE / coming.as_micros()).min(WHOLE);
        self.share = (self.share * (OVER - 1) + share) / OVER;
    }

    /// Pieces of this size asked for at a time, where so many want the blob.
    pub(super) fn most(&self, limits: &Limits, interested: u32, piece_size: u64) -> usize {
        let base = if interested <= limits.few { limits.in_flight_few } else { limits.in_flight };
        let more = (base as u128 * self.share + WHOLE / 2) / WHOLE;
        let most = base + usize::try_from(more).unwrap_or(0);
        let fit = usize::try_from(BYTES_MAX / piece_size.max(1)).unwrap_or(usize::MAX);
        most.min(limits.in_flight_max).min(fit.max(limits.in_flight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn as_many_more_are_asked_for_as_wait_for_an_answer() {
        let limits = Limits::default();
        let mut depth = Depth::default();
        let most = |depth: &Depth| depth.most(&limits, 100, MIB);
        assert_eq!(most(&depth), limits.in_flight);
        // Each piece takes 28 ms once it is granted, and two refusals of 2 ms before.
        for _ in 0..100 {
            depth.refused(millis(2));
            depth.refused(millis(2));
            depth.came(millis(30));
        }
        assert_eq!(most(&depth), limits.in_flight + 1);
        for _ in 0..100 {
            depth.refused(millis(30));
            depth.came(millis(31));
        }
        assert_eq!(most(&depth), limits.in_flight * 2, "no more than this");
        assert_eq!(depth.most(&Limits { in_flight_max: 7, ..limits }, 100, MIB), 7, "nor than this");
        (0..100).for_each(|_| depth.came(millis(3000)));
        assert_eq!(most(&depth), limits.in_flight, "it passes");
        // One that was refused after long says nothing of how long others take.
        depth.refused(millis(5000));
        (0..100).for_each(|_| depth.came(millis(30)));
        assert_eq!(most(&depth), limits.in_flight);
    }

    #[test]
    fn a_few_ask_each_other_for_more_and_large_pieces_are_fewer() {
        let (limits, depth) = (Limits::default(), Depth::default());
        assert_eq!(depth.most(&limits, limits.few, MIB), limits.in_flight_few);
        assert_eq!(depth.most(&limits, limits.few + 1, MIB), limits.in_flight);
        assert_eq!(depth.most(&limits, limits.few, 8 * MIB), 8);
        assert_eq!(depth.most(&limits, limits.few, 1 << 40), limits.in_flight);
    }
}
