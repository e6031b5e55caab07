//! The path of a piece on the data plane: `/p/<sha256 of the blob, hex>/<index of the piece>`.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// One piece of one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Which blob.
    pub blob: Digest,
    /// Index of the piece.
    pub piece: u32,
}

/// A path that names no piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the path of a piece: expected /p/<64 hex digits>/<index>")]
pub struct Malformed;

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/p/{}/{}", self.blob.hex(), self.piece)
    }
}

impl FromStr for Target {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (blob, piece) = text.strip_prefix("/p/").and_then(|rest| rest.split_once('/')).ok_or(Malformed)?;
        let target =
            Self { blob: Digest::from_hex(blob).map_err(|_| Malformed)?, piece: piece.parse().map_err(|_| Malformed)? };
        // `+5` and `05` are numbers to Rust: one piece has one path.
        if target.piece.to_string() == piece { Ok(target) } else { Err(Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_piece_has_one_path() {
        let blob = Digest::of(b"a");
        let hex = blob.hex();
        assert_eq!(format!("/p/{hex}/7").parse(), Ok(Target { blob, piece: 7 }));
        for wrong in [
            "/".to_owned(),
            "/p/".to_owned(),
            format!("/p/{hex}"),
            format!("/p/{hex}/"),
            format!("/p/{hex}/07"),
            format!("/p/{hex}/+7"),
            format!("/p/{hex}/7/"),
            format!("/p/{hex}/7?x"),
            format!("/p/{hex}/4294967296"),
            format!("/p/{}/7", hex.to_uppercase()),
            format!("p/{hex}/7"),
            format!("/p/sha256:{hex}/7"),
        ] {
            assert_eq!(wrong.parse::<Target>(), Err(Malformed), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn text_and_piece_say_the_same(blob: [u8; 32], piece: u32) {
            let target = Target { blob: Digest::from_bytes(blob), piece };
            prop_assert_eq!(target.to_string().parse(), Ok(target));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Target>();
        }
    }
}
