//! Makes the code of darter-api out of `proto/`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The command that brings the committed code up to date.
pub const GENERATE: &str = "DARTER_GENERATE=1 cargo test -p darter-tests --test tidy";

/// A generated file, by its path in the workspace, and its text.
pub type Generated = (&'static str, String);

/// What is generated for the workspace at `root`. Needs protoc.
pub fn generate(root: &Path) -> Result<Vec<Generated>> {
    Ok(vec![
        ("crates/darter-api/src/v1.rs", compile(root, "darter/v1/swarm", "darter.v1", messages)?),
        ("crates/darter-api/src/report.rs", compile(root, "darter/v1/report", "darter.v1", service)?),
        ("crates/darter-api/src/externalscaler.rs", compile(root, "externalscaler", "externalscaler", service)?),
    ])
}

/// Where protoc finds a file, what it is to find it by, and where its code goes.
struct Source {
    file: PathBuf,
    proto: PathBuf,
    out: PathBuf,
}

/// Types alone.
fn messages(source: &Source) -> std::io::Result<()> {
    prost_build::Config::new().out_dir(&source.out).compile_protos(&[&source.file], &[&source.proto])
}

/// Types, a gRPC client and a gRPC server.
fn service(source: &Source) -> std::io::Result<()> {
    let made = tonic_prost_build::configure().build_transport(false).out_dir(&source.out);
    // The cargo that runs a test is told nothing.
    made.emit_rerun_if_changed(false).compile_protos(&[&source.file], &[&source.proto])
}

/// The code of one file of `proto`. Each is by itself: what is in one package comes in one file.
fn compile(root: &Path, name: &str, package: &str, make: fn(&Source) -> std::io::Result<()>) -> Result<String> {
    let out = tempfile::tempdir().context("cannot make a directory for generated code")?;
    let proto = root.join("proto");
    let source = Source { file: proto.join(format!("{name}.proto")), proto, out: out.path().to_owned() };
    make(&source).with_context(|| format!("cannot compile {}", source.file.display()))?;
    let made = out.path().join(format!("{package}.rs"));
    let text = std::fs::read_to_string(&made).with_context(|| format!("cannot read {}", made.display()))?;
    // Every file of the workspace opens with why it exists.
    let from = if package == "darter.v1" { "proto/darter/v1" } else { "proto" };
    Ok(format!("//! Generated from {from}, not edited: `{GENERATE}`.\n\n{text}"))
}
