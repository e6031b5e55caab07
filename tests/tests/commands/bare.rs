//! `darter agent` with nothing said: no file, no flag, no root, no Kubernetes, no containerd, no GPU.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::NOBODY;
use darter_tests::http::Client;
use darter_tests::net::Network;
use darter_tests::process::{self, Process};
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run, darter};
use rustix::process::Signal;

#[tokio::test]
async fn an_agent_that_is_told_nothing_serves_on_its_usual_ports_and_keeps_its_data_at_home() -> Result<()> {
    let name = "an_agent_that_is_told_nothing_serves_on_its_usual_ports_and_keeps_its_data_at_home";
    if !can_run(name, &[Need::Root, Need::Darter]) {
        return Ok(());
    }
    // Of its own, so that the usual ports are free, and there is no metadata service.
    let network = Network::new(1)?;
    let (node, dir) = (network.node(0), Scratch::new()?);
    let (home, program) = (dir.join("home"), dir.join("darter"));
    fs::create_dir(&home)?;
    chown(&home, Some(NOBODY), Some(NOBODY))?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    // Others may not look into the directory that it was built in.
    fs::copy(darter()?, &program)?;
    let id = NOBODY.to_string();
    let mut command = node.command("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--pdeathsig", "KILL", "env", "-i"]);
    command.arg(format!("HOME={}", home.display())).arg(&program).arg("agent");
    let mut agent = Process::start("darter agent", command, &dir.join("log"))?;
    let client = Client::new(node);
    let is_200 = async |url: &str| client.get(url).await.is_ok_and(|answer| answer.status == 200);
    eventually("it serves", async || {
        ensure!(agent.exited()?.is_none(), "{}", process::tail(&agent.log()));
        Ok(is_200("http://127.0.0.1:4001/v2/").await && is_200("http://127.0.0.1:4004/readyz").await)
    })
    .await
    .with_context(|| agent.log())?;
    ensure!(home.join(".local/share/darter").is_dir(), "{}", agent.log());
    // No registry is mirrored, so it is no proxy for any.
    let url = "http://127.0.0.1:4001/v2/a/manifests/v1?ns=registry.example";
    ensure!(client.get(url).await?.status == 404);
    agent.signal(Signal::TERM)?;
    let status = agent.exit(Duration::from_secs(20)).await?;
    ensure!(status.success(), "{status}: {}", agent.log());
    Ok(())
}
