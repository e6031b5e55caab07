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
    text.parse().map_err(|source| KeyError::Content { path: path.to_owned(), source })
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
        for text in ["", "/key/swarm/psk/1.0.0/\n/base16/\nabcd\n", "not a key at all\n/base16/\n00\n"] {
            std::fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("swarm.key") && error.contains("darter swarm key"), "{error}");
        }
    }
}
