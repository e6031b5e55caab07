//! Origins that answer a range with the whole blob, as some proxies do on a first request.

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::image::{Format, Image};
use darter_tests::net::Place;
use darter_tests::nginx::Nginx;
use darter_tests::scratch::Scratch;
use darter_tests::tools::{Need, can_run};

const REGISTRY: &str = "registry.test.example";
const SIZE: u64 = 20 << 20;

/// The blob, from an nginx that ignores Range, through an agent that asks for `ranges` at once.
async fn pull(ranges: i64, connections: i64) -> Result<()> {
    let layer = Image::new(Format::Oci, 5, &[SIZE])?.layers[0].clone();
    let root = Scratch::new()?;
    let blobs = root.join("v2/app/blobs");
    std::fs::create_dir_all(&blobs)?;
    std::fs::write(blobs.join(layer.digest().to_string()), layer.content.to_bytes())?;
    let nginx = Nginx::start(root.path(), "max_ranges 0;").await?;
    let options = Options::new(&Place::Host).set("origin.ranges", ranges).registry(
        REGISTRY,
        &[
            ("endpoint", format!("http://{}", nginx.address()).into()),
            ("plain_http", true.into()),
            ("access", "public".into()),
            ("connections", connections.into()),
        ],
    );
    let agent = Agent::start(options).await?;
    let url = format!("{}/v2/app/blobs/{}?ns={REGISTRY}", agent.mirror_url(), layer.digest());
    let answer = agent.client().get(&url).await?;
    ensure!(answer.status == 200 && Digest::of(&answer.body) == layer.digest(), "{}: {}", answer.status, agent.log());
    let requests = agent.metrics().await?.sum("darter_origin_requests_total", &[("kind", "blob")]);
    ensure!(requests <= 16.0, "{requests} requests for one blob:\n{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn a_blob_arrives_whole_and_without_a_storm_of_requests() -> Result<()> {
    if !can_run("a_blob_arrives_whole_and_without_a_storm_of_requests", &[Need::Nginx, Need::Darter]) {
        return Ok(());
    }
    for (ranges, connections) in [(1, 1), (4, 1), (4, 16)] {
        pull(ranges, connections).await?;
    }
    Ok(())
}
