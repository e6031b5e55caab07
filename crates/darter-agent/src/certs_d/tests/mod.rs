//! Hosts as users have them, to be looked at before and after.

use std::collections::BTreeMap;
use std::fs;

use tempfile::TempDir;

use super::*;
use crate::config::Layers;
use crate::containerd::Known;

mod preflight;
mod running;
mod tree;

const REGISTRY: &str = "reg.example:5000";
const MIRROR: &str = "[host.\"http://127.0.0.1:4001\"]";
const HARBOR: &str = "# mine\nserver = \"https://reg.example:5000\"\n\n[host.\"https://harbor.example\"]\n";
const DRAGONFLY: &str = "server = \"https://reg.example:5000\"\n\n[host.\"http://127.0.0.1:4001\"]\n\
                         capabilities = [\"pull\", \"resolve\"]\n\n[host.\"http://127.0.0.1:4001\".header]\n\
                         X-Dragonfly-Registry = [\"https://reg.example:5000\"]\n";
const SPEGEL: &str = "server = 'https://reg.example:5000'\n\n[host.'http://10.0.3.7:30020']\n\
                      capabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n";

/// A host with containerd's directory, as far as we touch it.
struct Host {
    dir: TempDir,
    config: Config,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("containerd");
        fs::create_dir(&etc).unwrap();
        let text = format!(
            "[certs_d]\npath = \"{0}/certs.d\"\ncheck_every = \"1h\"\n[containerd]\nconfig = \"{0}/config.toml\"\n\
             [[registry]]\nname = \"{REGISTRY}\"\n",
            etc.display()
        );
        let config = Layers::text(&dir.path().join("darter.toml"), text).unwrap().config().unwrap();
        Self { dir, config }
    }

    fn with(files: &[(&str, &str)]) -> Self {
        let host = Self::new();
        for (path, text) in files {
            host.put(path, text);
        }
        host
    }

    /// A path below certs.d.
    fn path(&self, path: &str) -> PathBuf {
        self.config.certs_d.path.join(path)
    }

    fn put(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    fn get(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    fn hosts(&self) -> String {
        self.get(&format!("{REGISTRY}/hosts.toml"))
    }

    fn certs_d(&self) -> CertsD {
        let metrics = Arc::new(Metrics::new("0", "0"));
        let later_roots = preflight_for(&self.config, Known::not_asked()).later_roots;
        CertsD::new(&self.config, &later_roots, metrics)
    }

    /// The other hosts that a registry's file names.
    fn foreign(&self) -> Vec<ForeignOrigin> {
        self.certs_d().others().borrow().get(&REGISTRY.parse().unwrap()).cloned().unwrap_or_default()
    }

    fn round(&self, is_serving: bool) -> HostsState {
        let round = self.certs_d().keeper.round(is_serving);
        round.states.into_iter().next().unwrap().1
    }

    /// Every path below the containerd directory, with the text of the files.
    fn tree(&self) -> BTreeMap<String, Option<String>> {
        let mut tree = BTreeMap::new();
        let root = self.dir.path().join("containerd");
        let mut pending = vec![root.clone()];
        while let Some(dir) = pending.pop() {
            // A directory that is put in place of another has two names for a moment, and then one.
            for entry in fs::read_dir(&dir).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                if path.is_dir() && !path.is_symlink() {
                    pending.push(path);
                    tree.insert(name, None);
                } else {
                    tree.insert(name, Some(fs::read_to_string(&path).unwrap_or_default()));
                }
            }
        }
        tree
    }
}

fn harbor() -> ForeignOrigin {
    ForeignOrigin { url: "https://harbor.example".to_owned(), resolve: true }
}

/// Hosts as they are before us.
fn hosts() -> Vec<(&'static str, Host)> {
    let dir = |name: &str| format!("{REGISTRY}/{name}");
    vec![
        ("nothing", Host::new()),
        ("an empty certs.d", Host::with(&[(".keep", "")])),
        ("a user's file", Host::with(&[(&dir("hosts.toml"), HARBOR)])),
        ("inline hosts", Host::with(&[(&dir("hosts.toml"), "host.\"https://h\" = { capabilities = [\"pull\"] }")])),
        ("docker's layout", Host::with(&[(&dir("ca.crt"), "CA"), (&dir("c.cert"), "C"), (&dir("c.key"), "K")])),
        ("a default", Host::with(&[("_default/hosts.toml", HARBOR), ("_default/x.crt", "CA")])),
        ("the name without a colon", Host::with(&[("reg.example_5000_/hosts.toml", HARBOR)])),
        ("an unreadable file", Host::with(&[(&dir("hosts.toml"), "server = "), (&dir("ca.crt"), "CA")])),
        ("an empty file", Host::with(&[(&dir("hosts.toml"), "")])),
        ("Spegel", Host::with(&[(&dir("hosts.toml"), SPEGEL), (&format!("_backup/{}", dir("hosts.toml")), HARBOR)])),
        ("other registries", Host::with(&[("docker.io/hosts.toml", HARBOR), ("ghcr.io/ca.crt", "CA")])),
    ]
}
