//! The third part: what an agent says of GPUs, of this machine's own where it has some, else of a mock.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::stage::eventually;
use darter_tests::{process, tools};

pub(crate) async fn show() -> Result<()> {
    if Path::new("/dev/nvidiactl").exists() {
        println!("== GPUs: those of this machine");
        let options = Options::new(&Place::Host).plain_registry("registry.example", "http://127.0.0.1:9");
        return status(&Agent::start(options).await?, "gpu").await;
    }
    println!("== GPUs: this machine has none, so what follows is A MOCK: two H200 that exist in a file only");
    let healthy = "base = 'h200-busy'\nquiet = true\ncount = 2\n\
                   [gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\nminor = 1\n";
    let mock = Mock::new(healthy)?;
    let agent = Agent::start(mock.options(2)?).await?;
    let is = async |state: &str| {
        let page: serde_json::Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
        anyhow::Ok(page["gpu"]["state"] == state)
    };
    eventually("both are read", async || is("Ready").await).await?;
    println!("\n$ darter status");
    status(&agent, "2 ready").await?;
    mock.set(&format!("{healthy}lost = true\n"))?;
    eventually("one is lost", async || is("NotReady").await).await?;
    println!("\nThe second falls off its bus:\n\n$ darter status");
    status(&agent, "GpuLost").await
}

async fn status(agent: &Agent, wanted: &str) -> Result<()> {
    let mut command = Place::Host.command(tools::darter()?);
    command.args(["status", "--admin"]).arg(format!("http://{}", agent.admin_address()));
    let output = process::run("darter status", command, Duration::from_secs(20)).await?;
    print!("{}", output.stdout);
    ensure!(output.stdout.contains(wanted), "darter status: {}: {}", output.status, output.stderr);
    Ok(())
}
