//! certs.d as a whole, before and after: what a user sees of us, and that nothing of theirs is lost.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use darter_core::containerd_config::{PullPath, Reason};
use tempfile::TempDir;

use super::*;
use crate::config::Layers;

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
        CertsD::new(&self.config, &self.config.registries, "127.0.0.1:4001".parse().unwrap(), metrics)
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
            for entry in fs::read_dir(&dir).unwrap() {
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

#[test]
fn install_and_withdraw_leave_every_host_as_it_was() {
    for adopt in [false, true] {
        for (name, mut host) in hosts() {
            host.config.certs_d.adopt = adopt;
            let before = host.tree();
            assert_eq!(host.round(true), HostsState::Written, "{name}");
            let installed = host.tree();
            assert_ne!(installed, before, "{name}");
            assert_eq!(host.round(true), HostsState::Written, "{name}");
            assert_eq!(host.tree(), installed, "{name}: the second round changes nothing");
            assert!(matches!(host.round(false), HostsState::Absent { .. }), "{name}");
            assert_eq!(host.tree(), before, "{name}: withdrawn");
            host.round(false);
            assert_eq!(host.tree(), before, "{name}: withdrawn twice");
            host.round(true);
            assert_eq!(host.tree(), installed, "{name}: put back");
            uninstall(&host.config).unwrap();
            assert_eq!(host.tree(), before, "{name}: uninstalled");
            assert_eq!(uninstall(&host.config).unwrap(), [], "{name}: nothing left to undo");
        }
    }
}

#[test]
fn the_file_in_force_holds_what_it_hides() {
    for (name, needles) in [
        ("a user's file", &["# mine", "[host.\"https://harbor.example\"]"][..]),
        ("docker's layout", &["ca = [\"ca.crt\"]", "client = [[\"c.cert\", \"c.key\"]]"]),
        ("a default", &["# mine", "[host.\"https://harbor.example\"]"]),
        ("an unreadable file", &["ca = [\"ca.crt\"]"]),
        ("Spegel", &["30020"]),
    ] {
        let (_, host) = hosts().into_iter().find(|(known, _)| *known == name).unwrap();
        host.round(true);
        let text = host.hosts();
        for needle in needles.iter().chain(&[MIRROR]) {
            assert!(text.contains(needle), "{name}: {needle}\n{text}");
        }
        let mode = fs::metadata(host.path(&format!("{REGISTRY}/hosts.toml"))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "{name}");
    }
}

#[test]
fn a_file_of_another_root_is_folded_in_with_its_certificates() {
    let host = Host::new();
    let docker = host.dir.path().join("docker/certs.d");
    fs::create_dir_all(docker.join(REGISTRY)).unwrap();
    fs::write(docker.join(REGISTRY).join("ca.crt"), "CA").unwrap();
    let containerd = format!(
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"{}:{}\"\n",
        host.config.certs_d.path.display(),
        docker.display()
    );
    fs::write(&host.config.containerd.config, containerd).unwrap();
    let before = host.tree();
    host.round(true);
    let text = host.hosts();
    assert!(text.contains(&format!("ca = [\"{}/{REGISTRY}/ca.crt\"]", docker.display())), "{text}");
    // And follows it.
    fs::write(docker.join(REGISTRY).join("second.crt"), "CA").unwrap();
    host.round(true);
    assert!(host.hosts().contains("second.crt"), "{}", host.hosts());
    host.round(false);
    assert_eq!(host.tree(), before);
}

#[test]
fn adopted_dragonfly_and_spegel_are_out_and_come_back() {
    for (text, by) in [(DRAGONFLY, Foreign::Dragonfly), (SPEGEL, Foreign::Spegel)] {
        let mut host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), text)]);
        let before = host.tree();
        if by == Foreign::Dragonfly {
            assert_eq!(host.round(true), HostsState::Foreign { by });
            assert_eq!(host.tree(), before, "not touched without adopt");
        }
        host.config.certs_d.adopt = true;
        assert_eq!(host.round(true), HostsState::Written);
        let headers: Vec<_> = host.hosts().lines().filter(|line| line.starts_with('[')).map(str::to_owned).collect();
        assert_eq!(headers, [MIRROR], "{by}");
        // Whatever the configuration says by then.
        host.config.certs_d.adopt = false;
        uninstall(&host.config).unwrap();
        assert_eq!(host.tree(), before, "{by}");
    }
}

