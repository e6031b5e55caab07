//! Fetching ahead: a node that asks for a manifest will ask for its layers next.
//!
//! In the order of the manifest, because containerd unpacks them in it, a few at a time, as
//! containerd asks. Joining a pull that containerd started, or being joined by it, costs nothing.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use darter_core::manifest::{Descriptor, Manifest, Platform};
use darter_core::{Digest, Reference};
use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Asker, CONTAINERD_PATIENCE, Images, ManifestFound};
use crate::config::{self, Config};
use crate::log::chain;
use crate::origin::Credential;
use crate::pulls::{Joined, Progress, Wanted};

/// Images fetched ahead at once. Past it containerd's own requests start the pulls.
const IMAGES_MAX: usize = 16;

pub(super) struct Prefetch {
    enabled: bool,
    layers: usize,
    platform: Platform,
    patience: std::time::Duration,
    running: Arc<Mutex<HashSet<Digest>>>,
    stop: CancellationToken,
}

impl Prefetch {
    pub(super) fn new(config: &Config, stop: CancellationToken) -> Self {
        Self {
            enabled: config.mirror.prefetch == config::Prefetch::Layers,
            layers: config.mirror.prefetch_layers,
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
            layers: self.layers,
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

/// What one prefetch needs to ask as its asker does.
struct Ahead {
    images: Images,
    asker: Asker,
    credential: Credential,
    layers: usize,
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
        stream::iter(wanted).for_each_concurrent(self.layers, |blob| self.blob(blob)).await;
    }

    async fn child(&self, child: &Descriptor) -> Option<Manifest> {
        let reference = Reference::Digest(child.digest);
        let found = self.images.manifest_with(&self.asker, &reference, &self.credential).await;
        let found =
            found.inspect_err(|error| debug!(digest = %child.digest, error = %chain(error), "not fetched ahead"));
        Manifest::parse(&found.ok()?.content).ok()
    }

    /// Brings one blob here and waits for its end, which keeps its pull alive.
    async fn blob(&self, blob: Descriptor) {
        let inner = &self.images.0;
        if inner.handed_over.holds(&blob.digest, Instant::now()) {
            return;
        }
        // A disk that does not answer in time is no reason not to fetch.
        let looked = timeout(CONTAINERD_PATIENCE, inner.store.contains_in_containerd(&blob.digest)).await;
        if looked.unwrap_or(false) {
            return;
        }
        let wanted = Wanted {
            site: self.asker.site.clone(),
            repository: self.asker.repository.clone(),
            digest: blob.digest,
            size: Some(blob.size),
            credential: self.credential.clone(),
        };
        match inner.pulls.join(wanted).await {
            Ok(Joined::Complete(_)) => {}
            Ok(Joined::Running(mut reader)) => {
                let mut reached = 0;
                while reached < reader.size() {
                    match reader.progress_past(reached, self.patience).await {
                        Progress::Readable(end) => reached = end,
                        // The pull has its own deadlines; whoever reads has theirs.
                        Progress::Stalled => {}
                        Progress::Failed(_) => break,
                    }
                }
            }
            Err(error) => debug!(digest = %blob.digest, error = %chain(&error), "not fetched ahead"),
        }
    }
}
