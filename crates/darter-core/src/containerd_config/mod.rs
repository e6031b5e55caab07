//! Whether containerd, configured as it is, looks into certs.d at all.
//!
//! A hosts.toml in the right place is ignored without a word in several ways, and no API tells the
//! configuration in force. So its files are read as containerd merges them, and each trap is named
//! with its way out. Which traps there are depends on the version; where that is unknown, what some
//! version would do is said as such.
//!
//! Sources: containerd `cmd/containerd/server/config`, `internal/cri/config`, `plugins/cri/images`
//! and the runs in facts/containerd.md §7, §8. Not here: reading the files.

mod imports;
mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;

pub use imports::{imports, matches};

use settings::Settings;

/// containerd's own name for its default, of 2.2 and later.
const DEFAULT_CONFIG_PATH: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";
const DEFAULT_ROOT: &str = "/var/lib/containerd";
/// Before what only some versions do.
const UNKNOWN: &str = "version unknown: ";

/// A version of containerd, such as 2.2.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Version {
    /// 1 or 2.
    pub major: u32,
    /// Which of its lines.
    pub minor: u32,
}

impl Version {
    /// One of each kind: 1.x merges its files in another way, 2.1 pulls in another way than 2.0, and 2.2
    /// has a default where 2.1 has none.
    pub const KINDS: [Self; 4] = [
        Self { major: 1, minor: 6 },
        Self { major: 2, minor: 0 },
        Self { major: 2, minor: 1 },
        Self { major: 2, minor: 2 },
    ];
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = NotAVersion;

    /// Reads `2.2.4`, `v1.6.20~ds1` and what a User-Agent says after `containerd/`.
    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let mut parts = text.trim().trim_start_matches('v').splitn(3, '.');
        let mut number = || parts.next().and_then(|part| part.parse().ok());
        match (number(), number()) {
            (Some(major), Some(minor)) => Ok(Self { major, minor }),
            _ => Err(NotAVersion(text.to_owned())),
        }
    }
}

/// Not a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a version of containerd: expected such as 2.2.4")]
pub struct NotAVersion(String);

/// What an operator, or a program, can do something about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Which trap, in a word that stays the same.
    pub reason: Reason,
    /// What it costs.
    pub severity: Severity,
    /// What is the matter, in a sentence.
    pub message: String,
    /// What to do about it.
    pub way_out: String,
}

/// The traps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "each verdict carries its sentence")]
pub enum Reason {
    Unreadable,
    CriDisabled,
    NoConfigPath,
    NotInConfigPath,
    Shadowed,
    MirrorsInUse,
    ConfigsInUse,
    TransferTwoDirectories,
    Soci,
    ParallelLayerFetch,
    ImportsReplace,
}

/// What a trap costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Note,
    /// Some versions of containerd, or some pulls, go past the mirror.
    Limits,
    /// containerd never asks the mirror.
    Blocks,
}

/// Which code of containerd pulls images for Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PullPath {
    /// The CRI plugin's own: it takes several directories in `config_path`.
    Local,
    /// The transfer service of 2.1 and later: it takes `a:b` as one directory.
    Transfer,
    /// Local before 2.1, transfer service from then on.
    ByVersion,
}

/// What the configuration says about certs.d.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// The worst first.
    pub verdicts: Vec<Verdict>,
    /// Which code pulls.
    pub pull_path: PullPath,
    /// The directories of `config_path`, in order.
    pub roots: Vec<PathBuf>,
    /// containerd's root directory: its content store is below it. `None` where a file is unreadable.
    pub content_root: Option<PathBuf>,
    /// Whether layers leave the content store once they are unpacked.
    pub discards_layers: bool,
    /// Where containerd listens, if a file says so.
    #[serde(skip)]
    pub socket: Option<PathBuf>,
}

impl Judgement {
    /// Whether containerd asks the mirror.
    pub fn is_honoured(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.severity != Severity::Blocks)
    }

    /// Adds what only someone with a disk can know.
    pub fn add(&mut self, verdict: Verdict) {
        self.verdicts.push(verdict);
        self.verdicts.sort_by_key(|verdict| std::cmp::Reverse(verdict.severity));
    }

    /// The roots that containerd looks at before `certs_d`.
    pub fn roots_before(&self, certs_d: &Path) -> &[PathBuf] {
        let at = self.roots.iter().position(|root| same(root, certs_d));
        &self.roots[..at.unwrap_or_default()]
    }

    /// The roots that containerd looks at after `certs_d`, if it looks at that.
    pub fn roots_after(&self, certs_d: &Path) -> &[PathBuf] {
        let at = self.roots.iter().position(|root| same(root, certs_d));
        at.and_then(|at| self.roots.get(at + 1..)).unwrap_or_default()
    }
}

