//! The ECR registry of the node's own account, where the metadata service answers late: as on EC2 when a node
//! boots with many others, or when somebody raises the hop limit under a running agent.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::fake_ecr::{self, FakeEcr, Kind};
use darter_tests::imds::Imds;
use darter_tests::net::Network;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::Method;

const OWN: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

/// What `/readyz` says of hosts.toml.
async fn hosts_toml(agent: &Agent) -> Result<String> {
    let answer: serde_json::Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
    let checks = answer["checks"].as_array().context("no checks")?;
    let check = checks.iter().find(|check| check["check"] == "hosts_toml").context("no hosts_toml")?;
    Ok(format!("{}: {}", check["state"].as_str().unwrap_or_default(), check["reason"].as_str().unwrap_or_default()))
}

#[tokio::test]
async fn a_metadata_service_that_answers_late_still_gets_the_nodes_own_registry_mirrored() -> Result<()> {
    let name = "a_metadata_service_that_answers_late_still_gets_the_nodes_own_registry_mirrored";
    if !can_run(name, &[Need::Darter, Need::Root]) {
        return Ok(());
    }
    // Nothing leads out of here: the node's own registry is a real name.
    let network = Network::new(1)?;
    let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options::default())?;
    let mut imds = Imds::start(&network.hub(), "123456789012", "us-east-1")?;
    imds.down().await;
    let options = Options::new(&network.node(0))
        .set("aws.discover", "auto")
        .set("aws.imds_endpoint", imds.url())
        .set("aws.ecr_endpoint", ecr.api_url());
    let agent = Agent::start(options).await?;
    let said = hosts_toml(&agent).await?;
    ensure!(said.starts_with("degraded: the instance metadata service has not answered"), "{said}");
    let file = agent.dir().join("certs.d").join(OWN).join("hosts.toml");
    ensure!(!file.exists(), "hosts.toml is there before anybody knows the registry");
    let ask = format!("{}/v2/team/app/manifests/v1?ns={OWN}", agent.mirror_url());
    ensure!(agent.client().call(Method::HEAD, &ask, &[]).await?.status == 404);
    // Counted once it is on the wire, which its client sees first.
    let refused =
        async || anyhow::Ok(agent.metrics().await?.sum("darter_mirror_refusals_total", &[("reason", "not_mirrored")]));
    eventually("it is refused", async || Ok(refused().await? == 1.0)).await?;

    imds.up()?;
    let is_mirrored = async || Ok(file.exists() && hosts_toml(&agent).await?.starts_with("ok: "));
    eventually("the registry is mirrored", is_mirrored).await?;
    let text = std::fs::read_to_string(&file)?;
    ensure!(
        text.contains(&format!("server = \"https://{OWN}\"")) && text.contains("[host.\"http://127.0.0.1:4001\"]"),
        "{text}"
    );
    // It is served, with the node's role. The registry itself is out of reach here.
    agent.client().call(Method::HEAD, &ask, &[]).await?;
    ensure!(ecr.count(Kind::Token).granted == 1, "nobody asked for a password");
    ensure!(refused().await? == 1.0, "still refused");
    Ok(())
}
