//! What was proved and seen, kept for the next agent of this boot: one that is started again while a registry is
//! away gives what the one before it gave.
//!
//! Proofs of the node's own credential and of none are kept, and tags under them, with their age; what a pull
//! proved with a credential of its own is not. What is configured otherwise by then counts for nothing, and so
//! does what was kept before a reboot, when no clock tells how old it is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use darter_core::access::{CredentialKey, Kept, Owner, Place};
use darter_core::ecr::Ecr;
use darter_core::manifest::{MANIFEST_MAX_BYTES, Manifest};
use darter_core::{Digest, Registry};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Images;
use super::tags::KeptTag;
use crate::config::{Config, Discover, RegistryConfig};
use crate::files;
use crate::log::chain;
use crate::origin::Credential;

/// How often what changed is written, at the most.
const EVERY: Duration = Duration::from_secs(30);
/// Bytes of the file: as many proofs, repositories and tags as an agent remembers, with long names.
const BYTES_MAX: u64 = 16 << 20;
/// Manifests that are read again at a start, before the first request: 110 pods, each with an index and a manifest.
const READ_MAX: usize = 256;

/// The file in the data directory, and what it says when it counts.
pub(super) struct Keeper {
    file: PathBuf,
    boot_id: String,
    /// By registry: another configuration may be another credential.
    configured: BTreeMap<Registry, String>,
    /// Whether this node's own registry may come later: it opens nothing before.
    may_come: bool,
}

/// What is in the file.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Content {
    boot_id: String,
    /// Milliseconds since the boot, when it was written.
    written_ms: u64,
    configured: BTreeMap<Registry, String>,
    #[serde(flatten)]
    kept: Kept,
    tags: Vec<KeptTag>,
}

impl Keeper {
    pub(super) fn new(config: &Config) -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let configured = config.registries.iter().map(|registry| (registry.name.clone(), fingerprint(registry)));
        Self {
            file: config.data_dir().join("proofs.json"),
            boot_id: boot_id.trim().to_owned(),
            configured: configured.collect(),
            may_come: config.aws.discover == Discover::Auto && config.aws.account.is_none(),
        }
    }

    /// How a registry is configured, or will be when the metadata service names it.
    fn configuration(&self, registry: &Registry) -> Option<String> {
        let is_own = || self.may_come && matches!(Ecr::recognise(registry), Some(Ecr::Private { .. }));
        let known = self.configured.get(registry).cloned();
        known.or_else(|| is_own().then(|| fingerprint(&RegistryConfig::named(registry.clone()))))
    }

    /// What the agent before this one kept, as far as it counts, and how long ago.
    async fn read(&self) -> Option<(Content, Duration)> {
        let bytes = match files::read(&self.file, BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                self.complain(&error);
                return None;
            }
        };
        let mut content = match serde_json::from_slice::<Content>(&bytes) {
            Ok(content) => content,
            Err(error) => {
                self.complain(&error);
                return None;
            }
        };
        let elapsed = since_boot().checked_sub(Duration::from_millis(content.written_ms))?;
        if content.boot_id != self.boot_id || self.boot_id.is_empty() {
            return None;
        }
        let then = std::mem::take(&mut content.configured).into_iter();
        let same: BTreeSet<_> = then
            .filter(|(registry, config)| self.configuration(registry).as_ref() == Some(config))
            .map(|(registry, _)| registry)
            .collect();
        content.kept.proofs.retain(|proof| same.contains(&proof.registry));
        content.kept.places.retain(|place| same.contains(&place.registry));
        content.tags.retain(|tag| same.contains(&tag.registry));
        Some((content, elapsed))
    }

    fn complain(&self, error: &(dyn std::error::Error + 'static)) {
        info!(file = %self.file.display(), error = %chain(error),
            "what was proved before this start cannot be read: registries are asked again");
    }

    async fn write(&self, kept: Kept, tags: Vec<KeptTag>) -> io::Result<()> {
        let written_ms = u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX);
        let boot_id = self.boot_id.clone();
        let named = kept.proofs.iter().map(|proof| &proof.registry);
        let named = named.chain(kept.places.iter().map(|place| &place.registry));
        let named: BTreeSet<_> = named.chain(tags.iter().map(|tag| &tag.registry)).collect();
        let configured = named.into_iter().filter_map(|name| Some((name.clone(), self.configuration(name)?))).collect();
        let content = Content { boot_id, written_ms, configured, kept, tags };
        let file = self.file.clone();
        let write = move || files::replace(&file, &serde_json::to_vec(&content)?);
        tokio::task::spawn_blocking(write).await?
    }
}

fn fingerprint(registry: &RegistryConfig) -> String {
    Digest::of(serde_json::to_string(registry).unwrap_or_default().as_bytes()).to_string()
}

/// Also while the machine sleeps, unlike `Instant`.
fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let part = Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0));
    Duration::from_secs(u64::try_from(now.tv_sec).unwrap_or(0)) + part
}

/// Whose credential it was; none: a pull's own.
fn owner(key: CredentialKey) -> Option<Owner> {
    [Owner::Anybody, Owner::Node].into_iter().find(|owner| own(*owner) == key)
}

