//! The preflight on containerd's real files: imports, globs, several roots.

use darter_core::containerd_config::{PullPath, Reason};

use super::*;

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
