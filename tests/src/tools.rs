//! The programs that tests run: where they are, and what to say when one is missing.
//!
//! `scripts/install-tools` installs them. A test that cannot run says so on a line of its own that
//! the test runner does not hide, and adds it to a list that `make test` counts: a green run never
//! means that nothing was looked at.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::thread::{CapabilitySet, capabilities};

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The distribution's own: 1.6 on Debian 12.
    V1,
    /// 2.2.4, which EKS nodes run, built by `scripts/install-tools`. Its CRI pulls by itself, as there.
    V2,
    /// The same, where the CRI has the transfer service pull: what it does where nobody configured it.
    V2Transfer,
}

impl Release {
    /// Both, for tests that hold on each.
    pub const ALL: [Self; 2] = [Self::V1, Self::V2];

    /// `containerd` and `ctr` of this release, if installed.
    pub fn programs(self) -> Option<(PathBuf, PathBuf)> {
        match self {
            Self::V1 => Some((find("containerd")?, find("ctr")?)),
            Self::V2 | Self::V2Transfer => Some((cached("containerd")?, cached("ctr")?)),
        }
    }
}

/// What a test needs beyond cargo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Root, to make network namespaces and mounts.
    Root,
    /// A containerd, and root to run it.
    Containerd(Release),
    /// Debian's docker-registry, and htpasswd.
    DockerRegistry,
    /// nginx.
    Nginx,
    /// The OCI distribution conformance suite.
    Conformance,
    /// kube-apiserver and etcd.
    Kubernetes,
    /// kube-controller-manager, besides.
    Controllers,
    /// kube-scheduler, besides.
    Scheduler,
    /// Karpenter with its kwok provider, and its kinds.
    Karpenter,
    /// KEDA's operator, and its kinds.
    Keda,
    /// helm.
    Helm,
    /// kubeconform.
    Kubeconform,
    /// The custom resources of the Prometheus Operator.
    PrometheusOperator,
    /// The kinds of Karpenter.
    KarpenterKinds,
    /// The kinds of KEDA.
    KedaKinds,
    /// buildah, and root to run it.
    Buildah,
    /// runc.
    Runc,
    /// The darter binary.
    Darter,
    /// The darter binary, if it has a scaler that runs.
    LiveScaler,
    /// The mock of NVIDIA's library.
    MockNvml,
    /// Prometheus and promtool.
    Prometheus,
}

