//! The parts of messages, each against its bound, in both directions.

use std::time::Duration;

use darter_api::v1;
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::{PeerId, Reading};

use super::{DURATION_MAX, INDICES_MAX, PEERS_MAX, PIECES_MAX, WireError};

pub(super) fn bounded(field: &'static str, found: usize, max: usize) -> Result<(), WireError> {
    let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    if found <= max { Ok(()) } else { Err(WireError::TooMuch { field, found: wide(found), max: wide(max) }) }
}

fn key(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| WireError::Length { field, found: bytes.len() })
}

pub(super) fn digest(field: &'static str, bytes: &[u8]) -> Result<Digest, WireError> {
    key(field, bytes).map(Digest::from_bytes)
}

pub(super) fn peer(field: &'static str, bytes: &[u8]) -> Result<PeerId, WireError> {
    key(field, bytes).map(PeerId::from_bytes)
}

/// A peer, or the origin.
pub(super) fn source(field: &'static str, bytes: &[u8]) -> Result<Option<PeerId>, WireError> {
    if bytes.is_empty() { Ok(None) } else { peer(field, bytes).map(Some) }
}

pub(super) fn unsource(source: Option<PeerId>) -> Vec<u8> {
    source.map(|peer| peer.to_bytes().to_vec()).unwrap_or_default()
}

pub(super) fn peers(field: &'static str, list: &[Vec<u8>]) -> Result<Vec<PeerId>, WireError> {
    bounded(field, list.len(), PEERS_MAX)?;
    list.iter().map(|bytes| peer(field, bytes)).collect()
}

pub(super) fn unpeers(field: &'static str, list: &[PeerId]) -> Result<Vec<Vec<u8>>, WireError> {
    bounded(field, list.len(), PEERS_MAX)?;
    Ok(list.iter().map(|peer| peer.to_bytes().to_vec()).collect())
}

pub(super) fn segments(readings: &[Reading]) -> Result<Vec<u32>, WireError> {
    bounded("join.leased", readings.len(), PEERS_MAX)?;
    Ok(readings.iter().map(|reading| reading.segment).collect())
}

/// Where each is read; nothing where all are read from the origin.
pub(super) fn sources(readings: &[Reading]) -> Vec<Vec<u8>> {
    let has_some = readings.iter().any(|reading| reading.from.is_some());
    readings.iter().filter(|_| has_some).map(|reading| unsource(reading.from)).collect()
}

pub(super) fn readings(segments: &[u32], from: &[Vec<u8>]) -> Result<Vec<Reading>, WireError> {
    bounded("join.leased", segments.len(), PEERS_MAX)?;
    if !from.is_empty() && from.len() != segments.len() {
        return Err(WireError::Absent("join.leased_from of a part of the segments"));
    }
    let from = from.iter().map(Vec::as_slice).chain(std::iter::repeat(&[][..]));
    let reading =
        |(segment, from): (&u32, &[u8])| Ok(Reading { segment: *segment, from: source("join.leased_from", from)? });
    segments.iter().zip(from).map(reading).collect()
}

pub(super) fn indices(field: &'static str, list: Vec<u32>) -> Result<Vec<u32>, WireError> {
    bounded(field, list.len(), INDICES_MAX)?;
    Ok(list)
}

pub(super) fn unindices(field: &'static str, list: &[u32]) -> Result<Vec<u32>, WireError> {
    bounded(field, list.len(), INDICES_MAX)?;
    Ok(list.to_vec())
}

/// The size of a blob that is not cut into too many pieces.
pub(super) fn size(field: &'static str, size: u64) -> Result<u64, WireError> {
    let pieces = Layout::new(size).pieces();
    if pieces > PIECES_MAX {
        return Err(WireError::TooMuch { field, found: pieces, max: PIECES_MAX });
    }
    Ok(size)
}

pub(super) fn small(field: &'static str, number: u32) -> Result<u8, WireError> {
    let too_much = |_| WireError::TooMuch { field, found: number.into(), max: u8::MAX.into() };
    u8::try_from(number).map_err(too_much)
}

pub(super) fn duration(field: &'static str, microseconds: u64) -> Result<Duration, WireError> {
    let max = unduration(DURATION_MAX);
    if microseconds > max {
        return Err(WireError::TooMuch { field, found: microseconds, max });
    }
    Ok(Duration::from_micros(microseconds))
}

/// Cut to the bound: a wait of a day is as good as a longer one.
pub(super) fn unduration(duration: Duration) -> u64 {
    u64::try_from(duration.min(DURATION_MAX).as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn bitfield(field: &'static str, sent: Option<v1::Bitfield>) -> Result<Bitfield, WireError> {
    let v1::Bitfield { pieces, bits } = sent.ok_or(WireError::Absent(field))?;
    // Before anything of that size is allocated.
    if pieces > PIECES_MAX {
        return Err(WireError::TooMuch { field, found: pieces, max: PIECES_MAX });
    }
    if u64::try_from(bits.len()) != Ok(pieces.div_ceil(8)) {
        return Err(WireError::Bitfield("its length is not that of its pieces"));
    }
    let mut made = Bitfield::new(pieces);
    for (byte, at) in bits.into_iter().zip(0_u64..) {
        for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
            if at * 8 + bit >= pieces {
                return Err(WireError::Bitfield("a bit past its end"));
            }
            made.set(at * 8 + bit);
        }
    }
    Ok(made)
}

pub(super) fn unbitfield(field: &'static str, have: &Bitfield) -> Result<v1::Bitfield, WireError> {
    let pieces = have.len();
    if pieces > PIECES_MAX {
        return Err(WireError::TooMuch { field, found: pieces, max: PIECES_MAX });
    }
    let mut bits: Vec<u8> = have.words().iter().flat_map(|word| word.to_le_bytes()).collect();
    bits.truncate(usize::try_from(pieces.div_ceil(8)).unwrap_or(usize::MAX));
    Ok(v1::Bitfield { pieces, bits })
}
