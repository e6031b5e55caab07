//! What goes in and out of the state machine, and what agents say to each other.
//!
//! Not here: how a message looks on the wire, and the bytes of pieces, which never pass through.

use std::time::Duration;

use super::peer::{Members, PeerId};
use crate::Digest;
use crate::pieces::{Bitfield, Layout};

/// Something happened at this node.
#[derive(Debug, Clone)]
pub enum Event {
    /// The view of who is alive changed.
    Members(Members),
    /// The connection to a peer is gone.
    PeerLost(PeerId),
    /// A peer said something.
    Message {
        /// Who.
        from: PeerId,
        /// About which blob.
        blob: Digest,
        /// What.
        message: Message,
    },
    /// Somebody on this node wants a blob.
    Want {
        /// Which.
        blob: Digest,
        /// Its size decides how it is cut.
        layout: Layout,
        /// Pieces that an interrupted ingest left here, verified again.
        have: Bitfield,
        /// Whether this node has a credential that opens it at the origin.
        can_import: bool,
        /// Blobs of a lower turn come first: containerd unpacks layers in the order of their image.
        turn: u64,
    },
    /// Nobody on this node wants it any more, or it cannot be stored.
    Unwant(Digest),
    /// The blob is here whole, and its sha256 is right.
    Proven {
        /// Which.
        blob: Digest,
        /// How it is cut.
        layout: Layout,
    },
    /// The blob was evicted or found rotten.
    Gone(Digest),
    /// A piece that `Action::Fetch` asked for arrived, and its hash is the attested one.
    Fetched {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
        /// Who sent it.
        peer: PeerId,
    },
    /// A piece that `Action::Fetch` asked for did not come.
    FetchFailed {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
        /// Who was asked.
        peer: PeerId,
        /// Why.
        reason: FetchFailure,
    },
    /// A piece that `Action::Import` asked for arrived from the origin, and its hash is computed.
    Imported {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
    },
    /// One that `Action::Compare` named does not say what its pieces are.
    NotCompared {
        /// Which blob.
        blob: Digest,
        /// Who.
        peer: PeerId,
    },
    /// Bytes of a piece that `Action::Import` asked for have come since this was said last, a second ago or
    /// more, and it is not whole.
    Importing {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
    },
    /// An import ended before its last piece.
    ImportFailed {
        /// Which blob.
        blob: Digest,
        /// Index of the segment.
        segment: u32,
        /// Why.
        reason: ImportFailure,
    },
    /// The agent is to stop: what is here and nowhere else goes to others, in this order.
    Leave(Vec<Digest>),
    /// It does not stop after all.
    Stay,
    /// It stops now: uploads that run may end, and none begins.
    Withdraw,
    /// What `Action::Take` or `Action::Keep` asked for does not come: there is no room for it, or nobody gave it.
    NotTaken(Digest),
    /// A blob turned out wrong, and this peer is the one that vouched for the wrong bytes.
    Lied(PeerId),
    /// A peer asks for a piece on the data plane.
    Asked {
        /// Who.
        from: PeerId,
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
        /// Names the request in the answer.
        request: RequestId,
    },
    /// An upload that `Action::Serve` allowed ended, well or badly.
    Served(RequestId),
    /// The deadline passed.
    Tick,
}

/// What the agent is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell a peer something.
    Send {
        /// Whom.
        to: PeerId,
        /// About which blob.
        blob: Digest,
        /// What.
        message: Message,
    },
    /// Ask a peer for a piece.
    Fetch {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
        /// Whom to ask.
        peer: PeerId,
    },
    /// Ask both what each piece of the blob is, and take none that is otherwise where they agree.
    Compare {
        /// Which blob.
        blob: Digest,
        /// Two that have all of it.
        holders: [PeerId; 2],
    },
    /// The piece came from somebody else: close the request.
    CancelFetch {
        /// Which blob.
        blob: Digest,
        /// Index of the piece.
        piece: u32,
        /// Who was asked.
        peer: PeerId,
    },
    /// Read these pieces from the origin: `first..end`, inside one segment.
    Import {
        /// Which blob.
        blob: Digest,
        /// Index of the segment.
        segment: u32,
        /// Index of the first piece.
        first: u32,
        /// Index after the last piece.
        end: u32,
    },
    /// Want a blob that nobody on this node asked for, as far as there is room that nothing needs: who
    /// has it goes. Never from the origin.
    Take {
        /// Which.
        blob: Digest,
        /// Its size in bytes.
        size: u64,
    },
    /// Want a blob that others pulled, in the background, and make room for it as for any other: this
    /// node is a seed. Never from the origin. `Event::NotTaken` where it does not come.
    Keep {
        /// Which.
        blob: Digest,
        /// Its size in bytes.
        size: u64,
    },
    /// Say how much room the store has: with `Message::Room`, about this blob.
    TellRoom {
        /// To whom.
        to: PeerId,
        /// What that one asked about; room is the same for all.
        blob: Digest,
    },
    /// Somebody else pulled a blob that is here: this node, a seed, parts with others before it.
    Used(Digest),
    /// Nothing of a blob comes, and somebody is at it: it is worth waiting for.
    Wait(Digest),
    /// Whatever of this node's others could take, they have: it may go.
    Left,
    /// Answer a piece request with the piece.
    Serve(RequestId),
    /// Answer a piece request with a refusal.
    Refuse {
        /// Which.
        request: RequestId,
        /// Why.
        reason: Refusal,
    },
    /// What a peer did is none of what a node does. It was not taken in; this is for the metrics.
    Reject {
        /// Who.
        peer: PeerId,
        /// What it did.
        reason: Rejection,
    },
    /// Close the connection to a peer and accept none from it for a while.
    Ban {
        /// Whom.
        peer: PeerId,
        /// For how long.
        period: Duration,
    },
}

