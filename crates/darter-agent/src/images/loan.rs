//! What a host before the registry is good for while the registry itself is away.
//!
//! Such a host (a Harbor, a pull-through cache) may give to everybody what the registry gives to few,
//! and whoever may push to it can put a manifest there that names anything. So its yes opens nothing
//! but the one digest that it gives, each manifest and each blob by itself: never what a manifest
//! refers to, never the repository. Where the bytes are in the store already it has to show that it
//! has them too. The registry is asked first each time, unless it was away a moment ago; its no is
//! final, and a pull with a credential of its own gets no loan. That is what containerd, to which the
//! same host is named, would get there without us, and no byte more.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use bytes::Bytes;
use darter_core::range::Span;
use darter_core::{Digest, Reference};
use tracing::{debug, warn};

use super::access::{FIRST_BYTE, Gate, Grant, Proved};
use super::{Asker, Refusal, kept_blob};
use crate::log::chain;
use crate::origin::{BlobStream, Credential, OriginError, Whom};
use crate::store::Blob;

/// Bytes that a host shows of a blob, from a place that it cannot know before.
const SHOWN_BYTES: u64 = 256;

/// Whether a host before the registry can stand in for it. Not where the pull has a credential: what is
/// given to everybody proves nothing of this caller.
pub(super) fn may_borrow(asker: &Asker, credential: &Credential) -> bool {
    !matches!(credential, Credential::Caller(_)) && asker.site.origin().has_others()
}

impl Gate {
    /// A manifest from a host before the registry, which is `away`.
    pub(super) async fn borrow_manifest(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
        away: OriginError,
    ) -> Result<Grant, Refusal> {
        if !may_borrow(asker, credential) {
            return Err(away.into());
        }
        let _turn = self.asking.take((credential.key(), asker.place(), digest)).await;
        if self.is_lent(asker, digest, credential) {
            return Ok(Grant::Loan(None));
        }
        let others = asker.site.origin().of(Whom::Others);
        // All of it, whose digest is computed: also where it is here.
        match others.manifest(&asker.repository, &Reference::Digest(digest), credential).await {
            Ok(fetched) => {
                self.lend(asker, digest, credential);
                Ok(Grant::Loan(Some(fetched)))
            }
            Err(error) => {
                debug!(%digest, error = %chain(&error), "no host before the registry gives the manifest");
                Err(away.into())
            }
        }
    }

    /// The right to a blob from a host before the registry, which is `away`.
    pub(super) async fn borrow_blob(
        &self,
        asker: &Asker,
        digest: Digest,
        credential: &Credential,
        away: OriginError,
    ) -> Result<Proved, Refusal> {
        if !may_borrow(asker, credential) {
            return Err(away.into());
        }
        let _turn = self.asking.take((credential.key(), asker.place(), digest)).await;
        let Some(blob) = kept_blob(&self.store, &digest).await else {
            // Whether it has all of it shows when it comes.
            return match probe(asker, digest, FIRST_BYTE, credential).await {
                Ok(stream) => Ok(Proved { size: stream.size }),
                Err(error) => {
                    debug!(%digest, error = %chain(&error), "no host before the registry gives the blob");
                    Err(away.into())
                }
            };
        };
        if !self.is_lent(asker, digest, credential) {
            if !shows(asker, &blob, credential).await {
                return Err(away.into());
            }
            self.lend(asker, digest, credential);
        }
        Ok(Proved { size: Some(blob.size()) })
    }

    fn is_lent(&self, asker: &Asker, digest: Digest, credential: &Credential) -> bool {
        self.proofs().is_lent(Instant::now(), credential.key(), &asker.place(), digest)
    }

    fn lend(&self, asker: &Asker, digest: Digest, credential: &Credential) {
        self.proofs().lend(Instant::now(), credential.key(), &asker.place(), digest);
    }
}

/// Whether a host before the registry has the bytes of this blob.
async fn shows(asker: &Asker, blob: &Blob, credential: &Credential) -> bool {
    let (digest, span) = (*blob.digest(), somewhere(blob.size(), RandomState::new().build_hasher().finish()));
    let theirs = match probe(asker, digest, span, credential).await {
        Ok(stream) => read(stream, span).await,
        Err(error) => Err(error),
    };
    match (theirs, blob.read(span).await) {
        (Ok(theirs), Ok(ours)) if theirs == ours => true,
        (Ok(_), Ok(_)) => {
            warn!(%digest, registry = %asker.site.registry(), "a host before the registry says it has a blob, and shows \
                other bytes");
            false
        }
        (Err(error), _) => {
            debug!(%digest, error = %chain(&error), "no host before the registry shows the blob");
            false
        }
        (_, Err(error)) => {
            warn!(%digest, %error, "a stored blob cannot be read");
            false
        }
    }
}

async fn probe(asker: &Asker, digest: Digest, span: Span, credential: &Credential) -> Result<BlobStream, OriginError> {
    asker.site.origin().of(Whom::Others).probe(&asker.repository, &digest, span, credential).await
}

async fn read(mut stream: BlobStream, span: Span) -> Result<Bytes, OriginError> {
    let wanted = usize::try_from(span.len()).unwrap_or(usize::MAX);
    if stream.start != span.start {
        return Err(OriginError::Lied("all of a blob where a part was asked for"));
    }
    let mut bytes = Vec::new();
    while bytes.len() < wanted {
        let Some(chunk) = stream.next().await else { break };
        bytes.extend_from_slice(&chunk?);
    }
    bytes.truncate(wanted);
    Ok(bytes.into())
}

/// A part of a blob of `size` bytes, where `dice` is any number.
fn somewhere(size: u64, dice: u64) -> Span {
    let len = size.min(SHOWN_BYTES);
    let start = dice % (size - len + 1);
    Span { start, end: start + len }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_to_be_shown_is_in_the_blob_and_can_be_any_part_of_it(size in 0u64..10_000, dice: u64) {
            let span = somewhere(size, dice);
            prop_assert!(span.end <= size && span.len() == size.min(SHOWN_BYTES));
            let last = size - span.len();
            prop_assert_eq!(somewhere(size, last), Span { start: last, end: size });
        }
    }
}
