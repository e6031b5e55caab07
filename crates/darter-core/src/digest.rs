//! The name of a blob.
//!
//! Not here: hashing a stream as it arrives (`darter_agent::store`), which keeps its own state.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::hex;

/// The sha256 digest that names a blob: `sha256:<64 hex digits>` on the wire.
///
/// OCI allows other algorithms, and no registry we mirror uses one. Parsing such a digest fails,
/// the mirror answers 404, and containerd asks the registry itself: slower, never wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a text is not a digest that darter serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Well formed, but of an algorithm that darter does not keep.
    #[error("digest algorithm is not sha256")]
    Algorithm,
    /// Not a digest at all.
    #[error("not a digest: expected sha256:<64 lower-case hex digits>")]
    Malformed,
}

impl Digest {
    /// The digest whose 32 bytes are given.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `content`, computed here and now: for manifests and other small things.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hex digits, which are also the file name of the blob in every store.
    pub fn hex(&self) -> String {
        hex::encode(&self.0)
    }

    /// The digest whose hex digits are given, without the `sha256:` before them.
    pub fn from_hex(digits: &str) -> Result<Self, DigestError> {
        // The OCI image spec allows lower case only; two spellings would be two file names.
        hex::decode(digits).map(Self).ok_or(DigestError::Malformed)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text.split_once(':') {
            Some(("sha256", hex)) => Self::from_hex(hex),
            Some((algorithm, encoded)) if is_algorithm(algorithm) && is_encoded(encoded) => Err(DigestError::Algorithm),
            _ => Err(DigestError::Malformed),
        }
    }
}

/// OCI image spec: `algorithm-component [+._-] algorithm-component …`, of `[a-z0-9]+`.
fn is_algorithm(text: &str) -> bool {
    text.split(['+', '.', '_', '-'])
        .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()))
}

fn is_encoded(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"=_-".contains(&b))
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_digest_of_nothing_is_the_published_one() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn another_algorithm_is_told_from_garbage() {
        assert_eq!("sha512:abcdef".parse::<Digest>(), Err(DigestError::Algorithm));
        for garbage in ["", "sha256", "sha256:", "sha256:zz", ":ab", "SHA256:00", "sha256:../../etc/passwd"] {
            assert_eq!(garbage.parse::<Digest>(), Err(DigestError::Malformed), "{garbage}");
        }
        let upper = Digest::of(b"").to_string().to_uppercase().replace("SHA", "sha");
        assert_eq!(upper.parse::<Digest>(), Err(DigestError::Malformed));
    }

    proptest! {
        #[test]
        fn text_and_bytes_are_the_same_digest(bytes: [u8; 32]) {
            let digest = Digest::from_bytes(bytes);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Digest>();
        }
    }
}