#[test]
fn an_adopted_registry_goes_on_from_what_it_had_before_spegel() {
    let (_, mut host) = hosts().into_iter().find(|(name, _)| *name == "Spegel").unwrap();
    host.config.certs_d.adopt = true;
    host.round(true);
    assert!(host.hosts().contains("harbor.example"), "{}", host.hosts());
    assert_eq!(host.certs_d().foreign_origins(&REGISTRY.parse().unwrap()), ["https://harbor.example"]);
}

#[test]
fn edits_of_the_merged_file_survive_withdrawal_and_uninstall() {
    let edit = |host: &Host| {
        let text = format!("{}\n# new\n[host.\"https://new.example\"]\n", host.hosts());
        host.put(&format!("{REGISTRY}/hosts.toml"), &text);
    };
    for undo in [|host: &Host| drop(host.round(false)), |host: &Host| drop(uninstall(&host.config).unwrap())] {
        let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
        let before = host.tree().keys().cloned().collect::<Vec<_>>();
        host.round(true);
        edit(&host);
        assert_eq!(host.round(true), HostsState::Written);
        assert!(host.hosts().contains("# new"));
        undo(&host);
        assert_eq!(host.hosts(), format!("{HARBOR}\n# new\n[host.\"https://new.example\"]\n"));
        assert_eq!(host.tree().keys().cloned().collect::<Vec<_>>(), before);
        // In a directory that we made, too.
        let host = Host::new();
        host.round(true);
        edit(&host);
        undo(&host);
        assert_eq!(host.hosts(), "\n# new\n[host.\"https://new.example\"]\n");
    }
}

#[test]
fn a_file_of_ours_that_someone_broke_is_kept_beside() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    host.round(true);
    host.put(&format!("{REGISTRY}/hosts.toml"), &format!("{}\nserver = ", host.hosts()));
    assert_eq!(host.round(true), HostsState::Written);
    assert!(host.hosts().contains("harbor.example"));
    assert!(host.get(&format!("{REGISTRY}/hosts.toml.darter-unreadable")).ends_with("server = "));
    host.round(false);
    assert_eq!(host.hosts(), HARBOR);
}

#[test]
fn a_file_that_replaces_ours_is_the_new_original() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    host.round(true);
    let newer = "[host.\"https://newer.example\"]\n";
    host.put(&format!("{REGISTRY}/hosts.toml"), newer);
    host.round(true);
    assert!(host.hosts().contains("newer.example") && !host.hosts().contains("harbor.example"));
    host.round(false);
    assert_eq!(host.hosts(), newer);
}

#[test]
fn a_deleted_file_comes_back_with_what_it_was_made_from() {
    for files in [&[][..], &[(&*format!("{REGISTRY}/hosts.toml"), HARBOR)]] {
        let host = Host::with(files);
        let before = host.tree();
        host.round(true);
        let installed = host.tree();
        fs::remove_file(host.path(&format!("{REGISTRY}/hosts.toml"))).unwrap();
        host.round(true);
        assert_eq!(host.tree(), installed);
        fs::remove_dir_all(host.path(REGISTRY)).unwrap();
        host.round(true);
        assert!(host.hosts().contains(MIRROR));
        fs::remove_file(host.path(&format!("{REGISTRY}/hosts.toml"))).unwrap();
        host.round(false);
        if files.is_empty() {
            assert_eq!(host.tree(), before);
        }
    }
}

