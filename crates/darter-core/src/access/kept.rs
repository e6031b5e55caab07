//! What of the proofs outlives an agent: those of credentials that are the node's own, and which manifests
//! each repository had.
//!
//! A pull's own credential is not among them, not even as a hash. Ages are told instead of times: the next
//! agent has another clock to count from. What a manifest refers to is read from it again.
//! Not here: the file (`darter_agent::images::kept`).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Content, CredentialKey, Place, Proofs};
use crate::digest::Digest;
use crate::names::{Registry, Repository};

/// Manifests that are kept of one repository, the last that were used: what a node runs of it.
pub const MANIFESTS_MAX: usize = 32;

/// Whose credential it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// None was needed.
    Anybody,
    /// The node's.
    Node,
}

/// What is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Kept {
    /// The youngest first.
    pub proofs: Vec<KeptProof>,
    /// What repositories had.
    pub places: Vec<KeptPlace>,
}

/// A credential could read a repository.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct KeptProof {
    /// Whose credential.
    pub owner: Owner,
    /// Where.
    pub registry: Registry,
    /// Which repository.
    pub repository: Repository,
    /// Milliseconds since the registry said so.
    pub age_ms: u64,
}

/// Manifests that were seen in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct KeptPlace {
    /// Where.
    pub registry: Registry,
    /// Which repository.
    pub repository: Repository,
    /// Milliseconds since the registry itself spoke of it, if it did.
    pub told_ms: Option<u64>,
    /// The one that was used last is the last.
    pub manifests: Vec<String>,
}

impl Proofs {
    /// What the next agent may know. `owner` tells whose credential one is; none: a pull's own.
    pub fn keep(&self, now: Instant, owner: impl Fn(CredentialKey) -> Option<Owner>) -> Kept {
        let age = |at: Instant| now.saturating_duration_since(at);
        let mut proofs: Vec<_> = self
            .proved
            .iter()
            .filter(|(_, at)| age(**at) < self.limits.stale)
            .filter_map(|((key, place), at)| {
                let Place { registry, repository } = place.clone();
                Some(KeptProof { owner: owner(*key)?, registry, repository, age_ms: millis(age(*at)) })
            })
            .collect();
        proofs.sort_by_key(|proof| proof.age_ms);
        let place = |(place, content): (&Place, &Content)| {
            let Place { registry, repository } = place.clone();
            let manifests = content.manifests.iter().map(Digest::to_string).collect();
            KeptPlace { registry, repository, told_ms: content.told.map(|at| millis(age(at))), manifests }
        };
        let places = self.places.iter().filter(|(_, content)| !content.manifests.is_empty()).map(place).collect();
        Kept { proofs, places }
    }

    /// Takes what an agent kept `elapsed` ago. Nothing becomes younger by it, and what is known already stays.
    /// Gives the manifests whose references are to be read again.
    pub fn restore(
        &mut self,
        now: Instant,
        elapsed: Duration,
        kept: &Kept,
        key: impl Fn(Owner) -> CredentialKey,
    ) -> Vec<(Place, Digest)> {
        // Nothing was said before this clock began to run.
        let then = |age_ms: u64| now.checked_sub(Duration::from_millis(age_ms).saturating_add(elapsed));
        for KeptProof { owner, registry, repository, age_ms } in kept.proofs.iter().take(self.limits.proofs) {
            let Some(at) = then(*age_ms) else { continue };
            let place = Place { registry: registry.clone(), repository: repository.clone() };
            let known = self.proved.entry((key(*owner), place)).or_insert(at);
            *known = at.max(*known);
        }
        let mut manifests = Vec::new();
        for KeptPlace { registry, repository, told_ms, manifests: known } in kept.places.iter().take(self.limits.places)
        {
            let place = Place { registry: registry.clone(), repository: repository.clone() };
            for digest in
                known.iter().rev().take(MANIFESTS_MAX).rev().filter_map(|digest| digest.parse::<Digest>().ok())
            {
                self.saw_manifest(now, &place, digest, &[]);
                manifests.push((place.clone(), digest));
            }
            if let Some(content) = self.places.get_mut(&place) {
                content.told = content.told.max(told_ms.and_then(then));
            }
        }
        manifests
    }
}

