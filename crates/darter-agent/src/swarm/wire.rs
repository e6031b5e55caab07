//! The swarm's messages on the wire, and what of it is believed.
//!
//! A peer holds the swarm key, and may still be of another version, or broken: whatever it sends is
//! checked against bounds before it becomes a type that the core trusts. The bounds also hold for
//! what is sent, so that no frame of ours is one that a peer refuses.
//! Not here: how frames follow each other on a stream (`frame`).

mod checks;
mod hello;
mod seen;
#[cfg(test)]
mod tests;
mod tokens;

use std::time::Duration;

use darter_api::v1;
use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::token::Malformed;
use darter_core::swarm::{Join, Lease, LeaseEnd, Message};

use self::checks::{
    bitfield, digest, duration, indices, peers, readings, segments, size, small, source, sources, unbitfield,
    unduration, unindices, unpeers, unsource,
};

pub use self::hello::{FEATURES, Hello, SEES, VALUES, decode_peers, encode_peers, feature_for};
pub use self::seen::{decode_question, decode_seen, encode_question, encode_seen};
pub use self::tokens::{decode_token, decode_wanted, encode_token, encode_wanted};

/// Pieces of one blob: 8 TiB in pieces of 8 MiB, twenty times the largest model.
pub const PIECES_MAX: u64 = 1 << 20;
/// Indices of pieces or segments in one list. A HAVE names 8; this is what a long silence collects.
pub const INDICES_MAX: usize = 1 << 16;
/// Peers in one list: a node has at most 48 neighbours.
pub const PEERS_MAX: usize = 1024;
/// The longest duration in a message: what a registry may ask for with Retry-After.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// Why a message is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not the protobuf that it should be.
    #[error("not a frame of this protocol")]
    Decode(#[from] prost::DecodeError),
    /// A frame or message without a kind that this version knows.
    #[error("{0} of a kind that is not known here")]
    Unknown(&'static str),
    /// A part that must be there is not.
    #[error("no {0}")]
    Absent(&'static str),
    /// A digest or a peer of the wrong length.
    #[error("{field} has {found} bytes instead of 32")]
    Length {
        /// Which part.
        field: &'static str,
        /// Its length.
        found: usize,
    },
    /// A number or a length past its bound.
    #[error("{field} is {found}, more than {max}")]
    TooMuch {
        /// Which part.
        field: &'static str,
        /// What it is.
        found: u64,
        /// What it may be.
        max: u64,
    },
    /// A bitfield whose bytes do not fit its number of pieces, or the blob's.
    #[error("a bitfield that does not fit: {0}")]
    Bitfield(&'static str),
    /// Another text where a name should be. It is not repeated: it would go into logs.
    #[error("{0} that is none")]
    Name(&'static str),
    /// Another text where a token should be.
    #[error("a token that is none")]
    Token(#[from] Malformed),
}

/// A message about a blob, for the wire. An error is a message past the bounds: it is not sent.
pub fn encode(blob: &Digest, message: &Message) -> Result<v1::BlobMessage, WireError> {
    use v1::blob_message::Body;
    let body = match message {
        Message::Join(join) => Body::Join(v1::Join {
            size_bytes: join.size,
            have: Some(unbitfield("join.have", &join.have)?),
            leased: segments(&join.leased)?,
            leased_from: sources(&join.leased),
            can_import: join.can_import,
            is_going: join.is_going,
            neighbours: unpeers("join.neighbours", &join.neighbours)?,
        }),
        Message::Welcome { neighbours, holders, interested } => Body::Welcome(v1::Welcome {
            neighbours: unpeers("welcome.neighbours", neighbours)?,
            holders: unpeers("welcome.holders", holders)?,
            interested: *interested,
        }),
        Message::Lease(lease) => Body::Lease(v1::Lease {
            segment: lease.segment,
            from: unsource(lease.from),
            is_whole: lease.is_whole,
            interested: lease.interested,
        }),
        Message::Released { piece, is_whole } => Body::Released(v1::Released { piece: *piece, is_coming: !is_whole }),
        Message::LeaseEnd { segment, from, end, upload_time } => {
            let (outcome, wait) = match end {
                LeaseEnd::Done => (v1::LeaseOutcome::Done, Duration::ZERO),
                LeaseEnd::Throttled(wait) => (v1::LeaseOutcome::Throttled, *wait),
                LeaseEnd::Forbidden => (v1::LeaseOutcome::Forbidden, Duration::ZERO),
                LeaseEnd::Broken => (v1::LeaseOutcome::Broken, Duration::ZERO),
            };
            Body::LeaseEnd(v1::LeaseEnd {
                segment: *segment,
                outcome: outcome.into(),
                wait_microseconds: unduration(wait),
                upload_microseconds: unduration(*upload_time),
                from: unsource(*from),
            })
        }
        Message::Missing { segments, without } => Body::Missing(v1::Missing {
            segments: unindices("missing.segments", segments)?,
            without: unpeers("missing.without", without)?,
        }),
        Message::Hello { have, wants_answer } => {
            Body::Greeting(v1::Greeting { have: Some(unbitfield("greeting.have", have)?), wants_answer: *wants_answer })
        }
        Message::Have { pieces, free_slots, interested } => Body::Have(v1::Have {
            pieces: unindices("have.pieces", pieces)?,
            free_slots: u32::from(*free_slots),
            interested: *interested,
        }),
        Message::Slot => Body::Slot(v1::Slot {}),
        Message::NoNeed => Body::NoNeed(v1::NoNeed {}),
        Message::Holds { size } => Body::Holds(v1::Holds { size_bytes: *size }),
        Message::Leave => Body::Leave(v1::Leave {}),
        Message::Take { size, is_for_elsewhere } => {
            Body::Take(v1::Take { size_bytes: *size, is_for_elsewhere: *is_for_elsewhere })
        }
        Message::TakeEnd { is_kept } => Body::TakeEnd(v1::TakeEnd { is_kept: *is_kept }),
        Message::RoomWanted => Body::RoomWanted(v1::RoomWanted {}),
        Message::Room { bytes } => Body::Room(v1::Room { bytes: *bytes }),
    };
    Ok(v1::BlobMessage { blob: blob.as_bytes().to_vec(), body: Some(body) })
}

/// A message about a blob, as a peer sent it.
pub fn decode(message: v1::BlobMessage) -> Result<(Digest, Message), WireError> {
    use v1::blob_message::Body;
    let blob = digest("blob", &message.blob)?;
    let message = match message.body.ok_or(WireError::Unknown("a message"))? {
        Body::Join(join) => Message::Join(decode_join(join)?),
        Body::Welcome(v1::Welcome { neighbours, holders, interested }) => Message::Welcome {
            neighbours: peers("welcome.neighbours", &neighbours)?,
            holders: peers("welcome.holders", &holders)?,
            interested,
        },
        Body::Lease(v1::Lease { segment, from, is_whole, interested }) => {
            let from = source("lease.from", &from)?;
            Message::Lease(Lease { segment, from, is_whole, interested })
        }
        Body::Released(v1::Released { piece, is_coming }) => Message::Released { piece, is_whole: !is_coming },
        Body::LeaseEnd(ended) => {
            let end = match v1::LeaseOutcome::try_from(ended.outcome) {
                Ok(v1::LeaseOutcome::Done) => LeaseEnd::Done,
                Ok(v1::LeaseOutcome::Throttled) => {
                    LeaseEnd::Throttled(duration("lease_end.wait_microseconds", ended.wait_microseconds)?)
                }
                Ok(v1::LeaseOutcome::Forbidden) => LeaseEnd::Forbidden,
                Ok(v1::LeaseOutcome::Broken) => LeaseEnd::Broken,
                Ok(v1::LeaseOutcome::Unspecified) | Err(_) => return Err(WireError::Unknown("the end of a lease")),
            };
            let upload_time = duration("lease_end.upload_microseconds", ended.upload_microseconds)?;
            let from = source("lease_end.from", &ended.from)?;
            Message::LeaseEnd { segment: ended.segment, from, end, upload_time }
        }
        Body::Missing(v1::Missing { segments, without }) => Message::Missing {
            segments: indices("missing.segments", segments)?,
            without: peers("missing.without", &without)?,
        },
        Body::Greeting(v1::Greeting { have, wants_answer }) => {
            Message::Hello { have: bitfield("greeting.have", have)?, wants_answer }
        }
        Body::Have(v1::Have { pieces, free_slots, interested }) => Message::Have {
            pieces: indices("have.pieces", pieces)?,
            free_slots: small("have.free_slots", free_slots)?,
            interested,
        },
        Body::Slot(v1::Slot {}) => Message::Slot,
        Body::NoNeed(v1::NoNeed {}) => Message::NoNeed,
        Body::Holds(v1::Holds { size_bytes }) => Message::Holds { size: size("holds.size_bytes", size_bytes)? },
        Body::Leave(v1::Leave {}) => Message::Leave,
        Body::Take(v1::Take { size_bytes, is_for_elsewhere }) => {
            Message::Take { size: size("take.size_bytes", size_bytes)?, is_for_elsewhere }
        }
        Body::TakeEnd(v1::TakeEnd { is_kept }) => Message::TakeEnd { is_kept },
        Body::RoomWanted(v1::RoomWanted {}) => Message::RoomWanted,
        Body::Room(v1::Room { bytes }) => Message::Room { bytes },
    };
    Ok((blob, message))
}

fn decode_join(join: v1::Join) -> Result<Join, WireError> {
    let have = bitfield("join.have", join.have)?;
    if have.len() != Layout::new(join.size_bytes).pieces() {
        return Err(WireError::Bitfield("join.have is of a blob of another size"));
    }
    Ok(Join {
        size: join.size_bytes,
        have,
        leased: readings(&join.leased, &join.leased_from)?,
        can_import: join.can_import,
        is_going: join.is_going,
        neighbours: peers("join.neighbours", &join.neighbours)?,
    })
}
