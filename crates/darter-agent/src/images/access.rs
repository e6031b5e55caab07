//! Getting proofs of access from the registry itself, by the policy of each registry.
//!
//! `darter_core::access::Proofs` remembers them and says what they open. Here is who asks for
//! them, with which credential, and what a registry that is away means. No host before the registry
//! is ever asked for one: what a cache gives to everybody says nothing of what the registry would
//! give. `loan` is what such a host is good for while the registry is away, and `members` what the other
//! nodes are: they never prove anything, but tell what a repository has whose proof is an older one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::access::{CredentialKey, Limits, Place, Proof, Proofs, Said};
use darter_core::manifest::Manifest;
use darter_core::range::Span;
use darter_core::stale::Seen;
use darter_core::{Digest, Reference};

use super::away::ask;
use super::loan::may_borrow;
use super::members::Members;
use super::turns::Turns;
use super::{Asker, NotHere, Refusal};
use crate::config::{self, Access};
use crate::origin::{Credential, Fetched, OriginError};
use crate::store::Store;

/// Credentials times repositories: a node runs a few hundred pods.
const PROOFS_MAX: usize = 4096;
/// How long a host before the registry is not asked for the same digest again: one pull of an image.
const LOAN: Duration = Duration::from_secs(60);
/// Digests lent at once: those of the images that a node starts within `LOAN`.
const LOANS_MAX: usize = 4096;
/// Digests by the word of members at once: those of the images that a node starts in half a day.
const WORDS_MAX: usize = 8192;
/// Repositories whose content is remembered.
const PLACES_MAX: usize = 1024;
/// Digests of one repository: some hundred images of a hundred layers. 1024 of such repositories
/// would take 500 MiB; a node that ran them all would have run out of disk long before.
const DIGESTS_MAX: usize = 16_384;

pub(super) const FIRST_BYTE: Span = Span { start: 0, end: 1 };

/// Why a manifest may be read.
pub(super) enum Grant {
    /// The registry says so, or said so a while ago and is away.
    Proof,
    /// Members of the swarm saw it in this repository, the registry is away, and said a while ago that the
    /// repository may be read.
    Word,
    /// A host before it has this very digest, and the registry is away. Here it is where that host has
    /// just given it.
    Loan(Option<Fetched>),
}

/// A blob that may be read.
pub(super) struct Proved {
    /// Its size in bytes, where the repository's manifests or the origin told it.
    pub(super) size: Option<u64>,
}

/// Lets pulls through that have a proof.
pub(super) struct Gate {
    proofs: Arc<Mutex<Proofs>>,
    pub(super) store: Store,
    pub(super) members: Members,
    /// Proofs that are being asked for: a quota counts each of them.
    pub(super) asking: Turns<(CredentialKey, Place, Digest)>,
}

/// No proofs yet.
pub(super) fn proofs(mirror: &config::Mirror) -> Arc<Mutex<Proofs>> {
    Arc::new(Mutex::new(Proofs::new(Limits {
        fresh: mirror.proof_ttl.0,
        stale: mirror.proof_stale.0,
        loan: LOAN,
        proofs: PROOFS_MAX,
        loans: LOANS_MAX,
        words: WORDS_MAX,
        places: PLACES_MAX,
        digests: DIGESTS_MAX,
    })))
}

impl Gate {
    /// Proofs for what is in this store, or is to come into it.
    pub(super) fn new(proofs: Arc<Mutex<Proofs>>, store: Store, members: Members) -> Self {
        Self { proofs, store, members, asking: Turns::default() }
    }

    /// The credential that the policy of the registry asks for.
    pub(super) fn credential(&self, asker: &Asker) -> Result<Credential, Refusal> {
        match asker.site.access() {
            Some(Access::Off) => Err(NotHere::Off.into()),
            Some(Access::Public) => Ok(Credential::Anonymous),
            Some(Access::Node) => Ok(Credential::Node),
            Some(Access::Caller) => asker.caller.clone().ok_or(Refusal::Challenge),
            None => Ok(asker.caller.clone().unwrap_or(Credential::Anonymous)),
        }
    }

    /// Where the policy is to be found out: an anonymous request that was refused asks for the
    /// pull's own credential.
    pub(super) fn or_challenge<T>(&self, asker: &Asker, outcome: Result<T, Refusal>) -> Result<T, Refusal> {
        let undecided = asker.site.access().is_none() && asker.caller.is_none();
        match outcome {
            Err(Refusal::Origin(OriginError::Denied { .. })) if undecided => Err(Refusal::Challenge),
            outcome => outcome,
        }
    }

