//! What a pull is to bring here, from where, and what for.

use std::sync::Arc;

use darter_core::{Digest, Repository};

use crate::metrics::RegistryLabel;
use crate::origin::Credential;
use crate::sites::Site;

/// A blob that somebody wants, and from where.
#[derive(Clone)]
pub struct Wanted {
    /// Which blob.
    pub digest: Digest,
    /// Its size in bytes, where a manifest told it.
    pub size: Option<u64>,
    /// Where it can be read besides from other nodes; nothing: from them alone.
    pub whence: Option<Whence>,
    /// What for.
    pub purpose: Purpose,
}

/// What a blob is brought here for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Somebody reads it now.
    Read,
    /// Somebody is likely to read it later: it takes what the others leave.
    Ahead,
}

/// Where a blob can be read, by whom.
#[derive(Clone)]
pub struct Whence {
    /// The registry it belongs to.
    pub site: Arc<Site>,
    /// The repository that was proved to hold it.
    pub repository: Repository,
    /// What opens the repository.
    pub credential: Credential,
}

impl Wanted {
    /// The registry as the metrics name it.
    pub(super) fn label(&self) -> RegistryLabel {
        self.whence.as_ref().map_or_else(RegistryLabel::other, |whence| whence.site.label.clone())
    }
}
