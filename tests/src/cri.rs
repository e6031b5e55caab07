//! What kubelet says to containerd: the image service of the CRI.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AuthConfig, Image, ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest,
    VersionRequest,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A pull in a test that takes longer has hung.
const PATIENCE: Duration = Duration::from_secs(300);

/// A connection to one containerd.
#[derive(Debug, Clone)]
pub struct Cri {
    images: ImageServiceClient<Channel>,
    runtime: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// Connects when first used, and again after a restart of containerd.
    pub fn new(socket: &Path) -> Self {
        let socket: PathBuf = socket.to_owned();
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The address is not used: the connector above knows the socket.
        let channel = Endpoint::from_static("http://localhost").timeout(PATIENCE).connect_with_connector_lazy(connect);
        Self { images: ImageServiceClient::new(channel.clone()), runtime: RuntimeServiceClient::new(channel) }
    }

    /// Name and version of the runtime: answered once the CRI plugin is up.
    pub async fn version(&self) -> Result<String> {
        let version = self.runtime.clone().version(VersionRequest::default()).await?.into_inner();
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    /// Pulls an image as kubelet does, with the user and password that a pull secret or a credential
    /// provider gave, and gives back its id.
    pub async fn pull(&self, image: &str, credential: Option<(&str, &str)>) -> Result<String> {
        let auth = credential.map(|(user, password)| AuthConfig {
            username: user.to_owned(),
            password: password.to_owned(),
            ..AuthConfig::default()
        });
        let request = PullImageRequest { image: Some(spec(image)), auth, sandbox_config: None };
        let answer = self.images.clone().pull_image(request).await;
        Ok(answer.with_context(|| format!("cannot pull {image}"))?.into_inner().image_ref)
    }

    /// The image of this name, if it is there.
    pub async fn status(&self, image: &str) -> Result<Option<Image>> {
        let request = ImageStatusRequest { image: Some(spec(image)), verbose: false };
        Ok(self.images.clone().image_status(request).await?.into_inner().image)
    }

    /// All images.
    pub async fn list(&self) -> Result<Vec<Image>> {
        Ok(self.images.clone().list_images(ListImagesRequest { filter: None }).await?.into_inner().images)
    }

    /// Removes an image, by any of its names or its id.
    pub async fn remove(&self, image: &str) -> Result<()> {
        self.images.clone().remove_image(RemoveImageRequest { image: Some(spec(image)) }).await?;
        Ok(())
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..ImageSpec::default() }
}