    /// Notes what an answer of the registry itself says about the credential.
    pub(super) fn learn<T>(
        &self,
        asker: &Asker,
        credential: &Credential,
        answer: Result<T, OriginError>,
    ) -> Result<T, Refusal> {
        let place = asker.place();
        match &answer {
            Ok(_) => self.proofs().prove(Instant::now(), credential.key(), &place),
            Err(OriginError::Denied { .. }) => self.proofs().refuse(credential.key(), &place),
            Err(_) => {}
        }
        Ok(answer?)
    }

    /// Whether a proof that is not fresh may stand in while the origin is away.
    pub(super) fn holds_while_away(&self, asker: &Asker, credential: &Credential) -> bool {
        self.proof(&asker.place(), credential) != Proof::Missing
    }

    /// Proves that this asker may read `digest`, a manifest.
    pub(super) async fn prove_manifest(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Grant, Refusal> {
        match self.ask_for_manifest(asker, digest, credential).await {
            Err(Refusal::Origin(away)) if away.is_away() => {
                if self.is_known_to_members(asker, digest, credential).await {
                    return Ok(Grant::Word);
                }
                self.borrow_manifest(asker, digest, credential, away).await
            }
            asked => asked,
        }
    }

    async fn ask_for_manifest(&self, asker: &Asker, digest: Digest, credential: &Credential) -> Result<Grant, Refusal> {
        let place = asker.place();
        if self.is_open(&place, &digest, credential) {
            return Ok(Grant::Proof);
        }
        let _turn = self.asking.take((credential.key(), place.clone(), digest)).await;
        if self.is_open(&place, &digest, credential) {
            return Ok(Grant::Proof);
        }
        let proof = self.proof(&place, credential);
        // Also for a manifest that this repository was not seen to hold: the registry knows.
        let (origin, reference) = (asker.site.origin(), Reference::Digest(digest));
        let question = origin.head_manifest(&asker.repository, &reference, credential);
        let stale_will_do = proof != Proof::Missing && self.proofs().holds(&place, &digest);
        let said = self.said(asker, digest, credential);
        let fallback = stale_will_do || said.is_some() || may_borrow(asker, credential);
        let answer = ask(&asker.site, fallback, question).await;
        match (self.learn(asker, credential, answer), said) {
            (Ok(_), _) => {
                self.saw(asker, digest, None);
                Ok(Grant::Proof)
            }
            (Err(Refusal::Origin(error)), _) if error.is_away() && stale_will_do => Ok(Grant::Proof),
            (Err(Refusal::Origin(error)), Some(Said::Held(_))) if error.is_away() => Ok(Grant::Word),
            (Err(refusal), _) => Err(self.refused(&place, &digest, refusal)),
        }
    }

    /// A refusal of the registry itself, which ends the word of members.
    fn refused(&self, place: &Place, digest: &Digest, refusal: Refusal) -> Refusal {
        if matches!(refusal, Refusal::Origin(OriginError::NotFound)) {
            self.proofs().disown(place, digest);
        }
        refusal
    }

    /// What members of the swarm said of a digest, as far as it counts for this pull while its registry is
    /// away.
    fn said(&self, asker: &Asker, digest: Digest, credential: &Credential) -> Option<Said> {
        let counts = self.members.count_for(asker) && self.holds_while_away(asker, credential);
        counts.then(|| self.proofs().heard(Instant::now(), &asker.place(), &digest)).flatten()
    }

    /// The size of a digest in this repository, as the registry told it, or where it is away the members.
    pub(super) fn size(&self, asker: &Asker, digest: Digest, credential: &Credential) -> Option<u64> {
        let told = self.proofs().size(&asker.place(), &digest);
        told.or_else(|| match self.said(asker, digest, credential)? {
            Said::Held(size) => size,
            Said::Named => None,
        })
    }

    /// Whether members saw a manifest in this repository that an index names on which they agree. The
    /// registry is away.
    async fn is_known_to_members(&self, asker: &Asker, digest: Digest, credential: &Credential) -> bool {
        let Some(Said::Named) = self.said(asker, digest, credential) else { return false };
        match self.members.manifest(asker, &Reference::Digest(digest)).await {
            Some(seen) => {
                self.heard(asker, seen);
                true
            }
            None => false,
        }
    }

    /// Proves that this asker may read `digest`, a blob.
    pub(super) async fn prove_blob(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Proved, Refusal> {
        match self.ask_for_blob(asker, digest, credential).await {
            Err(Refusal::Origin(away)) if away.is_away() => self.borrow_blob(asker, digest, credential, away).await,
            asked => asked,
        }
    }

    async fn ask_for_blob(&self, asker: &Asker, digest: Digest, credential: &Credential) -> Result<Proved, Refusal> {
        let place = asker.place();
        if !self.is_open(&place, &digest, credential) {
            let holds = self.proofs().holds(&place, &digest);
            let witness = if holds { self.proofs().witness(&place) } else { None };
            let proved = match witness {
                Some(manifest) => self.ask_for_manifest(asker, manifest, credential).await,
                None => return self.ask_for_first_byte(asker, digest, credential).await,
            };
            match proved {
                // The manifest is gone, by a lifecycle rule say; the blob may belong to another image.
                Err(Refusal::Origin(OriginError::NotFound)) => {
                    return self.ask_for_first_byte(asker, digest, credential).await;
                }
                proved => drop(proved?),
            }
        }
        Ok(Proved { size: self.proofs().size(&place, &digest) })
    }

    /// No manifest seen in this repository refers to the blob (the agent was restarted in mid-pull,
    /// say): the registry itself decides, by the first byte of it. A blob GET is what a pull would
    /// send anyway; a HEAD is refused by ECR Public.
    async fn ask_for_first_byte(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Proved, Refusal> {
        let place = asker.place();
        let _turn = self.asking.take((credential.key(), place.clone(), digest)).await;
        if self.is_open(&place, &digest, credential) {
            return Ok(Proved { size: self.proofs().size(&place, &digest) });
        }
        let origin = asker.site.origin();
        let question = origin.probe(&asker.repository, &digest, FIRST_BYTE, credential);
        let said = self.said(asker, digest, credential);
        let answer = ask(&asker.site, said.is_some() || may_borrow(asker, credential), question).await;
        match (self.learn(asker, credential, answer), said) {
            (Ok(stream), _) => {
                self.saw(asker, digest, stream.size);
                Ok(Proved { size: stream.size })
            }
            (Err(Refusal::Origin(error)), Some(Said::Held(size))) if error.is_away() => Ok(Proved { size }),
            (Err(refusal), _) => Err(self.refused(&place, &digest, refusal)),
        }
    }

    /// Notes that the registry itself says that the asker's repository holds this.
    pub(super) fn saw(&self, asker: &Asker, digest: Digest, size: Option<u64>) {
        self.proofs().saw(Instant::now(), &asker.place(), digest, size);
    }

    /// Notes what a manifest refers to that the registry itself has in the asker's repository.
    pub(super) fn saw_manifest(&self, asker: &Asker, digest: Digest, manifest: &Manifest) {
        self.saw_manifest_in(&asker.place(), digest, manifest);
    }

    /// The same for a repository that nobody asks for now.
    pub(super) fn saw_manifest_in(&self, place: &Place, digest: Digest, manifest: &Manifest) {
        let references: Vec<_> = match manifest {
            Manifest::Image { .. } => manifest.references().iter().map(|d| (d.digest, d.size)).collect(),
            // A registry need not check what an index names (sparse indexes are legal), so whoever can
            // push one could name the manifest of somebody else's image. Each is proved by itself.
            Manifest::Index { .. } => Vec::new(),
        };
        self.proofs().saw_manifest(Instant::now(), place, digest, &references);
    }

    /// Notes that members of the swarm agree that the asker's repository has this.
    pub(super) fn heard(&self, asker: &Asker, seen: Seen) {
        self.proofs().hear(Instant::now(), &asker.place(), &[(seen.digest, Said::Held(seen.size))]);
    }

    /// Notes what a manifest refers to on which members agree.
    pub(super) fn heard_manifest(&self, asker: &Asker, manifest: &Manifest) {
        let words: Vec<_> = match manifest {
            Manifest::Image { .. } => {
                manifest.references().iter().map(|d| (d.digest, Said::Held(Some(d.size)))).collect()
            }
            // As with the registry's own: whoever pushed it may have named what is somebody else's.
            Manifest::Index { manifests, .. } => manifests.iter().map(|(d, _)| (d.digest, Said::Named)).collect(),
        };
        self.proofs().hear(Instant::now(), &asker.place(), &words);
    }

    /// Whether a fresh proof opens `digest`.
    fn is_open(&self, place: &Place, digest: &Digest, credential: &Credential) -> bool {
        self.proof(place, credential) == Proof::Fresh && self.proofs().holds(place, digest)
    }

    fn proof(&self, place: &Place, credential: &Credential) -> Proof {
        self.proofs().proof(Instant::now(), credential.key(), place)
    }

    pub(super) fn proofs(&self) -> MutexGuard<'_, Proofs> {
        self.proofs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
