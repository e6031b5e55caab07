//! Who vouched for bytes that the origin does not have: found out when a blob's sha256 is wrong.
//!
//! Until then every node had its pieces checked against what their importers vouch for, so one who lies
//! spoils the blob for all of them. One piece of each importer, read from the origin, tells who it is;
//! then the others are asked again, and the origin is read once more for all of them together. Only a
//! liar who lies seldom makes each node read the whole alone. Not here: what becomes of a liar
//! (`darter_core::swarm`).

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use darter_core::pieces::{Layout, chaining_value};
use darter_core::range::Span;
use darter_core::swarm::PeerId;
use darter_core::swarm::attest::Attest;
use tracing::{debug, info, warn};

use super::Whence;
use super::fetch::Job;
use crate::log::chain;
use crate::metrics::ReasonLabels;
use crate::origin::{Origin, OriginError, Whom};
use crate::swarm::handle::SwarmHandle;

/// Whose word holds for a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// This node's: all of it came from the origin. Or an earlier life of the agent had it, which checked
    /// it then and kept no signature.
    Ours,
    /// That of its importer, as this peer sent it.
    Theirs(PeerId, Attest),
    /// It has bytes of several, and is not what any of them vouches for: one lied. This node's own word
    /// least of all holds for it, and it is given to nobody.
    Nobodys,
}

/// Whose word holds for a piece that came out with this value, after these sent it, or parts of it.
pub(super) fn word(sent: &[(PeerId, Attest)], value: [u8; 32]) -> Word {
    match sent.iter().find(|(_, attest)| attest.cv == value) {
        Some((peer, attest)) => Word::Theirs(*peer, *attest),
        None if sent.is_empty() => Word::Ours,
        None => Word::Nobodys,
    }
}

/// Reads a piece of each importer from the origin, by lot, until one turns out to have lied. False:
/// nobody did, as far as that tells.
pub(super) async fn find_liar(
    job: &Job,
    swarm: &SwarmHandle,
    layout: Layout,
    (origin, whence): (&Origin, &Whence),
    vouched: &[(u32, Attest)],
) -> bool {
    let mut importers: BTreeMap<PeerId, Vec<(u32, Attest)>> = BTreeMap::new();
    for (piece, attest) in vouched.iter().filter(|(_, attest)| attest.importer != swarm.me()) {
        importers.entry(attest.importer).or_default().push((*piece, *attest));
    }
    for (importer, pieces) in importers {
        // By lot: one who knows which piece is looked at lies about the others.
        let Some((piece, attest)) = pieces.get(lot() % pieces.len().max(1)) else { continue };
        match value(job, origin, whence, layout.piece(u64::from(*piece))).await {
            Ok(value) if value == attest.cv => {}
            Ok(_) => {
                lied(job, swarm, importer, 1).await;
                return true;
            }
            Err(error) => {
                debug!(digest = %job.wanted.digest, error = %chain(&error), "cannot look who lied");
                return false;
            }
        }
    }
    false
}

/// Reads a piece from the origin, and tells on those who claim that it has another value: these.
pub(super) async fn find_wrong(
    job: &Job,
    swarm: &SwarmHandle,
    (origin, whence): (&Origin, &Whence),
    span: Span,
    claims: &[(PeerId, [u8; 32])],
) -> Vec<PeerId> {
    let value = match value(job, origin, whence, span).await {
        Ok(value) => value,
        Err(error) => {
            debug!(digest = %job.wanted.digest, error = %chain(&error), "cannot look who is wrong");
            return Vec::new();
        }
    };
    let wrong: Vec<PeerId> = claims.iter().filter(|(_, claimed)| *claimed != value).map(|(peer, _)| *peer).collect();
    for peer in &wrong {
        lied(job, swarm, *peer, 1).await;
    }
    wrong
}

/// The value that a piece has at the registry itself: what stands before it may be wrong, and is not blamed on
/// a member.
async fn value(job: &Job, origin: &Origin, whence: &Whence, span: Span) -> Result<[u8; 32], OriginError> {
    let Whence { repository, credential, .. } = whence;
    let mut stream = origin.of(Whom::Registry).blob(repository, &job.wanted.digest, Some(span), credential).await?;
    if stream.start != span.start {
        return Err(OriginError::Lied("it does not send the range that is asked for"));
    }
    let len = usize::try_from(span.len()).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let Some(chunk) = stream.next().await else {
            return Err(OriginError::Truncated { got: span.start + bytes.len() as u64, wanted: span.end });
        };
        let chunk = chunk?;
        bytes.extend_from_slice(&chunk[..chunk.len().min(len - bytes.len())]);
        job.account.activity().touch();
    }
    job.account.read_from_origin(span.len());
    let hashed = tokio::task::spawn_blocking(move || chaining_value(span.start, &bytes)).await;
    // It does not panic; the agent stops.
    hashed.map_err(|_| OriginError::Truncated { got: span.start, wanted: span.end })
}

/// Finds out who vouched for what the origin does not have, now that the blob is here from it.
pub(super) async fn blame(job: &Job, swarm: &SwarmHandle, vouched: &[(u32, Attest)]) {
    let mut liars = BTreeMap::new();
    for (piece, attest) in vouched {
        match job.store.piece(&job.wanted.digest, *piece).await {
            Some((_, value)) if value != attest.cv => *liars.entry(attest.importer).or_insert(0_u32) += 1,
            Some(_) => {}
            // Evicted again: nobody can be blamed.
            None => return,
        }
    }
    if liars.is_empty() {
        // What was written is not what was checked: this node's own memory or disk.
        warn!(digest = %job.wanted.digest, "a blob was wrong although each of its pieces was right");
    }
    for (importer, pieces) in liars {
        lied(job, swarm, importer, pieces).await;
    }
}

/// A node vouched for so many pieces that the origin does not have.
async fn lied(job: &Job, swarm: &SwarmHandle, importer: PeerId, pieces: u32) {
    job.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "lied" }).inc_by(u64::from(pieces));
    if importer == swarm.me() {
        info!(digest = %job.wanted.digest, pieces, "this node itself vouched for bytes that the origin does not send now");
    } else {
        warn!(digest = %job.wanted.digest, %importer, pieces, "a node vouched for bytes that the origin does not have");
        swarm.lied(importer).await;
    }
}

/// Any number.
pub(super) fn lot() -> usize {
    usize::try_from(RandomState::new().build_hasher().finish() >> 1).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    /// Peer `n` sends what importer `n + 10` attests with value `n`.
    fn sent(n: u8) -> (PeerId, Attest) {
        (peer(n), Attest { importer: peer(n + 10), cv: [n; 32], signature: [0; 64] })
    }

    #[test]
    fn of_several_that_sent_a_piece_the_one_counts_whose_bytes_it_has() {
        let (liar, honest) = (sent(1), sent(2));
        for order in [[liar, honest], [honest, liar]] {
            assert_eq!(word(&order, [2; 32]), Word::Theirs(honest.0, honest.1));
            assert_eq!(word(&order, [1; 32]), Word::Theirs(liar.0, liar.1));
        }
        assert_eq!(word(&[], [3; 32]), Word::Ours);
    }

    #[test]
    fn this_node_does_not_vouch_for_a_mixture() {
        // Its first bytes from the origin, the others of a liar: or of both of these.
        assert_eq!(word(&[sent(1)], [3; 32]), Word::Nobodys);
        assert_eq!(word(&[sent(1), sent(2)], [3; 32]), Word::Nobodys);
    }
}