/// Names one piece request at the node that answers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Why a piece request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// All slots are taken: ask again after this.
    Busy(Duration),
    /// The piece is not here.
    NotHere,
}

/// What a peer did that none should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// It spoke of more blobs than one node has.
    Flood,
    /// It announced pieces of a blob and gave none of them.
    Boast,
}

/// Why a piece did not come from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchFailure {
    /// It said so.
    Refused(Refusal),
    /// It could not be reached, or broke off.
    Broken,
    /// Nothing came for as long as one waits: it is dead, or as good as dead.
    Stalled,
    /// Whoever vouches for what it has counts for nothing here. That is no fault of its own.
    Unvouched,
    /// What it sent does not match the attested hash.
    Corrupt,
}

/// Why an import ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportFailure {
    /// 429 or 503: the origin wants fewer requests for this long.
    Throttled(Duration),
    /// The origin refuses this node: no more leases for it.
    Forbidden,
    /// Anything else.
    Broken,
}

/// What agents tell each other about one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// To the coordinator: I want this blob. Also sent again for more neighbours, and to a backup.
    Join(Join),
    /// The coordinator's answer.
    Welcome {
        /// Peers to exchange pieces with.
        neighbours: Vec<PeerId>,
        /// Some that have all of it, whose words about its pieces can be compared.
        holders: Vec<PeerId>,
        /// How many want the blob: decides the window.
        interested: u32,
    },
    /// The coordinator gives a segment to its owner.
    Lease(Lease),
    /// An owner tells its coordinator what it read from the scarce source.
    Released {
        /// Index of the piece.
        piece: u32,
        /// Whether it has all of it. Else bytes of it come, slowly: the lease is not to be given to another.
        is_whole: bool,
    },
    /// An owner gives a segment back, whole or not.
    LeaseEnd {
        /// Index of the segment.
        segment: u32,
        /// Where it was to be read: a peer, or the origin.
        from: Option<PeerId>,
        /// How it ended.
        end: LeaseEnd,
        /// How long the owner's uploads of a piece take; zero: nobody asked for one yet.
        upload_time: Duration,
    },
    /// To the coordinator: for long nobody around me had what I miss.
    Missing {
        /// Indices of segments.
        segments: Vec<u32>,
        /// Peers that the sender takes nothing from: they sent it wrong bytes.
        without: Vec<PeerId>,
    },
    /// First word between neighbours, and its answer.
    Hello {
        /// What the sender has.
        have: Bitfield,
        /// Whether an answer is expected.
        wants_answer: bool,
    },
    /// To neighbours: these pieces are here now. From the coordinator: none is, and one comes slowly.
    Have {
        /// Indices of pieces.
        pieces: Vec<u32>,
        /// Uploads that could start now.
        free_slots: u8,
        /// The largest number of interested nodes that the sender heard of.
        interested: u32,
    },
    /// To a neighbour that was refused: a slot is kept for you for a moment.
    Slot,
    /// The answer, where nothing is needed any more: give it to another.
    NoNeed,
    /// To coordinator and backup, also when they become that: this blob is here whole and proven.
    Holds {
        /// Its size in bytes.
        size: u64,
    },
    /// To neighbours and coordinator: I have nothing of this blob to give any more.
    Leave,
    /// To the coordinator: I have this blob, and go. Unless others have it, take it.
    Take {
        /// Its size in bytes.
        size: u64,
        /// Not in the sender's own zone: what happens to a zone happens to both.
        is_for_elsewhere: bool,
    },
    /// How much room is there for more?
    RoomWanted,
    /// The answer.
    Room {
        /// Bytes that fit without anything leaving for them.
        bytes: u64,
    },
    /// The answer to `Take`, once it is known.
    TakeEnd {
        /// Whether somebody else has the blob whole.
        is_kept: bool,
    },
}

/// A wish for a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// Size of the blob in bytes.
    pub size: u64,
    /// What is here already.
    pub have: Bitfield,
    /// What the sender reads from a scarce source now: a new coordinator must not give it to others.
    pub leased: Vec<Reading>,
    /// Whether the sender may read from the origin.
    pub can_import: bool,
    /// The sender is about to go: it reads from the origin only what nobody else can.
    pub is_going: bool,
    /// Neighbours that it has, so that it gets others.
    pub neighbours: Vec<PeerId>,
}

#[cfg(test)]
impl Join {
    /// Of a node that may read from the origin, and does not yet.
    pub(crate) const fn of(size: u64, have: Bitfield) -> Self {
        Self { size, have, leased: Vec::new(), can_import: true, is_going: false, neighbours: Vec::new() }
    }
}

/// A segment that a node reads, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Index of the segment.
    pub segment: u32,
    /// A peer; none: the origin.
    pub from: Option<PeerId>,
}

/// The right and the duty to read a segment from where it is scarce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Index of the segment.
    pub segment: u32,
    /// Where to read it: a peer, or the origin.
    pub from: Option<PeerId>,
    /// Whether that peer has the whole blob: nobody need ask it what it has.
    pub is_whole: bool,
    /// How many want the blob.
    pub interested: u32,
}

/// How a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Every piece of the segment is at its owner.
    Done,
    /// The origin throttles: wait this long.
    Throttled(Duration),
    /// The owner may not read the origin.
    Forbidden,
    /// The source broke.
    Broken,
}
