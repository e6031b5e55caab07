//! What other parts of the agent want said of this node, for whoever looks at it in Kubernetes.

use std::time::Duration;

use tokio::sync::mpsc;

use super::events::Said;

/// Notes that were not taken yet. Each is rare; when more come at once the first ones say enough.
const WAITING_MAX: usize = 16;

/// Something that an operator should know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A member of the swarm did again and again what no node does.
    PeerBanned {
        /// Who, by its identity in the swarm.
        peer: String,
        /// For how long it is left alone.
        period: Duration,
    },
    /// The store takes no blobs any more.
    StoreStopped {
        /// Why.
        reason: String,
    },
    /// It takes blobs again.
    StoreWorks,
}

/// Takes notes and never waits. Where nobody writes Events they come to nothing.
#[derive(Debug, Clone)]
pub struct Notes(mpsc::Sender<Note>);

impl Notes {
    /// For the parts, and for who writes it down.
    pub(super) fn new() -> (Self, mpsc::Receiver<Note>) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        (Self(sender), receiver)
    }

    /// Says it, if anybody listens and has not enough to write.
    pub fn say(&self, note: Note) {
        // The log has it in any case: whoever notes something logs it too.
        let _ = self.0.try_send(note);
    }
}

impl From<Note> for Said {
    fn from(note: Note) -> Self {
        let (is_warning, reason, action, note) = match note {
            Note::PeerBanned { peer, period } => {
                let text = format!(
                    "the member {peer} of the swarm gave wrong bytes or broke its word three times: it is left alone \
                     for {} min. its node is the one whose log has this peer as its own; look at its disk and memory",
                    period.as_secs() / 60
                );
                (true, "SwarmPeerBanned", "Ban", text)
            }
            Note::StoreStopped { reason } => {
                let text = format!("the image store takes no blobs, and pulls go past it: {reason}");
                (true, "ImageStoreStopped", "PassThrough", text)
            }
            Note::StoreWorks => (false, "ImageStoreWorks", "Store", "the image store takes blobs again".to_owned()),
        };
        Self { is_warning, reason, action, note }
    }
}
