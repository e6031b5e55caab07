//! The node's own credential for one registry: from where the operator said, or from AWS.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use darter_core::ecr;
use tokio::io::AsyncReadExt;

use super::OriginError;
use super::credential::{Account, Basic};
use super::docker_config::DockerConfig;
use super::ecr::Ecr;
use super::send::Wire;
use crate::config::{Access, RegistryConfig};

/// Passwords and docker configurations that are read: tokens have a few KiB at most.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// ECR says 403, not 401, to a token that is over; but also to a repository that is not ours. Only
/// a token this old is suspected, so that the latter does not cost a new token each time.
const SUSPECT: Duration = Duration::from_secs(10 * 60);

pub(super) enum NodeCredential {
    None,
    /// The file is read at each use: secrets are rotated by replacing it.
    File {
        user: String,
        path: PathBuf,
    },
    Docker(DockerConfig),
    Ecr {
        source: Arc<Ecr>,
        registry: ecr::Ecr,
    },
}

impl NodeCredential {
    pub(super) fn of(registry: &RegistryConfig, source: &Arc<Ecr>) -> Self {
        if let Some((user, path)) = registry.username.clone().zip(registry.password_file.clone()) {
            return Self::File { user, path };
        }
        if let Some(path) = registry.docker_config.clone() {
            return Self::Docker(DockerConfig::new(path, &registry.name));
        }
        match ecr::Ecr::recognise(&registry.name) {
            // ECR Public gives anonymous tokens by the usual challenge; a node that says who it is may pull more.
            Some(ecr::Ecr::Public) if registry.access != Some(Access::Node) => Self::None,
            Some(registry) => Self::Ecr { source: source.clone(), registry },
            None => Self::None,
        }
    }

    pub(super) const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// The credential; never `refused`, if there is any way to get another.
    pub(super) async fn get(&self, wire: &Wire, refused: Option<&Account>) -> Result<Option<Account>, OriginError> {
        match self {
            Self::None => Ok(None),
            Self::File { user, path } => {
                let password = read(path).await?;
                let password = String::from_utf8_lossy(&password);
                Ok(Some(Account::Password(Basic::of(user, password.trim_end_matches(['\r', '\n'])))))
            }
            Self::Docker(config) => config.get(refused).await,
            Self::Ecr { source, registry } => {
                let refused = refused.and_then(Account::basic);
                Ok(Some(Account::Password(source.get(wire, registry, refused, Duration::ZERO).await?)))
            }
        }
    }

    /// Another credential than `refused`, to which the registry said `status`; `None` if there is none.
    pub(super) async fn another(
        &self,
        wire: &Wire,
        refused: &Account,
        status: u16,
    ) -> Result<Option<Account>, OriginError> {
        let found = match (self, status) {
            (Self::Ecr { source, registry }, 403) => {
                Some(Account::Password(source.get(wire, registry, refused.basic(), SUSPECT).await?))
            }
            (_, 401) => self.get(wire, Some(refused)).await?,
            _ => None,
        };
        Ok(found.filter(|found| found != refused))
    }
}

/// A small file.
pub(super) async fn read(path: &Path) -> Result<Vec<u8>, OriginError> {
    let failed = |source| OriginError::File { path: path.to_owned(), source };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut content = Vec::new();
    file.take(FILE_MAX_BYTES).read_to_end(&mut content).await.map_err(failed)?;
    Ok(content)
}
