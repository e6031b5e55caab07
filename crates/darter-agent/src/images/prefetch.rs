//! Fetching ahead: a node that asks for a manifest will ask for its layers next.
//!
//! In the order of the manifest, because containerd unpacks them in it, a few at a time, as
//! containerd asks; in a swarm more of them at once where they are small, because each costs a word to
//! other nodes first. Joining a pull that containerd started, or being joined by it, costs nothing.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use darter_core::manifest::{Descriptor, Manifest, Platform};
use darter_core::{Digest, Reference};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Asker, CONTAINERD_PATIENCE, Images, ManifestFound};
use crate::config::{self, Config};
use crate::log::chain;
use crate::origin::Credential;
use crate::pulls::{Joined, Wanted, Whence};

/// Images fetched ahead at once. Past it containerd's own requests start the pulls.
const IMAGES_MAX: usize = 16;

/// Layers of one image on their way at once in a swarm, in bytes: with more, the later ones would take
/// the link from the first, which containerd unpacks meanwhile, and a node that is ahead of the others
/// would hold more leases than it can read in time. Of a large layer it has two segments of 8 MiB.
const AHEAD_BYTES: u64 = 16 * 1024 * 1024;

/// Layers of all images beyond `prefetch_layers` of each: half of the ingests that the store has at
/// once, so that it never refuses a layer that containerd asks for.
const AHEAD_MAX: usize = 32;

pub(super) struct Prefetch {
    enabled: bool,
    layers: usize,
    /// Places for layers beyond those: none without other nodes.
    ahead: Arc<Semaphore>,
    platform: Platform,
    patience: std::time::Duration,
    running: Arc<Mutex<HashSet<Digest>>>,
    stop: CancellationToken,
}

impl Prefetch {
    /// With other nodes, more layers at once.
    pub(super) fn new(config: &Config, is_shared: bool, stop: CancellationToken) -> Self {
        Self {
            enabled: config.mirror.prefetch == config::Prefetch::Layers,
            layers: config.mirror.prefetch_layers,
            ahead: Arc::new(Semaphore::new(if is_shared { AHEAD_MAX } else { 0 })),
            platform: config.platform(),
            patience: config.mirror.stall.0,
            running: Arc::default(),
            stop,
        }
    }

    /// Starts to fetch what `manifest` refers to, if it is not being fetched already.
    pub(super) fn start(&self, images: &Images, asker: &Asker, credential: Credential, manifest: &ManifestFound) {
        if !self.enabled {
            return;
        }
        let Ok(read) = Manifest::parse(&manifest.content) else { return };
        let Some(running) = Running::enter(&self.running, manifest.digest) else { return };
        let ahead = Ahead {
            images: images.clone(),
            asker: asker.clone(),
            credential,
            room: Room { layers: self.layers, more: self.ahead.clone() },
            patience: self.patience,
        };
        let (platform, stop) = (self.platform.clone(), self.stop.clone());
        tokio::spawn(async move {
            let _running = running;
            stop.run_until_cancelled(ahead.image(read, &platform)).await;
        });
    }
}

/// An image that is being fetched ahead, in the set while this lives.
struct Running(Arc<Mutex<HashSet<Digest>>>, Digest);

