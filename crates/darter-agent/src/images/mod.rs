//! What a request of a pull gets: a manifest or a blob, if whoever asks may read it.
//!
//! `access` says with which credential and whether its proof holds, `loan` what may be read where the
//! registry cannot say so, `tags` what a tag means now, `members` what the swarm says of that, `prefetch`
//! what is fetched ahead, `kept` what the next agent knows of all that, `handover` what is left to the origin for
//! a while, `refusal` why nothing is given, `room` how much is in memory, `catalogue` which images are known.
//! Blobs come from the store, from containerd's content store or by a pull; manifests are small and come whole,
//! from the registry or (`others`) from the other nodes.
//! Proofs come from the registry itself; bytes that one opened may come from the hosts before it.
//! Not here: HTTP (`mirror`).

mod access;
mod away;
mod catalogue;
mod handover;
mod kept;
mod loan;
mod members;
mod others;
mod prefetch;
mod refusal;
mod room;
mod tags;
mod turns;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_core::access::{CredentialKey, Place};
use darter_core::manifest::Manifest;
use darter_core::{Digest, Reference, Repository};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::Config;
use crate::log::chain;
use crate::metrics::{Metrics, Source};
use crate::origin::{Credential, Fetched, Passed, Whom};
use crate::pulls::{Joined, Pulls, Purpose, Wanted, Whence};
use crate::sites::Site;
use crate::store::{Blob, Doubt, Store};
use crate::swarm::handle::Wish;

use access::{Gate, Grant};
pub use catalogue::{Catalogue, KnownImage};
use handover::HandedOver;
pub use handover::Share;
use kept::Keeper;
use loan::may_borrow;
use members::Members;
pub use members::Memory;
use others::{Asked, Others};
use prefetch::Prefetch;
pub use refusal::{NotHere, Refusal};
use room::Room;
pub use room::Taken;
use tags::Tags;
use turns::Turns;

/// How long a blob in containerd's content store may be looked for and hashed before a pull is the
/// faster way.
const CONTAINERD_PATIENCE: Duration = Duration::from_millis(500);

/// How long an answer waits for its manifest to be on disk: usually a millisecond, and then the
/// next request finds it there.
const KEEP_PATIENCE: Duration = Duration::from_millis(300);

/// Manifests being written at once. Past it the disk is far behind, and they are fetched again.
const KEEPING_MAX: usize = 32;

/// A manifest, as it is served.
#[derive(Debug, Clone)]
pub struct ManifestFound {
    /// Its name.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// The exact bytes.
    pub content: Bytes,
    /// Where they came from.
    pub source: Source,
    /// The same bytes in the store, if they are there.
    pub kept: Option<Blob>,
    /// What the bytes take of the room for such things; to be held as long as they are.
    pub room: Option<Taken>,
}

/// A blob, as it is served.
#[derive(Debug)]
pub enum BlobFound {
    /// All of it is here.
    Complete(Blob),
    /// It is on its way.
    Coming(crate::pulls::Reader),
}

/// Whoever asks: a repository, and the credential that came with the request.
#[derive(Clone)]
pub struct Asker {
    /// The registry.
    pub site: Arc<Site>,
    /// The repository.
    pub repository: Repository,
    /// The credential of the pull, if it sent one.
    pub caller: Option<Credential>,
}

impl Asker {
    fn place(&self) -> Place {
        Place { registry: self.site.registry().clone(), repository: self.repository.clone() }
    }
}

/// The images of this node. Cheap to clone.
#[derive(Clone)]
pub struct Images(Arc<Inner>);

struct Inner {
    store: Store,
    pulls: Pulls,
    gate: Gate,
    tags: Tags,
    others: Others,
    prefetch: Prefetch,
    catalogue: Catalogue,
    handed_over: HandedOver,
    keeper: Keeper,
    keeping: Arc<Semaphore>,
    room: Room,
    /// Manifests that are being fetched.
    fetching: Turns<(CredentialKey, Place, Digest)>,
}

impl Images {
    /// Images out of this store, brought by these pulls. Prefetching ends when `stop` does.
    pub fn new(config: &Config, store: Store, pulls: Pulls, metrics: Arc<Metrics>, stop: CancellationToken) -> Self {
        let prefetch = Prefetch::new(config, pulls.swarm().is_some(), stop);
        let proofs = access::proofs(&config.mirror);
        let members = Members::new(config, proofs.clone(), pulls.swarm().cloned(), metrics.clone());
        Self(Arc::new(Inner {
            gate: Gate::new(proofs, store.clone(), members),
            others: Others::new(pulls.swarm().cloned(), metrics.clone()),
            store,
            pulls,
            tags: Tags::new(config.mirror.tag_ttl.0, metrics),
            prefetch,
            keeper: Keeper::new(config),
            catalogue: Catalogue::new(config.platform()),
            handed_over: HandedOver::new(config.mirror.handover.0),
            keeping: Arc::new(Semaphore::new(KEEPING_MAX)),
            room: Room::new(),
            fetching: Turns::default(),
        }))
    }

