//! The last membership on disk: an agent that starts while the API server is away begins with it.
//!
//! An address in it may be somebody else's by then: who has not the swarm key learns nothing there.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;
use tracing::{info, warn};

use super::ServiceName;

/// Slices change many times a second while a cluster boots: they are written once they had this long
/// to settle, and no more often.
const SETTLE: Duration = Duration::from_secs(1);

/// Ten thousand members (`swarm.max_members` at most) with the longest addresses are 0.6 MB.
const BYTES_MAX: u64 = 1024 * 1024;

/// The file in the data directory.
#[derive(Debug, Clone)]
pub(super) struct Remembered {
    path: PathBuf,
    service: String,
}

/// What is in the file.
#[derive(Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Content {
    /// Another Service has other members.
    pub service: String,
    /// Where they were.
    pub addresses: BTreeSet<SocketAddr>,
}

impl Content {
    /// What the bytes of a file say.
    ///
    /// # Errors
    /// They are of no such file.
    pub fn parse(bytes: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(bytes)
    }

    /// The bytes of a new file.
    ///
    /// # Errors
    /// None that an address could make.
    pub fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

impl Remembered {
    pub(super) fn new(path: &Path, service: &ServiceName) -> Self {
        Self { path: path.to_owned(), service: service.to_string() }
    }

    /// What was written last; empty if nothing was, or for another Service.
    pub(super) async fn read(&self) -> BTreeSet<SocketAddr> {
        match self.try_read().await {
            Ok(content) if content.service == self.service => {
                info!(addresses = content.addresses.len(), "beginning with the members that were known last");
                content.addresses
            }
            Ok(_) => BTreeSet::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => {
                warn!(path = %self.path.display(), %error, "cannot read the members that were known last; going on without");
                BTreeSet::new()
            }
        }
    }

    async fn try_read(&self) -> io::Result<Content> {
        if tokio::fs::metadata(&self.path).await?.len() > BYTES_MAX {
            return Err(io::Error::other("longer than any such file"));
        }
        Ok(Content::parse(&tokio::fs::read(&self.path).await?)?)
    }

    /// Writes each change. Never ends.
    pub(super) async fn follow(&self, mut found: watch::Receiver<BTreeSet<SocketAddr>>) {
        let mut is_failing = false;
        while found.changed().await.is_ok() {
            tokio::time::sleep(SETTLE).await;
            let addresses = found.borrow_and_update().clone();
            match self.write(addresses).await {
                Ok(()) => is_failing = false,
                // Said once: the disk that is full is said elsewhere too.
                Err(error) if !is_failing => {
                    is_failing = true;
                    warn!(path = %self.path.display(), %error, "cannot keep the members for the next start");
                }
                Err(_) => {}
            }
        }
        std::future::pending().await
    }

    /// Whole or not at all.
    async fn write(&self, addresses: BTreeSet<SocketAddr>) -> io::Result<()> {
        let content = Content { service: self.service.clone(), addresses }.to_json()?;
        let temporary = self.path.with_extension("json.new");
        let mut file = tokio::fs::File::create(&temporary).await?;
        file.write_all(&content).await?;
        file.sync_all().await?;
        tokio::fs::rename(&temporary, &self.path).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(last: u8) -> BTreeSet<SocketAddr> {
        (1..=last).map(|n| SocketAddr::from(([10, 0, 0, n], 4002))).collect()
    }

    #[tokio::test]
    async fn what_was_written_is_read_for_the_same_service_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("members.json");
        let ours = Remembered::new(&path, &"gpu/darter".parse().unwrap());
        assert_eq!(ours.read().await, BTreeSet::new());
        ours.write(addresses(3)).await.unwrap();
        ours.write(addresses(2)).await.unwrap();
        assert_eq!(ours.read().await, addresses(2));
        assert_eq!(Remembered::new(&path, &"gpu/other".parse().unwrap()).read().await, BTreeSet::new());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[tokio::test]
    async fn a_file_that_is_broken_or_endless_is_no_members() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("members.json");
        let remembered = Remembered::new(&path, &"darter".parse().unwrap());
        for text in ["", "{}", "{\"service\":\"darter\",\"addresses\":[\"10.0.0.1\"]}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(remembered.read().await, BTreeSet::new(), "{text}");
        }
        let right = "{\"service\":\"darter\",\"addresses\":[\"10.0.0.1:4002\"]}";
        std::fs::write(&path, right).unwrap();
        assert_eq!(remembered.read().await, addresses(1));
        std::fs::write(&path, right.to_owned() + &" ".repeat(1 << 20)).unwrap();
        assert_eq!(remembered.read().await, BTreeSet::new());
    }
}
