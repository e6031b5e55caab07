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
use crate::pulls::{Joined, Purpose, Wanted, Whence};

/// Images fetched ahead at once. Past it containerd's own requests start the pulls.
const IMAGES_MAX: usize = 16;

/// Layers of one image on their way at once in a swarm, in bytes: with more, the later ones would take
/// the link from the first, which containerd unpacks meanwhile, and a node that is ahead of the others
/// would hold more leases than it can read in time. Of a large layer it has two segments of 8 MiB.
const AHEAD_BYTES: u64 = 16 * 1024 * 1024;

/// Layers of all images on their way at once: half of the ingests that the store has at once, so that it
/// never refuses a layer that containerd asks for.
const AHEAD_MAX: usize = 32;

pub(super) struct Prefetch {
    enabled: bool,
    room: Room,
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
            room: Room {
                layers: config.mirror.prefetch_layers,
                is_shared,
                places: Arc::new(Semaphore::new(AHEAD_MAX)),
            },
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
            room: self.room.clone(),
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
#[derive(Clone)]
struct Room {
    layers: usize,
    /// Whether there may be other nodes.
    is_shared: bool,
    /// Places for the layers of all images.
    places: Arc<Semaphore>,
}

impl Room {
    /// Whether a layer is one of the few of its image, which wait for a place until they have one.
    const fn is_one_of_few(&self, running: usize) -> bool {
        running < self.layers
    }

    /// Waits for a place. The semaphore is never closed: there is always one in the end.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().acquire_owned().await.ok()
    }

    /// A place for a layer of so many bytes beyond those, with other nodes and where all of the image that
    /// is on its way is small, if there is a place.
    fn one_more(&self, bytes: u64, size: u64) -> Option<OwnedSemaphorePermit> {
        let is_small = self.is_shared && bytes.saturating_add(size) <= AHEAD_BYTES;
        is_small.then(|| self.places.clone().try_acquire_owned().ok()).flatten()
    }
}

/// The layers of one image that are on their way, of which each ends with its size.
struct Coming<F> {
    layers: FuturesUnordered<F>,
    bytes: u64,
}

impl<F: Future<Output = u64>> Coming<F> {
    fn begin(&mut self, size: u64, layer: F) {
        self.bytes += size;
        self.layers.push(layer);
    }

    /// Waits until one of them is here. False: there is none.
    async fn one_ends(&mut self) -> bool {
        let ended = self.layers.next().await;
        self.bytes -= ended.unwrap_or(0);
        ended.is_some()
    }

    /// Waits for something else; they go on meanwhile.
    async fn during<T>(&mut self, other: impl Future<Output = T>) -> T {
        tokio::pin!(other);
        loop {
            tokio::select! {
                done = &mut other => return done,
                true = self.one_ends() => {}
            }
        }
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
        let mut coming = Coming { layers: FuturesUnordered::new(), bytes: 0 };
        // They begin in this order.
        for blob in wanted {
            if !coming.during(self.is_wanted(&blob)).await {
                continue;
            }
            let place = loop {
                if self.room.is_one_of_few(coming.layers.len()) {
                    break coming.during(self.room.place()).await;
                }
                if let Some(place) = self.room.one_more(coming.bytes, blob.size) {
                    break Some(place);
                }
                // Where nothing runs there is room, unless no layer is to be fetched ahead at all.
                if !coming.one_ends().await {
                    return;
                }
            };
            let size = blob.size;
            coming.begin(size, async move {
                self.blob(blob).await;
                drop(place);
                size
            });
        }
        while coming.one_ends().await {}
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
        let wanted =
            Wanted { digest: blob.digest, size: Some(blob.size), whence: Some(whence), purpose: Purpose::Ahead };
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
    use futures_util::FutureExt as _;

    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn room(is_shared: bool, places: usize) -> Room {
        Room { layers: 3, is_shared, places: Arc::new(Semaphore::new(places)) }
    }

    /// The places that an image with layers of one size takes at once.
    fn taken(room: &Room, size: u64) -> Vec<OwnedSemaphorePermit> {
        let mut taken = Vec::new();
        loop {
            let few = room.is_one_of_few(taken.len()).then(|| room.place().now_or_never()).flatten();
            match few.flatten().or_else(|| room.one_more(size * taken.len() as u64, size)) {
                Some(place) => taken.push(place),
                None => return taken,
            }
        }
    }

    #[test]
    fn small_layers_are_wished_for_all_at_once_and_large_ones_a_few_at_a_time() {
        for (size, count) in [(MIB / 8, AHEAD_MAX), (MIB, 16), (2 * MIB, 8), (1024 * MIB, 3)] {
            assert_eq!(taken(&room(true, AHEAD_MAX), size).len(), count, "{size}");
        }
        assert_eq!(taken(&room(false, AHEAD_MAX), MIB).len(), 3, "a node by itself");
    }

    #[test]
    fn all_images_together_have_so_many_places_and_give_them_back() {
        for is_shared in [false, true] {
            let room = room(is_shared, 4);
            let first = taken(&room, 1024 * MIB);
            assert_eq!((first.len(), taken(&room, 1024 * MIB).len()), (3, 1));
            drop(first);
            assert_eq!(taken(&room, 1024 * MIB).len(), 3);
        }
    }

    #[tokio::test]
    async fn layers_go_on_while_an_image_waits_for_a_place() {
        let places = Arc::new(Semaphore::new(1));
        let mut coming = Coming { layers: FuturesUnordered::new(), bytes: 0 };
        let place = places.clone().acquire_owned().await;
        coming.begin(MIB, async move {
            tokio::task::yield_now().await;
            drop(place);
            MIB
        });
        assert!(coming.during(places.acquire_owned()).await.is_ok());
        while coming.one_ends().await {}
        assert_eq!(coming.bytes, 0);
    }
}
