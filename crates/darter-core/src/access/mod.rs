//! Who may read what is kept here: proofs of access, and what each of them opens.
//!
//! A proof says that a credential could read a repository at its registry a short while ago. It
//! opens only what that repository is known to hold: manifests that were seen in it, and what they
//! refer to. A loan is far less: another host gave one digest while the registry could not be asked. So
//! is the word of the swarm's members: it opens a digest to whoever has a proof, and ends with the
//! registry's return.
//! Not here: how either is got (a HEAD or GET at an origin, by `darter_agent::images::access`).

mod kept;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::digest::Digest;
use crate::names::{Registry, Repository};

pub use kept::{Kept, KeptPlace, KeptProof, MANIFESTS_MAX, Owner};

/// A credential, told apart from others without holding it: the agent gives a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CredentialKey(pub [u8; 32]);

/// A repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The registry.
    pub registry: Registry,
    /// The repository inside it.
    pub repository: Repository,
}

/// How long proofs hold, and how many things are remembered.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A proof this young is as good as new.
    pub fresh: Duration,
    /// A proof this young still holds while the origin is away.
    pub stale: Duration,
    /// A loan this young spares its host from being asked again.
    pub loan: Duration,
    /// Proofs remembered: credentials times repositories in use on one node.
    pub proofs: usize,
    /// Loans remembered.
    pub loans: usize,
    /// Digests remembered of which members of the swarm spoke.
    pub words: usize,
    /// Repositories whose content is remembered.
    pub places: usize,
    /// Digests remembered for one repository: some hundred images of a hundred layers.
    pub digests: usize,
}

/// How good a proof is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Holds without asking.
    Fresh,
    /// Holds only if the origin cannot be asked.
    Stale,
    /// There is none.
    Missing,
}

/// What one node has proved and seen.
#[derive(Debug)]
pub struct Proofs {
    limits: Limits,
    proved: BTreeMap<(CredentialKey, Place), Instant>,
    /// Apart from all that is proved: no loan ever tells what a repository holds.
    loans: BTreeMap<(CredentialKey, Place, Digest), Instant>,
    /// Apart from what repositories hold, too: with the registry's return it counts for nothing.
    words: BTreeMap<(Place, Digest), Word>,
    places: BTreeMap<Place, Content>,
    changes: u64,
}

/// What members of the swarm say of a digest in a repository whose registry is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// The repository has it, of this size in bytes where it was told.
    Held(Option<u64>),
    /// An index that the repository has names it. That opens nothing: who pushes an index may name
    /// somebody else's manifest in it.
    Named,
}

#[derive(Debug)]
struct Word {
    said: Said,
    at: Instant,
}

/// What a repository is known to hold.
#[derive(Debug)]
struct Content {
    used: Instant,
    /// When the registry itself was last heard of it, if it was: what is kept here may be used while it is
    /// away.
    told: Option<Instant>,
    /// Manifests that were seen, the last one last: it is what a later proof asks the origin for.
    manifests: Vec<Digest>,
    /// Sizes in bytes where a manifest told them.
    digests: BTreeMap<Digest, Option<u64>>,
}

