//! The preflight on containerd's real files: imports, globs, several roots.

use darter_core::containerd_config::{PullPath, Reason};

use super::*;
use crate::containerd::Known;

fn nobody_asked() -> Known {
    Known { unknown: Some("nobody was asked".to_owned()), ..Known::default() }
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
    let recent = || Known { version: Some("2.2.4".to_owned()), ..Known::default() };
    for (two, discard, honoured) in [(true, true, true), (true, false, false), (false, false, true)] {
        let host = Host::new();
        let certs_d = host.config.certs_d.path.display().to_string();
        let config_path = if two { format!("{certs_d}:/etc/docker/certs.d") } else { certs_d };
        fs::write(&host.config.containerd.config, containerd_config(&config_path, discard)).unwrap();
        let answer = preflight_for(&host.config, recent());
        assert_eq!(answer.honoured, Some(honoured), "{answer}");
        assert_eq!(answer.judgement.discards_layers, discard);
        // An import turns it round.
        let conf_d = host.dir.path().join("containerd/conf.d");
        fs::create_dir(&conf_d).unwrap();
        let import = "version = 3\nimports = [\"../config.toml\"]\n[plugins.'io.containerd.cri.v1.images']\n\
                      use_local_image_pull = true\n";
        fs::write(conf_d.join("10-local.toml"), import).unwrap();
        fs::write(conf_d.join("ignored.conf"), "not = toml = at all").unwrap();
        let answer = preflight_for(&host.config, recent());
        assert_eq!((answer.honoured, answer.files.len()), (Some(true), 2), "{answer}");
        assert_eq!(answer.judgement.pull_path, PullPath::Local);
    }
}

#[test]
fn the_preflight_says_what_hides_us_and_what_it_could_not_read() {
    let host = Host::new();
    let answer = preflight_for(&host.config, nobody_asked());
    assert_eq!(answer.honoured, None);
    assert!(answer.to_string().starts_with("containerd may or may not look into"), "{answer}");
    let first = host.dir.path().join("first");
    fs::create_dir_all(first.join("_default")).unwrap();
    let roots = format!("{}:{}", first.display(), host.config.certs_d.path.display());
    fs::write(&host.config.containerd.config, containerd_config(&roots, true)).unwrap();
    let answer = preflight_for(&host.config, nobody_asked());
    let reasons: Vec<Reason> = answer.judgement.verdicts.iter().map(|verdict| verdict.reason).collect();
    assert_eq!((answer.honoured, reasons), (Some(false), vec![Reason::Shadowed]));
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["verdicts"][0]["reason"], "shadowed");
    assert_eq!(json["honoured"], false);
}

#[test]
fn without_a_version_only_what_holds_for_all_of_them_is_sure() {
    let host = Host::new();
    let certs_d = host.config.certs_d.path.display().to_string();
    let two = format!("{certs_d}:/etc/docker/certs.d");
    let two_v2 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = ";
    for (text, unknown, old, new) in [
        (containerd_config(&certs_d, false), Some(true), None, Some(true)),
        (format!("{two_v2}{certs_d:?}\n"), Some(true), Some(true), Some(true)),
        (format!("{two_v2}{two:?}\n"), None, Some(true), Some(false)),
        (format!("{two_v2}\"/opt/certs\"\n"), Some(false), Some(false), Some(false)),
        (format!("imports = [\"absent.toml\"]\n{two_v2}{certs_d:?}\n"), None, None, None),
    ] {
        fs::write(&host.config.containerd.config, &text).unwrap();
        let honoured = |version: Option<&str>| {
            let version = version.map(str::to_owned);
            preflight_for(&host.config, Known { version, ..nobody_asked() }).honoured
        };
        assert_eq!(honoured(None), unknown, "{text}");
        assert_eq!(honoured(Some("a commit")), unknown, "{text}");
        assert_eq!(honoured(Some("2.2.4")), new, "{text}");
        if old.is_some() {
            assert_eq!(honoured(Some("1.6.20")), old, "{text}");
        }
    }
    fs::write(&host.config.containerd.config, format!("{two_v2}{two:?}\n")).unwrap();
    let answer = preflight_for(&host.config, nobody_asked());
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["honoured"], serde_json::Value::Null);
    assert!(json["verdicts"][0]["message"].as_str().unwrap().starts_with("version unknown: "), "{json}");
    assert!(json["containerd"]["version"].is_null() && json["containerd"]["unknown"].is_string(), "{json}");
    assert!(answer.to_string().contains("version unknown: nobody was asked"), "{answer}");
}
