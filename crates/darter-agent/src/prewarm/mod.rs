//! Bringing an image here before anybody asks for it.
//!
//! Into the store, blob by blob; then, where a CRI socket is known, containerd pulls it through the
//! mirror and unpacks it, as the kubelet would. At last it is pinned, so that it is still here when
//! its pod comes. Whoever ordered it gets an event for each step; when they go away it stops, and what
//! has arrived is kept.

mod cri;
mod login;
mod pin;
mod warm;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use darter_core::manifest::{Descriptor, Manifest, Platform};
use darter_core::units::Seconds;
use darter_core::{Digest, ImageName, Reference};
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};

use crate::config::{Access, Config};
use crate::images::{Asker, BlobFound, Images, Refusal};
use crate::log::chain;
use crate::pulls::{Progress, Reader};
use crate::sites::Sites;
use crate::store::{Blob, PIN_MAX, PinError, Store};

pub use login::Login;
pub use pin::{Pin, Release};
pub use warm::Warm;

/// Events that may wait for a slow reader; past it the work waits too.
const EVENTS_MAX: usize = 64;
/// Orders carried out at once. `darter prewarm` sends one after the other and the network is full with
/// a few images; more would only take ingests and connections from the pulls of pods.
const ORDERS_MAX: usize = 8;
/// A blob tells its progress this often.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// What is ordered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// As a person types it: `registry/repository:tag`.
    pub image: String,
    /// Only into the store, even where a CRI socket is known.
    #[serde(default)]
    pub store_only: bool,
    /// For how long eviction spares it afterwards: `0` is not at all, nothing is `store.pin_for`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Seconds>,
    /// What opens the repository, where the registry asks each pull for its own credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<Login>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The manifest is known, and these blobs are to come.
    Image {
        /// The image manifest.
        digest: String,
        /// Configuration and layers, in order.
        blobs: Vec<BlobSize>,
    },
    /// A blob has this many bytes here.
    Blob {
        /// Which one.
        digest: String,
        /// Bytes that are here.
        bytes: u64,
    },
    /// containerd pulls and unpacks.
    Unpacking,
    /// The image is here.
    Done {
        /// From the order to here.
        seconds: f64,
        /// Bytes of all blobs.
        bytes: u64,
        /// What containerd calls it, if it has it.
        image_ref: Option<String>,
        /// Whether eviction spares it.
        pin: Pin,
    },
    /// Eviction may take it again.
    Unpinned {
        /// Whether it was pinned before.
        was_pinned: bool,
    },
    /// It could not be brought here.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A blob and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobSize {
    /// Its name.
    pub digest: String,
    /// In bytes.
    pub size: u64,
}

/// Takes orders. Cheap to clone.
#[derive(Clone)]
pub struct Prewarm {
    sites: Arc<Sites>,
    images: Images,
    store: Store,
    platform: Platform,
    pin_for: Duration,
    layers: usize,
    patience: Duration,
    cri: Option<PathBuf>,
    orders: Arc<Semaphore>,
}