impl Need {
    /// Why it is not met, or `None`.
    fn missing(self) -> Option<&'static str> {
        let (met, reason) = match self {
            Self::Root | Self::Containerd(_) | Self::Buildah if !has_rights() => {
                (false, "needs root, with the right to make network namespaces and mounts")
            }
            Self::Root | Self::Containerd(_) if find("ip").is_none() || find("tc").is_none() => {
                (false, "no ip or tc: run scripts/install-tools")
            }
            Self::Root => (true, ""),
            Self::Containerd(release @ Release::V1) => {
                (release.programs().is_some(), "no containerd: run scripts/install-tools")
            }
            Self::Containerd(release @ (Release::V2 | Release::V2Transfer)) => {
                (release.programs().is_some(), "no containerd 2.2.4: scripts/install-tools builds it, with Go")
            }
            Self::DockerRegistry => (
                find("docker-registry").is_some() && find("htpasswd").is_some(),
                "no docker-registry or htpasswd: run scripts/install-tools",
            ),
            Self::Nginx => (find("nginx").is_some(), "no nginx: run scripts/install-tools"),
            Self::Conformance => {
                (conformance().is_some(), "no conformance suite: scripts/install-tools builds it, with Go")
            }
            Self::Kubernetes => (
                kubernetes().is_some(),
                "no kube-apiserver or etcd: scripts/install-tools kubernetes builds them, with Go",
            ),
            Self::Controllers => (
                controller_manager().is_some(),
                "no kube-controller-manager: scripts/install-tools kubernetes builds it, with Go",
            ),
            Self::Scheduler => {
                (scheduler().is_some(), "no kube-scheduler: scripts/install-tools kube builds it, with Go")
            }
            Self::Karpenter => (
                karpenter().is_some(),
                "no Karpenter, or none of its kinds: scripts/install-tools kube builds it, with Go",
            ),
            Self::Keda => (
                keda().is_some(),
                "no operator of KEDA, or none of its kinds: scripts/install-tools kube builds it, with Go",
            ),
            Self::Helm => (helm().is_some(), "no helm: scripts/install-tools kubernetes builds it, with Go"),
            Self::Kubeconform => {
                (kubeconform().is_some(), "no kubeconform: scripts/install-tools kubernetes builds it, with Go")
            }
            Self::PrometheusOperator => (
                prometheus_operator().is_some(),
                "no kinds of the Prometheus Operator: scripts/install-tools kubernetes fetches them, with Go",
            ),
            Self::KarpenterKinds => (
                karpenter_kinds().is_some(),
                "no kinds of Karpenter: scripts/install-tools kubernetes fetches them, with Go",
            ),
            Self::KedaKinds => {
                (keda_kinds().is_some(), "no kinds of KEDA: scripts/install-tools kubernetes fetches them, with Go")
            }
            Self::Buildah => (find("buildah").is_some(), "no buildah: run scripts/install-tools image"),
            Self::Runc => (find("runc").is_some(), "no runc: run scripts/install-tools"),
            Self::Darter => (darter().is_ok(), "no darter binary: run cargo build -p darter"),
            Self::LiveScaler => (has_scaler(), "no darter binary with a `darter scaler`: run cargo build -p darter"),
            Self::Prometheus => (
                find("prometheus").is_some() && find("promtool").is_some(),
                "no prometheus or promtool: run scripts/install-tools",
            ),
            Self::MockNvml => (mock_nvml().is_ok(), "no mock of libnvidia-ml.so: run cargo build -p darter-nvml-mock"),
        };
        if met { None } else { Some(reason) }
    }
}

/// Whether a test can run here. If not, says why and counts it; the test then just returns.
///
/// With `DARTER_REQUIRE_ALL` set a test that cannot run fails instead.
pub fn can_run(test: &str, needs: &[Need]) -> bool {
    let Some(reason) = needs.iter().find_map(|need| need.missing()) else { return true };
    assert!(std::env::var_os("DARTER_REQUIRE_ALL").is_none(), "{test}: {reason}");
    let line = format!("NOT RUN: {test}: {reason}");
    say(&line);
    if let Ok(list) = File::options().create(true).append(true).open(not_run_list()) {
        let _ = append(list, &line);
    }
    false
}

/// Adds a line in one write: tests that run at once append to the same list, and theirs would come
/// between two.
fn append(mut list: impl io::Write, line: &str) -> io::Result<()> {
    list.write_all(format!("{line}\n").as_bytes())
}

/// Writes a line to the terminal. The test runner hides what tests print with `println!`.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The list of tests that did not run, one a line: `$DARTER_NOT_RUN`, or `not-run.txt` in target/.
/// Whoever starts a whole run removes it first.
pub fn not_run_list() -> PathBuf {
    std::env::var_os("DARTER_NOT_RUN").map_or_else(|| profile_dir().join("../not-run.txt"), PathBuf::from)
}

/// The directory of tools that are built from source and kept outside the clone.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("DARTER_TOOLS") {
        return dir.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    cache.or_else(home).unwrap_or_else(std::env::temp_dir).join("darter/tools")
}

/// A program of the distribution. /usr/sbin is looked at too: it is not on every user's PATH. Our own
/// tools are not, though they may be on it: the containerd there is the other one.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from);
    let own = cache_dir().join("bin");
    let dirs = std::env::split_paths(&path).chain(system).filter(|dir| *dir != own);
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The OCI distribution conformance suite, if installed.
pub fn conformance() -> Option<PathBuf> {
    cached("conformance")
}

/// kube-apiserver and etcd, if installed. Those of our own cache only: the tests know their version.
pub fn kubernetes() -> Option<(PathBuf, PathBuf)> {
    Some((cached("kube-apiserver")?, cached("etcd")?))
}

/// kube-controller-manager, if installed.
pub fn controller_manager() -> Option<PathBuf> {
    cached("kube-controller-manager")
}

