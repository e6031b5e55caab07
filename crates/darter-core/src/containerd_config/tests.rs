//! The runs of facts/containerd.md §8, and each trap with its reason.

use proptest::prelude::*;

use super::*;

const CERTS_D: &str = "/etc/containerd/certs.d";
const TWO: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";

fn version(text: &str) -> Option<Version> {
    Some(text.parse().unwrap())
}

fn judged(files: &[&str], version: Option<Version>) -> Judgement {
    let files: Vec<(PathBuf, String)> =
        files.iter().enumerate().map(|(n, text)| (format!("/{n}.toml").into(), (*text).to_owned())).collect();
    judge(&files, Path::new(CERTS_D), version)
}

fn reasons(judgement: &Judgement) -> Vec<(Reason, Severity)> {
    judgement.verdicts.iter().map(|verdict| (verdict.reason, verdict.severity)).collect()
}

fn v2(config_path: &str, discard: bool, rest: &str) -> String {
    format!(
        "version = 2\n{rest}\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = {discard}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"{config_path}\"\n"
    )
}

fn v3(config_path: &str, keys: &str) -> String {
    format!(
        "version = 3\n[plugins.'io.containerd.cri.v1.images']\n{keys}\n\
         [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{config_path}'\n"
    )
}

#[test]
fn the_four_cases_that_were_run_and_seen() {
    let discards = v3(TWO, "discard_unpacked_layers = true");
    let keeps = v3(TWO, "discard_unpacked_layers = false");
    let one = v3(CERTS_D, "discard_unpacked_layers = false");
    assert!(judged(&[&discards], version("2.2.4")).is_honoured());
    assert_eq!(reasons(&judged(&[&keeps], version("2.2.4"))), [(Reason::TransferTwoDirectories, Severity::Blocks)]);
    assert!(judged(&[&one], version("2.2.4")).is_honoured());
    assert!(judged(&[&v2(TWO, true, "")], version("1.6.20")).is_honoured());
    // The same node, migrated from version 2 by containerd itself.
    assert_eq!(
        reasons(&judged(&[&v2(TWO, false, "")], version("2.2.4"))),
        [(Reason::TransferTwoDirectories, Severity::Blocks)]
    );
    assert_eq!(
        reasons(&judged(&[&v2(TWO, false, "")], None)),
        [(Reason::TransferTwoDirectories, Severity::Limits)],
        "without a version it may be either"
    );
}

#[test]
fn each_setting_that_brings_the_local_path_is_known() {
    for keys in [
        "use_local_image_pull = true",
        "discard_unpacked_layers = true",
        "disable_snapshot_annotations = false",
        "max_concurrent_downloads = 10",
        "image_pull_with_sync_fs = true",
    ] {
        let judgement = judged(&[&v3(TWO, keys)], version("2.3.0"));
        assert_eq!((judgement.pull_path, judgement.is_honoured()), (PullPath::Local, true), "{keys}");
    }
    let neutral = "max_concurrent_downloads = 3\ndisable_snapshot_annotations = true";
    assert_eq!(judged(&[&v3(TWO, neutral)], version("2.3.0")).pull_path, PullPath::Transfer);
    assert_eq!(judged(&[&v3(TWO, neutral)], version("2.0.5")).pull_path, PullPath::Local);
}

#[test]
fn no_config_path_is_nothing_before_2_2_and_two_directories_after() {
    for (text, version, expected) in [
        ("version = 2", version("1.7.34"), vec![(Reason::NoConfigPath, Severity::Blocks)]),
        ("", version("2.1.0"), vec![(Reason::NoConfigPath, Severity::Blocks)]),
        ("version = 3", version("2.2.0"), vec![(Reason::TransferTwoDirectories, Severity::Blocks)]),
        ("version = 2", None, vec![(Reason::NoConfigPath, Severity::Blocks)]),
    ] {
        assert_eq!(reasons(&judged(&[text], version)), expected, "{text} {version:?}");
    }
    let local = "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true";
    assert!(judged(&[local], version("2.2.0")).is_honoured());
    let unknown = judged(&[local], None);
    assert_eq!(reasons(&unknown), [(Reason::NoConfigPath, Severity::Limits)]);
    assert!(unknown.verdicts[0].message.starts_with("version unknown: "), "{unknown:?}");
}

#[test]
fn the_last_file_that_says_where_containerd_listens_counts() {
    let (one, two) = ("[grpc]\naddress = \"/run/one.sock\"\n", "grpc.address = \"/run/two.sock\"\n");
    let socket = |files: &[&str]| judged(files, None).socket;
    assert_eq!(socket(&["version = 2"]), None);
    assert_eq!(socket(&[one, two]).as_deref(), Some(Path::new("/run/two.sock")));
    assert_eq!(socket(&[one, "[grpc]\naddress = \"\"\nuid = 7\n"]).as_deref(), Some(Path::new("/run/one.sock")));
}

#[test]
fn each_kind_of_version_is_there() {
    for (text, kind) in [("1.6.20", 0), ("1.7.34", 0), ("2.0.7", 1), ("2.1.4", 2), ("2.2.0", 3), ("2.4.0", 3)] {
        let one = |version| {
            let local = "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true";
            let files = [v2(TWO, false, ""), v3(TWO, ""), local.to_owned(), "version = 2".to_owned()];
            files.map(|file| judged(&[&file], Some(version)).is_honoured())
        };
        assert_eq!(one(text.parse().unwrap()), one(Version::KINDS[kind]), "{text}");
    }
}