/// Why an image could not be brought here.
#[derive(Debug, thiserror::Error)]
enum PrewarmError {
    #[error(transparent)]
    Name(#[from] darter_core::names::NameError),
    #[error("{0} is not mirrored here: add a [[registry]] with this name to the configuration")]
    Registry(darter_core::Registry),
    #[error("cannot get {what}")]
    Refused {
        what: String,
        #[source]
        source: Refusal,
    },
    #[error("{0} asks each pull for its own credential: give this one --username and --password-stdin")]
    NoLogin(darter_core::Registry),
    #[error("{0} is read with access = \"{1}\", which takes no credential of a prewarm: leave --username out")]
    Login(darter_core::Registry, &'static str),
    #[error("the manifest cannot be read")]
    Manifest(#[from] darter_core::manifest::ManifestError),
    #[error("the index has no image for {os}/{architecture} (mirror.platform)")]
    Platform { os: String, architecture: String },
    #[error("{0} stopped coming: {1}")]
    Broken(Digest, String),
    #[error("containerd did not pull the image")]
    Cri(#[from] cri::CriError),
    #[error("busy: {ORDERS_MAX} images are being brought here already; try again when one of them is here")]
    Busy,
    #[error("whoever ordered it is gone")]
    Gone,
    #[error("a pin may last {max} at most", max = Seconds(PIN_MAX))]
    PinTooLong,
    #[error("the pin was not released")]
    Unpin(#[from] PinError),
}

/// An image, as its manifests tell it.
struct Found {
    /// The image manifest.
    digest: Digest,
    /// The manifests on the way to it, with their sizes.
    manifests: Vec<(Digest, u64)>,
    /// Configuration and layers, each once.
    blobs: Vec<Descriptor>,
}

impl Prewarm {
    /// Takes orders for images of these registries.
    pub fn new(config: &Config, sites: Arc<Sites>, images: Images, store: Store) -> Self {
        Self {
            sites,
            images,
            store,
            platform: config.platform(),
            pin_for: config.store.pin_for.0,
            layers: config.mirror.prefetch_layers,
            patience: config.mirror.stall.0,
            cri: config.containerd.socket.clone(),
            orders: Arc::new(Semaphore::new(ORDERS_MAX)),
        }
    }

    /// Carries out an order. The last event is `Done` or `Failed`; dropping the stream stops it.
    pub fn run(self, order: Order) -> impl Stream<Item = Event> + Send + Sync + 'static {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = self.carry_out(&order, &events) => outcome,
                () = events.closed() => Err(PrewarmError::Gone),
            };
            let last = outcome.unwrap_or_else(|error| Event::Failed { reason: chain(&error).to_string() });
            // Nobody to tell: the order was withdrawn.
            let _ = events.send(last).await;
        });
        stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|event| (event, receiver)) })
    }

    /// Releases an image. Its registry is not asked: what was pinned under the name is released,
    /// whatever the name means by now.
    pub async fn release(self, order: Release) -> Event {
        let released = match order.image.parse::<ImageName>() {
            Ok(name) => pin::unpin(self.store, name.to_string()).await.map_err(PrewarmError::from),
            Err(error) => Err(error.into()),
        };
        match released {
            Ok(was_pinned) => Event::Unpinned { was_pinned },
            Err(error) => Event::Failed { reason: chain(&error).to_string() },
        }
    }

    async fn carry_out(&self, order: &Order, events: &mpsc::Sender<Event>) -> Result<Event, PrewarmError> {
        // Refused and not queued: whoever waits here holds a connection of the admin socket.
        let _place = self.orders.try_acquire().map_err(|_| PrewarmError::Busy)?;
        self.image(order, events).await
    }

    async fn image(&self, order: &Order, events: &mpsc::Sender<Event>) -> Result<Event, PrewarmError> {
        let started = Instant::now();
        let name: ImageName = order.image.parse()?;
        let lifetime = order.pin.map_or(self.pin_for, |pin| pin.0);
        if lifetime > PIN_MAX {
            return Err(PrewarmError::PinTooLong);
        }
        let site = self.sites.get(Some(&name.registry)).ok_or_else(|| PrewarmError::Registry(name.registry.clone()))?;
        let caller = order.login.as_ref().map(Login::credential);
        let unused = match site.access() {
            Some(Access::Node) => Some("node"),
            Some(Access::Public) => Some("public"),
            Some(Access::Caller | Access::Off) | None => None,
        };
        if let (Some(access), Some(_)) = (unused, &caller) {
            return Err(PrewarmError::Login(name.registry, access));
        }
        let asker = Asker { site: site.clone(), repository: name.repository.clone(), caller };
        let Found { digest, manifests, blobs } = self.manifest(&asker, &name).await?;
        let sizes = blobs.iter().map(|blob| BlobSize { digest: blob.digest.to_string(), size: blob.size });
        tell(events, Event::Image { digest: digest.to_string(), blobs: sizes.collect() }).await?;
        // The sizes are the registry's word: a sum that is no number must not end the agent's task.
        let bytes = blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
        let pinned = manifests.into_iter().chain(blobs.iter().map(|blob| (blob.digest, blob.size))).collect();
        let mut pinning = pin::Pinning::new(&self.store, name.to_string(), pinned, lifetime);
        let blobs: Vec<_> = blobs.iter().map(|blob| self.blob(&asker, blob, events)).collect();
        let mut coming = stream::iter(blobs).buffer_unordered(self.layers);
        while let Some(outcome) = coming.next().await {
            pinning.hold(outcome?);
        }
        let image_ref = match &self.cri {
            Some(socket) if !order.store_only => {
                tell(events, Event::Unpacking).await?;
                Some(cri::pull(socket, &name.to_string(), order.login.as_ref()).await?)
            }
            _ => None,
        };
        let pin = pinning.pin().await;
        Ok(Event::Done { seconds: started.elapsed().as_secs_f64(), bytes, image_ref, pin })
    }

    /// The image manifest for this node's platform, and what it refers to.
    async fn manifest(&self, asker: &Asker, name: &ImageName) -> Result<Found, PrewarmError> {
        let (mut found, mut manifest) = self.read(asker, &name.reference).await?;
        let mut manifests = vec![found];
        if let index @ Manifest::Index { .. } = &manifest {
            let child = index.for_platform(&self.platform).ok_or_else(|| PrewarmError::Platform {
                os: self.platform.os.clone(),
                architecture: self.platform.architecture.clone(),
            })?;
            (found, manifest) = self.read(asker, &Reference::Digest(child.digest)).await?;
            manifests.push(found);
        }
        let mut seen = HashMap::new();
        let blobs = manifest.references().into_iter().filter(|blob| seen.insert(blob.digest, ()).is_none());
        Ok(Found { digest: found.0, manifests, blobs: blobs.cloned().collect() })
    }

    /// A manifest, with its digest and size.
    async fn read(&self, asker: &Asker, reference: &Reference) -> Result<((Digest, u64), Manifest), PrewarmError> {
        let refused = |source| match source {
            Refusal::Challenge => PrewarmError::NoLogin(asker.site.registry().clone()),
            source => PrewarmError::Refused { what: format!("the manifest {reference}"), source },
        };
        let found = self.images.manifest(asker, reference, false).await.map_err(refused)?;
        Ok(((found.digest, found.content.len() as u64), Manifest::parse(&found.content)?))
    }

    /// Brings one blob here. Its handle, which keeps it here, if the store has it.
    async fn blob(
        &self,
        asker: &Asker,
        blob: &Descriptor,
        events: &mpsc::Sender<Event>,
    ) -> Result<Option<Blob>, PrewarmError> {
        let refused = |source| PrewarmError::Refused { what: blob.digest.to_string(), source };
        // A hand-over a moment ago keeps nothing from coming: that is for containerd, which has the origin.
        let here = match self.images.bring(asker, blob.digest).await.map_err(refused)? {
            BlobFound::Complete(blob) => Some(blob),
            BlobFound::Coming(reader) => {
                self.follow(reader, blob, events).await?;
                self.store.look_up(&blob.digest).await
            }
        };
        tell(events, Event::Blob { digest: blob.digest.to_string(), bytes: blob.size }).await?;
        Ok(here)
    }

    async fn follow(
        &self,
        mut reader: Reader,
        blob: &Descriptor,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), PrewarmError> {
        let (mut reached, mut told) = (0, Instant::now());
        while reached < reader.size() {
            match reader.progress_past(reached, self.patience).await {
                Progress::Readable(end) => reached = end,
                // The pull gives up by itself when its origin is dead; slow is not dead.
                Progress::Stalled => {}
                Progress::Failed(reason) => return Err(PrewarmError::Broken(blob.digest, reason)),
            }
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                tell(events, Event::Blob { digest: blob.digest.to_string(), bytes: reached }).await?;
            }
        }
        Ok(())
    }
}

async fn tell(events: &mpsc::Sender<Event>, event: Event) -> Result<(), PrewarmError> {
    events.send(event).await.map_err(|_| PrewarmError::Gone)
}
