//! Makes the code of darter-api out of `proto/`.

use std::path::Path;

use anyhow::{Context, Result};

/// The command that brings the committed code up to date.
pub const GENERATE: &str = "DARTER_GENERATE=1 cargo test -p darter-tests --test tidy";

/// The text of crates/darter-api/src/v1.rs, for the workspace at `root`. Needs protoc.
pub fn generate(root: &Path) -> Result<String> {
    let out = tempfile::tempdir().context("cannot make a directory for generated code")?;
    let proto = root.join("proto");
    prost_build::Config::new()
        .out_dir(out.path())
        .compile_protos(&[proto.join("darter/v1/swarm.proto")], &[&proto])
        .context("cannot compile proto/darter/v1/swarm.proto")?;
    let made = out.path().join("darter.v1.rs");
    let text = std::fs::read_to_string(&made).with_context(|| format!("cannot read {}", made.display()))?;
    // Every file of the workspace opens with why it exists.
    Ok(format!("//! Generated from proto/darter/v1, not edited: `{GENERATE}`.\n\n{text}"))
}