fn millis(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some time to count from")]
mod tests {
    use super::super::tests::{LIMITS, digest, place};
    use super::super::{Limits, Proof};
    use super::*;

    const NODE: CredentialKey = CredentialKey([1; 32]);
    const CALLER: CredentialKey = CredentialKey([2; 32]);

    fn owner(key: CredentialKey) -> Option<Owner> {
        (key == NODE).then_some(Owner::Node)
    }

    fn next(now: Instant, elapsed: Duration, kept: &Kept) -> (Proofs, Vec<(Place, Digest)>) {
        let mut proofs = Proofs::new(LIMITS);
        let manifests = proofs.restore(now, elapsed, kept, |_| NODE);
        (proofs, manifests)
    }

    #[test]
    fn a_proof_goes_on_ageing_over_a_restart_and_a_pulls_own_credential_is_not_kept() {
        // Some time into the boot.
        let t0 = Instant::now();
        let at = |seconds: u64| t0 + Duration::from_secs(seconds);
        let mut proofs = Proofs::new(LIMITS);
        proofs.prove(t0, NODE, &place("a"));
        proofs.prove(t0, CALLER, &place("a"));
        let kept = proofs.keep(at(600), owner);
        assert_eq!(kept.proofs.len(), 1);
        let text = serde_json::to_string(&kept).unwrap();
        let kept: Kept = serde_json::from_str(&text).unwrap();
        let minute = Duration::from_secs(60);
        let (next_, _) = next(at(660), minute, &kept);
        assert_eq!(next_.proof(at(899), NODE, &place("a")), Proof::Fresh);
        assert_eq!(next_.proof(at(900), NODE, &place("a")), Proof::Stale, "as if nobody had stopped");
        assert_eq!(next_.proof(at(660), CALLER, &place("a")), Proof::Missing);
        let (late, _) = next(at(660), LIMITS.stale, &kept);
        assert_eq!(late.proof(at(660), NODE, &place("a")), Proof::Missing);
        assert!(proofs.keep(t0 + LIMITS.stale, owner).proofs.is_empty(), "one that holds no more is not written");
    }

    #[test]
    fn a_repository_has_its_manifests_after_a_restart_and_what_they_refer_to_once_they_are_read() {
        let t0 = Instant::now();
        let mut proofs = Proofs::new(LIMITS);
        proofs.saw(t0, &place("a"), digest("manifest"), Some(7));
        proofs.saw_manifest(t0, &place("a"), digest("older"), &[]);
        proofs.saw_manifest(t0, &place("a"), digest("manifest"), &[(digest("layer"), 7)]);
        let kept = proofs.keep(t0, owner);
        let (mut next, manifests) = next(t0, Duration::ZERO, &kept);
        assert_eq!(manifests, [(place("a"), digest("older")), (place("a"), digest("manifest"))]);
        assert_eq!(next.witness(&place("a")), Some(digest("manifest")));
        assert!(next.holds(&place("a"), &digest("manifest")) && !next.holds(&place("a"), &digest("layer")));
        next.saw_manifest(t0, &place("a"), digest("manifest"), &[(digest("layer"), 7)]);
        assert_eq!(next.size(&place("a"), &digest("layer")), Some(7));
        assert!(next.saw_lately(t0 + LIMITS.stale / 2, &place("a"), &digest("manifest")).is_some());
        assert!(next.saw_lately(t0 + LIMITS.stale, &place("a"), &digest("manifest")).is_none(), "told as long ago");
    }

    #[test]
    fn what_is_known_already_is_not_made_older_and_nonsense_makes_nothing() {
        let t0 = Instant::now();
        let old = Proofs::new(LIMITS);
        let mut kept = old.keep(t0, owner);
        kept.proofs.push(KeptProof {
            owner: Owner::Node,
            registry: place("a").registry,
            repository: place("a").repository,
            age_ms: u64::MAX,
        });
        let names = (0..100).map(|name| digest(&name.to_string()).to_string());
        kept.places.push(KeptPlace {
            registry: place("a").registry,
            repository: place("a").repository,
            told_ms: Some(u64::MAX),
            manifests: names.chain(["no digest".to_owned()]).collect(),
        });
        let mut proofs = Proofs::new(Limits { digests: 1000, ..LIMITS });
        proofs.prove(t0, NODE, &place("a"));
        let manifests = proofs.restore(t0, Duration::from_secs(1), &kept, |_| NODE);
        assert_eq!(manifests.len(), MANIFESTS_MAX - 1, "the last ones, less one that is no digest");
        assert_eq!(proofs.proof(t0 + Duration::from_secs(899), NODE, &place("a")), Proof::Fresh);
        assert!(proofs.saw_lately(t0, &place("a"), &digest("99")).is_none(), "the registry did not say so");
    }
}