impl Proofs {
    /// Nothing proved, nothing seen.
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            proved: BTreeMap::new(),
            loans: BTreeMap::new(),
            words: BTreeMap::new(),
            places: BTreeMap::new(),
            changes: 0,
        }
    }

    /// Another number whenever there is something else to keep for the next agent.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// How good the proof of `credential` for `place` is at `now`.
    pub fn proof(&self, now: Instant, credential: CredentialKey, place: &Place) -> Proof {
        match self.proved.get(&(credential, place.clone())).map(|at| now.saturating_duration_since(*at)) {
            Some(age) if age < self.limits.fresh => Proof::Fresh,
            Some(age) if age < self.limits.stale => Proof::Stale,
            _ => Proof::Missing,
        }
    }

    /// The origin let `credential` read `place` at `now`.
    pub fn prove(&mut self, now: Instant, credential: CredentialKey, place: &Place) {
        self.changes += 1;
        self.proved.insert((credential, place.clone()), now);
        keep_newest(&mut self.proved, self.limits.proofs);
    }

    /// The origin refused `credential` for `place`: what was proved before no longer counts.
    pub fn refuse(&mut self, credential: CredentialKey, place: &Place) {
        self.changes += 1;
        self.proved.remove(&(credential, place.clone()));
        self.loans.retain(|(key, lent, _), _| !(*key == credential && lent == place));
    }

    /// A host before the registry gave this digest, for `credential`, while the registry could not be
    /// asked. Opens nothing else, and holds only while that is so.
    pub fn lend(&mut self, now: Instant, credential: CredentialKey, place: &Place, digest: Digest) {
        self.loans.insert((credential, place.clone(), digest), now);
        keep_newest(&mut self.loans, self.limits.loans);
    }

    /// Whether this digest was lent a moment ago.
    pub fn is_lent(&self, now: Instant, credential: CredentialKey, place: &Place, digest: Digest) -> bool {
        let at = self.loans.get(&(credential, place.clone(), digest));
        at.is_some_and(|at| now.saturating_duration_since(*at) < self.limits.loan)
    }

    /// Members of the swarm said this of digests in `place` while the registry could not be asked.
    pub fn hear(&mut self, now: Instant, place: &Place, words: &[(Digest, Said)]) {
        // One manifest refers to fewer than there is room for.
        for (digest, said) in words.iter().take(self.limits.words) {
            let said = match (self.heard(now, place, digest), said) {
                // Less is no news, and does not keep what is known either: a digest that is held may be named too.
                (Some(Said::Held(_)), Said::Named) => continue,
                (Some(known @ Said::Held(_)), Said::Held(None)) => known,
                _ => *said,
            };
            self.words.insert((place.clone(), *digest), Word { said, at: now });
        }
        let excess = self.words.len().saturating_sub(self.limits.words);
        if excess > 0 {
            let mut ages: Vec<_> = self.words.iter().map(|(key, word)| (word.at, key.clone())).collect();
            ages.sort_unstable();
            for (_, key) in ages.into_iter().take(excess) {
                self.words.remove(&key);
            }
        }
    }

    /// What members said of a digest, if that was not too long ago.
    pub fn heard(&self, now: Instant, place: &Place, digest: &Digest) -> Option<Said> {
        let word = self.words.get(&(place.clone(), *digest))?;
        (now.saturating_duration_since(word.at) < self.limits.stale).then_some(word.said)
    }

    /// The registry says that `place` does not have it.
    pub fn disown(&mut self, place: &Place, digest: &Digest) {
        self.words.remove(&(place.clone(), *digest));
    }

    /// The size that a manifest of `place` gives `digest`, if the registry itself said that `place` holds
    /// it and spoke of `place` lately: what this node can tell others.
    pub fn saw_lately(&self, now: Instant, place: &Place, digest: &Digest) -> Option<Option<u64>> {
        let content = self.places.get(place)?;
        content.told.filter(|told| now.saturating_duration_since(*told) < self.limits.stale)?;
        content.digests.get(digest).copied()
    }

    /// `manifest` was read from `place` and refers to `references`.
    pub fn saw_manifest(&mut self, now: Instant, place: &Place, manifest: Digest, references: &[(Digest, u64)]) {
        self.note(now, place, &[(manifest, None)]);
        let references: Vec<_> = references.iter().map(|(digest, size)| (*digest, Some(*size))).collect();
        self.note(now, place, &references);
        if let Some(content) = self.places.get_mut(place) {
            content.manifests.retain(|known| *known != manifest);
            content.manifests.push(manifest);
            let excess = content.manifests.len().saturating_sub(MANIFESTS_MAX);
            content.manifests.drain(..excess);
        }
    }

    /// The registry itself says that `place` holds this.
    pub fn saw(&mut self, now: Instant, place: &Place, digest: Digest, size: Option<u64>) {
        self.note(now, place, &[(digest, size)]);
        if let Some(content) = self.places.get_mut(place) {
            content.told = Some(now);
        }
    }

    fn note(&mut self, now: Instant, place: &Place, digests: &[(Digest, Option<u64>)]) {
        self.changes += 1;
        if !self.places.contains_key(place) && self.places.len() >= self.limits.places {
            let idlest = self.places.iter().min_by_key(|(_, content)| content.used).map(|(place, _)| place.clone());
            idlest.map(|place| self.places.remove(&place));
        }
        let new = || Content { used: now, told: None, manifests: Vec::new(), digests: BTreeMap::new() };
        let content = self.places.entry(place.clone()).or_insert_with(new);
        content.used = now;
        if content.digests.len() + digests.len() > self.limits.digests {
            // Begin again rather than keep a history: what is still in use is seen again at once.
            content.digests.clear();
            content.manifests.clear();
        }
        for (digest, size) in digests.iter().take(self.limits.digests) {
            let known = content.digests.entry(*digest).or_insert(*size);
            *known = known.or(*size);
        }
    }

    /// Whether `place` is known to hold `digest`.
    pub fn holds(&self, place: &Place, digest: &Digest) -> bool {
        self.places.get(place).is_some_and(|content| content.digests.contains_key(digest))
    }

    /// The size in bytes that a manifest of `place` gives `digest`. Sizes of other repositories do
    /// not count: whoever may push to one of them could name a wrong one.
    pub fn size(&self, place: &Place, digest: &Digest) -> Option<u64> {
        self.places.get(place).and_then(|content| content.digests.get(digest).copied().flatten())
    }

    /// A manifest of `place` that a proof can ask the origin for.
    pub fn witness(&self, place: &Place) -> Option<Digest> {
        self.places.get(place).and_then(|content| content.manifests.last().copied())
    }
}