/// Judges the main file and its imports, in the order that containerd loads them. No file at all is
/// containerd's default configuration.
pub fn judge(files: &[(PathBuf, String)], certs_d: &Path, version: Option<Version>) -> Judgement {
    let (settings, mut verdicts) = read(files, version);
    let roots = roots(&settings, version);
    let pull_path = pull_path(&settings, version);
    verdicts.extend(registry_tables(&settings));
    verdicts.extend(config_path(&settings, &roots, certs_d, version));
    verdicts.extend(two_directories(pull_path, &roots));
    verdicts.extend(other_notes(&settings));
    let is_readable = verdicts.iter().all(|verdict| verdict.reason != Reason::Unreadable);
    let content_root = is_readable.then(|| PathBuf::from(settings.root.as_deref().unwrap_or(DEFAULT_ROOT)));
    verdicts.sort_by_key(|verdict| std::cmp::Reverse(verdict.severity));
    let (discards_layers, socket) = (settings.discard_unpacked_layers, settings.socket.map(PathBuf::from));
    Judgement { verdicts, pull_path, roots, content_root, discards_layers, socket }
}

fn read(files: &[(PathBuf, String)], version: Option<Version>) -> (Settings, Vec<Verdict>) {
    let mut verdicts = Vec::new();
    let mut parsed = Vec::new();
    for (path, text) in files {
        match text.parse::<toml_edit::DocumentMut>() {
            Ok(document) => parsed.push(document),
            Err(error) => verdicts.push(Verdict {
                reason: Reason::Unreadable,
                severity: Severity::Blocks,
                message: format!("{} is not TOML: {}", path.display(), error.message()),
                way_out: "containerd does not start with this file: correct it".into(),
            }),
        }
    }
    let merged = settings::merge(&parsed, false);
    // containerd 1.x takes each plugin's whole section from the last file that has one.
    let replaced = settings::merge(&parsed, true);
    match version {
        Some(version) if version.major < 2 => (replaced, verdicts),
        Some(_) => (merged, verdicts),
        None => {
            if merged != replaced && merged.root_version < 3 {
                verdicts.push(Verdict {
                    reason: Reason::ImportsReplace,
                    severity: Severity::Note,
                    message: "version unknown: an imported file has part of a section that another has too: containerd 1.x uses only \
                              the last one, 2.x both; judged here as 2.x does"
                        .into(),
                    way_out: "keep the whole CRI section in one file".into(),
                });
            }
            (merged, verdicts)
        }
    }
}

fn roots(settings: &Settings, version: Option<Version>) -> Vec<PathBuf> {
    let is_default = settings.config_path.is_empty() && !settings.mirrors && has_default(version);
    let text = if is_default { DEFAULT_CONFIG_PATH } else { &settings.config_path };
    text.split(':').filter(|root| !root.is_empty()).map(PathBuf::from).collect()
}

fn has_default(version: Option<Version>) -> bool {
    version >= Some(Version { major: 2, minor: 2 })
}

fn pull_path(settings: &Settings, version: Option<Version>) -> PullPath {
    let transfers = Version { major: 2, minor: 1 };
    match version {
        _ if settings.forces_local_pull() => PullPath::Local,
        Some(version) if version < transfers => PullPath::Local,
        Some(_) => PullPath::Transfer,
        None => PullPath::ByVersion,
    }
}

fn registry_tables(settings: &Settings) -> Option<Verdict> {
    let has_path = !settings.config_path.is_empty();
    if settings.mirrors {
        let message = if has_path {
            "`registry.mirrors` and `config_path` are both set: containerd's CRI plugin refuses to start"
        } else {
            "`registry.mirrors` is set: containerd uses it and does not look into certs.d"
        };
        return Some(Verdict {
            reason: Reason::MirrorsInUse,
            severity: Severity::Blocks,
            message: message.into(),
            way_out: "move the mirrors into hosts.toml files, remove `registry.mirrors` and set config_path".into(),
        });
    }
    settings.configs.then(|| Verdict {
        reason: Reason::ConfigsInUse,
        severity: Severity::Note,
        message: "`registry.configs` or `registry.auths` is set: deprecated, and its `tls` cannot stand beside \
                  config_path"
            .into(),
        way_out: "move certificates into hosts.toml files and credentials into imagePullSecrets".into(),
    })
}

