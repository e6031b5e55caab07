//! What a tag means now: asked at the registry itself, once for everybody who asks at the same time.
//!
//! A peer is never asked while the registry answers (design: one lying member must not be able to redirect
//! a tag), and an old answer is given only where the operator said so and the registry cannot be reached: this node's own
//! (`serve_stale = "node"`), or one on which all `members` agree that know the tag (`"cluster"`). Where
//! there is no such answer either, a host before the registry is asked, if hosts.toml lets it resolve tags,
//! as containerd itself would ask it. What members or such a host say is forgotten with the tag's TTL.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::access::{CredentialKey, Owner, Place};
use darter_core::stale::{Discord, Seen};
use darter_core::{Digest, Reference, Registry, Repository, Tag};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::access::Gate;
use super::away;
use super::loan::may_borrow;
use super::{Asker, NotHere, Refusal};
use crate::config::ServeStale;
use crate::log::chain;
use crate::metrics::{Metrics, RegistryLabels};
use crate::origin::{Credential, OriginError, Whom};

/// Tags remembered, for their TTL and for `serve_stale`.
const TAGS_MAX: usize = 4096;

type Key = (CredentialKey, Place, Tag);

/// One tag, as one credential sees it. The lock is held while the origin is asked: others wait
/// for the answer instead of asking too.
type Slot = Arc<tokio::sync::Mutex<Option<Known>>>;

/// What a tag meant, and when.
#[derive(Clone, Copy)]
struct Known {
    digest: Digest,
    at: Instant,
    by: Teller,
}

/// Who said it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Teller {
    Registry,
    /// All members of the swarm that knew it, while the registry was away.
    Members,
    /// A host before the registry, while that was away.
    Host,
}

/// A tag, as it is kept for the next agent.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(super) struct KeptTag {
    owner: Owner,
    pub(super) registry: Registry,
    repository: Repository,
    tag: Tag,
    digest: String,
    age_ms: u64,
}

impl Known {
    fn now(digest: Digest, by: Teller) -> Self {
        Self { digest, at: Instant::now(), by }
    }
}

pub(super) struct Tags {
    ttl: Duration,
    metrics: Arc<Metrics>,
    slots: Mutex<HashMap<Key, (Slot, Instant)>>,
}

impl Tags {
    pub(super) fn new(ttl: Duration, metrics: Arc<Metrics>) -> Self {
        Self { ttl, metrics, slots: Mutex::default() }
    }

    /// The digest behind a tag. The registry's answer is a proof of access too.
    pub(super) async fn resolve(
        &self,
        asker: &Asker,
        tag: &Tag,
        credential: &Credential,
        gate: &Gate,
    ) -> Result<Digest, Refusal> {
        if !asker.site.config.resolve {
            return Err(NotHere::Unresolved.into());
        }
        let slot = self.slot((credential.key(), asker.place(), tag.clone()));
        let mut known = slot.lock().await;
        let fresh = known.filter(|known| known.at.elapsed() < self.ttl);
        if let Some(Known { digest, by: Teller::Registry, .. }) = fresh {
            return Ok(digest);
        }
        let holds = gate.holds_while_away(asker, credential);
        let is_kept = holds && asker.site.config.serve_stale == ServeStale::Node;
        let memory = known.filter(|known| is_kept && known.by == Teller::Registry);
        let may_ask_members = holds && gate.members.count_for(asker);
        // Only what stands in below makes the wait shorter.
        let fallback = memory.is_some() || may_ask_members || may_borrow(asker, credential);
        let answer = away::ask(&asker.site, fallback, ask(asker, tag, credential, Whom::Registry)).await;
        match (gate.learn(asker, credential, answer), memory) {
            (Ok((digest, size)), _) => {
                gate.saw(asker, digest, size);
                gate.members.saw(asker, tag, credential, Seen { digest, size });
                *known = Some(Known::now(digest, Teller::Registry));
                Ok(digest)
            }
            // What the registry said itself comes before what another host says.
            (Err(Refusal::Origin(error)), Some(memory)) if error.is_away() => {
                self.tell_stale(asker, tag, memory, &error);
                Ok(memory.digest)
            }
            (Err(Refusal::Origin(error)), None) if error.is_away() => {
                let told = match fresh {
                    Some(told) => told,
                    None => stand_in(asker, tag, credential, gate, may_ask_members, error).await?,
                };
                if told.by == Teller::Members {
                    self.count_stale(asker);
                }
                *known = Some(told);
                Ok(told.digest)
            }
            (Err(refusal), _) => {
                *known = None;
                gate.members.forget(asker, tag, credential);
                Err(refusal)
            }
        }
    }

