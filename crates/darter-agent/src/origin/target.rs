//! The places a registry's images may come from, in the order they are asked for bytes.
//!
//! First what hosts.toml named besides us, then `origins`, then the registry itself. Only the last
//! is shown credentials, and asked who may read what; the others would learn them for nothing, and
//! know nothing of it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use darter_core::hosts_toml::ForeignOrigin;
use http::Uri;
use tracing::warn;

use super::OriginError;
use super::away::Away;
use super::challenge::Bearer;
use super::url::{Place, api_root};
use crate::config::RegistryConfig;

/// Docker Hub's registry has another name than its images.
const DOCKER_HUB: &str = "https://registry-1.docker.io";
/// Origins asked for one thing: each that is away costs a second, twice a minute.
const TARGETS_MAX: usize = 8;
/// How long one that is away is left alone. A host that restarts is missed for no longer than a large
/// pull takes, and one that stays down costs one request in all of that.
const AWAY: Duration = Duration::from_secs(30);

pub(super) struct Target {
    /// The URL under which `<repository>/manifests/…` is.
    pub(super) root: String,
    pub(super) place: Place,
    /// Whether it is the registry itself, or another path of the same host.
    pub(super) is_own: bool,
    /// Whether it is asked what a tag means.
    pub(super) resolves: bool,
    /// Since when it has not answered. Of the registry itself nobody keeps this.
    pub(super) away: Away,
    /// The token server that it named last: asked before the next request, to save its 401.
    bearer: Mutex<Option<Bearer>>,
}

impl Target {
    fn new(url: &str, own: Option<&Place>) -> Result<Self, OriginError> {
        let root = api_root(url)?;
        let place = place(&root)?;
        let is_own = own.is_none_or(|own| *own == place);
        Ok(Self { root, place, is_own, resolves: true, away: Away::new(AWAY, AWAY), bearer: Mutex::new(None) })
    }

    pub(super) fn bearer(&self) -> Option<Bearer> {
        self.bearer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn learn(&self, bearer: Option<Bearer>) {
        *self.bearer.lock().unwrap_or_else(PoisonError::into_inner) = bearer;
    }
}

/// Where a URL of the configuration leads.
pub(super) fn place(url: &str) -> Result<Place, OriginError> {
    let uri: Option<Uri> = url.parse().ok();
    uri.as_ref().and_then(Place::of).ok_or_else(|| OriginError::Url(url.to_owned()))
}

/// All targets of a registry, the registry itself last.
pub(super) fn targets(registry: &RegistryConfig, foreign: &[ForeignOrigin]) -> Result<Vec<Target>, OriginError> {
    let own = match (&registry.endpoint, registry.name.as_str()) {
        (Some(endpoint), _) => endpoint.clone(),
        (None, "docker.io") => DOCKER_HUB.to_owned(),
        (None, name) => format!("https://{name}"),
    };
    let own = Target::new(&own, None)?;
    let mut targets: Vec<Target> = Vec::new();
    for ForeignOrigin { url, resolve } in foreign {
        match Target::new(url, Some(&own.place)) {
            Ok(target) => targets.push(Target { resolves: *resolve, ..target }),
            // Somebody else's file: it must not keep the agent from starting.
            Err(error) => warn!(registry = %registry.name, %error, "a host of hosts.toml is left out"),
        }
    }
    for url in &registry.origins {
        targets.push(Target::new(url, Some(&own.place))?);
    }
    targets.truncate(TARGETS_MAX - 1);
    targets.retain(|target| target.root != own.root);
    targets.push(own);
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_itself_comes_last_and_alone_is_trusted() {
        let mut registry = RegistryConfig::named("docker.io".parse().unwrap());
        registry.origins = vec!["https://harbor.example/v2/hub".into(), "https://registry-1.docker.io:443/x".into()];
        let foreign = ["https://cache.example", "nonsense"];
        let foreign = foreign.map(|url| ForeignOrigin { url: url.to_owned(), resolve: false });
        let targets = targets(&registry, &foreign).unwrap();
        let seen: Vec<_> =
            targets.iter().map(|target| (target.root.as_str(), target.is_own, target.resolves)).collect();
        assert_eq!(
            seen,
            [
                ("https://cache.example/v2", false, false),
                ("https://harbor.example/v2/hub", false, true),
                ("https://registry-1.docker.io:443/x/v2", true, true),
                ("https://registry-1.docker.io/v2", true, true),
            ]
        );
    }
}
