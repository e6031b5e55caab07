//! `darter preflight`: would containerd, as this host has it, look at what we write?
//!
//! Reads its configuration with all imports, and the roots that it names; writes nothing. Which version
//! reads that configuration decides some of it: containerd is asked, and where it does not tell, only what
//! holds for all versions is said for sure.

use std::collections::VecDeque;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use darter_core::Registry;
use darter_core::containerd_config::{self as core, Judgement, Severity, Verdict, Version};
use darter_core::hosts_toml::Foreign;
use serde::Serialize;

use super::site::Site;
use super::{CertsDError, files, site};
use crate::config::{Config, RegistryConfig};
use crate::containerd::{self, Known};

/// containerd itself has no limit; a host with more has a loop that paths do not show.
const IMPORTS_MAX: usize = 256;

/// The answer, for people (`Display`) and programs (JSON).
#[derive(Debug, Clone, Serialize)]
pub struct Preflight {
    /// Where hosts.toml files go.
    pub certs_d: PathBuf,
    /// Whether containerd asks the mirror for what is written there. `None` where that cannot be told: its
    /// version is not known and matters, or a file of its configuration cannot be read.
    pub honoured: Option<bool>,
    /// Which containerd that is.
    pub containerd: Known,
    /// The files that were read, in containerd's order.
    pub files: Vec<PathBuf>,
    /// What Dragonfly or Spegel left in the hosts.toml of a registry; `certs_d.adopt` takes it out.
    /// Looked for by `preflight` only.
    pub left: Vec<Left>,
    /// The roots that containerd looks at only where ours has nothing.
    #[serde(skip)]
    pub later_roots: Vec<PathBuf>,
    /// What they say.
    #[serde(flatten)]
    pub judgement: Judgement,
}

/// A host that another program left in a hosts.toml.
#[derive(Debug, Clone, Serialize)]
pub struct Left {
    /// Of which registry.
    pub registry: Registry,
    /// Whose it is.
    pub by: Foreign,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { registry, by } = self;
        write!(f, "{by} has a host in the hosts.toml of {registry}")
    }
}

/// Judges this host for the containerd that answers at its socket, its hosts.toml files too.
pub async fn preflight(config: &Config) -> Preflight {
    let named = || core::judge(&load(&config.containerd.config).0, &config.certs_d.path, None).socket;
    let known = containerd::known(config.containerd.socket.clone().or_else(named)).await;
    let found = preflight_for(config, known);
    Preflight { left: left(config, &found.later_roots), ..found }
}

/// Judges containerd's configuration for what is known of this containerd. In a running agent the
/// hosts.toml files have a keeper, who reads them.
pub fn preflight_for(config: &Config, containerd: Known) -> Preflight {
    let (files, unread) = load(&config.containerd.config);
    let judged = |version| {
        let mut judgement = core::judge(&files, &config.certs_d.path, version);
        if files.is_empty() {
            // A host without containerd, or a mount that is missing: its defaults say nothing about it.
            judgement.verdicts.clear();
            judgement.content_root = None;
        }
        for verdict in unread.iter().cloned().chain(shadows(config, &judgement)) {
            judgement.add(verdict);
        }
        judgement
    };
    let version = containerd.version();
    let honoured = {
        let kinds = version.map_or_else(|| Version::KINDS.to_vec(), |version| vec![version]);
        let mut answers: Vec<bool> = kinds.into_iter().map(|kind| judged(Some(kind)).is_honoured()).collect();
        answers.dedup();
        match answers[..] {
            [false] => Some(false),
            [true] if unread.is_empty() => Some(true),
            _ => None,
        }
    };
    let judgement = judged(version);
    // 2.2 and later have a second root by default; for the others it is never looked at.
    let recent = core::judge(&files, &config.certs_d.path, Some(Version { major: 2, minor: 2 }));
    Preflight {
        certs_d: config.certs_d.path.clone(),
        honoured,
        containerd,
        files: files.into_iter().map(|(path, _)| path).collect(),
        left: Vec::new(),
        later_roots: recent.roots_after(&config.certs_d.path).to_vec(),
        judgement,
    }
}

