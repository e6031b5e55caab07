//! Seeds: the nodes that pulled an image may all go, and those that come later do not need the registry.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::stage::{MIB, eventually};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// The first node is a seed, with a store of so many MiB.
async fn start(nodes: usize, limit_mib: u64) -> Result<Swarm> {
    let seed = move |seat: &Seat, options: Options| match seat.number {
        0 => options.set("seed.enabled", true).set("store.limit", format!("{limit_mib}MiB")),
        _ => options,
    };
    Swarm::start(Plan::new(nodes, 200, 1), seed).await
}

/// Waits until the seed has every layer of an image and its configuration, none of it from the registry.
async fn is_kept(swarm: &Swarm, pushed: &Pushed) -> Result<()> {
    let seed = swarm.node(0).running_agent().context("the seed is gone")?;
    let blobs = || pushed.image.pulled_blobs().map(|blob| blob.digest().to_string());
    eventually("the seed has the image", async || {
        let log = seed.log();
        let took = |digest: &String| {
            log.lines().any(|line| line.contains("took a blob from other nodes") && line.contains(digest.as_str()))
        };
        Ok(blobs().all(|digest| took(&digest)))
    })
    .await?;
    let read = seed.metrics().await?.sum("darter_origin_bytes_total", &[]);
    ensure!(read == 0.0, "the seed read {read} bytes from the registry");
    Ok(())
}

#[tokio::test]
async fn nodes_that_come_after_all_others_went_find_their_image_at_the_seed() -> Result<()> {
    if !can_run("nodes_that_come_after_all_others_went_find_their_image_at_the_seed", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(4, 500).await?;
    let pushed = swarm.push(31, &[24 * MIB, 3 * MIB]).await?;
    last(swarm.pull_on(&[1, 2, 3], &pushed).await)?;
    is_kept(&swarm, &pushed).await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    for node in 1..=3 {
        swarm.node_mut(node).stop_agent().await?;
    }
    let mut fresh = Vec::new();
    for _ in 0..3 {
        fresh.push(swarm.add_node().await?);
    }
    swarm.complete().await?;
    last(swarm.pull_on(&fresh, &pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1)
}

#[tokio::test]
async fn a_seed_parts_with_what_the_cluster_has_not_pulled_for_longest() -> Result<()> {
    if !can_run("a_seed_parts_with_what_the_cluster_has_not_pulled_for_longest", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(2, 40).await?;
    let [first, second, third] =
        [swarm.push(32, &[14 * MIB]).await?, swarm.push(33, &[14 * MIB]).await?, swarm.push(34, &[14 * MIB]).await?];
    for pushed in [&first, &second] {
        last(swarm.pull_on(&[1], pushed).await)?;
        is_kept(&swarm, pushed).await?;
    }
    // The first is pulled once more, elsewhere: of the two it is the one to keep.
    let other = swarm.add_node().await?;
    swarm.complete().await?;
    last(swarm.pull_on(&[other], &first).await)?;
    last(swarm.pull_on(&[1], &third).await)?;
    is_kept(&swarm, &third).await?;
    let seed = swarm.node(0).running_agent().context("the seed is gone")?;
    ensure!(seed.metrics().await?.sum("darter_store_evictions_total", &[]) >= 1.0, "{}", swarm.story(0));
    // Without a word: else they would hand over what the seed has no room for.
    swarm.kill_agent(1)?;
    swarm.kill_agent(other)?;
    let newcomer = swarm.add_node().await?;
    swarm.complete().await?;
    for (pushed, layers_from_registry) in [(&first, 1), (&third, 1), (&second, 2)] {
        last(swarm.pull_on(&[newcomer], pushed).await)?;
        let copies = darter_tests::cluster::Copies::of_blob(&swarm.ecr().log(), &pushed.image.layers[0]);
        ensure!(copies.least == layers_from_registry, "{}: {copies}", pushed.tag);
    }
    Ok(())
}
