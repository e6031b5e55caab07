//! The pieces record beside each blob and ingest: which pieces are here, and what vouches for each.
//!
//! It verifies itself. A record is a claim that the bytes of a piece hash to a chaining value; after
//! a crash every claim is checked against the bytes. Hence neither the record nor the data is synced
//! piece by piece: whatever a power loss tears, the claim does not hold and the piece is fetched again.
//!
//! Format, little endian: `DARTPCS1`, size of the blob (u64), check of these 16 bytes (8 bytes of
//! BLAKE3); then 33 bytes a piece: a flag and the chaining value.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: &[u8; 8] = b"DARTPCS1";
const HEADER_BYTES: u64 = 24;
const ENTRY_BYTES: u64 = 33;

/// What the record says about one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is not here.
    Missing,
    /// It is here and has this chaining value.
    Here([u8; 32]),
    /// It should be here; its record was lost, and only the sha256 of the whole can tell.
    Unvouched,
}

/// An open record file.
#[derive(Debug)]
pub(super) struct Record {
    file: File,
    size: u64,
}

impl Record {
    /// A new record of a blob of `size` bytes that claims nothing, in place of what was there.
    pub(super) fn create(path: &Path, size: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&size.to_le_bytes());
        let check = blake3::hash(&header);
        header.extend_from_slice(&check.as_bytes()[..8]);
        file.write_all_at(&header, 0)?;
        Ok(Self { file, size })
    }

    /// The record that is there. `InvalidData` if its header is not whole.
    pub(super) fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(writable).open(path)?;
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        let (body, check) = header.split_at(16);
        let (magic, size) = body.split_at(8);
        let whole = magic == MAGIC && blake3::hash(body).as_bytes()[..8] == *check;
        match <[u8; 8]>::try_from(size) {
            Ok(size) if whole => Ok(Self { file, size: u64::from_le_bytes(size) }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Size of the blob in bytes.
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    /// The claim about piece `index`; what cannot be read is not claimed.
    pub(super) fn claim(&self, index: u64) -> Claim {
        let mut entry = [0; 33];
        match self.file.read_exact_at(&mut entry, Self::offset(index)) {
            Ok(()) if entry[0] == 1 => {
                let mut value = [0; 32];
                value.copy_from_slice(&entry[1..]);
                Claim::Here(value)
            }
            Ok(()) if entry[0] == 2 => Claim::Unvouched,
            _ => Claim::Missing,
        }
    }

    /// Writes the claim about piece `index`.
    pub(super) fn set(&self, index: u64, claim: Claim) -> io::Result<()> {
        let mut entry = [0; 33];
        match claim {
            Claim::Missing => (),
            Claim::Here(value) => {
                entry[0] = 1;
                entry[1..].copy_from_slice(&value);
            }
            Claim::Unvouched => entry[0] = 2,
        }
        self.file.write_all_at(&entry, Self::offset(index))
    }

    /// Flushes it to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    const fn offset(index: u64) -> u64 {
        HEADER_BYTES + index * ENTRY_BYTES
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_reads_back_what_was_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let record = Record::create(&path, 5 << 20).unwrap();
        record.set(3, Claim::Here([7; 32])).unwrap();
        record.set(1, Claim::Unvouched).unwrap();
        drop(record);
        let record = Record::open(&path, true).unwrap();
        let claims: Vec<_> = (0..5).map(|i| record.claim(i)).collect();
        assert_eq!(
            (record.size(), claims),
            (5 << 20, vec![Claim::Missing, Claim::Unvouched, Claim::Missing, Claim::Here([7; 32]), Claim::Missing])
        );
    }

    proptest! {
        #[test]
        fn garbage_is_no_record(bytes in prop::collection::vec(any::<u8>(), 0..80), flip in 0usize..24) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("r");
            std::fs::write(&path, &bytes).unwrap();
            prop_assert!(Record::open(&path, false).is_err());
            Record::create(&path, 9).unwrap();
            let mut torn = std::fs::read(&path).unwrap();
            torn[flip] ^= 1;
            std::fs::write(&path, &torn).unwrap();
            prop_assert!(Record::open(&path, false).is_err());
        }
    }
}