fn keep_newest<K: Ord + Clone>(times: &mut BTreeMap<K, Instant>, max: usize) {
    if times.len() > max {
        let oldest = times.iter().min_by_key(|(_, at)| **at).map(|(key, _)| key.clone());
        oldest.map(|key| times.remove(&key));
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some time to count from")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) const LIMITS: Limits = Limits {
        fresh: Duration::from_secs(900),
        stale: Duration::from_secs(43_200),
        loan: Duration::from_secs(60),
        proofs: 3,
        loans: 4,
        words: 5,
        places: 2,
        digests: 8,
    };

    pub(super) fn place(name: &str) -> Place {
        Place { registry: "reg.example".parse().unwrap(), repository: name.parse().unwrap() }
    }

    pub(super) fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    #[test]
    fn a_proof_ages_from_fresh_to_stale_to_missing() {
        let (t0, key) = (Instant::now(), CredentialKey([1; 32]));
        let mut proofs = Proofs::new(LIMITS);
        proofs.prove(t0, key, &place("a"));
        assert_eq!(proofs.proof(t0 + Duration::from_secs(899), key, &place("a")), Proof::Fresh);
        assert_eq!(proofs.proof(t0 + Duration::from_secs(900), key, &place("a")), Proof::Stale);
        assert_eq!(proofs.proof(t0 + Duration::from_secs(43_200), key, &place("a")), Proof::Missing);
        assert_eq!(proofs.proof(t0, key, &place("b")), Proof::Missing, "another repository");
        assert_eq!(proofs.proof(t0, CredentialKey([2; 32]), &place("a")), Proof::Missing, "another credential");
        proofs.refuse(key, &place("a"));
        assert_eq!(proofs.proof(t0, key, &place("a")), Proof::Missing);
    }

    #[test]
    fn a_repository_opens_only_what_its_own_manifests_refer_to() {
        let t0 = Instant::now();
        let mut proofs = Proofs::new(LIMITS);
        proofs.saw_manifest(t0, &place("a"), digest("manifest"), &[(digest("layer"), 7)]);
        assert!(proofs.holds(&place("a"), &digest("layer")));
        assert_eq!(proofs.size(&place("a"), &digest("layer")), Some(7));
        assert_eq!(proofs.witness(&place("a")), Some(digest("manifest")));
        assert!(!proofs.holds(&place("b"), &digest("layer")), "cached, but not of this repository");
        assert!(!proofs.holds(&place("a"), &digest("other")));
    }

    #[test]
    fn a_loan_opens_one_digest_for_a_minute_and_proves_nothing() {
        let (t0, key) = (Instant::now(), CredentialKey([1; 32]));
        let mut proofs = Proofs::new(LIMITS);
        proofs.saw_manifest(t0, &place("a"), digest("manifest"), &[(digest("layer"), 7)]);
        proofs.lend(t0, key, &place("a"), digest("manifest"));
        let soon = t0 + Duration::from_secs(59);
        assert!(proofs.is_lent(soon, key, &place("a"), digest("manifest")));
        assert!(!proofs.is_lent(t0 + Duration::from_secs(60), key, &place("a"), digest("manifest")));
        assert!(!proofs.is_lent(soon, key, &place("a"), digest("layer")), "not what the manifest refers to");
        assert!(!proofs.is_lent(soon, key, &place("b"), digest("manifest")), "not in another repository");
        assert!(!proofs.is_lent(soon, CredentialKey([2; 32]), &place("a"), digest("manifest")), "not to another");
        assert_eq!(proofs.proof(soon, key, &place("a")), Proof::Missing, "no proof, not even a stale one");
        proofs.lend(t0, key, &place("b"), digest("other"));
        assert!(!proofs.holds(&place("b"), &digest("other")), "what a repository holds only its registry tells");
        proofs.refuse(key, &place("a"));
        assert!(!proofs.is_lent(soon, key, &place("a"), digest("manifest")), "the registry says no");
        assert!(proofs.is_lent(soon, key, &place("b"), digest("other")));
    }

    #[test]
    fn the_word_of_members_is_no_content_of_a_repository_and_what_an_index_names_is_not_open() {
        let t0 = Instant::now();
        let mut proofs = Proofs::new(LIMITS);
        let heard = |proofs: &Proofs, now, name| proofs.heard(now, &place("a"), &digest(name));
        let names = [(digest("index"), Said::Held(Some(7))), (digest("child"), Said::Named)];
        proofs.hear(t0, &place("a"), &names);
        assert_eq!(heard(&proofs, t0, "index"), Some(Said::Held(Some(7))));
        assert_eq!(heard(&proofs, t0, "child"), Some(Said::Named));
        assert_eq!(proofs.heard(t0, &place("b"), &digest("index")), None, "another repository");
        assert_eq!(proofs.heard(t0 + LIMITS.stale, &place("a"), &digest("index")), None, "too long ago");
        assert!(!proofs.holds(&place("a"), &digest("index")), "the registry did not say so");
        assert_eq!(proofs.saw_lately(t0, &place("a"), &digest("index")), None, "nor is it told to others");
        proofs.hear(t0, &place("a"), &[(digest("child"), Said::Held(None))]);
        proofs.hear(t0, &place("a"), &[(digest("child"), Said::Named)]);
        assert_eq!(heard(&proofs, t0, "child"), Some(Said::Held(None)), "less is no news");
        proofs.hear(t0 + LIMITS.stale / 2, &place("a"), &[(digest("child"), Said::Named)]);
        assert_eq!(heard(&proofs, t0 + LIMITS.stale, "child"), None, "and does not keep what is known");
        proofs.hear(t0 + LIMITS.stale, &place("a"), &[(digest("child"), Said::Named)]);
        assert_eq!(heard(&proofs, t0 + LIMITS.stale, "child"), Some(Said::Named), "too long ago to be held still");
        proofs.disown(&place("a"), &digest("child"));
        assert_eq!(heard(&proofs, t0, "child"), None);
    }

    #[test]
    fn others_are_told_what_the_registry_itself_said_and_only_for_a_while() {
        let t0 = Instant::now();
        let mut proofs = Proofs::new(LIMITS);
        proofs.saw(t0, &place("a"), digest("manifest"), Some(7));
        let told = |proofs: &Proofs, now, repository, name| proofs.saw_lately(now, &place(repository), &digest(name));
        assert_eq!(told(&proofs, t0, "a", "manifest"), Some(Some(7)));
        assert_eq!(told(&proofs, t0, "b", "manifest"), None);
        assert_eq!(told(&proofs, t0, "a", "other"), None);
        proofs.saw_manifest(t0 + LIMITS.stale / 2, &place("a"), digest("manifest"), &[]);
        assert_eq!(told(&proofs, t0 + LIMITS.stale, "a", "manifest"), None, "using it is not asking the registry");
        proofs.saw(t0 + LIMITS.stale, &place("a"), digest("other"), None);
        assert_eq!(told(&proofs, t0 + LIMITS.stale, "a", "manifest"), Some(Some(7)));
        proofs.saw_manifest(t0, &place("c"), digest("manifest"), &[]);
        assert_eq!(told(&proofs, t0, "c", "manifest"), None, "the registry did not say so");
    }

    proptest! {
        #[test]
        fn memory_is_bounded_whatever_is_asked(names in prop::collection::vec("[a-d]{1,2}", 1..40)) {
            let t0 = Instant::now();
            let mut proofs = Proofs::new(LIMITS);
            for (step, name) in names.iter().enumerate() {
                let now = t0 + Duration::from_secs(u64::try_from(step).unwrap());
                let key = CredentialKey([u8::try_from(step % 5).unwrap(); 32]);
                proofs.prove(now, key, &place(name));
                proofs.saw_manifest(now, &place(name), digest(name), &[(digest(&format!("{name}{step}")), 1)]);
                proofs.lend(now, key, &place(name), digest(name));
                let word = |part: usize| (digest(&format!("{name}{step}{part}")), Said::Held(None));
                let words: Vec<_> = (0..step % 8).map(word).collect();
                proofs.hear(now, &place(name), &words);
                let is_heard = |word: &(Digest, _)| proofs.heard(now, &place(name), &word.0).is_some();
                prop_assert!(words.iter().take(LIMITS.words).all(is_heard), "what was just heard is known");
                prop_assert!(proofs.words.len() <= LIMITS.words);
                prop_assert!(proofs.is_lent(now, key, &place(name), digest(name)), "what was just lent is");
                prop_assert!(proofs.holds(&place(name), &digest(name)), "what was just seen is known");
                prop_assert_eq!(proofs.proof(now, key, &place(name)), Proof::Fresh, "what was just proved holds");
                prop_assert!(proofs.proved.len() <= LIMITS.proofs);
                prop_assert!(proofs.loans.len() <= LIMITS.loans);
                prop_assert!(proofs.places.len() <= LIMITS.places);
                prop_assert!(proofs.places.values().all(|content| content.digests.len() <= LIMITS.digests));
            }
        }
    }
}
