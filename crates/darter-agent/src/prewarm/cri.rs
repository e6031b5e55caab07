//! Asking containerd to pull, by the interface that the kubelet uses: labels and unpacking come out
//! as the kubelet expects, and the bytes come through the mirror.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::{ImageSpec, PullImageRequest};
use tokio::time::timeout;

use super::Login;
use crate::containerd;

/// Unpacking 40 GB takes minutes; containerd has its own watchdog for progress.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why containerd did not pull.
#[derive(Debug, thiserror::Error)]
pub(super) enum CriError {
    /// The socket.
    #[error("cannot reach containerd at {}", .path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    /// containerd's own answer.
    #[error("containerd says: {}", .0.message())]
    Pull(#[source] Box<tonic::Status>),
    /// None at all.
    #[error("containerd is not ready after {PULL_TIMEOUT:?}")]
    TimedOut,
}

/// Pulls and unpacks `image`, with this credential; gives what containerd calls it.
pub(super) async fn pull(socket: &Path, image: &str, login: Option<&Login>) -> Result<String, CriError> {
    let connected = containerd::connect(socket).await;
    let channel = connected.map_err(|source| CriError::Connect { path: socket.to_owned(), source })?;
    let image = ImageSpec { image: image.to_owned(), ..ImageSpec::default() };
    let auth = login.map(Login::for_cri);
    let request = PullImageRequest { image: Some(image), auth, ..PullImageRequest::default() };
    let mut images = ImageServiceClient::new(channel);
    let pulled = timeout(PULL_TIMEOUT, images.pull_image(request)).await.map_err(|_| CriError::TimedOut)?;
    Ok(pulled.map_err(|status| CriError::Pull(Box::new(status)))?.into_inner().image_ref)
}