fn config_path(settings: &Settings, roots: &[PathBuf], certs_d: &Path, version: Option<Version>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    if settings.cri_disabled {
        verdicts.push(Verdict {
            reason: Reason::CriDisabled,
            severity: Severity::Blocks,
            message: "the CRI plugin is in `disabled_plugins`: this containerd pulls nothing for Kubernetes".into(),
            way_out: "remove it from `disabled_plugins`, or point containerd.config at the right containerd".into(),
        });
    }
    if roots.is_empty() && !settings.mirrors {
        let (severity, unknown, which) = match version {
            None if settings.forces_local_pull() => (Severity::Limits, UNKNOWN, " before containerd 2.2"),
            _ => (Severity::Blocks, "", ""),
        };
        verdicts.push(Verdict {
            reason: Reason::NoConfigPath,
            severity,
            message: format!("{unknown}`config_path` is not set: certs.d is not looked at{which}"),
            way_out: format!("set {} = \"{}\" and restart containerd", settings.config_path_key(), certs_d.display()),
        });
    }
    if !roots.is_empty() && !roots.iter().any(|root| same(root, certs_d)) {
        verdicts.push(Verdict {
            reason: Reason::NotInConfigPath,
            severity: Severity::Blocks,
            message: format!(
                "certs_d.path {} is not in containerd's config_path \"{}\"",
                certs_d.display(),
                join(roots)
            ),
            way_out: format!("set certs_d.path = \"{}\"", roots[0].display()),
        });
    }
    verdicts
}

fn two_directories(pull_path: PullPath, roots: &[PathBuf]) -> Option<Verdict> {
    let (severity, unknown) = match pull_path {
        PullPath::Local => return None,
        PullPath::Transfer => (Severity::Blocks, ""),
        PullPath::ByVersion => (Severity::Limits, UNKNOWN),
    };
    (roots.len() > 1).then(|| Verdict {
        reason: Reason::TransferTwoDirectories,
        severity,
        message: format!(
            "{unknown}containerd 2.1 and later pulls through its transfer service here, which takes \"{}\" as the name of one \
             directory: every hosts.toml is ignored",
            join(roots)
        ),
        way_out: "set config_path to one directory, or use_local_image_pull = true, or discard_unpacked_layers = true \
                  (the default of EKS AL2023), and restart containerd"
            .into(),
    })
}

fn other_notes(settings: &Settings) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    if settings.snapshotter.starts_with("soci") {
        verdicts.push(Verdict {
            reason: Reason::Soci,
            severity: Severity::Limits,
            message: "the snapshotter is soci (FastImagePull): it fetches layers from the registry itself; only \
                      manifests and configs pass the mirror"
                .into(),
            way_out: "use the overlayfs snapshotter on nodes where images should come from the cluster".into(),
        });
    }
    if settings.layer_fetch_buffer >= 512 {
        verdicts.push(Verdict {
            reason: Reason::ParallelLayerFetch,
            severity: Severity::Note,
            message: "concurrent_layer_fetch_buffer is on: blobs that are not complete here are served as one stream"
                .into(),
            way_out: "nothing to do; it gains nothing on a pull through the mirror".into(),
        });
    }
    verdicts
}

/// A verdict that needs a look at the disk: an earlier root has what containerd takes first.
pub fn shadowed(by: &Path, certs_d: &Path) -> Verdict {
    Verdict {
        reason: Reason::Shadowed,
        severity: Severity::Blocks,
        message: format!("{} comes before {} in config_path and is taken instead", by.display(), certs_d.display()),
        way_out: "remove that directory, or set certs_d.path to the first root".into(),
    }
}

/// A verdict on a file that exists and cannot be read.
pub fn unreadable(path: &Path, why: &str) -> Verdict {
    Verdict {
        reason: Reason::Unreadable,
        severity: Severity::Limits,
        message: format!("cannot read {}: {why}; what it says is not known", path.display()),
        way_out: "mount containerd's configuration directory into the agent, or set containerd.config".into(),
    }
}

/// Paths as texts differ by a slash at the end; links are not followed.
fn same(a: &Path, b: &Path) -> bool {
    a.components().eq(b.components())
}

fn join(roots: &[PathBuf]) -> String {
    roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(":")
}
