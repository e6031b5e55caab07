//! The house style, as far as a machine can read it: who may depend on whom, what a file opens
//! with, how long it may be, and that generated files are up to date.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Past this a file holds two ideas.
const LINES_MAX: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust file of the workspace, relative to the root.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = ["crates", "tests", "benches", "fuzz"].map(|dir| root().join(dir)).to_vec();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("a readable directory").path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(root()).expect("below the root").to_owned());
            }
        }
    }
    assert!(found.len() > 30, "only {} files found: this test looks in the wrong place", found.len());
    found.sort();
    found
}

fn manifest(path: &str) -> toml_edit::DocumentMut {
    read(path).parse().expect("a manifest is TOML")
}

/// The manifests of the workspace's packages.
fn manifests() -> Vec<String> {
    let workspace = manifest("Cargo.toml");
    let members = workspace["workspace"]["members"].as_array().expect("a workspace has members");
    members.iter().map(|member| format!("{}/Cargo.toml", member.as_str().expect("a path"))).collect()
}

/// What a manifest names under `[dependencies]`.
fn dependencies(path: &str) -> Vec<String> {
    let manifest = manifest(path);
    let table = manifest["dependencies"].as_table().expect("a manifest has dependencies");
    let mut names: Vec<_> = table.iter().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    names
}

#[test]
fn dependencies_point_from_the_binary_to_the_core() {
    let workspace = |manifest| -> Vec<String> {
        dependencies(manifest).into_iter().filter(|name| name.starts_with("darter-")).collect()
    };
    assert_eq!(workspace("crates/darter-core/Cargo.toml"), [""; 0]);
    assert_eq!(workspace("crates/darter-api/Cargo.toml"), [""; 0]);
    assert_eq!(workspace("crates/darter-base/Cargo.toml"), [""; 0]);
    assert_eq!(workspace("crates/darter-nvml/Cargo.toml"), [""; 0]);
    assert_eq!(
        workspace("crates/darter-agent/Cargo.toml"),
        ["darter-api", "darter-base", "darter-core", "darter-nvml"]
    );
    assert_eq!(workspace("crates/darter-scaler/Cargo.toml"), ["darter-api", "darter-base", "darter-core"]);
    assert_eq!(workspace("crates/darter/Cargo.toml"), ["darter-agent", "darter-base", "darter-core", "darter-scaler"]);
}

#[test]
fn what_ships_contains_no_mock() {
    let product: Vec<_> = manifests().into_iter().filter(|path| path.starts_with("crates/")).collect();
    assert!(product.len() >= 4, "only {product:?}");
    for path in product {
        let manifest = manifest(&path);
        for kind in ["dependencies", "build-dependencies"] {
            let named = manifest.get(kind).and_then(|table| table.as_table());
            let test_only = |name: &&str| matches!(*name, "darter-nvml-mock" | "darter-tests" | "darter-benches");
            let found: Vec<_> = named.into_iter().flatten().map(|(name, _)| name).filter(test_only).collect();
            assert!(found.is_empty(), "{path}: {found:?} under [{kind}]");
        }
    }
}

