//! Keeping what was brought: its handles while the rest comes, then a pin.
//!
//! An image that cannot be pinned is brought all the same, and whoever ordered it is told: a prewarmed
//! image is worth having for as long as nobody needs its room.

use std::time::{Duration, SystemTime};

use darter_core::Digest;
use darter_core::units::Seconds;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::log::chain;
use crate::store::{Blob, PinError, Store};

/// An order to release an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// As it was ordered.
    pub image: String,
}

/// Whether eviction spares what was brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Pin {
    /// It does.
    Set {
        /// For so long.
        lifetime: Seconds,
        /// The end of it, in Unix seconds.
        until: u64,
        /// Bytes of all pinned images, this one included.
        pinned_bytes: u64,
    },
    /// It does not, though that was ordered: the image is here for as long as nobody needs its room.
    Refused {
        /// Why.
        reason: String,
    },
    /// That was not ordered.
    NotOrdered,
}

/// A pin in the making.
pub(super) struct Pinning {
    store: Store,
    image: String,
    blobs: Vec<(Digest, u64)>,
    lifetime: Duration,
    /// Eviction spares a blob whose handle lives. `None` where there will be no pin: an image that is
    /// larger than the share of pins must not take the whole store while it comes.
    held: Option<Vec<Blob>>,
}

impl Pinning {
    /// Of an image whose manifests, configuration and layers are these.
    pub(super) fn new(store: &Store, image: String, blobs: Vec<(Digest, u64)>, lifetime: Duration) -> Self {
        let will_pin = !lifetime.is_zero() && store.may_pin(&image, &blobs).is_ok();
        Self { store: store.clone(), image, blobs, lifetime, held: will_pin.then(Vec::new) }
    }

    /// Keeps a blob here until the pin does.
    pub(super) fn hold(&mut self, blob: Option<Blob>) {
        if let Some(held) = &mut self.held {
            held.extend(blob);
        }
    }

    /// Pins the image, as far as that was ordered and may be.
    pub(super) async fn pin(self) -> Pin {
        if self.lifetime.is_zero() {
            return Pin::NotOrdered;
        }
        let until = SystemTime::now() + self.lifetime;
        let (store, image, lifetime) = (self.store.clone(), self.image.clone(), Seconds(self.lifetime));
        let pinning = move || self.store.pin(&self.image, &self.blobs, until);
        match tokio::task::spawn_blocking(pinning).await {
            Ok(Ok(pinned_bytes)) => {
                info!(image, %lifetime, pinned_bytes, store_bytes = store.usage().bytes, "pinned an image");
                let until = until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
                Pin::Set { lifetime, until, pinned_bytes }
            }
            Ok(Err(error)) => refused(&image, chain(&error).to_string()),
            Err(error) => refused(&image, error.to_string()),
        }
    }
}

fn refused(image: &str, reason: String) -> Pin {
    warn!(image, reason, "an image is here and not pinned");
    Pin::Refused { reason }
}

/// Releases an image. Whether it was pinned.
pub(super) async fn unpin(store: Store, image: String) -> Result<bool, PinError> {
    // A task that ended early has told so in the log, and the pin ends by itself.
    tokio::task::spawn_blocking(move || store.unpin(&image)).await.unwrap_or(Err(PinError::Unavailable))
}
