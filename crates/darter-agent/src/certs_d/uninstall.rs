//! `darter uninstall`: certs.d as it was before, whatever the configuration says now. Finds what is
//! ours by what we left in it. Where an agent runs it does this itself (`order`).

use std::path::Path;

use darter_core::Registry;
use darter_core::hosts_toml::{Wanted, marked_url};

use super::files::{self, BACKUP, BASE, CREATED, HOSTS};
use super::site::{Site, Undone, registry_of};
use super::{CertsDError, wanted};
use crate::config::{Config, RegistryConfig};

/// Puts every directory under certs.d back that darter had its hands in. Goes on after an error, and
/// returns the first.
pub fn uninstall(config: &Config) -> Result<Vec<Undone>, CertsDError> {
    let root = &config.certs_d.path;
    let mut undone = Vec::new();
    let mut failed = None;
    for name in files::names(root)?.unwrap_or_default() {
        let known = |registry: &Registry| {
            let known = config.registries.iter().find(|known| known.name == *registry).cloned();
            let known = known.unwrap_or_else(|| RegistryConfig::named(registry.clone()));
            wanted(config, &known, config.mirror.listen)
        };
        match leave_dir(root, &name, known) {
            Ok(done) => undone.extend(done),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let root_failed = leave_root(root).err();
    failed.or(root_failed).map_or(Ok(undone), Err)
}

/// Puts one directory back, if darter had its hands in it. `wanted` says what it would be now.
pub(super) fn leave_dir(
    root: &Path,
    name: &str,
    wanted: impl Fn(&Registry) -> Wanted,
) -> Result<Option<Undone>, CertsDError> {
    let dir = root.join(name);
    let Some(registry) = registry_of(name).filter(|_| dir.is_dir() && !dir.is_symlink()) else { return Ok(None) };
    files::clear_leftovers(&dir)?;
    let hosts = files::read(&dir.join(HOSTS))?;
    let marked = hosts.as_ref().and_then(|hosts| marked_url(&hosts.text));
    if marked.is_none() && ![BACKUP, BASE, CREATED].iter().any(|name| dir.join(name).exists()) {
        return Ok(None);
    }
    let mut wanted = wanted(&registry);
    // The agent that wrote the file may have listened elsewhere.
    wanted.mirror_url = marked.map_or(wanted.mirror_url, str::to_owned);
    Site { root: root.to_owned(), later_roots: Vec::new(), wanted }.leave(&dir)
}

/// Removes what a crash left in certs.d, and certs.d itself if we made it and nobody uses it.
pub(super) fn leave_root(root: &Path) -> Result<(), CertsDError> {
    files::clear_leftovers(root)?;
    if root.join(CREATED).exists() {
        files::remove(&root.join(CREATED))?;
        files::remove_dir_if_empty(root)?;
    }
    Ok(())
}