/// A kill leaves the tree after any prefix of the steps. The steps of an installation over a user's
/// file are backup, base, exchange; of one into a new directory, a staged directory and its rename.
#[test]
fn a_kill_between_any_two_steps_is_understood_by_the_next_start_and_by_uninstall() {
    let whole = |files: &[(&str, &str)]| {
        let host = Host::with(files);
        host.round(true);
        host.tree()
    };
    let dir = |name: &str| format!("{REGISTRY}/{name}");
    let installed = whole(&[(&dir("hosts.toml"), HARBOR)]);
    let merged = installed[&format!("certs.d/{}", dir("hosts.toml"))].clone().unwrap();
    let leftovers: [&[(&str, &str)]; 6] = [
        &[(&dir("hosts.toml.darter-backup"), HARBOR)],
        &[(&dir(".darter-tmp-1-hosts.toml"), &merged), (&dir("hosts.toml.darter-backup"), HARBOR)],
        &[(&dir(".darter-tmp-1-hosts.toml.darter-backup"), HARBOR)],
        &[(".darter-tmp-7-ghcr.io/hosts.toml", &merged), (".darter-tmp-7-ghcr.io/.darter-created", "")],
        &[(&dir("hosts.toml.darter-base"), HARBOR), (&dir("hosts.toml.darter-backup"), HARBOR)],
        // The exchange of a restoration was done, the removal after it not.
        &[(&dir("hosts.toml.darter-backup"), &merged)],
    ];
    for left in leftovers {
        let start = || {
            let host = Host::with(&[(&dir("hosts.toml"), HARBOR)]);
            let before = host.tree();
            left.iter().for_each(|(path, text)| host.put(path, text));
            (host, before)
        };
        let (host, before) = start();
        uninstall(&host.config).unwrap();
        assert_eq!(host.tree(), before, "uninstall after {left:?}");
        let (host, before) = start();
        let mut keeper = host.certs_d().keeper;
        keeper.clear_leftovers();
        keeper.round(true);
        assert_eq!(host.tree(), installed, "start after {left:?}");
        keeper.round(false);
        assert_eq!(host.tree(), before, "withdrawal after {left:?}");
    }
    // Killed in the middle of a restoration: the backup is there, our file is not.
    let host = Host::with(&[(&dir("hosts.toml.darter-backup"), HARBOR)]);
    uninstall(&host.config).unwrap();
    assert_eq!(host.hosts(), HARBOR);
}

#[test]
fn a_host_without_containerd_gets_nothing() {
    let host = Host::new();
    fs::remove_dir(host.dir.path().join("containerd")).unwrap();
    let HostsState::Absent { reason } = host.round(true) else { panic!("not absent") };
    assert!(reason.contains("no containerd here"), "{reason}");
    assert_eq!(fs::read_dir(host.dir.path()).unwrap().count(), 0);
    assert_eq!(uninstall(&host.config).unwrap(), []);
}

#[test]
fn a_place_that_cannot_be_written_is_reported_and_left() {
    // Root may write anywhere; a file in the way stops everybody.
    let host = Host::with(&[(REGISTRY, "")]);
    let before = host.tree();
    let HostsState::Failed { reason } = host.round(true) else { panic!("not failed") };
    assert!(reason.contains(REGISTRY) && reason.contains(": "), "{reason}");
    assert_eq!(host.tree(), before);
}

#[test]
fn a_read_only_directory_is_reported_and_left() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let before = host.tree();
    let dir = host.path(REGISTRY);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o555)).unwrap();
    let state = host.round(true);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    if rustix::process::geteuid().is_root() {
        assert_eq!(state, HostsState::Written);
    } else {
        assert!(matches!(state, HostsState::Failed { .. }), "{state:?}");
        assert_eq!(host.tree(), before);
    }
}

#[test]
fn a_directory_that_is_a_link_is_not_followed() {
    let host = Host::with(&[("_default/hosts.toml", HARBOR)]);
    std::os::unix::fs::symlink("_default", host.path(REGISTRY)).unwrap();
    let before = host.tree();
    assert!(matches!(host.round(true), HostsState::Failed { .. }));
    assert_eq!(host.tree(), before);
    uninstall(&host.config).unwrap();
    assert_eq!(host.tree(), before);
}

