//! Who is in the swarm, and who coordinates a blob.
//!
//! Rendezvous hashing (HRW): everybody ranks the members for a digest in the same way without a
//! word, and a member that comes or goes moves only the blobs that are its own.

use std::fmt;
use std::sync::Arc;

use crate::Digest;

/// Name of an agent in the swarm: its ed25519 public key.
///
/// Kept as words, the first byte highest: names are compared with every message.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId([u64; 4]);

impl PeerId {
    /// The peer whose public key is given.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Self(words)
    }

    /// The public key.
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// A number that differs from peer to peer: for lots that everybody draws alike.
    pub(super) fn lot(self) -> u64 {
        self.0.into_iter().fold(0, |sum, word| mix(sum ^ word))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to tell peers apart in a log.
        self.to_bytes().iter().take(6).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a node stands: bytes between zones cost money. A hash of the zone's name; all nodes whose
/// zone is not known are in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Zone(pub u64);

/// One agent that is thought to be alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub id: PeerId,
    /// Where.
    pub zone: Zone,
    /// Whether it keeps a copy of what the others pull.
    pub is_seed: bool,
}

/// All agents that are thought to be alive, as one snapshot. Cheap to clone: 1,000 members are
/// shared by everything that looks at them.
#[derive(Debug, Clone, Default)]
pub struct Members {
    all: Arc<[Member]>,
    seeds: Arc<[PeerId]>,
}

/// How many of the best ranked are remembered: the coordinator, and those that follow it when it dies.
const COORDINATORS: usize = 3;

impl Members {
    /// A snapshot of `members`, in any order; a second entry for one peer is dropped.
    pub fn new(mut members: Vec<Member>) -> Self {
        members.sort_by_key(|member| member.id);
        members.dedup_by_key(|member| member.id);
        let seeds = members.iter().filter(|member| member.is_seed).map(|member| member.id).collect();
        Self { all: members.into(), seeds }
    }

    /// The members by ascending `PeerId`.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Member> {
        self.all.iter()
    }

    /// Whether a member is of the zone beyond which nothing goes, if there is one.
    pub(super) fn is_within(&self, scope: Option<Zone>, id: &PeerId) -> bool {
        scope.is_none_or(|zone| self.get(id).is_some_and(|member| member.zone == zone))
    }

    /// The seeds among them, by ascending `PeerId`.
    pub fn seeds(&self) -> &[PeerId] {
        &self.seeds
    }

    /// Whether this is a member that keeps a copy of what the others pull.
    pub fn is_seed(&self, id: &PeerId) -> bool {
        self.seeds.binary_search(id).is_ok()
    }

    /// Number of members.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The member with this name.
    pub fn get(&self, id: &PeerId) -> Option<&Member> {
        self.all.binary_search_by_key(id, |member| member.id).ok().map(|at| &self.all[at])
    }

    /// The best ranked members for `blob`: its coordinator first, then its backups.
    pub fn ranked(&self, blob: &Digest) -> Vec<PeerId> {
        self.ranked_among(blob, |_| true)
    }

    /// The same of those that fit.
    pub(super) fn ranked_among(&self, blob: &Digest, fits: impl Fn(&Member) -> bool) -> Vec<PeerId> {
        let mut best: Vec<(u64, PeerId)> = Vec::with_capacity(COORDINATORS + 1);
        for member in self.all.iter().filter(|member| fits(member)) {
            let entry = (score(blob, &member.id), member.id);
            if best.len() == COORDINATORS && entry <= best[COORDINATORS - 1] {
                continue;
            }
            let place = best.partition_point(|other| *other > entry);
            best.insert(place, entry);
            best.truncate(COORDINATORS);
        }
        best.into_iter().map(|(_, id)| id).collect()
    }
}

/// Rank of a peer for a blob: the highest wins. All versions of darter must agree on it.
///
/// Both inputs are hashes, so mixing their words is enough. Somebody who grinds an identity to
/// become a coordinator has the swarm key already, and gains the right to hand out reading tasks.
pub fn score(blob: &Digest, peer: &PeerId) -> u64 {
    let blob = blob
        .as_bytes()
        .chunks_exact(8)
        .fold(0, |sum, chunk| mix(sum ^ chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))));
    mix(blob.wrapping_add(peer.lot()))
}

/// The finaliser of splitmix64.
pub(super) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A seeded source of numbers for ties and choices (splitmix64): the same seed, the same run.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) const fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// One of `choices`, by lot.
    pub(super) fn pick<'a, T>(&mut self, choices: &'a [T]) -> Option<&'a T> {
        choices.get(self.below(choices.len()))
    }

    /// A number below `end`; 0 if there is none.
    pub(super) fn below(&mut self, end: usize) -> usize {
        let end = end as u64;
        usize::try_from(self.roll().checked_rem(end).unwrap_or(0)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u16) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&n.to_le_bytes());
        PeerId::from_bytes(bytes)
    }

    fn members(ids: impl IntoIterator<Item = u16>) -> Members {
        Members::new(ids.into_iter().map(|n| Member { id: peer(n), zone: Zone::default(), is_seed: false }).collect())
    }

    proptest! {
        #[test]
        fn ranked_is_the_head_of_all_members_sorted_by_score(ids in prop::collection::btree_set(0u16..500, 0..40), blob: [u8; 32]) {
            let blob = Digest::from_bytes(blob);
            let mut sorted: Vec<PeerId> = ids.iter().map(|n| peer(*n)).collect();
            sorted.sort_by_key(|id| std::cmp::Reverse((score(&blob, id), *id)));
            sorted.truncate(COORDINATORS);
            prop_assert_eq!(members(ids).ranked(&blob), sorted);
        }

        #[test]
        fn a_member_that_leaves_moves_only_its_own_blobs(leaver in 0u16..50, blob: [u8; 32]) {
            let blob = Digest::from_bytes(blob);
            let before = members(0..50).ranked(&blob);
            let after = members((0..50).filter(|n| *n != leaver)).ranked(&blob);
            let expected: Vec<_> = before.into_iter().filter(|id| *id != peer(leaver)).collect();
            prop_assert!(after.starts_with(&expected));
        }
    }

    #[test]
    fn coordinators_are_spread_evenly() {
        let members = members(0..20);
        let mut load = [0_u32; 20];
        for blob in 0..4000_u32 {
            let top = members.ranked(&Digest::of(&blob.to_le_bytes()))[0];
            load[usize::from(top.to_bytes()[0])] += 1;
        }
        assert!(load.iter().all(|blobs| (140..=260).contains(blobs)), "{load:?}");
    }
}