impl Running {
    fn enter(set: &Arc<Mutex<HashSet<Digest>>>, digest: Digest) -> Option<Self> {
        let mut running = set.lock().unwrap_or_else(PoisonError::into_inner);
        (running.len() < IMAGES_MAX && running.insert(digest)).then(|| Self(set.clone(), digest))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// How much of one image may be on its way at once.
struct Room {
    layers: usize,
    more: Arc<Semaphore>,
}

impl Room {
    /// A place for a layer of so many bytes, if there is one: for a few at any time, for more where all
    /// of them together are small.
    fn place(&self, running: usize, bytes: u64, size: u64) -> Option<Option<OwnedSemaphorePermit>> {
        if running < self.layers {
            return Some(None);
        }
        let is_small = bytes.saturating_add(size) <= AHEAD_BYTES;
        is_small.then(|| self.more.clone().try_acquire_owned().ok().map(Some)).flatten()
    }
}

/// What one prefetch needs to ask as its asker does.
struct Ahead {
    images: Images,
    asker: Asker,
    credential: Credential,
    room: Room,
    patience: std::time::Duration,
}

impl Ahead {
    async fn image(&self, manifest: Manifest, platform: &Platform) {
        let image = match manifest.for_platform(platform) {
            Some(child) => self.child(child).await,
            None => Some(manifest),
        };
        let Some(Manifest::Image { config, layers, .. }) = image else { return };
        let wanted = std::iter::once(config).chain(layers);
        let mut running = FuturesUnordered::new();
        let mut bytes = 0;
        for blob in wanted {
            // Those that run go on meanwhile, and begin: in this order.
            let is_wanted = {
                let look = self.is_wanted(&blob);
                tokio::pin!(look);
                loop {
                    tokio::select! {
                        is_wanted = &mut look => break is_wanted,
                        Some(size) = running.next() => bytes -= size,
                    }
                }
            };
            if !is_wanted {
                continue;
            }
            let place = loop {
                if let Some(place) = self.room.place(running.len(), bytes, blob.size) {
                    break place;
                }
                // Where nothing runs there is room, unless no layer is to be fetched ahead at all.
                let Some(size) = running.next().await else { return };
                bytes -= size;
            };
            bytes += blob.size;
            running.push(async {
                let size = blob.size;
                self.blob(blob).await;
                drop(place);
                size
            });
        }
        while running.next().await.is_some() {}
    }

    async fn child(&self, child: &Descriptor) -> Option<Manifest> {
        let reference = Reference::Digest(child.digest);
        let found = self.images.manifest_with(&self.asker, &reference, &self.credential).await;
        let found =
            found.inspect_err(|error| debug!(digest = %child.digest, error = %chain(error), "not fetched ahead"));
        Manifest::parse(&found.ok()?.content).ok()
    }

    async fn is_wanted(&self, blob: &Descriptor) -> bool {
        let inner = &self.images.0;
        if inner.handed_over.holds(&blob.digest, Instant::now()) {
            return false;
        }
        // A disk that does not answer in time is no reason not to fetch.
        let looked = timeout(CONTAINERD_PATIENCE, inner.store.contains_in_containerd(&blob.digest)).await;
        !looked.unwrap_or(false)
    }

    /// Brings one blob here and waits for its end, which keeps its pull alive.
    async fn blob(&self, blob: Descriptor) {
        let whence = Whence {
            site: self.asker.site.clone(),
            repository: self.asker.repository.clone(),
            credential: self.credential.clone(),
        };
        let wanted = Wanted { digest: blob.digest, size: Some(blob.size), whence: Some(whence) };
        match self.images.0.pulls.join(wanted).await {
            Ok(Joined::Complete(_)) => {}
            Ok(Joined::Running(reader)) => {
                // The pull itself says why where it ends early.
                let _ = reader.to_end(self.patience).await;
            }
            Err(error) => debug!(digest = %blob.digest, error = %chain(&error), "not fetched ahead"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// How many layers of one size are on their way at once.
    fn at_once(room: &Room, size: u64) -> usize {
        let mut places = Vec::new();
        while let Some(place) = room.place(places.len(), size * places.len() as u64, size) {
            places.push(place);
        }
        places.len()
    }

    #[test]
    fn small_layers_are_wished_for_all_at_once_and_large_ones_a_few_at_a_time() {
        let room = |places| Room { layers: 3, more: Arc::new(Semaphore::new(places)) };
        assert_eq!(at_once(&room(AHEAD_MAX), MIB / 8), 3 + AHEAD_MAX);
        assert_eq!(at_once(&room(AHEAD_MAX), MIB), 16);
        assert_eq!(at_once(&room(AHEAD_MAX), 2 * MIB), 8);
        assert_eq!(at_once(&room(AHEAD_MAX), 1024 * MIB), 3);
        assert_eq!(at_once(&room(0), MIB), 3, "a node by itself");
    }

    #[test]
    fn images_share_the_places_and_give_them_back() {
        let more = Arc::new(Semaphore::new(1));
        let room = Room { layers: 1, more: more.clone() };
        let place = room.place(1, MIB, MIB);
        assert!(place.is_some() && room.place(1, MIB, MIB).is_none());
        drop(place);
        assert!(room.place(1, MIB, MIB).is_some());
    }
}
