//! `darter uninstall`: certs.d as it was before darter, by the running agent where there is one.
//!
//! An agent keeps its files, so it has to be asked to stop that: what another process takes out it would
//! put in again.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use darter_agent::certs_d::{self, Undone, Uninstalled};
use darter_agent::config::Config;
use tokio::time::timeout;

use crate::show::print;
use crate::socket;

/// A few small files for each registry, behind at most one look at all of them.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has the agent do it, or does it.
pub(crate) async fn run(config: &Config) -> Result<ExitCode> {
    let socket = config.admin_socket();
    let Some(stream) = socket::connect(&socket).await? else {
        show(&certs_d::uninstall(config)?)?;
        return print(&format!("no agent answers at {}: done without one\n", socket.display()));
    };
    let ordered = async {
        let mut lines = socket::post(stream, "/v1/uninstall", "").await?;
        let line = lines.next_line().await?.unwrap_or_default();
        serde_json::from_str::<Uninstalled>(&line).with_context(|| format!("the agent said `{line}`"))
    };
    let ordered = timeout(PATIENCE, ordered).await.context("it gives no answer").flatten();
    let mut done = ordered
        .with_context(|| format!("the agent at {} did not uninstall: stop it, then do this again", socket.display()))?;
    // It may be configured for another place than this command, where one before it left something.
    if done.certs_d != config.certs_d.path {
        done.undone.extend(certs_d::uninstall(config)?);
    }
    show(&done.undone)?;
    print("the running agent did this, and writes no hosts.toml until it is started again\n")
}

fn show(undone: &[Undone]) -> Result<()> {
    if undone.is_empty() {
        print("nothing to do: no hosts.toml is darter's\n")?;
    }
    for file in undone {
        print(&format!("{file}\n"))?;
    }
    Ok(())
}