    /// What the registries said to this node, for the other nodes.
    pub fn memory(&self) -> Memory {
        self.0.gate.members.memory()
    }

    /// The images that this node knows.
    pub fn catalogue(&self) -> Catalogue {
        self.0.catalogue.clone()
    }

    /// The manifest that `reference` means to this asker. With `ahead`, the layers of the image
    /// start to come.
    pub async fn manifest(&self, asker: &Asker, reference: &Reference, ahead: bool) -> Result<ManifestFound, Refusal> {
        let credential = self.0.gate.credential(asker)?;
        let found = self.manifest_with(asker, reference, &credential).await;
        let mut found = self.0.gate.or_challenge(asker, found)?;
        if found.room.is_none() {
            found.room = Some(self.0.room.take(found.content.len() as u64).await);
        }
        self.0.catalogue.gave(asker, reference, &found);
        if ahead {
            self.0.prefetch.start(self, asker, credential, &found);
        }
        Ok(found)
    }

    async fn manifest_with(
        &self,
        asker: &Asker,
        reference: &Reference,
        credential: &Credential,
    ) -> Result<ManifestFound, Refusal> {
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => self.0.tags.resolve(asker, tag, credential, &self.0.gate).await?,
        };
        if let Some(found) = self.kept_manifest(asker, digest, credential).await? {
            return Ok(found);
        }
        let _turn = self.0.fetching.take((credential.key(), asker.place(), digest)).await;
        if let Some(found) = self.kept_manifest(asker, digest, credential).await? {
            return Ok(found);
        }
        self.fetch_manifest(asker, digest, credential).await
    }

    /// The manifest if it is in the store, is what it is called, and may be read.
    async fn kept_manifest(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Option<ManifestFound>, Refusal> {
        let Some(blob) = self.0.store.look_up(&digest).await else { return Ok(None) };
        // A layer asked for as a manifest is not read into memory.
        if blob.size() > darter_core::manifest::MANIFEST_MAX_BYTES {
            return Ok(None);
        }
        let grant = self.0.gate.prove_manifest(asker, digest, credential).await?;
        let room = Some(self.0.room.take(blob.size()).await);
        let content = match blob.read_all().await {
            Ok(content) if Digest::of(&content) == digest => content,
            Ok(_) => {
                warn!(%digest, "a stored manifest is not what it was; dropped");
                self.0.store.forget(&digest);
                return Ok(None);
            }
            Err(error) => {
                warn!(%digest, error = %chain(&error), "a stored manifest cannot be read; dropped");
                self.0.store.forget(&digest);
                return Ok(None);
            }
        };
        let Ok(manifest) = Manifest::parse(&content) else { return Ok(None) };
        self.note(asker, digest, &manifest, &grant);
        let media_type = manifest.media_type().to_owned();
        Ok(Some(ManifestFound { digest, media_type, content, source: Source::Cache, kept: Some(blob), room }))
    }

    /// The manifest from another node, or from its origins. From the registry itself it is a proof of
    /// access too.
    async fn fetch_manifest(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<ManifestFound, Refusal> {
        let turn = match self.ask_others(asker, digest, credential).await {
            Asked::Found(found) => return Ok(found),
            Asked::Turn(wish) => Some(wish),
            Asked::Nobody => None,
        };
        let (fetched, grant) = if asker.site.origin().has_others() {
            self.fetch_before_the_registry(asker, digest, credential).await?
        } else {
            (self.fetch_from_the_registry(asker, digest, credential).await?, Grant::Proof)
        };
        let Fetched { content, media_type, .. } = fetched;
        match Manifest::parse(&content) {
            Ok(manifest) => {
                self.note(asker, digest, &manifest, &grant);
                // Kept only if its media type can be told again from its bytes.
                if manifest.media_type() == media_type {
                    self.keep(digest, content.clone(), turn).await;
                }
            }
            // An artifact of a kind we do not know: served, and not kept.
            Err(error) => debug!(%digest, error = %chain(&error), "passing a manifest on unread"),
        }
        Ok(ManifestFound { digest, media_type, content, source: Source::Origin, kept: None, room: None })
    }

    /// Notes what a manifest says that the asker's repository has.
    fn note(&self, asker: &Asker, digest: Digest, manifest: &Manifest, grant: &Grant) {
        match grant {
            Grant::Proof => self.0.gate.saw_manifest(asker, digest, manifest),
            Grant::Word => self.0.gate.heard_manifest(asker, manifest),
            // What it refers to is borrowed by itself.
            Grant::Loan(_) => return,
        }
        self.0.others.saw_manifest(asker, manifest);
    }

    async fn fetch_from_the_registry(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Fetched, Refusal> {
        let fetched = asker.site.origin().manifest(&asker.repository, &Reference::Digest(digest), credential).await;
        self.0.gate.learn(asker, credential, fetched)
    }

    /// A manifest where hosts stand before the registry, which are there to spare it: the proof by a HEAD,
    /// and the bytes from them. Docker Hub counts GETs. Why it may be read is told too.
    async fn fetch_before_the_registry(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
    ) -> Result<(Fetched, Grant), Refusal> {
        let grant = self.0.gate.prove_manifest(asker, digest, credential).await?;
        if let Grant::Loan(Some(fetched)) = grant {
            return Ok((fetched, Grant::Loan(None)));
        }
        let others = asker.site.origin().of(Whom::Others);
        match (others.manifest(&asker.repository, &Reference::Digest(digest), credential).await, grant) {
            (Ok(fetched), grant) => Ok((fetched, grant)),
            // They do not have it, or something else under its name.
            (Err(_), Grant::Proof) => {
                Ok((self.fetch_from_the_registry(asker, digest, credential).await?, Grant::Proof))
            }
            (Err(error), Grant::Word | Grant::Loan(_)) => Err(error.into()),
        }
    }

    /// Keeps a manifest. It is in hand already, so a slow disk holds up the answer for a moment at
    /// most, and the keeping goes on behind it. Then the other nodes can have it, who wait for `wish`.
    async fn keep(&self, digest: Digest, content: Bytes, wish: Option<Wish>) {
        let Ok(place) = self.0.keeping.clone().try_acquire_owned() else {
            debug!(%digest, "a manifest was not kept: the disk is behind");
            return;
        };
        let store = self.0.store.clone();
        let kept = tokio::spawn(async move {
            match (store.put(&digest, content).await, wish) {
                (Ok(_), Some(wish)) => wish.proven(),
                (Ok(_), None) => {}
                (Err(error), _) => debug!(%digest, error = %chain(&error), "a manifest was not kept"),
            }
            drop(place);
        });
        // Past the wait nobody listens any more: the task itself tells how it ended.
        let _ = tokio::time::timeout(KEEP_PATIENCE, kept).await;
    }

    /// A blob: from the store, from containerd, or on its way from the origin. Not one that was handed
    /// over a moment ago.
    pub async fn blob(&self, asker: &Asker, digest: Digest) -> Result<BlobFound, Refusal> {
        let share = self.share(asker, digest)?;
        not_cut(self.0.handed_over.holds_for(&share, Instant::now()))?;
        let is_given = || not_cut(self.0.handed_over.holds(&digest, Instant::now()));
        self.get(asker, digest, Purpose::Read, is_given).await
    }

    /// The same for whoever is not containerd, and has no origin of its own to go on at: ahead of its pulls.
    pub async fn bring(&self, asker: &Asker, digest: Digest) -> Result<BlobFound, Refusal> {
        self.get(asker, digest, Purpose::Ahead, || Ok(())).await
    }

    /// A blob that `is_given` to those who may read it.
    async fn get(
        &self,
        asker: &Asker,
        digest: Digest,
        purpose: Purpose,
        is_given: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<BlobFound, Refusal> {
        let credential = self.0.gate.credential(asker)?;
        let proved = self.0.gate.prove_blob(asker, digest, &credential).await;
        let proved = self.0.gate.or_challenge(asker, proved)?;
        is_given()?;
        if let Some(blob) = kept_blob(&self.0.store, &digest).await {
            return Ok(BlobFound::Complete(blob));
        }
        self.pull(asker, credential, (digest, proved.size), purpose).await
    }

    /// A blob only if all of it is here: for ranges that start later, which never make a pull.
    pub async fn complete_blob(&self, asker: &Asker, digest: Digest) -> Result<BlobFound, Refusal> {
        let credential = self.0.gate.credential(asker)?;
        not_cut(self.0.handed_over.holds_for(&self.share(asker, digest)?, Instant::now()))?;
        // Looked up before it is proved: an absent blob must not cost a request at the origin.
        let Some(blob) = kept_blob(&self.0.store, &digest).await else {
            return Err(NotHere::Incomplete.into());
        };
        let proved = self.0.gate.prove_blob(asker, digest, &credential).await;
        self.0.gate.or_challenge(asker, proved)?;
        not_cut(self.0.handed_over.holds(&digest, Instant::now()))?;
        Ok(BlobFound::Complete(blob))
    }

    /// A blob under the name of whoever asks for it.
    pub fn share(&self, asker: &Asker, digest: Digest) -> Result<Share, Refusal> {
        Ok(Share { credential: self.0.gate.credential(asker)?.key(), place: asker.place(), digest })
    }

    /// Notes that a body of a blob was cut short: for a while it is answered 404.
    pub fn hand_over(&self, share: &Share) {
        self.0.handed_over.note(share, Instant::now());
    }

    /// The size of a blob that this asker may read, without a byte of it: for HEAD.
    pub async fn blob_size(&self, asker: &Asker, digest: Digest) -> Result<u64, Refusal> {
        let credential = self.0.gate.credential(asker)?;
        let proved = self.0.gate.prove_blob(asker, digest, &credential).await;
        let proved = self.0.gate.or_challenge(asker, proved)?;
        let kept = kept_blob(&self.0.store, &digest).await.map(|blob| blob.size());
        kept.or(proved.size).ok_or_else(|| NotHere::NoSize.into())
    }

    async fn pull(
        &self,
        asker: &Asker,
        credential: Credential,
        (digest, size): (Digest, Option<u64>),
        purpose: Purpose,
    ) -> Result<BlobFound, Refusal> {
        let (site, repository) = (asker.site.clone(), asker.repository.clone());
        let whence = Some(Whence { site, repository, credential });
        match self.0.pulls.join(Wanted { digest, size, whence, purpose }).await? {
            Joined::Complete(blob) => Ok(BlobFound::Complete(blob)),
            Joined::Running(reader) => Ok(BlobFound::Coming(reader)),
        }
    }

    /// Tags and referrers: the registry's own answer, or where it is away that of a host before it.
    pub async fn pass(&self, asker: &Asker, path_and_query: &str) -> Result<(Passed, Taken), Refusal> {
        let credential = self.0.gate.credential(asker)?;
        let (origin, may_borrow) = (asker.site.origin(), may_borrow(asker, &credential));
        let question = origin.pass(path_and_query, &credential);
        let passed = match away::ask(&asker.site, may_borrow, question).await {
            Err(away) if away.is_away() && may_borrow => {
                origin.of(Whom::Others).pass(path_and_query, &credential).await.map_err(|_| away)
            }
            passed => passed,
        };
        let passed = self.0.gate.or_challenge(asker, passed.map_err(Refusal::from))?;
        let room = self.0.room.take(passed.content.len() as u64).await;
        Ok((passed, room))
    }

    /// Whether a stored blob may have rotted, now that somebody is to get it.
    pub fn doubt(&self, blob: &Blob) -> Option<Doubt> {
        self.0.store.doubt(blob, Instant::now())
    }

    /// Notes that somebody got a stored blob to its end.
    pub fn given(&self, blob: &Blob) {
        self.0.store.given(blob, Instant::now());
    }

    /// When something of a blob came last that is on its way here, or of those behind which it waits; nothing:
    /// it is not.
    pub fn came_last(&self, digest: &Digest, most: Duration) -> Option<Instant> {
        self.0.pulls.came_last(digest, most)
    }

    /// Whether blobs come from other nodes too.
    pub fn have_company(&self) -> bool {
        self.0.pulls.have_company()
    }

    /// Drops a blob that could not be read to its end.
    pub fn forget(&self, digest: &Digest) {
        self.0.store.forget(digest);
    }
}

/// A blob that was cut short goes on at the origin for a while, wherever it was cut.
fn not_cut(was_cut: bool) -> Result<(), Refusal> {
    if was_cut { Err(NotHere::HandedOver.into()) } else { Ok(()) }
}

/// A blob that is on this node: in the store, or in containerd's.
async fn kept_blob(store: &Store, digest: &Digest) -> Option<Blob> {
    if let Some(blob) = store.look_up(digest).await {
        return Some(blob);
    }
    tokio::time::timeout(CONTAINERD_PATIENCE, store.get_from_containerd(digest)).await.ok().flatten()
}
