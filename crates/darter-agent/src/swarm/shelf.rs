//! What other nodes get from this one: a piece of a blob on its way, or of one that is here.

use std::time::Duration;

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::{PeerId, Refusal, Zone};
use tokio::sync::{mpsc, oneshot};

use super::control::ControlHandle;
use super::exchange::{Decision, Identity, Peers, Source, Upload, ZoneRelation};
use super::handle::{Input, Reply};
use crate::store::Store;

/// What a peer waits that asks while this node has no time for it.
const LATER: Duration = Duration::from_millis(20);

/// The others, as the exchange asks about them.
pub(super) struct Others {
    pub(super) control: ControlHandle,
    pub(super) zone: Zone,
}

impl Peers for Others {
    fn member(&self, peer: PeerId) -> Option<ZoneRelation> {
        let (_, zone) = self.control.member(peer)?;
        Some(match (zone, self.zone) {
            (Zone(0), _) | (_, Zone(0)) => ZoneRelation::Unknown,
            (theirs, ours) if theirs == ours => ZoneRelation::Same,
            _ => ZoneRelation::Other,
        })
    }

    fn may_attest(&self, importer: PeerId) -> bool {
        self.control.me() == importer || self.control.is_trusted(importer)
    }
}

/// The pieces of this node.
pub(super) struct Shelf {
    pub(super) others: Others,
    pub(super) store: Store,
    pub(super) identity: Identity,
    pub(super) inbox: mpsc::Sender<Input>,
}

impl Peers for Shelf {
    fn member(&self, peer: PeerId) -> Option<ZoneRelation> {
        self.others.member(peer)
    }

    fn may_attest(&self, importer: PeerId) -> bool {
        self.others.may_attest(importer)
    }
}

impl Source for Shelf {
    async fn ask(&self, peer: PeerId, blob: Digest, piece: u32) -> Decision {
        let (reply, answer) = oneshot::channel();
        let asked = Input::Asked { from: peer, blob, piece, reply };
        let answer = match self.inbox.send(asked).await {
            Ok(()) => answer.await.ok(),
            Err(_) => None,
        };
        let (slot, coming) = match answer {
            Some(Reply::Serve(slot, coming)) => (slot, coming),
            Some(Reply::Refuse(Refusal::Busy(wait))) => return Decision::Busy(wait),
            Some(Reply::Refuse(Refusal::NotHere)) => return Decision::NotHere,
            // The agent stops.
            None => return Decision::Busy(LATER),
        };
        let (file, layout, attest) = match coming {
            Some(coming) => match coming.piece(piece) {
                Some((file, attest)) => (file, coming.layout(), attest),
                None => return Decision::NotHere,
            },
            // Its sha256 matched, in the store or in containerd's: this node itself vouches for it.
            None => match self.store.piece(&blob, piece).await {
                Some((stored, value)) => {
                    let layout = Layout::new(stored.size());
                    let attest = self.identity.attest(&blob, &layout, piece, value);
                    (stored.file().clone(), layout, attest)
                }
                None => return Decision::NotHere,
            },
        };
        let span = layout.piece(u64::from(piece));
        Decision::Serve(Upload { file, span, attest: Some(attest), slot: Box::new(slot) })
    }

    async fn values(&self, blob: Digest) -> Option<Vec<[u8; 32]>> {
        self.store.values(&blob).await
    }
}