    /// What the registry said of tags, for the next agent. `owner` tells whose credential one is; none: a pull's
    /// own. What is being asked for at this moment is not among it.
    pub(super) fn keep(&self, now: Instant, owner: impl Fn(CredentialKey) -> Option<Owner>) -> Vec<KeptTag> {
        let slots = self.slots();
        let of = |((key, place, tag), (slot, _)): (&Key, &(Slot, Instant))| {
            let Place { registry, repository } = place.clone();
            let known = slot.try_lock().ok()?.filter(|known| known.by == Teller::Registry)?;
            let age = now.saturating_duration_since(known.at).as_millis();
            Some(KeptTag {
                owner: owner(*key)?,
                registry,
                repository,
                tag: tag.clone(),
                digest: known.digest.to_string(),
                age_ms: u64::try_from(age).unwrap_or(u64::MAX),
            })
        };
        slots.iter().filter_map(of).collect()
    }

    /// Takes what an agent kept `elapsed` ago. Nothing becomes younger by it.
    pub(super) fn restore(
        &self,
        now: Instant,
        elapsed: Duration,
        kept: Vec<KeptTag>,
        key: impl Fn(Owner) -> CredentialKey,
    ) {
        let mut slots = self.slots();
        for KeptTag { owner, registry, repository, tag, digest, age_ms } in kept.into_iter().take(TAGS_MAX) {
            let age = Duration::from_millis(age_ms).saturating_add(elapsed);
            let (Ok(digest), Some(at)) = (digest.parse(), now.checked_sub(age)) else { continue };
            let known = Known { digest, at, by: Teller::Registry };
            let slot = Arc::new(tokio::sync::Mutex::new(Some(known)));
            slots.entry((key(owner), Place { registry, repository }, tag)).or_insert((slot, now));
        }
    }

    /// The digest seen last is given, because the operator prefers it to nothing.
    fn tell_stale(&self, asker: &Asker, tag: &Tag, Known { digest, at, .. }: Known, error: &OriginError) {
        self.count_stale(asker);
        warn!(registry = %asker.site.registry(), repository = %asker.repository, %tag, %digest,
            age_seconds = at.elapsed().as_secs(), error = %chain(error),
            "the origin is away; answering the digest seen last");
    }

    fn count_stale(&self, asker: &Asker) {
        let labels = RegistryLabels { registry: asker.site.label.clone() };
        self.metrics.stale_tags.get_or_create(&labels).inc();
    }

    fn slot(&self, key: Key) -> Slot {
        let mut slots = self.slots();
        if slots.len() >= TAGS_MAX && !slots.contains_key(&key) {
            let idlest = slots.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            idlest.map(|key| slots.remove(&key));
        }
        let (slot, used) = slots.entry(key).or_insert_with(|| (Slot::default(), Instant::now()));
        *used = Instant::now();
        slot.clone()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Key, (Slot, Instant)>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody else than the registry, which is `away`, and of which this node has no answer of its own to give.
async fn stand_in(
    asker: &Asker,
    tag: &Tag,
    credential: &Credential,
    gate: &Gate,
    may_ask_members: bool,
    away: OriginError,
) -> Result<Known, Refusal> {
    if may_ask_members {
        match gate.members.tag(asker, tag).await {
            Ok(seen) => {
                gate.heard(asker, seen);
                return Ok(Known::now(seen.digest, Teller::Members));
            }
            // One of them may be right, and a host before the registry does not know which.
            Err(Discord::Differ) => return Err(NotHere::Differ.into()),
            Err(Discord::Few | Discord::Unknown) => {}
        }
    }
    if !may_borrow(asker, credential) {
        return Err(away.into());
    }
    let (digest, _) = ask(asker, tag, credential, Whom::Others).await.map_err(|_| away)?;
    Ok(Known::now(digest, Teller::Host))
}

/// Digest, and size where it is told: HEAD, and GET where the answer to it names no digest.
async fn ask(
    asker: &Asker,
    tag: &Tag,
    credential: &Credential,
    whom: Whom,
) -> Result<(Digest, Option<u64>), OriginError> {
    let (origin, reference) = (asker.site.origin().of(whom), Reference::Tag(tag.clone()));
    let described = origin.head_manifest(&asker.repository, &reference, credential).await?;
    match described.digest {
        Some(digest) => Ok((digest, described.size)),
        None => {
            let fetched = origin.manifest(&asker.repository, &reference, credential).await?;
            Ok((fetched.digest, u64::try_from(fetched.content.len()).ok()))
        }
    }
}
