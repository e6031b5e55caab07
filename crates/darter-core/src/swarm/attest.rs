//! An importer's word for one piece: who read it from the origin, and the BLAKE3 value it had there.
//!
//! A sha256 names the whole blob and can be checked at its last byte only; this lets every piece be
//! checked as it arrives, and says who is to blame when the whole turns out wrong. It travels with
//! the piece as one header. Not here: making and checking the signature, which needs keys
//! (`darter_agent::swarm::exchange`).

use std::fmt;
use std::str::FromStr;

use super::PeerId;
use crate::pieces::Layout;
use crate::{Digest, hex};

/// Name of the header that carries it.
pub const HEADER: &str = "darter-attest";

/// What a signature under this text is for: the same key signs libp2p handshakes and other things.
const DOMAIN: &[u8] = b"darter piece attest v1\0";

/// One piece as its importer saw it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Attest {
    /// Who read the piece from the origin.
    pub importer: PeerId,
    /// The piece's BLAKE3 chaining value (`pieces::chaining_value`).
    pub cv: [u8; 32],
    /// The importer's ed25519 signature of `message`.
    pub signature: [u8; 64],
}

/// A text that is not an attest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an attest: expected <importer> <chaining value> <signature> in hex")]
pub struct Malformed;

/// What an importer signs: this piece of this blob, cut this way, had this value.
///
/// Every part has a fixed length, so no two pieces share a message.
pub fn message(blob: &Digest, layout: &Layout, piece: u32, cv: &[u8; 32]) -> Vec<u8> {
    let len = layout.piece(u64::from(piece)).len();
    let numbers = [layout.size().to_be_bytes(), u64::from(piece).to_be_bytes(), len.to_be_bytes()];
    [DOMAIN, blob.as_bytes(), numbers.as_flattened(), cv].concat()
}

impl fmt::Display for Attest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let importer = hex::encode(&self.importer.to_bytes());
        write!(f, "{importer} {} {}", hex::encode(&self.cv), hex::encode(&self.signature))
    }
}

impl fmt::Debug for Attest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attest({}: {})", self.importer, hex::encode(&self.cv))
    }
}

impl FromStr for Attest {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or(Malformed);
        let attest = Self {
            importer: hex::decode(word()?).map(PeerId::from_bytes).ok_or(Malformed)?,
            cv: hex::decode(word()?).ok_or(Malformed)?,
            signature: hex::decode(word()?).ok_or(Malformed)?,
        };
        if words.next().is_some() { Err(Malformed) } else { Ok(attest) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_and_attest_say_the_same(importer: [u8; 32], cv: [u8; 32], signature: [[u8; 32]; 2]) {
            let mut attest = Attest { importer: PeerId::from_bytes(importer), cv, signature: [0; 64] };
            attest.signature.copy_from_slice(signature.as_flattened());
            prop_assert_eq!(attest.to_string().parse(), Ok(attest));
            prop_assert_eq!(format!("{attest} ").parse::<Attest>(), Err(Malformed));
            prop_assert_eq!(format!(" {attest}").parse::<Attest>(), Err(Malformed));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Attest>();
        }

        /// One byte changed: another attest or none.
        #[test]
        fn a_changed_text_is_not_the_same_attest(at in 0usize..258, byte: u8) {
            let attest = Attest { importer: PeerId::from_bytes([0xab; 32]), cv: [1; 32], signature: [2; 64] };
            let mut text = attest.to_string().into_bytes();
            prop_assume!(text[at] != byte);
            text[at] = byte;
            let parsed = std::str::from_utf8(&text).ok().and_then(|text| text.parse::<Attest>().ok());
            prop_assert_ne!(parsed, Some(attest));
        }
    }

    #[test]
    fn every_part_of_a_piece_is_in_its_message() {
        const MIB: u64 = 1 << 20;
        let (blob, other) = (Digest::of(b"a"), Digest::of(b"b"));
        let layout = Layout::new(3 * MIB);
        let messages = [
            message(&blob, &layout, 0, &[0; 32]),
            message(&other, &layout, 0, &[0; 32]),
            message(&blob, &layout, 1, &[0; 32]),
            message(&blob, &layout, 0, &[1; 32]),
            message(&blob, &Layout::new(3 * MIB + 1), 0, &[0; 32]),
        ];
        assert!(messages.iter().all(|message| message.len() == messages[0].len() && message.starts_with(DOMAIN)));
        assert_eq!(messages.iter().collect::<BTreeSet<_>>().len(), messages.len());
    }
}
