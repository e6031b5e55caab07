//! Images that eviction spares for a while, because somebody ordered it.
//!
//! By image and not by blob: images share layers, and releasing one must not release the other's.
//! Each pin ends by itself, and all together may take `store.pin_share` of what the store may use.
//! A disk that fills up afterwards is stronger than a pin: what is past that share leaves after
//! everything else, see `Index::victims`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use darter_core::Digest;

use super::index::Index;
use super::journal::Line;
use super::state::DiskError;
use super::{Store, lock};

/// A pin for longer than this is a mistake: it would be forgotten by everybody but the disk.
pub const PIN_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Images pinned at once: far more than a node holds.
const IMAGES_MAX: usize = 1024;
/// Their blobs together: 100 bytes of memory and 65 of the journal each.
const DIGESTS_MAX: usize = 65_536;

/// One pinned image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pin {
    /// When it ends.
    pub(super) until: SystemTime,
    /// Manifests, configuration and layers.
    pub(super) digests: Vec<Digest>,
}

/// All pinned images, by name.
#[derive(Debug, Default)]
pub(super) struct Pins {
    images: BTreeMap<String, Pin>,
    /// What follows from them: until when each digest is pinned.
    digests: HashMap<Digest, SystemTime>,
}

impl Pins {
    pub(super) const fn images(&self) -> &BTreeMap<String, Pin> {
        &self.images
    }

    /// Until when a digest is pinned, if it is.
    pub(super) fn until(&self, digest: &Digest) -> Option<SystemTime> {
        self.digests.get(digest).copied()
    }

    pub(super) fn digests(&self) -> impl Iterator<Item = &Digest> {
        self.digests.keys()
    }

    /// The digests that other images pin.
    pub(super) fn of_others(&self, image: &str) -> HashSet<Digest> {
        let others = self.images.iter().filter(|(name, _)| *name != image);
        others.flat_map(|(_, pin)| pin.digests.iter().copied()).collect()
    }

    /// Pins an image, or releases it. What was before.
    pub(super) fn set(&mut self, image: &str, pin: Option<Pin>) -> Option<Pin> {
        let before = match pin {
            Some(pin) => self.images.insert(image.to_owned(), pin),
            None => self.images.remove(image),
        };
        self.derive();
        before
    }

    /// Takes all of these at once.
    pub(super) fn load(&mut self, images: impl IntoIterator<Item = (String, Pin)>) {
        self.images.extend(images);
        self.derive();
    }

    /// Releases what has ended, and names it. One that ends further ahead than anybody may order was
    /// written under another clock: it must not stay for years.
    pub(super) fn expire(&mut self, now: SystemTime) -> Vec<String> {
        let latest = now + PIN_MAX;
        let (ended, far): (Vec<_>, Vec<_>) = self
            .images
            .iter()
            .filter(|(_, pin)| pin.until <= now || pin.until > latest)
            .map(|(name, pin)| (name.clone(), pin.until))
            .partition(|(_, until)| *until <= now);
        if ended.is_empty() && far.is_empty() {
            return Vec::new();
        }
        for (name, _) in far {
            self.images.entry(name).and_modify(|pin| pin.until = latest);
        }
        let ended: Vec<_> = ended.into_iter().map(|(name, _)| name).collect();
        self.images.retain(|name, _| !ended.contains(name));
        self.derive();
        ended
    }

    fn derive(&mut self) {
        self.digests.clear();
        for pin in self.images.values() {
            for digest in &pin.digests {
                let until = self.digests.entry(*digest).or_insert(pin.until);
                *until = pin.until.max(*until);
            }
        }
    }
}

/// Why an image is not pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The share of pins is used up.
    #[error(
        "with it pinned images would take {wanted} bytes, and they may take {limit}: store.pin_share of what the store may use now"
    )]
    TooMuch {
        /// Bytes of all pinned images, this one included.
        wanted: u64,
        /// Bytes that they may have.
        limit: u64,
    },
    /// So many pins are a mistake.
    #[error("more than {IMAGES_MAX} images with {DIGESTS_MAX} blobs would be pinned")]
    TooMany,
    /// The directory of the store is not there.
    #[error("the store is not available")]
    Unavailable,
    /// It could not be written down, so a restart would forget it.
    #[error("a restart would forget it")]
    Disk(#[from] DiskError),
}

impl Store {
    /// Whether an image of these blobs and sizes could be pinned now: the bytes that would be.
    pub fn may_pin(&self, image: &str, blobs: &[(Digest, u64)]) -> Result<u64, PinError> {
        lock(&self.shared.index).may_pin(image, blobs)
    }

    /// Has eviction spare these blobs until then, also after a restart; in place of an earlier pin of
    /// the image. They need not be here yet. The bytes that are pinned now, of all images. Blocks.
    pub fn pin(&self, image: &str, blobs: &[(Digest, u64)], until: SystemTime) -> Result<u64, PinError> {
        let pin = Pin { until, digests: blobs.iter().map(|(digest, _)| *digest).collect() };
        let mut bytes = 0;
        let mut allowed = |index: &Index| index.may_pin(image, blobs).map(|wanted| bytes = wanted);
        self.set_pin(image, Some(pin), &mut allowed)?;
        Ok(bytes)
    }

    /// Releases an image for eviction. Whether it was pinned. Blocks.
    pub fn unpin(&self, image: &str) -> Result<bool, PinError> {
        Ok(self.set_pin(image, None, &mut |_| Ok(()))?.is_some())
    }

    fn set_pin(
        &self,
        image: &str,
        pin: Option<Pin>,
        allowed: &mut dyn FnMut(&Index) -> Result<(), PinError>,
    ) -> Result<Option<Pin>, PinError> {
        let shared = &self.shared;
        let mount = shared.mount.get().ok_or(PinError::Unavailable)?;
        let line = |pin: Option<Pin>| match pin {
            Some(pin) => Line::Pin(image.to_owned(), pin),
            None => Line::Unpin(image.to_owned()),
        };
        let before = {
            // Held over both, so that a rewrite in between cannot swallow the line.
            let mut journal = lock(&mount.journal);
            let set = |index: &mut Index| allowed(index).map(|()| index.set_pin(image, pin.clone()));
            let before = shared.change(set)?;
            journal.append(&line(pin));
            before
        };
        if let Err(error) = shared.settle_journal() {
            let mut journal = lock(&mount.journal);
            shared.change(|index| index.set_pin(image, before.clone()));
            // The line may be in the file, although it could not be synced: the next one takes it back.
            journal.append(&line(before));
            return Err(error.into());
        }
        Ok(before)
    }
}

impl Index {
    fn may_pin(&self, image: &str, blobs: &[(Digest, u64)]) -> Result<u64, PinError> {
        let told: HashMap<Digest, u64> = blobs.iter().copied().collect();
        let mut digests = self.pins().of_others(image);
        digests.extend(told.keys());
        let images = self.pins().images();
        let is_new = usize::from(!images.contains_key(image));
        if images.len() + is_new > IMAGES_MAX || digests.len() > DIGESTS_MAX {
            return Err(PinError::TooMany);
        }
        let size = |digest| self.blob_size(digest).or_else(|| told.get(digest).copied()).unwrap_or(0);
        let wanted = digests.iter().map(size).fold(0, u64::saturating_add);
        let limit = self.pin_limit_bytes;
        if wanted > limit { Err(PinError::TooMuch { wanted, limit }) } else { Ok(wanted) }
    }
}
