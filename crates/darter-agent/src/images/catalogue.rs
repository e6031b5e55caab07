//! Which images this node knows, and under which names: for whoever tells others what is here.
//!
//! One is known once a manifest of it was given to somebody, or once it was found in the store. Not here:
//! what the store has of it now (`Store::holding`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use darter_core::manifest::{Manifest, Platform};
use darter_core::{Digest, ImageName, Reference};

use super::{Asker, ManifestFound};
use crate::store::Store;

/// Images remembered. A node has some dozens; of more, those that were asked for longest ago are forgotten.
const IMAGES_MAX: usize = 512;
/// Names of one image.
const NAMES_MAX: usize = 4;
/// Blobs that are read to find the images in a store, those first that were used last.
const FINDS_MAX: usize = 1024;
/// Manifests are smaller than this, but for those of hundreds of layers.
const FOUND_BYTES_MAX: u64 = 64 * 1024;

/// Images of one platform. Cheap to clone.
#[derive(Clone)]
pub struct Catalogue(Arc<Kept>);

struct Kept {
    platform: Platform,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    images: HashMap<Digest, Entry>,
    /// Counts what was asked for.
    asked: u64,
}

struct Entry {
    names: Vec<String>,
    /// Manifest, configuration and layers, each once; nothing where the manifest itself was not seen yet.
    blobs: Arc<[(Digest, u64)]>,
    asked: u64,
}

/// One image, of which the manifest is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownImage {
    /// Of its manifest.
    pub digest: Digest,
    /// What it was asked for under, the last first.
    pub names: Vec<String>,
    /// Manifest, configuration and layers with their sizes, each once.
    pub blobs: Arc<[(Digest, u64)]>,
}

impl Catalogue {
    /// Of nothing yet.
    pub(super) fn new(platform: Platform) -> Self {
        Self(Arc::new(Kept { platform, known: Mutex::default() }))
    }

    /// All images, in no order.
    pub fn images(&self) -> Vec<KnownImage> {
        let known = self.known();
        let whole = known.images.iter().filter(|(_, entry)| !entry.blobs.is_empty());
        let image = |(digest, entry): (&Digest, &Entry)| {
            let names = entry.names.iter().rev().cloned().collect();
            KnownImage { digest: *digest, names, blobs: entry.blobs.clone() }
        };
        whole.map(image).collect()
    }

    /// Somebody was given a manifest.
    pub(super) fn gave(&self, asker: &Asker, reference: &Reference, found: &ManifestFound) {
        let Ok(manifest) = Manifest::parse(&found.content) else { return };
        let (registry, repository) = (asker.site.registry().clone(), asker.repository.clone());
        let named = ImageName { registry, repository, reference: reference.clone() };
        let (digest, blobs) = match &manifest {
            Manifest::Image { .. } => (found.digest, Some(blobs(&found.digest, found.content.len(), &manifest))),
            // Whoever asks for it means the one of this platform.
            Manifest::Index { .. } => match manifest.for_platform(&self.0.platform) {
                Some(image) => (image.digest, None),
                None => return,
            },
        };
        // Its own digest says nothing that is not known.
        let name = (*reference != Reference::Digest(digest)).then(|| named.to_string());
        let own = ImageName { reference: Reference::Digest(digest), ..named }.to_string();
        self.known().note(digest, [Some(own), name].into_iter().flatten(), blobs);
    }

    /// Looks for images in the store that were there before. Blocks.
    pub fn find(&self, store: &Store) {
        // The last is to be the newest.
        for digest in store.small_blobs(FOUND_BYTES_MAX, FINDS_MAX).iter().rev() {
            if self.known().images.get(digest).is_some_and(|entry| !entry.blobs.is_empty()) {
                continue;
            }
            let Some(content) = store.peek(digest) else { continue };
            if let Ok(manifest @ Manifest::Image { .. }) = Manifest::parse(&content) {
                let blobs = blobs(digest, content.len(), &manifest);
                self.known().note(*digest, std::iter::empty(), Some(blobs));
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn note(&mut self, digest: Digest, names: impl Iterator<Item = String>, blobs: Option<Arc<[(Digest, u64)]>>) {
        if self.images.len() >= IMAGES_MAX && !self.images.contains_key(&digest) {
            let idlest = self.images.iter().min_by_key(|(digest, entry)| (entry.asked, **digest));
            idlest.map(|(digest, _)| *digest).map(|digest| self.images.remove(&digest));
        }
        self.asked += 1;
        let entry =
            self.images.entry(digest).or_insert_with(|| Entry { names: Vec::new(), blobs: Arc::new([]), asked: 0 });
        entry.asked = self.asked;
        if let Some(blobs) = blobs {
            entry.blobs = blobs;
        }
        for name in names {
            entry.names.retain(|other| *other != name);
            entry.names.push(name);
        }
        let excess = entry.names.len().saturating_sub(NAMES_MAX);
        entry.names.drain(..excess);
    }
}

fn blobs(digest: &Digest, size: usize, manifest: &Manifest) -> Arc<[(Digest, u64)]> {
    let own = (*digest, u64::try_from(size).unwrap_or(u64::MAX));
    let mut blobs: Vec<_> = manifest.references().iter().map(|blob| (blob.digest, blob.size)).collect();
    blobs.push(own);
    blobs.sort_unstable();
    blobs.dedup_by_key(|(digest, _)| *digest);
    blobs.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: usize) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn whole(n: usize) -> Option<Arc<[(Digest, u64)]>> {
        Some(Arc::new([(digest(n), 1)]))
    }

    #[test]
    fn what_was_asked_for_longest_ago_is_forgotten_and_names_are_few() {
        let mut known = Known::default();
        for n in 0..IMAGES_MAX {
            known.note(digest(n), std::iter::empty(), whole(n));
        }
        known.note(digest(0), std::iter::empty(), None);
        known.note(digest(IMAGES_MAX), std::iter::empty(), whole(IMAGES_MAX));
        assert_eq!(known.images.len(), IMAGES_MAX);
        assert!(known.images.contains_key(&digest(0)) && !known.images.contains_key(&digest(1)));
        for name in ["a", "b", "c", "d", "a", "e"] {
            known.note(digest(0), std::iter::once(name.to_owned()), None);
        }
        assert_eq!(known.images[&digest(0)].names, ["c", "d", "a", "e"]);
        assert_eq!(known.images[&digest(0)].blobs.len(), 1, "a name takes nothing away");
    }
}
