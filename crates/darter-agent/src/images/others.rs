//! Manifests by digest from the other nodes: one reads it from the registry, the others take it there.
//!
//! A manifest is a blob of one piece, and its digest says whether it is the right one. Whether this
//! asker may read it is still proved at the registry, by this node itself, while the bytes come: what
//! another node says opens nothing. Tags are never asked for here (design: one lying member must not
//! be able to redirect a tag). Where nobody else is, or no order comes soon, the registry is asked as
//! if there were no swarm.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use darter_core::Digest;
use darter_core::access::Place;
use darter_core::manifest::Manifest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::PeerId;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, warn};

use super::access::Grant;
use super::{Asker, Images, ManifestFound};
use crate::activity::Activity;
use crate::log::chain;
use crate::metrics::{Metrics, ReasonLabels, Source};
use crate::origin::Credential;
use crate::swarm::handle::{Order, SwarmHandle, Wish};

/// The first order comes within a round trip or two between nodes. So long no proof is asked for: who
/// is told to read the manifest from the registry gets its proof with it.
const FIRST_ORDER: Duration = Duration::from_millis(20);

/// Whoever reads a manifest for all needs a few round trips to the registry. Past this every node asks
/// by itself: a manifest is small, and containerd waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// Before every blob: without its manifest nothing begins.
const FIRST: u64 = 0;

/// Manifests whose size an index told: some hundred indices of ten platforms. Past it they are
/// forgotten, and the registry is asked.
const SIZES_MAX: usize = 4096;

/// What other nodes are good for here.
pub(super) struct Others {
    swarm: Option<SwarmHandle>,
    metrics: Arc<Metrics>,
    /// Hints: a size that is wrong leads nowhere, and the digest judges what comes. They open nothing.
    sizes: Mutex<HashMap<(Place, Digest), u64>>,
}

/// What became of asking the other nodes.
pub(super) enum Asked {
    /// One of them had it, and the registry says that it may be read.
    Found(ManifestFound),
    /// This node is to read it from the registry, and the others wait until its wish is fulfilled.
    Turn(Wish),
    /// They are of no help.
    Nobody,
}

/// How the wish for a manifest went.
enum Hunted {
    Content(Bytes),
    Turn,
    /// This member vouched for something else under the manifest's name.
    Wrong(PeerId),
    Nobody,
}

impl Others {
    pub(super) fn new(swarm: Option<SwarmHandle>, metrics: Arc<Metrics>) -> Self {
        Self { swarm, metrics, sizes: Mutex::default() }
    }

    /// Notes how large the manifests are that an index names.
    pub(super) fn saw_manifest(&self, asker: &Asker, manifest: &Manifest) {
        let (Some(_), Manifest::Index { manifests, .. }) = (&self.swarm, manifest) else { return };
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        if sizes.len() + manifests.len() > SIZES_MAX {
            sizes.clear();
        }
        let place = asker.place();
        sizes.extend(manifests.iter().take(SIZES_MAX).map(|(child, _)| ((place.clone(), child.digest), child.size)));
    }

    fn size(&self, place: Place, digest: Digest) -> Option<u64> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner).get(&(place, digest)).copied()
    }
}

impl Images {
    /// Asks the other nodes for a manifest, if its size is known and there are any.
    pub(super) async fn ask_others(&self, asker: &Asker, digest: Digest, credential: &Credential) -> Asked {
        let Some(swarm) = &self.0.others.swarm else { return Asked::Nobody };
        let place = asker.place();
        let told = self.0.gate.size(asker, digest, credential);
        let Some(size) = told.or_else(|| self.0.others.size(place, digest)) else { return Asked::Nobody };
        let layout = Layout::new(size);
        // Larger ones are rare, and not worth a transfer of pieces.
        if layout.pieces() != 1 {
            return Asked::Nobody;
        }
        // The blobs that this manifest leads to would wait for the others too.
        swarm.settled().await;
        if swarm.is_alone() {
            return Asked::Nobody;
        }
        let asked = self.hunt_and_prove(swarm, layout, asker, digest, credential).await;
        if let Asked::Nobody = asked {
            debug!(%digest, "the other nodes are of no help with a manifest; asking the registry");
            self.0.others.metrics.swarm_fallbacks.get_or_create(&ReasonLabels { reason: "manifest" }).inc();
        }
        asked
    }

    async fn hunt_and_prove(
        &self,
        swarm: &SwarmHandle,
        layout: Layout,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Asked {
        let began = Instant::now();
        let mut wish = swarm.want(digest, layout, Bitfield::new(layout.pieces()), (FIRST, true)).await;
        let (hunted, grant) = {
            let hunt = timeout_at(began + PATIENCE, hunt(&mut wish, digest));
            let proof = self.0.gate.prove_manifest(asker, digest, credential);
            tokio::pin!(hunt, proof);
            let (mut is_late, mut grant) = (false, None);
            let hunted = loop {
                tokio::select! {
                    hunted = &mut hunt => break hunted.unwrap_or(Hunted::Nobody),
                    () = sleep_until(began + FIRST_ORDER), if !is_late => is_late = true,
                    proved = &mut proof, if is_late && grant.is_none() => grant = Some(proved),
                }
            };
            if grant.is_none() && matches!(hunted, Hunted::Content(_)) {
                grant = Some(proof.await);
            }
            (hunted, grant)
        };
        match (hunted, grant) {
            (Hunted::Content(content), Some(Ok(grant @ (Grant::Proof | Grant::Word)))) => {
                self.take(asker, digest, content, wish, grant).await
            }
            // A loan is asked for again below, and gives the bytes too; what refuses, refuses there.
            (Hunted::Content(_) | Hunted::Nobody, _) => Asked::Nobody,
            (Hunted::Turn, _) => Asked::Turn(wish),
            (Hunted::Wrong(importer), _) => {
                warn!(%digest, %importer, "a node vouched for something else under the name of a manifest");
                self.0.others.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "lied" }).inc();
                swarm.lied(importer).await;
                Asked::Nobody
            }
        }
    }

    /// A manifest from another node, which may be read here.
    async fn take(&self, asker: &Asker, digest: Digest, content: Bytes, wish: Wish, grant: Grant) -> Asked {
        // Only manifests are kept whose media type their bytes tell; this is none of them.
        let Ok(manifest) = Manifest::parse(&content) else { return Asked::Nobody };
        self.note(asker, digest, &manifest, &grant);
        let media_type = manifest.media_type().to_owned();
        self.keep(digest, content.clone(), Some(wish)).await;
        Asked::Found(ManifestFound { digest, media_type, content, source: Source::Peer, kept: None, room: None })
    }
}

/// Does what the swarm orders until the manifest is here, or this node is the one to read it.
async fn hunt(wish: &mut Wish, digest: Digest) -> Hunted {
    let fetcher = wish.fetcher();
    while let Some(order) = wish.order().await {
        match order {
            Order::Fetch { piece, peer } => match fetcher.fetch(piece, peer, Activity::default()).await {
                Ok(got) if Digest::of(&got.bytes) == digest => {
                    return Hunted::Content(Bytes::copy_from_slice(&got.bytes));
                }
                Ok(got) => return Hunted::Wrong(got.attest.importer),
                Err(error) => {
                    debug!(%digest, %peer, error = %chain(&error), "a manifest did not come from a node");
                    wish.fetch_failed(piece, peer, error.failure()).await;
                }
            },
            Order::Import { .. } => return Hunted::Turn,
            Order::Cancel { .. } | Order::Compare(_) | Order::Wait => {}
        }
    }
    Hunted::Nobody
}
