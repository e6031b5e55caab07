//! Peers that sent wrong bytes, and for how long nothing is taken from them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::limits::Limits;
use super::peer::PeerId;
use super::time::Time;

/// Peers remembered; past it the one that behaved for longest is forgiven.
const REMEMBERED_MAX: usize = 1024;
/// So many strikes, after fading, end in the long ban.
const STRIKES_OUT: u32 = 3;

#[derive(Debug, Default)]
pub(super) struct Strikes(BTreeMap<PeerId, Record>);

#[derive(Debug)]
struct Record {
    strikes: u32,
    /// Of the last strike.
    at: Time,
    banned_until: Time,
}

impl Strikes {
    /// A peer sent wrong bytes. How long it is banned now.
    pub(super) fn strike(&mut self, now: Time, peer: PeerId, limits: &Limits) -> Duration {
        if self.0.len() >= REMEMBERED_MAX && !self.0.contains_key(&peer) {
            let calmest = self.0.iter().min_by_key(|(_, record)| record.at).map(|(id, _)| *id);
            calmest.map(|id| self.0.remove(&id));
        }
        let record = self.0.entry(peer).or_insert(Record { strikes: 0, at: now, banned_until: Time::ZERO });
        let half_lives = now.since(record.at).as_micros() / limits.strike_half_life.as_micros().max(1);
        let faded = record.strikes.checked_shr(u32::try_from(half_lives).unwrap_or(u32::MAX)).unwrap_or(0);
        record.strikes = faded + 1;
        record.at = now;
        let period = if record.strikes >= STRIKES_OUT { limits.ban_last } else { limits.ban_first };
        record.banned_until = record.banned_until.max(now + period);
        period
    }

    pub(super) fn is_banned(&self, now: Time, peer: &PeerId) -> bool {
        self.0.get(peer).is_some_and(|record| now < record.banned_until)
    }

    /// Who is banned now.
    pub(super) fn banned(&self, now: Time) -> impl Iterator<Item = PeerId> {
        self.0.iter().filter(move |(_, record)| now < record.banned_until).map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_strike_within_the_half_life_is_the_long_ban_and_old_ones_fade() {
        let (limits, peer) = (Limits::default(), PeerId::from_bytes([7; 32]));
        let mut strikes = Strikes::default();
        let at = |seconds: u64| Time::from_micros(seconds * 1_000_000);
        assert_eq!(strikes.strike(at(0), peer, &limits), limits.ban_first);
        assert!(strikes.is_banned(at(59), &peer) && !strikes.is_banned(at(60), &peer));
        assert_eq!(strikes.strike(at(100), peer, &limits), limits.ban_first);
        assert_eq!(strikes.strike(at(200), peer, &limits), limits.ban_last);
        assert_eq!(strikes.banned(at(3799)).collect::<Vec<_>>(), [peer]);
        assert_eq!(strikes.strike(at(3800), peer, &limits), limits.ban_first, "after six half-lives they are gone");
    }
}