#[test]
fn a_link_in_place_of_the_file_is_put_back_as_a_link() {
    let host = Host::with(&[("managed/hosts.toml", HARBOR), (&format!("{REGISTRY}/.keep"), "")]);
    let link = host.path(&format!("{REGISTRY}/hosts.toml"));
    std::os::unix::fs::symlink("../managed/hosts.toml", &link).unwrap();
    host.round(true);
    assert!(!link.is_symlink() && host.hosts().contains("# mine"));
    assert_eq!(host.get("managed/hosts.toml"), HARBOR, "what it points to is not ours");
    host.round(false);
    assert!(link.is_symlink());
    assert_eq!(host.hosts(), HARBOR);
}

#[test]
fn no_write_mode_writes_nothing_and_says_what_the_file_should_be() {
    for (name, mut host) in hosts() {
        host.config.certs_d.write = false;
        let before = host.tree();
        let HostsState::NotWritten { should_be } = host.round(true) else { panic!("{name}") };
        assert!(should_be.contains(MIRROR));
        host.round(false);
        assert_eq!(host.tree(), before, "{name}");
        host.put(&format!("{REGISTRY}/hosts.toml"), &should_be);
        if name != "the name without a colon" {
            assert_eq!(host.round(true), HostsState::Written, "{name}");
        }
    }
}

#[test]
fn a_registry_that_is_off_gets_no_file() {
    let mut host = Host::new();
    host.config.registries[0].access = Some(Access::Off);
    assert!(matches!(host.round(true), HostsState::Absent { .. }));
    assert_eq!(host.tree().len(), 0, "not even certs.d itself");
}

#[test]
fn foreign_origins_are_read_before_and_after_installation() {
    let registry = REGISTRY.parse().unwrap();
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    for _ in 0..2 {
        assert_eq!(host.certs_d().foreign_origins(&registry), ["https://harbor.example"]);
        host.round(true);
    }
    let host = Host::with(&[("_default/hosts.toml", HARBOR)]);
    assert_eq!(host.certs_d().foreign_origins(&registry), ["https://harbor.example"]);
    assert_eq!(host.certs_d().foreign_origins(&"other.example".parse().unwrap()), [""; 0]);
}

#[test]
fn an_edit_between_reading_and_writing_is_never_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts.toml");
    fs::write(&path, "theirs").unwrap();
    let stale = files::Content { bytes: b"older".to_vec(), text: "older".into() };
    assert!(!files::replace(&path, Some(&stale), "ours").unwrap());
    assert!(!files::replace(&path, None, "ours").unwrap());
    assert!(!files::take_away(&path, &stale).unwrap());
    let backup = dir.path().join("backup");
    fs::write(&backup, "backup").unwrap();
    assert!(!files::put_back(&backup, &path, Some(&stale)).unwrap());
    assert!(!files::put_back(&backup, &path, None).unwrap());
    // The edit came after the last look and before the rename.
    assert!(!files::exchange_checked(&backup, &path, &stale).unwrap());
    assert!(!files::make_dir(dir.path(), &[("hosts.toml", "ours")]).unwrap());
    assert!(!files::take_away_dir(dir.path(), Some(&stale)).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
    assert_eq!(fs::read_to_string(&backup).unwrap(), "backup");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "and nothing is left about");
}

#[test]
fn uninstall_finds_the_files_of_an_agent_that_was_configured_otherwise() {
    let mut host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR), ("ghcr.io/hosts.toml", DRAGONFLY)]);
    let before = host.tree();
    host.config.certs_d.adopt = true;
    host.config.registries.push(RegistryConfig::named("ghcr.io".parse().unwrap()));
    host.config.registries.push(RegistryConfig::named("quay.io".parse().unwrap()));
    host.round(true);
    assert!(host.get("quay.io/hosts.toml").contains(MIRROR));
    let now = Host::new().config;
    host.config = Config { certs_d: crate::config::CertsD { path: host.path(""), ..now.certs_d.clone() }, ..now };
    host.config.registries.clear();
    host.config.mirror.listen.set_port(4555);
    let undone: Vec<How> = uninstall(&host.config).unwrap().iter().map(|undone| undone.how).collect();
    assert_eq!(undone, [How::Restored, How::Removed, How::Restored]);
    assert_eq!(host.tree(), before);
}

