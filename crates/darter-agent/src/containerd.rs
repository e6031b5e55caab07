//! Asking containerd itself, by its socket: which version it is.
//!
//! Whoever may use the socket is root on the node, so it is asked this and nothing else here, and where
//! there is none the agent does without. Not asked is `containerd --version`: the program on the path may
//! be another than the one that runs. Pulling through it is `prewarm`'s.

use std::path::{Path, PathBuf};
use std::time::Duration;

use darter_core::containerd_config::{NotAVersion, Version};
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::log::chain;

/// Where it listens if its configuration does not say.
const DEFAULT_SOCKET: &str = "/run/containerd/containerd.sock";
/// It answers from memory.
const PATIENCE: Duration = Duration::from_secs(1);
/// The method of its Version service (api/services/version/v1 of containerd 1.x and 2.x).
const METHOD: &str = "/containerd.services.version.v1.Version/Version";

/// What is known of the containerd of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Known {
    /// Its version, as it says it of itself.
    pub version: Option<String>,
    /// The socket where it was asked, if it was.
    pub socket: Option<PathBuf>,
    /// Why its version is not known.
    pub unknown: Option<String>,
}

impl Known {
    /// As its requests tell it.
    pub fn by_requests(version: Version) -> Self {
        Self { version: Some(version.to_string()), ..Self::default() }
    }

    /// Before anybody asked.
    pub fn not_asked() -> Self {
        Self { unknown: Some("it was not asked yet".to_owned()), ..Self::default() }
    }

    /// The version, as far as it decides anything.
    pub fn version(&self) -> Option<Version> {
        self.version.as_ref().and_then(|version| version.parse().ok())
    }
}

/// Its answer to [`METHOD`], without the revision.
#[derive(Clone, PartialEq, prost::Message)]
struct VersionResponse {
    #[prost(string, tag = "1")]
    version: String,
}

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("cannot reach it")]
    Connect(#[from] tonic::transport::Error),
    #[error("it says: {0}")]
    Refused(String),
    #[error("no answer within {PATIENCE:?}")]
    TimedOut,
    #[error("it does not tell")]
    Version(#[from] NotAVersion),
}

/// Asks for its version: at `named`, or at the usual place if something is there.
pub async fn known(named: Option<PathBuf>) -> Known {
    let usual = || Some(PathBuf::from(DEFAULT_SOCKET)).filter(|socket| socket.exists());
    let Some(socket) = named.or_else(usual) else {
        let unknown = format!("no configuration names a socket, and there is no {DEFAULT_SOCKET}");
        return Known { unknown: Some(unknown), ..Known::default() };
    };
    let asked = tokio::time::timeout(PATIENCE, ask(&socket)).await.unwrap_or(Err(AskError::TimedOut));
    let (version, unknown) = match asked {
        Ok(version) => (Some(version), None),
        Err(error) => (None, Some(format!("asked at {}: {}", socket.display(), chain(&error)))),
    };
    Known { version, socket: Some(socket), unknown }
}

async fn ask(socket: &Path) -> Result<String, AskError> {
    let mut containerd = tonic::client::Grpc::new(connect(socket).await?);
    containerd.ready().await?;
    let codec = ProstCodec::<(), VersionResponse>::default();
    let answer = containerd.unary(tonic::Request::new(()), PathAndQuery::from_static(METHOD), codec).await;
    let version = answer.map_err(|status| AskError::Refused(status.message().to_owned()))?.into_inner().version;
    // A build of one's own says `unknown`, or a commit.
    version.parse::<Version>()?;
    Ok(version)
}

/// A connection to a socket of containerd.
pub async fn connect(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = socket.to_owned();
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // The address is not used: the connector knows the socket.
    Endpoint::from_static("http://containerd").connect_with_connector(connector).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn why_the_version_is_not_known_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let absent = known(Some(socket.clone())).await;
        assert_eq!((absent.version(), absent.socket.as_ref()), (None, Some(&socket)));
        assert!(absent.unknown.unwrap().contains("No such file"));
        // Somebody listens and never says a word.
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        assert!(known(Some(socket)).await.unknown.unwrap().contains("within 1s"));
    }
}