/// kube-scheduler, if installed.
pub fn scheduler() -> Option<PathBuf> {
    cached("kube-scheduler")
}

/// Karpenter with its kwok provider, if installed, and the directories of the kinds that it needs.
pub fn karpenter() -> Option<(PathBuf, [PathBuf; 2])> {
    Some((cached("karpenter-kwok")?, [karpenter_kinds()?, kinds("karpenter.kwok.sh_kwoknodeclasses.yaml")?]))
}

/// KEDA's operator, if installed, and the directories of the kinds that it needs.
pub fn keda() -> Option<(PathBuf, [PathBuf; 2])> {
    Some((cached("keda-operator")?, [keda_kinds()?, kinds("eventing.keda.sh_cloudeventsources.yaml")?]))
}

/// helm, if installed. That of our own cache only: the tests know its version.
pub fn helm() -> Option<PathBuf> {
    cached("helm")
}

/// kubeconform, if installed.
pub fn kubeconform() -> Option<PathBuf> {
    cached("kubeconform")
}

/// The directory of the Prometheus Operator's custom resource definitions, if they were fetched.
pub fn prometheus_operator() -> Option<PathBuf> {
    kinds("monitoring.coreos.com_podmonitors.yaml")
}

/// The directory of Karpenter's custom resource definitions, if they were fetched.
pub fn karpenter_kinds() -> Option<PathBuf> {
    kinds("karpenter.sh_nodeclaims.yaml")
}

/// The directory of KEDA's custom resource definitions, if they were fetched.
pub fn keda_kinds() -> Option<PathBuf> {
    kinds("keda.sh_scaledobjects.yaml")
}

/// Where this one is, in its newest version.
fn kinds(file: &str) -> Option<PathBuf> {
    let versions = std::fs::read_dir(cache_dir().join("crds")).ok()?.flatten().map(|entry| entry.path());
    versions.filter(|path| path.join(file).is_file()).max()
}

/// The darter binary under test: `$DARTER_BIN`, or the one that cargo built beside this program.
pub fn darter() -> Result<PathBuf> {
    let path = std::env::var_os("DARTER_BIN").map_or_else(|| profile_dir().join("darter"), PathBuf::from);
    path.canonicalize().with_context(|| format!("no darter binary at {}: cargo build -p darter", path.display()))
}

fn has_scaler() -> bool {
    let help =
        darter().and_then(|darter| Ok(std::process::Command::new(darter).args(["scaler", "--help"]).output()?));
    help.is_ok_and(|help| help.status.success())
}

/// The mock of NVIDIA's library that cargo built beside this program, which depends on it.
pub fn mock_nvml() -> Result<PathBuf> {
    // In `deps` is the newest: one directory up is that of the last `cargo build` that named it.
    let name = Path::new("libnvidia_ml_mock.so");
    let paths = [profile_dir().join("deps").join(name), profile_dir().join(name)];
    let found = paths.iter().find(|path| path.is_file());
    found.cloned().with_context(|| format!("no {}: cargo build -p darter-nvml-mock", paths[0].display()))
}

fn cached(program: &str) -> Option<PathBuf> {
    Some(cache_dir().join("bin").join(program)).filter(|file| file.is_file())
}

/// `target/debug`, or whatever holds this program: tests run from its `deps`, examples from theirs.
fn profile_dir() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let dir = program.parent().unwrap_or_else(|| Path::new("."));
    match dir.file_name().and_then(|name| name.to_str()) {
        Some("deps" | "examples") => dir.parent().unwrap_or(dir).to_owned(),
        _ => dir.to_owned(),
    }
}

/// Root of a container may have neither right.
fn has_rights() -> bool {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    let own = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    rustix::process::geteuid().is_root() && own.contains(needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each call of `write` brought.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl io::Write for &mut Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_reaches_the_list_in_one_write_so_that_no_other_comes_between() {
        let mut writes = Writes::default();
        append(&mut writes, "NOT RUN: a test: no root").unwrap();
        assert_eq!(writes.0, [b"NOT RUN: a test: no root\n"]);
    }
}
