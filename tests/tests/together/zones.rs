//! Nodes in two zones: bytes between zones cost money, and no blob goes from one to the other twice.

use anyhow::{Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::stage::{MIB, bytes};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// Four nodes, every other one in the second zone, that have all pulled an image at the same moment.
async fn pulled_in_two_zones(scope: &'static str, seed: u64) -> Result<(Swarm, Pushed)> {
    let seated = move |seat: &Seat, options: Options| {
        options.set("swarm.zone", ["a", "b"][seat.number % 2]).set("swarm.scope", scope)
    };
    // A registry that two zones at once do not slow down so much that either thinks that a reader is dead.
    let swarm = Swarm::start(Plan::new(4, 100, 4), seated).await?;
    let pushed = swarm.push(seed, &[24 * MIB, 8 * MIB]).await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_peaceful().await?;
    Ok((swarm, pushed))
}

/// Bytes of pieces that nodes got from others of the same zone, or of another.
async fn received(swarm: &Swarm, relation: &str) -> Result<f64> {
    swarm.sum("darter_peer_bytes_total", &[("direction", "received"), ("zone_relation", relation)]).await
}

#[tokio::test]
async fn a_blob_goes_once_from_zone_to_zone_and_is_read_once_in_all() -> Result<()> {
    if !can_run("a_blob_goes_once_from_zone_to_zone_and_is_read_once_in_all", &NEEDS) {
        return Ok(());
    }
    let (swarm, pushed) = pulled_in_two_zones("cluster", 51).await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    let (size, crossed) = (bytes(swarm.copies(&pushed).size), received(&swarm, "other").await?);
    // One zone more than one: a copy, and what was asked for twice because it was late.
    ensure!(crossed <= 1.05 * size, "{crossed} of {size} bytes went from zone to zone");
    // Each zone has what the other read, and nothing of it came over the registry's link.
    ensure!(crossed >= 0.95 * size, "{crossed} of {size} bytes went from zone to zone");
    let unknown = received(&swarm, "unknown").await?;
    ensure!(unknown == 0.0, "{unknown} bytes came from nodes of no zone");
    Ok(())
}

#[tokio::test]
async fn zones_that_read_for_themselves_read_once_each_and_give_each_other_nothing() -> Result<()> {
    if !can_run("zones_that_read_for_themselves_read_once_each_and_give_each_other_nothing", &NEEDS) {
        return Ok(());
    }
    let (swarm, pushed) = pulled_in_two_zones("zone", 52).await?;
    swarm.copies(&pushed).ensure_exactly(2)?;
    let (crossed, stayed) = (received(&swarm, "other").await?, received(&swarm, "same").await?);
    ensure!(crossed == 0.0, "{crossed} bytes went from zone to zone");
    let layers = bytes(pushed.image.layer_bytes());
    ensure!(stayed >= 2.0 * layers, "{stayed} bytes went from node to node, {layers} to each that did not read them");
    Ok(())
}
