//! Whether a kind is there at all: nobody has to install Karpenter or KEDA. What is not there is said once, and looked
//! for again.

use std::time::Duration;

use darter_base::kubernetes::{Teller, connect, refusal};
use kube::Client;
use serde::Deserialize;
use tracing::info;

use super::super::metrics::Metrics;
use super::super::settings::Settings;

/// A kind that somebody else defines, and the versions of it that can be read, the newest first.
pub(in super::super) struct Kind {
    pub(in super::super) group: &'static str,
    pub(in super::super) versions: &'static [&'static str],
    pub(in super::super) plural: &'static str,
    /// What there is without it, for people.
    pub(in super::super) without: &'static str,
}

#[derive(Debug, Deserialize)]
struct Resources {
    resources: Vec<Resource>,
}

#[derive(Debug, Deserialize)]
struct Resource {
    name: String,
}

impl Kind {
    /// In which version it is served; none where it is not.
    pub(in super::super) async fn version(&self, client: &Client) -> kube::Result<Option<&'static str>> {
        for version in self.versions {
            let request = http::Request::get(format!("/apis/{}/{version}", self.group)).body(Vec::new());
            let answer = client.request::<Resources>(request.map_err(kube::Error::HttpError)?).await;
            match answer {
                Ok(list) if list.resources.iter().any(|resource| resource.name == self.plural) => {
                    return Ok(Some(version));
                }
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Waits until it is served.
    pub(super) async fn served(&self, settings: &Settings, metrics: &Metrics) -> &'static str {
        let name = format!("{}.{}", self.plural, self.group);
        let mut teller = Teller::new(format!("cannot look whether there are {name}"), &metrics.watch_errors);
        let mut said = false;
        loop {
            match connect(settings.kubeconfig.as_deref()).await {
                Ok(connected) => match self.version(&connected.client).await {
                    Ok(Some(version)) => {
                        info!(kind = name, version, "there are such objects in this cluster");
                        return version;
                    }
                    Ok(None) => {
                        teller.works();
                        if !std::mem::replace(&mut said, true) {
                            let versions = self.versions.join(" or ");
                            info!(kind = name, versions, "no such kind in this cluster: {}", self.without);
                        }
                    }
                    Err(error) => {
                        let rights = "to discover the API, as every authenticated user may";
                        let (reason, text) = refusal(&error, rights).unwrap_or_else(|| ("answer", error.to_string()));
                        teller.fails(reason, &text);
                    }
                },
                Err(reason) => teller.fails("credentials", &reason),
            }
            tokio::time::sleep(Duration::from_millis(settings.look_again_ms)).await;
        }
    }
}