#[test]
fn every_other_trap_is_named() {
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]\n";
    let with_path = format!("{}{cri}", v2(CERTS_D, true, ""));
    let tables = [
        (with_path, Reason::MirrorsInUse, Severity::Blocks),
        (format!("version = 2\n{cri}"), Reason::MirrorsInUse, Severity::Blocks),
        (v2("/opt/certs", true, ""), Reason::NotInConfigPath, Severity::Blocks),
        (v2(CERTS_D, true, "disabled_plugins = [\"cri\"]"), Reason::CriDisabled, Severity::Blocks),
        (v3(CERTS_D, "snapshotter = \"soci\""), Reason::Soci, Severity::Limits),
        (v3(CERTS_D, "concurrent_layer_fetch_buffer = 8388608"), Reason::ParallelLayerFetch, Severity::Note),
        ("version = ".to_owned(), Reason::Unreadable, Severity::Blocks),
    ];
    for (text, reason, severity) in tables {
        let judgement = judged(&[&text], version("2.2.4"));
        assert!(reasons(&judgement).contains(&(reason, severity)), "{reason:?}: {judgement:?}");
        assert_eq!(judgement.is_honoured(), severity != Severity::Blocks, "{reason:?}");
    }
    let configs = "[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r\".auth]\nusername = \"u\"\n";
    let judgement = judged(&[&format!("{}{configs}", v2(TWO, false, ""))], version("2.2.4"));
    assert_eq!(reasons(&judgement), [(Reason::ConfigsInUse, Severity::Note)], "they bring the local path");
}

#[test]
fn the_layouts_of_versions_1_to_4_are_one_to_us() {
    let v1 = format!(
        "[plugins.cri.registry]\nconfig_path = \"{CERTS_D}\"\n[plugins.cri.containerd]\nsnapshotter = \"soci\""
    );
    for (text, version) in [
        (v1, "1.6.20"),
        (v2(CERTS_D, false, ""), "1.7.0"),
        (v3(CERTS_D, ""), "2.1.0"),
        (v3(CERTS_D, "").replace("version = 3", "version = 4"), "2.3.0"),
    ] {
        assert!(judged(&[&text], self::version(version)).is_honoured(), "{text}");
    }
    // Version 3 does not read the sections of version 2.
    let wrong = v2(CERTS_D, true, "").replace("version = 2", "version = 3");
    assert_eq!(reasons(&judged(&[&wrong], version("2.1.0"))), [(Reason::NoConfigPath, Severity::Blocks)]);
}

#[test]
fn imports_win_over_the_main_file_and_1_x_takes_whole_sections() {
    let main = v2(CERTS_D, true, "root = \"/data/containerd\"\nimports = [\"conf.d/*.toml\", \"/x/../y.toml\"]");
    assert_eq!(
        imports(Path::new("/etc/containerd/config.toml"), &main),
        [Path::new("/etc/containerd/conf.d/*.toml"), Path::new("/y.toml")]
    );
    let import =
        "version = 2\nroot = \"\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"soci\"\n";
    let two = judged(&[&main, import], version("2.2.4"));
    assert_eq!(reasons(&two), [(Reason::Soci, Severity::Limits)]);
    assert_eq!(two.content_root.as_deref(), Some(Path::new("/data/containerd")));
    assert!(two.discards_layers);
    let one = judged(&[&main, import], version("1.7.20"));
    assert_eq!(reasons(&one), [(Reason::NoConfigPath, Severity::Blocks), (Reason::Soci, Severity::Limits)]);
    let unknown = judged(&[&main, import], None);
    assert_eq!(reasons(&unknown), [(Reason::Soci, Severity::Limits), (Reason::ImportsReplace, Severity::Note)]);
}

#[test]
fn the_roots_around_ours_are_told() {
    let judgement = judged(&[&v2("/a:/etc/containerd/certs.d/:/b:/c", true, "")], version("1.7.0"));
    assert_eq!(judgement.roots_before(Path::new(CERTS_D)), [Path::new("/a")]);
    assert_eq!(judgement.roots_after(Path::new(CERTS_D)), [Path::new("/b"), Path::new("/c")]);
    assert_eq!(judged(&[], version("2.2.0")).content_root.as_deref(), Some(Path::new("/var/lib/containerd")));
}

#[test]
fn versions_are_read_from_what_containerd_says_of_itself() {
    for (text, major, minor) in [("2.2.4", 2, 2), ("v1.6.20~ds1", 1, 6), ("2.4.0-beta.0", 2, 4), ("1.7", 1, 7)] {
        assert_eq!(text.parse(), Ok(Version { major, minor }));
    }
    assert!("unknown".parse::<Version>().is_err());
}

#[test]
fn a_star_is_any_name() {
    for (pattern, name, fits) in [
        ("*.toml", "a.toml", true),
        ("*.toml", ".toml", true),
        ("*.toml", "a.toml.bak", false),
        ("10-*-x*", "10-a-xb", true),
        ("?", "ab", false),
        ("*a*b", "aab", true),
        ("", "", true),
    ] {
        assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(texts in proptest::collection::vec("(?s).{0,60}", 0..3), keys in "[a-z_.= \"\\[\\]\n]{0,80}") {
        let mut texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let keys = format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n{keys}");
        texts.push(&keys);
        let _ = judged(&texts, None);
        let _ = imports(Path::new("/c"), &keys);
    }
}
