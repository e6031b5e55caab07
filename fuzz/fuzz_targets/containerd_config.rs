//! Whether containerd looks into certs.d: a promise that holds for the version it was made for.

#![no_main]

use std::path::{Path, PathBuf};

use darter_core::containerd_config::{Judgement, PullPath, Reason, Severity, Version, imports, judge, matches};
use libfuzzer_sys::fuzz_target;

const CERTS_D: &str = "/etc/containerd/certs.d";
const VERSIONS: [&str; 5] = ["1.6.20", "1.7.27", "2.0.7", "2.1.4", "2.2.4"];

fuzz_target!(|text: &str| {
    // Two files in one, so that the corpus stays readable.
    let (main, imported) = text.split_once("# imports\n").unwrap_or((text, ""));
    let file = |name: &str, text: &str| (PathBuf::from(name), text.to_owned());
    let alone = [file("/etc/containerd/config.toml", main)];
    let both = [alone[0].clone(), file("/etc/containerd/conf.d/x.toml", imported)];

    let judged = |files: &[(PathBuf, String)], version: Option<&str>| {
        let version = version.map(|version| version.parse::<Version>().expect("a version"));
        let judgement = judge(files, Path::new(CERTS_D), version);
        is_sound(&judgement, files, version.is_some());
        judgement
    };
    for version in VERSIONS {
        judged(&both, Some(version));
    }
    judged(&both, None);

    let unknown = judged(&alone, None);
    let worst = unknown.verdicts.iter().map(|verdict| verdict.severity).max();
    for version in VERSIONS {
        let known = judged(&alone, Some(version));
        if !unknown.is_honoured() {
            assert!(!known.is_honoured(), "blocked where the version is unknown, and not by {version}: {unknown:?}");
        }
        if worst < Some(Severity::Limits) {
            assert!(known.is_honoured(), "no limit where the version is unknown, and blocked by {version}: {known:?}");
        }
    }

    for path in imports(Path::new("/etc/containerd/config.toml"), main) {
        assert!(path.is_absolute() && !path.components().any(|part| part.as_os_str() == ".."), "{}", path.display());
    }
    if main.len() < 12 && imported.len() < 12 {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        assert_eq!(matches(main, imported), fits(&chars(main), &chars(imported)), "{main:?} {imported:?}");
    }
});

fn is_sound(judgement: &Judgement, files: &[(PathBuf, String)], version_is_known: bool) {
    assert!(judgement.verdicts.is_sorted_by_key(|verdict| std::cmp::Reverse(verdict.severity)), "{judgement:?}");
    let is_toml = files.iter().all(|(_, text)| text.parse::<toml_edit::DocumentMut>().is_ok());
    let unreadable = judgement.verdicts.iter().any(|verdict| verdict.reason == Reason::Unreadable);
    assert_eq!(unreadable, !is_toml, "{judgement:?}");
    assert_eq!(judgement.content_root.is_some(), is_toml, "{judgement:?}");
    if judgement.is_honoured() && version_is_known {
        assert!(
            judgement.roots.iter().any(|root| root.components().eq(Path::new(CERTS_D).components())),
            "{judgement:?}"
        );
        assert!(judgement.pull_path == PullPath::Local || judgement.roots.len() == 1, "{judgement:?}");
    }
}

/// `matches` as its documentation says it.
fn fits(pattern: &[char], name: &[char]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        (['*', rest @ ..], _) => fits(rest, name) || (!name.is_empty() && fits(pattern, &name[1..])),
        ([c, pattern @ ..], [n, name @ ..]) => (*c == '?' || c == n) && fits(pattern, name),
        _ => false,
    }
}