/// A file that cannot be read is the writer's to report: it will not be written either.
fn left(config: &Config, later_roots: &[PathBuf]) -> Vec<Left> {
    let by = |registry: &RegistryConfig| {
        let wanted = super::wanted(config, registry, config.mirror.listen);
        let site = Site { root: config.certs_d.path.clone(), later_roots: later_roots.to_vec(), wanted };
        let found = site.others().unwrap_or_default().left_by.into_iter();
        found.map(|by| Left { registry: registry.name.clone(), by }).collect::<Vec<_>>()
    };
    config.registries.iter().flat_map(by).collect()
}

/// Reads the main file, then the files that it imports, then theirs (LoadConfig).
fn load(main: &Path) -> (Vec<(PathBuf, String)>, Vec<Verdict>) {
    let (mut loaded, mut unread) = (Vec::<(PathBuf, String)>::new(), Vec::new());
    let mut pending = VecDeque::from([main.to_owned()]);
    while let Some(path) = pending.pop_front() {
        if loaded.len() >= IMPORTS_MAX || loaded.iter().any(|(known, _)| *known == path) {
            continue;
        }
        match files::read(&path) {
            Ok(Some(content)) => {
                pending.extend(core::imports(&path, &content.text).iter().flat_map(|pattern| expand(pattern)));
                loaded.push((path, content.text));
            }
            Ok(None) => unread.push(core::unreadable(&path, "no such file")),
            Err(error) => unread.push(core::unreadable(&path, &cause(&error))),
        }
    }
    (loaded, unread)
}

fn cause(error: &CertsDError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The files that a pattern stands for, sorted; a path without a star stands for itself.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    if !pattern.to_string_lossy().contains('*') {
        return vec![pattern.to_owned()];
    }
    let mut found = vec![PathBuf::new()];
    for component in pattern.components() {
        let fits = |dir: &PathBuf| fitting(dir, component);
        found = found.iter().flat_map(fits).take(IMPORTS_MAX).collect();
    }
    found
}

fn fitting(dir: &Path, component: Component<'_>) -> Vec<PathBuf> {
    let text = component.as_os_str().to_string_lossy();
    if !text.contains(['*', '?']) {
        let path = dir.join(component);
        return if path.exists() { vec![path] } else { Vec::new() };
    }
    let names = files::names(dir).ok().flatten().unwrap_or_default();
    names.iter().filter(|name| core::matches(&text, name)).map(|name| dir.join(name)).collect()
}

/// What in an earlier root containerd takes instead of ours.
fn shadows(config: &Config, judgement: &Judgement) -> Vec<Verdict> {
    let certs_d = &config.certs_d.path;
    let paths = |root: &PathBuf| {
        let named = config.registries.iter().flat_map(|registry| site::host_paths(root, &registry.name));
        named.chain([root.join("_default")]).collect::<Vec<_>>()
    };
    let earlier = judgement.roots_before(certs_d).iter().flat_map(paths).filter(|path| path.exists());
    earlier.map(|path| core::shadowed(&path, certs_d)).collect()
}

impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answer = match self.honoured {
            Some(true) => "looks into",
            Some(false) => "does not look into",
            None => "may or may not look into",
        };
        let version = self.containerd.version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
        writeln!(f, "containerd{version} {answer} {}", self.certs_d.display())?;
        if let Some(why) = &self.containerd.unknown {
            writeln!(f, "  version unknown: {why}\n    set containerd.socket, and run this as root")?;
        }
        for verdict in &self.judgement.verdicts {
            let severity = match verdict.severity {
                Severity::Blocks => "blocks",
                Severity::Limits => "limits",
                Severity::Note => "note",
            };
            writeln!(f, "  {severity}: {}\n    {}", verdict.message, verdict.way_out)?;
        }
        for left in &self.left {
            writeln!(f, "  note: {left}\n    certs_d.adopt = true takes it out and keeps a backup")?;
        }
        for file in &self.files {
            writeln!(f, "  read {}", file.display())?;
        }
        Ok(())
    }
}