/// A running writer, and what is needed to end it.
struct Running {
    serving: channel::Sender<bool>,
    states: channel::Receiver<States>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    metrics: Arc<Metrics>,
}

impl Running {
    fn start(host: &Host, is_serving: bool) -> Self {
        let certs_d = host.certs_d();
        let (metrics, states) = (certs_d.keeper.metrics.clone(), certs_d.states());
        let (serving, heard) = channel::channel(is_serving);
        let stop = CancellationToken::new();
        let task = tokio::spawn(certs_d.run(heard, stop.clone()));
        Self { serving, states, stop, task, metrics }
    }

    async fn until(&mut self, wanted: impl Fn(&HostsState) -> bool) {
        let found = self.states.wait_for(|states| states.first().is_some_and(|(_, state)| wanted(state)));
        tokio::time::timeout(Duration::from_secs(20), found).await.expect("in time").unwrap();
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// Looks until it is so: the tree is another program's view, nobody tells it.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_follows_the_self_test_and_goes_when_the_agent_stops() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let before = host.tree();
    let mut running = Running::start(&host, false);
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.serving.send_replace(true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(host.hosts().contains(MIRROR));
    running.serving.send_replace(false);
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.serving.send_replace(true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(running.metrics.render().contains("state=\"written\"} 1"));
    assert!(!running.metrics.render().contains("state=\"absent\""));
    running.stop().await;
    assert_eq!(host.tree(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_self_test_takes_the_file_away() {
    let host = Host::new();
    let before = host.tree();
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    drop(std::mem::replace(&mut running.serving, channel::channel(true).0));
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_is_heard_healed_and_counted_at_once() {
    let host = Host::new();
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let right = host.tree();
    // The timer is an hour away: what heals here was heard.
    fs::remove_file(host.path(&format!("{REGISTRY}/hosts.toml"))).unwrap();
    eventually("a deleted file comes back", || host.tree() == right).await;
    host.put(&format!("{REGISTRY}/hosts.toml"), &host.hosts().replace("\"resolve\"", "\"push\""));
    eventually("an edit of our table is undone", || host.tree() == right).await;
    fs::remove_dir_all(host.path("")).unwrap();
    eventually("certs.d itself comes back", || host.tree() == right).await;
    eventually("counted", || running.metrics.hosts_toml_repairs.get() == 3).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_goes_or_comes_is_heard_wherever_it_was_folded_from() {
    let host = Host::with(&[("_default/a.crt", "CA")]);
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(host.hosts().contains("_default/a.crt\"]"), "{}", host.hosts());
    // containerd fails every pull of a registry whose `ca` it cannot read.
    fs::remove_file(host.path("_default/a.crt")).unwrap();
    eventually("a certificate that is gone is not named", || !host.hosts().contains("ca = ")).await;
    host.put(&format!("{REGISTRY}/own.crt"), "CA");
    eventually("the registry's own counts", || host.hosts().contains("ca = [\"own.crt\"]")).await;
    running.stop().await;
    assert_eq!(host.get(&format!("{REGISTRY}/own.crt")), "CA");
    assert_eq!(fs::read_dir(host.path(REGISTRY)).unwrap().count(), 1, "the user's file, in a directory now theirs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_remove_on_exit_off_the_file_stays() {
    let mut host = Host::new();
    host.config.certs_d.remove_on_exit = false;
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let installed = host.tree();
    running.stop().await;
    assert_eq!(host.tree(), installed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_instant_the_file_is_whole() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let path = host.path(&format!("{REGISTRY}/hosts.toml"));
    let done = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let done = done.clone();
        move || {
            let (mut with, mut without) = (0_u32, 0_u32);
            while !done.load(Ordering::Relaxed) {
                // Over a user's file there is one at every instant, and it is the user's or ours.
                let text = fs::read_to_string(&path).expect("a file");
                assert!(text == HARBOR || (text.contains(MIRROR) && text.ends_with(&HARBOR[HARBOR.len() - 33..])));
                if text == HARBOR { without += 1 } else { with += 1 }
            }
            (with, without)
        }
    });
    let mut running = Running::start(&host, true);
    for _ in 0..25 {
        running.until(|state| *state == HostsState::Written).await;
        running.serving.send_replace(false);
        running.until(|state| matches!(state, HostsState::Absent { .. })).await;
        running.serving.send_replace(true);
    }
    running.until(|state| *state == HostsState::Written).await;
    running.stop().await;
    done.store(true, Ordering::Relaxed);
    let (with, without) = reader.join().unwrap();
    assert!(with > 0 && without > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_beside_us_never_loses_its_last_word() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let path = host.path(&format!("{REGISTRY}/hosts.toml"));
    let temp = host.path("theirs");
    for n in 0..200 {
        // As configuration management does it: a new file, by rename.
        fs::write(&temp, format!("[host.\"https://n{n}.example\"]\n")).unwrap();
        fs::rename(&temp, &path).unwrap();
        assert!(host.tree().len() < 9, "no litter");
    }
    eventually("the last word is merged", || host.hosts().contains("n199.example") && host.hosts().contains(MIRROR))
        .await;
    running.stop().await;
    assert_eq!(host.hosts(), "[host.\"https://n199.example\"]\n");
}

fn containerd_config(config_path: &str, discard: bool) -> String {
    format!(
        "version = 3\nimports = [\"conf.d/*.toml\"]\n[plugins.'io.containerd.cri.v1.images']\n\
         discard_unpacked_layers = {discard}\n[plugins.'io.containerd.cri.v1.images'.registry]\n\
         config_path = '{config_path}'\n"
    )
}

#[test]
fn the_preflight_reads_containerds_files_and_imports() {
    let recent = Some("2.2.4".parse().unwrap());
    for (two, discard, honoured) in [(true, true, true), (true, false, false), (false, false, true)] {
        let host = Host::new();
        let certs_d = host.config.certs_d.path.display().to_string();
        let config_path = if two { format!("{certs_d}:/etc/docker/certs.d") } else { certs_d };
        fs::write(&host.config.containerd.config, containerd_config(&config_path, discard)).unwrap();
        let answer = preflight_for(&host.config, recent);
        assert_eq!(answer.honoured, honoured, "{answer}");
        assert_eq!(answer.judgement.discards_layers, discard);
        // An import turns it round.
        let conf_d = host.dir.path().join("containerd/conf.d");
        fs::create_dir(&conf_d).unwrap();
        let import = "version = 3\nimports = [\"../config.toml\"]\n[plugins.'io.containerd.cri.v1.images']\n\
                      use_local_image_pull = true\n";
        fs::write(conf_d.join("10-local.toml"), import).unwrap();
        fs::write(conf_d.join("ignored.conf"), "not = toml = at all").unwrap();
        let answer = preflight_for(&host.config, recent);
        assert_eq!((answer.honoured, answer.files.len()), (true, 2), "{answer}");
        assert_eq!(answer.judgement.pull_path, PullPath::Local);
    }
}

#[test]
fn the_preflight_says_what_hides_us_and_what_it_could_not_read() {
    let host = Host::new();
    let answer = preflight(&host.config);
    assert!(!answer.honoured);
    assert!(answer.to_string().starts_with("cannot tell"), "{answer}");
    let first = host.dir.path().join("first");
    fs::create_dir_all(first.join("_default")).unwrap();
    let roots = format!("{}:{}", first.display(), host.config.certs_d.path.display());
    fs::write(&host.config.containerd.config, containerd_config(&roots, true)).unwrap();
    let answer = preflight(&host.config);
    let reasons: Vec<Reason> = answer.judgement.verdicts.iter().map(|verdict| verdict.reason).collect();
    assert_eq!((answer.honoured, reasons), (false, vec![Reason::Shadowed]));
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["verdicts"][0]["reason"], "shadowed");
    assert_eq!(json["honoured"], false);
}
