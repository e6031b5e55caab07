//! certs.d as a whole, before and after: what a user sees of us, and that nothing of theirs is lost.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::config::Access;
use crate::containerd::Known;

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
    assert_eq!(host.foreign(), [harbor()]);
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

#[tokio::test]
async fn preflight_names_what_dragonfly_and_spegel_left() {
    for (text, by) in [(DRAGONFLY, vec![Foreign::Dragonfly]), (SPEGEL, vec![Foreign::Spegel]), (HARBOR, vec![])] {
        let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), text)]);
        let found = preflight(&host.config).await;
        assert_eq!(found.left.iter().map(|left| left.by).collect::<Vec<_>>(), by);
        assert_eq!(found.to_string().contains("certs_d.adopt"), !by.is_empty());
        // A running agent looks at containerd's configuration every few seconds, and not at these.
        assert_eq!(preflight_for(&host.config, Known::default()).left.len(), 0);
    }
}

#[test]
fn a_registry_that_is_off_gets_no_file() {
    let mut host = Host::new();
    host.config.registries[0].access = Some(Access::Off);
    assert_eq!(host.round(true), HostsState::Closed);
    assert_eq!(HostsState::Closed.check(), darter_core::ready::State::Ok, "what the operator chose is no fault");
    assert_eq!(host.tree().len(), 0, "not even certs.d itself");
}

#[test]
fn foreign_origins_are_read_before_and_after_installation() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    for _ in 0..2 {
        assert_eq!(host.foreign(), [harbor()]);
        host.round(true);
    }
    let host = Host::with(&[("_default/hosts.toml", HARBOR)]);
    assert_eq!(host.foreign(), [harbor()]);
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

#[test]
fn a_registry_that_left_the_configuration_is_left_at_the_next_start() {
    let mut host = Host::with(&[("ghcr.io/hosts.toml", HARBOR)]);
    host.config.registries.push(RegistryConfig::named("ghcr.io".parse().unwrap()));
    host.config.registries.push(RegistryConfig::named("quay.io".parse().unwrap()));
    host.round(true);
    // Killed, and started with another configuration.
    host.config.registries.truncate(1);
    let mut keeper = host.certs_d().keeper;
    keeper.clear_leftovers();
    assert_eq!(host.get("ghcr.io/hosts.toml"), HARBOR);
    assert!(!host.path("quay.io").exists());
    assert!(host.hosts().contains(MIRROR), "the one that stays is not touched");
    keeper.round(false);
    assert_eq!(host.tree().len(), 3, "certs.d, ghcr.io and the user's file");
}

#[test]
fn a_registry_that_is_not_served_gets_back_what_it_had_until_it_is() {
    for (name, host) in hosts() {
        let before = host.tree();
        let mut keeper = host.certs_d().keeper;
        keeper.round(true);
        let reason = "cannot read ca.pem".to_owned();
        keeper.unserved.insert(REGISTRY.parse().unwrap(), reason.clone());
        let states = keeper.round(true).states;
        assert_eq!(states, [(REGISTRY.parse().unwrap(), HostsState::Absent { reason })], "{name}");
        keeper.round(false);
        assert_eq!(host.tree(), before, "{name}");
        keeper.unserved.clear();
        assert_eq!(keeper.round(true).states[0].1, HostsState::Written, "{name}");
    }
}
