//! What commands print: for people on a terminal, and the same lines in a pipe.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use darter_agent::certs_d::Preflight;

/// Writes to stdout; a pipe that was closed early (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<ExitCode> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot print"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Preflight's exit code where it cannot be told whether containerd will use the mirror. 2 is a wrong
/// command line (clap).
const CANNOT_TELL: u8 = 3;

/// What preflight found. 1 if containerd will not use the mirror, or not for all pulls.
pub(crate) fn preflight(found: &Preflight, json: bool) -> Result<ExitCode> {
    if json {
        print(&(serde_json::to_string_pretty(found)? + "\n"))?;
    } else {
        print(&format!("{found}\n"))?;
    }
    Ok(match (found.honoured, found.problem()) {
        (None, _) => ExitCode::from(CANNOT_TELL),
        (Some(true), None) => ExitCode::SUCCESS,
        (Some(_), _) => ExitCode::FAILURE,
    })
}
