//! The swarm key: who does not have it learns nothing, not even that this is a darter agent.
//!
//! In libp2p's own format (`/key/swarm/psk/1.0.0/`), so that tools for it work here too.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libp2p::pnet::{KeyParseError, PreSharedKey};
use tracing::warn;

use super::identity::random;

/// Why there is no swarm key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the swarm key {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no key.
    #[error("{} is not a swarm key; `darter swarm key` makes one", .path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyParseError,
    },
}

/// The key in `path`.
pub fn load(path: &Path) -> Result<PreSharedKey, KeyError> {
    let read = |source| KeyError::Read { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(read)?;
    // A secret that Kubernetes mounts may well be readable by its group; by everybody is a mistake.
    if std::fs::metadata(path).map_err(read)?.mode() & 0o007 != 0 {
        warn!(file = %path.display(), "everybody on this node can read the swarm key: chmod 600");
    }
    parse(&text).map_err(|source| KeyError::Content { path: path.to_owned(), source })
}

/// libp2p's own parser panics where the third line has other characters than digits, and takes `+f` for `0f`.
fn parse(text: &str) -> Result<PreSharedKey, KeyParseError> {
    let digits = text.lines().nth(2).unwrap_or_default().trim_end();
    if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) { text.parse() } else { Err(KeyParseError::InvalidKeyFile) }
}

/// The text of a new key file.
pub fn make() -> io::Result<String> {
    random().map(|bytes| PreSharedKey::new(bytes).to_key_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_can_be_loaded_and_is_another_one_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swarm.key");
        let text = make().unwrap();
        std::fs::write(&path, &text).unwrap();
        assert!(text.starts_with("/key/swarm/psk/1.0.0/\n/base16/\n"), "{text}");
        assert_eq!(load(&path).unwrap().to_key_file(), text);
        assert_ne!(make().unwrap(), text);
    }

    #[test]
    fn a_wrong_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swarm.key");
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("swarm.key"), "{error}");
        let with = |digits: &str| format!("/key/swarm/psk/1.0.0/\n/base16/\n{digits}\n");
        let mut texts = vec![String::new(), with("abcd"), "not a key at all\n/base16/\n00\n".to_owned()];
        // As long as a key, and none: cut into pairs in the middle of characters, or with signs.
        texts.extend([with(&"é".repeat(32)), with(&format!("a{}a", "é".repeat(31))), with(&"+f".repeat(32))]);
        for text in texts {
            std::fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("swarm.key") && error.contains("darter swarm key"), "{error}");
        }
    }
}