fn own(owner: Owner) -> CredentialKey {
    match owner {
        Owner::Anybody => Credential::Anonymous.key(),
        Owner::Node => Credential::Node.key(),
    }
}

/// As many as are read again, and of each repository those that were used last; in the order in which they were.
fn newest(manifests: &[(Place, Digest)]) -> impl Iterator<Item = &(Place, Digest)> {
    let mut later = BTreeMap::<&Place, usize>::new();
    // How many of the same repository were used after each.
    let mut ranks: Vec<_> = manifests
        .iter()
        .rev()
        .map(|(place, _)| {
            let count = later.entry(place).or_default();
            *count += 1;
            *count
        })
        .collect();
    ranks.reverse();
    let mut sorted = ranks.clone();
    sorted.sort_unstable();
    let most = sorted.get(READ_MAX).copied().unwrap_or(usize::MAX);
    manifests.iter().zip(ranks).filter(move |(_, rank)| *rank < most).map(|(manifest, _)| manifest).take(READ_MAX)
}

impl Images {
    /// Takes what the agent before this one kept. To be done before the first request.
    pub async fn recall(&self) {
        let Some((content, elapsed)) = self.0.keeper.read().await else { return };
        let now = Instant::now();
        let manifests = self.0.gate.proofs().restore(now, elapsed, &content.kept, own);
        let (proofs, tags) = (content.kept.proofs.len(), content.tags.len());
        self.0.tags.restore(now, elapsed, content.tags, own);
        for (place, digest) in newest(&manifests) {
            self.read_again(place, digest).await;
        }
        info!(proofs, tags, manifests = manifests.len(), "what was proved before this start is known still");
    }

    /// A manifest that is not here any more, or not what it is called, opens nothing but itself.
    async fn read_again(&self, place: &Place, digest: &Digest) {
        let Some(blob) = self.0.store.look_up(digest).await.filter(|blob| blob.size() <= MANIFEST_MAX_BYTES) else {
            return;
        };
        let Ok(content) = blob.read_all().await else { return };
        if Digest::of(&content) != *digest {
            return;
        }
        if let Ok(manifest) = Manifest::parse(&content) {
            self.0.gate.saw_manifest_in(place, *digest, &manifest);
        }
    }

    /// Keeps for the next agent what changes, until `stop` and then once more. Never ends before.
    pub async fn remember(self, stop: CancellationToken) {
        let mut written = 0;
        let mut fails = false;
        loop {
            let stops = stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_none();
            let changes = self.0.gate.proofs().changes();
            if changes != written {
                let now = Instant::now();
                let kept = self.0.gate.proofs().keep(now, owner);
                let done = self.0.keeper.write(kept, self.0.tags.keep(now, owner)).await;
                match &done {
                    Ok(()) => written = changes,
                    Err(error) if !fails => warn!(file = %self.0.keeper.file.display(), error = %chain(error),
                        "what was proved is not kept: after a restart registries are asked again"),
                    Err(_) => {}
                }
                fails = done.is_err();
            }
            if stops {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_proved_of_the_nodes_own_registry_waits_for_the_metadata_service() {
        let mut config = Config::embedded();
        config.registries.push(RegistryConfig::named("listed.example".parse().unwrap()));
        let own: Registry = "123456789012.dkr.ecr.us-east-1.amazonaws.com".parse().unwrap();
        let known = |config: &Config, registry: &str| Keeper::new(config).configuration(&registry.parse().unwrap());
        // As it is configured once it is known, and so as the agent before this one had it.
        let named = Some(fingerprint(&RegistryConfig::named(own.clone())));
        assert_eq!(known(&config, own.as_str()), named);
        assert!(known(&config, "listed.example").is_some());
        assert_eq!(known(&config, "another.example"), None);
        // Nobody is asked for it.
        config.aws.discover = Discover::Off;
        assert_eq!(known(&config, own.as_str()), None);
        config.registries.push(RegistryConfig::named(own.clone()));
        assert_eq!(known(&config, own.as_str()), named);
    }

    #[test]
    fn of_too_many_manifests_those_are_read_again_that_were_used_last_in_each_repository() {
        let place = |name: &str| Place { registry: "reg.example".parse().unwrap(), repository: name.parse().unwrap() };
        let of = |name: &str, count: u32| -> Vec<_> {
            (0..count).map(|n| (place(name), Digest::of(format!("{name}{n}").as_bytes()))).collect()
        };
        let all = [of("a", 300), of("b", 2)].concat();
        let read: Vec<_> = newest(&all).cloned().collect();
        assert!(read.len() <= READ_MAX && read.len() > READ_MAX - 3, "{}", read.len());
        assert_eq!(read.last(), all.last(), "a repository that comes late in the alphabet");
        assert!(read.contains(&all[299]) && read.contains(&all[300]) && !read.contains(&all[0]));
        assert!(read.is_sorted_by_key(|one| all.iter().position(|other| other == one)));
        assert_eq!(newest(&of("a", 7)).count(), 7);
    }
}
