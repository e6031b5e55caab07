//! What a tag means now: asked at the origin, once for everybody who asks at the same time.
//!
//! A peer is never asked (design: one lying member must not be able to redirect a tag), and an old
//! answer is given only where the operator said so and the origin cannot be reached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::access::{CredentialKey, Place};
use darter_core::{Digest, Reference, Tag};
use tracing::warn;

use super::access::Gate;
use super::{Asker, Refusal};
use crate::config::ServeStale;
use crate::log::chain;
use crate::metrics::{Metrics, RegistryLabels};
use crate::origin::{Credential, OriginError};

/// Tags remembered, for their TTL and for `serve_stale`.
const TAGS_MAX: usize = 4096;

type Key = (CredentialKey, Place, Tag);

/// One tag, as one credential sees it. The lock is held while the origin is asked: others wait
/// for the answer instead of asking too.
type Slot = Arc<tokio::sync::Mutex<Option<(Digest, Instant)>>>;

pub(super) struct Tags {
    ttl: Duration,
    metrics: Arc<Metrics>,
    slots: Mutex<HashMap<Key, (Slot, Instant)>>,
}

impl Tags {
    pub(super) fn new(ttl: Duration, metrics: Arc<Metrics>) -> Self {
        Self { ttl, metrics, slots: Mutex::default() }
    }

    /// The digest behind a tag. The answer is a proof of access too.
    pub(super) async fn resolve(
        &self,
        asker: &Asker,
        tag: &Tag,
        credential: &Credential,
        gate: &Gate,
    ) -> Result<Digest, Refusal> {
        if !asker.site.config.resolve {
            return Err(Refusal::NotHere("tags of this registry are resolved by containerd: resolve = false"));
        }
        let slot = self.slot((credential.key(), asker.place(), tag.clone()));
        let mut known = slot.lock().await;
        if let Some((digest, at)) = *known
            && at.elapsed() < self.ttl
        {
            return Ok(digest);
        }
        // Only what `stale` would answer makes the wait shorter.
        let memory_will_do = known.is_some()
            && asker.site.config.serve_stale == ServeStale::Node
            && gate.holds_while_away(asker, credential);
        let answer = gate.away().ask(&asker.site, memory_will_do, ask(asker, tag, credential)).await;
        match gate.learn(asker, credential, answer) {
            Ok(digest) => {
                *known = Some((digest, Instant::now()));
                Ok(digest)
            }
            Err(Refusal::Origin(error)) if error.is_away() => self.stale(asker, tag, *known, memory_will_do, error),
            Err(refusal) => {
                *known = None;
                Err(refusal)
            }
        }
    }

    /// The digest seen last, where the operator prefers it to nothing.
    fn stale(
        &self,
        asker: &Asker,
        tag: &Tag,
        known: Option<(Digest, Instant)>,
        memory_will_do: bool,
        error: OriginError,
    ) -> Result<Digest, Refusal> {
        match known {
            Some((digest, at)) if memory_will_do => {
                let labels = RegistryLabels { registry: asker.site.label.clone() };
                self.metrics.stale_tags.get_or_create(&labels).inc();
                warn!(registry = %asker.site.registry(), repository = %asker.repository, %tag, %digest,
                    age_seconds = at.elapsed().as_secs(), error = %chain(&error),
                    "the origin is away; answering the digest seen last");
                Ok(digest)
            }
            _ => Err(error.into()),
        }
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

/// HEAD, and GET where the answer to it names no digest.
async fn ask(asker: &Asker, tag: &Tag, credential: &Credential) -> Result<Digest, OriginError> {
    let reference = Reference::Tag(tag.clone());
    let described = asker.site.origin.head_manifest(&asker.repository, &reference, credential).await?;
    match described.digest {
        Some(digest) => Ok(digest),
        None => Ok(asker.site.origin.manifest(&asker.repository, &reference, credential).await?.digest),
    }
}
