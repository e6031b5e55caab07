//! Who this node is: an ed25519 key that is made at the first start and kept.
//!
//! Its public half is the node's name in the swarm, for the core (32 bytes) and for libp2p alike.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use darter_core::swarm::PeerId;
use libp2p::identity::{Keypair, PublicKey};
use rustix::rand::{GetRandomFlags, getrandom};

/// Why this node has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read.
    #[error("cannot read the node's identity {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write the node's identity {}", .path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is something else in it.
    #[error(
        "{} is not a node's identity: it has {length} bytes instead of 32; remove it, and the node gets a new name",
        .path.display()
    )]
    Content {
        /// Which file.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
}

/// The key of this node.
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
    id: PeerId,
}

impl Identity {
    /// The identity in `path`: 32 bytes, the secret half of an ed25519 key. Made if there is none.
    pub fn load_or_make(path: &Path) -> Result<Self, IdentityError> {
        let read = |source| IdentityError::Read { path: path.to_owned(), source };
        match std::fs::read(path) {
            Ok(bytes) => {
                let length = bytes.len();
                Self::from_secret(bytes).ok_or_else(|| IdentityError::Content { path: path.to_owned(), length })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path),
            Err(error) => Err(read(error)),
        }
    }

    fn make(path: &Path) -> Result<Self, IdentityError> {
        let wrong = |source| IdentityError::Write { path: path.to_owned(), source };
        let secret = random().map_err(wrong)?;
        // Whole or not at all: half a key would keep the agent from starting.
        let temporary = path.with_extension("key.new");
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary).map_err(wrong)?;
        file.write_all(&secret).and_then(|()| file.sync_all()).map_err(wrong)?;
        std::fs::rename(&temporary, path).map_err(wrong)?;
        let parent = path.parent().unwrap_or_else(|| Path::new("."));
        std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(wrong)?;
        Self::from_secret(secret.to_vec())
            .ok_or_else(|| IdentityError::Content { path: path.to_owned(), length: secret.len() })
    }

    fn from_secret(mut bytes: Vec<u8>) -> Option<Self> {
        let keypair = Keypair::ed25519_from_bytes(&mut bytes).ok()?;
        let id = of_key(keypair.public())?;
        Some(Self { keypair, id })
    }

    /// The node's name in the swarm.
    pub const fn id(&self) -> PeerId {
        self.id
    }

    /// The key itself.
    pub const fn keypair(&self) -> &Keypair {
        &self.keypair
    }
}

/// The core's name of a peer that libp2p names. None: it is not an ed25519 key, so no agent.
pub fn to_core(peer: &libp2p::PeerId) -> Option<PeerId> {
    // Names of so short keys hold the key itself, behind the code 0 of a hash that changes nothing.
    let hash: &libp2p::multihash::Multihash<64> = peer.as_ref();
    if hash.code() != 0 {
        return None;
    }
    of_key(PublicKey::try_decode_protobuf(hash.digest()).ok()?)
}

/// libp2p's name of a peer. None: the 32 bytes are no public key.
pub fn to_libp2p(peer: PeerId) -> Option<libp2p::PeerId> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(&peer.to_bytes()).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

fn of_key(key: PublicKey) -> Option<PeerId> {
    key.try_into_ed25519().ok().map(|key| PeerId::from_bytes(key.to_bytes()))
}

/// 32 bytes from the kernel: a key.
pub(super) fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    // 256 bytes and less come all at once.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_identity_is_made_once_readable_by_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        let first = Identity::load_or_make(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Identity::load_or_make(&path).unwrap().id(), first.id());
        let other = Identity::load_or_make(&dir.path().join("other.key")).unwrap();
        assert_ne!(other.id(), first.id());
    }

    #[test]
    fn both_names_of_a_peer_are_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_make(&dir.path().join("identity.key")).unwrap();
        let name = identity.keypair().public().to_peer_id();
        assert_eq!(to_libp2p(identity.id()), Some(name));
        assert_eq!(to_core(&name), Some(identity.id()));
        assert_eq!(to_core(&libp2p::PeerId::random()), None, "a hash of nobody's key");
    }

    #[test]
    fn a_broken_identity_is_named_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        std::fs::write(&path, b"short").unwrap();
        let error = Identity::load_or_make(&path).err().unwrap().to_string();
        assert!(error.contains("identity.key") && error.contains("5 bytes"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
        let error = Identity::load_or_make(&dir.path().join("nowhere/identity.key")).err().unwrap().to_string();
        assert!(error.contains("nowhere/identity.key"), "{error}");
    }
}
