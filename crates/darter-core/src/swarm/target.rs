//! Paths on the data plane: `/p/<sha256 of the blob, hex>/<index of the piece>` for a piece, and
//! `/v/<sha256 of the blob, hex>` for the BLAKE3 chaining values of all pieces of a blob, 32 bytes each.

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

/// What one request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// A piece.
    Piece(Target),
    /// The values of all pieces of a blob.
    Values(Digest),
}

/// A path that names nothing that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a path of the blob exchange: expected /p/<64 hex digits>/<index> or /v/<64 hex digits>")]
pub struct Malformed;

impl Path {
    /// The blob that it is about.
    pub const fn blob(&self) -> &Digest {
        match self {
            Self::Piece(target) => &target.blob,
            Self::Values(blob) => blob,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Piece(target) => target.fmt(f),
            Self::Values(blob) => write!(f, "/v/{}", blob.hex()),
        }
    }
}

impl FromStr for Path {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        match text.strip_prefix("/v/") {
            Some(blob) => Digest::from_hex(blob).map(Self::Values).map_err(|_| Malformed),
            None => text.parse().map(Self::Piece),
        }
    }
}

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

    #[test]
    fn the_values_of_a_blob_have_one_path() {
        let blob = Digest::of(b"a");
        let hex = blob.hex();
        assert_eq!(format!("/v/{hex}").parse(), Ok(Path::Values(blob)));
        for wrong in [format!("/v/{hex}/"), format!("/v/{hex}/7"), format!("/v/{}", hex.to_uppercase()), "/v/".into()] {
            assert_eq!(wrong.parse::<Path>(), Err(Malformed), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn text_and_path_say_the_same(blob: [u8; 32], piece: u32) {
            let blob = Digest::from_bytes(blob);
            let target = Target { blob, piece };
            prop_assert_eq!(target.to_string().parse(), Ok(target));
            for path in [Path::Piece(target), Path::Values(blob)] {
                prop_assert_eq!(path.to_string().parse(), Ok(path));
                prop_assert_eq!(path.blob(), &blob);
            }
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Path>();
        }
    }
}