#[test]
fn only_what_speaks_c_may_be_unsafe() {
    let unsafe_ones = ["crates/darter-nvml/Cargo.toml", "tests/nvml-mock/Cargo.toml"];
    for path in manifests() {
        let manifest = manifest(&path);
        let inherits = manifest["lints"].get("workspace").and_then(|value| value.as_bool()) == Some(true);
        assert_eq!(inherits, !unsafe_ones.contains(&path.as_str()), "{path}: [lints]");
    }
    // Those that do not inherit the workspace's lints have the others all the same.
    let all = manifest("Cargo.toml");
    assert_eq!(all["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("forbid"));
    for tool in ["rust", "clippy"] {
        let lints = all["workspace"]["lints"][tool].as_table().expect("a table of lints");
        for (name, level) in lints.iter().filter(|(name, _)| *name != "unsafe_code") {
            for path in unsafe_ones {
                let own = manifest(path)["lints"][tool].get(name).and_then(|level| level.as_str().map(str::to_owned));
                assert_eq!(own.as_deref(), level.as_str(), "{path}: {tool} {name}");
            }
        }
    }
}

#[test]
fn the_core_depends_on_nothing_that_waits_or_touches_the_machine() {
    let allowed = ["blake3", "serde", "serde_json", "sha2", "thiserror", "toml_edit"];
    let found = dependencies("crates/darter-core/Cargo.toml");
    for name in &found {
        assert!(allowed.contains(&name.as_str()), "darter-core must stay pure: why does it depend on {name}?");
    }
    for file in sources().iter().filter(|file| file.starts_with("crates/darter-core/src")) {
        has_none_of(file, &IMPURE);
    }
}

const IMPURE: [&str; 7] =
    ["std::fs", "std::net::Tcp", "std::thread", "std::process", "Instant::now", "SystemTime::now", "HashMap"];

fn has_none_of(file: &Path, banned: &[&str]) {
    // Tests at the end of a file may name a time to count from.
    let text = read(file);
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    for banned in banned {
        assert!(!code.contains(banned), "{}: {banned}", file.display());
    }
}

/// What of the scaler touches the machine: everything else of it is pure.
const SCALER_SHELL: [&str; 15] = [
    "access",
    "bell",
    "clock",
    "config",
    "controller",
    "demand",
    "grpc",
    "http",
    "hub",
    "keda",
    "kubernetes",
    "metrics",
    "recorder",
    "reports",
    "scaler",
];

#[test]
fn the_scaler_decides_and_plays_in_integers_and_without_touching_the_machine() {
    let is_shell = |file: &Path| {
        let module = file.iter().nth(3).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        SCALER_SHELL.contains(&module.trim_end_matches(".rs"))
    };
    let all = sources().into_iter().filter(|file| file.starts_with("crates/darter-scaler/src"));
    let files: Vec<_> = all.filter(|file| !is_shell(file)).collect();
    assert!(files.len() > 30, "only {files:?}");
    for file in files {
        has_none_of(&file, &IMPURE);
        has_none_of(&file, &["tokio", "async ", "tracing"]);
        // Made-up demand is drawn in fractions; nothing is decided in them.
        if !file.ends_with("traces/generate.rs") {
            has_none_of(&file, &["f64", "f32"]);
        }
    }
}

#[test]
fn every_file_opens_with_why_it_exists() {
    for file in sources() {
        let text = read(&file);
        assert!(text.starts_with("//! "), "{} has no `//!` header", file.display());
    }
}

#[test]
fn no_file_holds_two_ideas() {
    let is_written = |file: &PathBuf| !read(file).starts_with("//! Generated from ");
    let long: BTreeMap<_, _> = sources()
        .into_iter()
        .filter(is_written)
        .map(|file| (file.clone(), read(&file).lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .collect();
    assert!(long.is_empty(), "longer than {LINES_MAX} lines: {long:#?}");
}

#[test]
fn the_example_configurations_are_the_embedded_defaults() {
    for (path, default, command) in [
        ("deploy/darter.toml", darter_agent::config::DEFAULT, "darter config default"),
        ("deploy/scaler.toml", darter_scaler::config::DEFAULT, "darter scaler config default"),
    ] {
        assert_eq!(read(path), default, "run: {command} > {path}");
    }
}

#[test]
fn the_wire_types_are_what_proto_says() {
    let generated = darter_tests::proto::generate(&root()).unwrap_or_else(|error| panic!("{error:#}"));
    for (path, made) in generated {
        if std::env::var_os("DARTER_GENERATE").is_some() {
            fs::write(root().join(path), &made).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
        assert!(read(path) == made, "{path} is not what proto/ says; run: {}", darter_tests::proto::GENERATE);
    }
}

#[test]
fn the_code_map_names_every_module() {
    let readme = read("README.md");
    for file in sources().iter().filter(|file| file.starts_with("crates")) {
        let parts: Vec<_> = file.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let [_, package, _, module, ..] = parts.as_slice() else { panic!("{}", file.display()) };
        let module = module.trim_end_matches(".rs");
        if !matches!(module, "lib" | "main") {
            assert!(readme.contains(&format!("`{module}`")), "README.md's code map lacks `{module}` of {package}");
        }
    }
}

#[test]
fn every_metric_is_in_the_readme() {
    // From the source: an exposition leaves out families that have no series yet.
    let readme = read("README.md");
    for (path, least) in [("crates/darter-agent/src/metrics.rs", 16), ("crates/darter-scaler/src/metrics.rs", 20)] {
        let source = read(path);
        let named = |rest: &str| rest.split('"').map(ToOwned::to_owned).find(|part| is_metric(part));
        let names: Vec<_> = source.split("metric!(").skip(1).filter_map(named).collect();
        assert!(names.len() >= least, "only {names:?}");
        for name in names {
            assert!(readme.contains(&format!("`darter_{name}")), "README.md does not say what darter_{name} is");
        }
    }
}

fn is_metric(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}
