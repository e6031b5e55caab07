//! Tags of a registry that is away, by the word of the swarm's members (`serve_stale = "cluster"`).
//!
//! Asked only where the pull has a proof for the repository, and of what the registry itself said to this
//! node ([`Memory`]) the others are told in turn. What they agree on opens one manifest and what that refers
//! to; of an index it opens nothing, and each manifest that it names is asked for by itself. All of it ends
//! with the registry's return.
//! Not here: questions and answers on the wire (`swarm::witnesses`), the agreement (`darter_core::stale`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::access::{Place, Proofs};
use darter_core::stale::{Discord, Seen, SeenTags, agree};
use darter_core::{Reference, Registry, Tag};
use tracing::{debug, warn};

use super::Asker;
use crate::config::{Config, ServeStale};
use crate::metrics::{Metrics, RegistryReasonLabels};
use crate::origin::Credential;
use crate::swarm::handle::SwarmHandle;

/// Tags remembered for others and for this node: those of the images that a node runs in half a day.
const TAGS_MAX: usize = 4096;

/// What the registries said to this node, for the members that ask. Cheap to clone.
#[derive(Clone)]
pub struct Memory(Arc<Kept>);

struct Kept {
    /// Those that say `serve_stale = "cluster"`. Of others nobody is told anything.
    registries: BTreeSet<Registry>,
    tags: Mutex<SeenTags>,
    proofs: Arc<Mutex<Proofs>>,
}

impl Memory {
    /// Of one registry, which said this of tags.
    #[cfg(test)]
    pub(crate) fn of(registry: Registry, tags: SeenTags, proofs: Proofs) -> Self {
        let (tags, proofs) = (Mutex::new(tags), Arc::new(Mutex::new(proofs)));
        Self(Arc::new(Kept { registries: BTreeSet::from([registry]), tags, proofs }))
    }

    /// What the registry said of this, if it spoke of it lately.
    pub fn recall(&self, now: Instant, place: &Place, reference: &Reference) -> Option<Seen> {
        if !self.0.registries.contains(&place.registry) {
            return None;
        }
        match reference {
            Reference::Tag(tag) => self.tags().last(now, place, tag),
            Reference::Digest(digest) => {
                let proofs = self.0.proofs.lock().unwrap_or_else(PoisonError::into_inner);
                let size = proofs.saw_lately(now, place, digest)?;
                Some(Seen { digest: *digest, size })
            }
        }
    }

    fn tags(&self) -> MutexGuard<'_, SeenTags> {
        self.0.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The members, and what this node tells them.
pub(super) struct Members {
    swarm: Option<SwarmHandle>,
    memory: Memory,
    metrics: Arc<Metrics>,
}

impl Members {
    pub(super) fn new(
        config: &Config,
        proofs: Arc<Mutex<Proofs>>,
        swarm: Option<SwarmHandle>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let cluster = config.registries.iter().filter(|registry| registry.serve_stale == ServeStale::Cluster);
        let registries = cluster.map(|registry| registry.name.clone()).collect();
        // As long as a proof: without one nobody may have what the tag leads to.
        let lifetime: Duration = config.mirror.proof_stale.0;
        let tags = Mutex::new(SeenTags::new(lifetime, TAGS_MAX));
        Self { swarm, memory: Memory(Arc::new(Kept { registries, tags, proofs })), metrics }
    }

    pub(super) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Whether their word counts for this registry while it is away.
    pub(super) fn count_for(&self, asker: &Asker) -> bool {
        self.swarm.is_some() && asker.site.config.serve_stale == ServeStale::Cluster
    }

    /// The registry itself said what a tag means.
    pub(super) fn saw(&self, asker: &Asker, tag: &Tag, credential: &Credential, seen: Seen) {
        if self.count_for(asker) {
            let key = (asker.place(), tag.clone(), credential.key());
            self.memory.tags().saw(Instant::now(), key, seen);
        }
    }

    /// It said that there is no such tag, or not for this credential.
    pub(super) fn forget(&self, asker: &Asker, tag: &Tag, credential: &Credential) {
        self.memory.tags().forget(&(asker.place(), tag.clone(), credential.key()));
    }

    /// What all members say of a tag that know it, this node included. The registry is away.
    pub(super) async fn tag(&self, asker: &Asker, tag: &Tag) -> Result<Seen, Discord> {
        let agreed = self.ask(asker, &Reference::Tag(tag.clone())).await;
        if let Err(discord) = agreed {
            let labels = RegistryReasonLabels { registry: asker.site.label.clone(), reason: discord.as_str() };
            self.metrics.stale_tag_refusals.get_or_create(&labels).inc();
        }
        agreed
    }

    /// Whether members saw a manifest in the asker's repository.
    pub(super) async fn manifest(&self, asker: &Asker, reference: &Reference) -> Option<Seen> {
        self.ask(asker, reference).await.ok()
    }

    async fn ask(&self, asker: &Asker, reference: &Reference) -> Result<Seen, Discord> {
        let Some(swarm) = &self.swarm else { return Err(Discord::Unknown) };
        let place = asker.place();
        let own = self.memory.recall(Instant::now(), &place, reference);
        let heard = swarm.ask_members(&place, reference).await;
        let agreed = agree(own, &heard.said);
        let (asked, answered, knowing) = (heard.asked, heard.answered, heard.said.len());
        let (registry, repository, knows) = (&place.registry, &place.repository, own.is_some());
        match (&agreed, reference) {
            (Ok(seen), Reference::Tag(tag)) => warn!(%registry, %repository, %tag, digest = %seen.digest, asked,
                answered, knowing, knows, "the origin is away; answering the digest on which all members agree that know \
                the tag"),
            (Err(Discord::Differ), Reference::Tag(tag)) => {
                warn!(%registry, %repository, %tag, asked, answered, knowing,
                knows, "the origin is away, and members differ on what a tag means: no answer")
            }
            (agreed, reference) => debug!(%registry, %repository, %reference, asked, answered, knowing, knows, ?agreed,
                "the origin is away; members were asked"),
        }
        agreed
    }
}
