//! Keys of `[[registry]]` that cannot work, and files that they name and that are not there.

use super::check::Fault;
use super::{Access, Config, RegistryConfig, ServeStale, Swarm};
use crate::log::chain;
use crate::origin::{check_ca, is_url, without_secrets};

pub(super) fn check_registries(config: &Config) -> Result<(), Fault> {
    for (index, registry) in config.registries.iter().enumerate() {
        // To DNS they are one. Their hosts.toml, tokens and limits would be two.
        let is_it = |other: &&RegistryConfig| other.name.as_str().eq_ignore_ascii_case(registry.name.as_str());
        if let Some(twin) = config.registries[..index].iter().find(is_it) {
            let message = if twin.name == registry.name {
                format!("{} is configured twice", registry.name)
            } else {
                format!("{} is {} in other letters: configure it once", registry.name, twin.name)
            };
            return Err(Fault { key: format!("registry[{index}].name"), message });
        }
        check_registry(registry)
            .and_then(|()| check_cluster(registry, &config.swarm))
            .map_err(|(key, message)| Fault { key: format!("registry[{index}].{key}"), message })?;
    }
    Ok(())
}

/// What the agent starts without: a registry whose files are not there is tried again until they are.
pub(super) fn warnings(config: &Config) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (index, registry) in config.registries.iter().enumerate() {
        if let Some(Err(error)) = registry.ca.as_deref().map(check_ca) {
            let message = format!("{}; until it can be used this registry is not served", chain(&error));
            faults.push(Fault { key: format!("registry[{index}].ca"), message });
        }
        for (key, path) in [("password_file", &registry.password_file), ("docker_config", &registry.docker_config)] {
            let Some(path) = path else { continue };
            if let Err(error) = std::fs::read(path) {
                let path = path.display();
                let message = format!("cannot read {path}: {error}; without it this node has no credential");
                faults.push(Fault { key: format!("registry[{index}].{key}"), message });
            }
        }
    }
    faults
}

fn check_registry(registry: &RegistryConfig) -> Result<(), (&'static str, String)> {
    for (key, url) in
        registry.origins.iter().map(|url| ("origins", url)).chain(registry.endpoint.iter().map(|url| ("endpoint", url)))
    {
        let is_http = url.starts_with("http://");
        if !is_http && !url.starts_with("https://") || !is_url(url) {
            let url = without_secrets(url);
            return Err((key, format!("`{url}` is not a URL: expected https://host[:port]")));
        }
        if is_http && !registry.plain_http {
            return Err((key, format!("`{url}` is not encrypted: say plain_http = true if that is meant")));
        }
    }
    if registry.username.is_some() != registry.password_file.is_some() {
        return Err(("username", "username and password_file belong together".to_owned()));
    }
    if registry.username.is_some() && registry.docker_config.is_some() {
        return Err(("docker_config", "give either docker_config or username and password_file".to_owned()));
    }
    let has_credential = registry.username.is_some() || registry.docker_config.is_some();
    if has_credential && registry.access != Some(Access::Node) {
        let message = "a credential of the node is used with access = \"node\" only: whoever can start a pod here \
                       may then read what it opens";
        return Err(("access", message.to_owned()));
    }
    if registry.connections == Some(0) {
        return Err(("connections", "must be at least 1".to_owned()));
    }
    if registry.serve_stale != ServeStale::Off && !registry.resolve {
        return Err(("serve_stale", "needs resolve = true: without it tags never pass this agent".to_owned()));
    }
    if registry.serve_stale != ServeStale::Off && registry.access == Some(Access::Off) {
        return Err(("serve_stale", "has no meaning with access = \"off\"".to_owned()));
    }
    Ok(())
}

fn check_cluster(registry: &RegistryConfig, swarm: &Swarm) -> Result<(), (&'static str, String)> {
    if registry.serve_stale == ServeStale::Cluster && swarm.key_file.is_none() {
        return Err((
            "serve_stale",
            "\"cluster\" needs swarm.key_file: without a swarm nobody can be asked".to_owned(),
        ));
    }
    Ok(())
}
