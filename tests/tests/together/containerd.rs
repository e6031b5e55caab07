//! What only a node's containerd has is given to other nodes too: darter came later, or was gone around.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Copies, Plan, Pushed, Seat, last};
use darter_tests::image::Item;
use darter_tests::stage::{MIB, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// Nodes whose containerds keep their layers.
async fn start(nodes: usize, mbit: u64) -> Result<Swarm> {
    let plan = Plan { keeps_layers: true, ..Plan::new(nodes, mbit, 1) };
    let talkative = |_: &Seat, options: Options| {
        let level = "info,darter_agent::swarm::driver=debug,darter_agent::store=debug";
        // A pull has no other reader than the test.
        options.set("log.level", level).set("mirror.prefetch", "off").set("mirror.linger", "200ms")
    };
    Swarm::start(plan, talkative).await
}

/// The containerd of the first node has an image that its agent knows nothing of, and was asked for nothing.
async fn pull_before_darter(swarm: &mut Swarm, pushed: &Pushed) -> Result<()> {
    swarm.node_mut(0).stop_agent().await?;
    last(swarm.pull_on(&[0], pushed).await)?;
    swarm.copies(pushed).ensure_exactly(1)?;
    swarm.node_mut(0).start_agent_again().await?;
    swarm.complete().await?;
    let agent = swarm.agent(0)?;
    ensure!(agent.metrics().await?.sum("darter_store_bytes", &[]) == 0.0, "its store has something");
    Ok(())
}

/// Waits until the first node offers so many bytes of its containerd, and has told of so many blobs in all.
async fn offers(swarm: &Swarm, size: u64, blobs: usize) -> Result<()> {
    let (agent, told) = (swarm.agent(0)?, format!("told the swarm what is here blobs={blobs}"));
    eventually("its containerd's blobs are offered", async || {
        let offered = agent.metrics().await?.sum("darter_containerd_offered_bytes", &[]);
        Ok(offered >= bytes(size) && agent.log().lines().any(|line| line.ends_with(&told)))
    })
    .await
    .with_context(|| swarm.story(0))
}

/// The same for an image: its blobs, an index and a manifest.
async fn offers_image(swarm: &Swarm, pushed: &Pushed) -> Result<()> {
    let blobs = || pushed.image.pulled_blobs();
    offers(swarm, blobs().map(Item::size).sum(), blobs().count() + 2).await
}

#[tokio::test]
async fn an_image_that_containerd_pulled_before_darter_came_is_given_to_the_next_node() -> Result<()> {
    if !can_run("an_image_that_containerd_pulled_before_darter_came_is_given_to_the_next_node", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(2, 400).await?;
    let pushed = swarm.push(51, &[24 * MIB, 3 * MIB]).await?;
    pull_before_darter(&mut swarm, &pushed).await?;
    offers_image(&swarm, &pushed).await?;
    let seen = swarm.ecr().log().len();
    last(swarm.pull_on(&[1], &pushed).await)?;
    swarm.ensure_peaceful().await?;
    let read = Copies::of_log(&swarm.ecr().log().split_off(seen), &pushed.image);
    ensure!(read.sent == 0, "the registry gave {read}\n{}", swarm.told());
    let layers = bytes(pushed.image.layer_bytes());
    swarm.agent(1)?.counted("darter_mirror_bytes_total", &[("source", "peer")], |sum| sum >= layers).await?;
    // It is taken back when containerd forgets the image, and no second copy was made of it.
    ensure!(swarm.agent(0)?.metrics().await?.sum("darter_store_bytes", &[]) < bytes(MIB));
    swarm.node(0).containerd().forget().await?;
    eventually("nothing is offered", async || {
        Ok(swarm.agent(0)?.metrics().await?.sum("darter_containerd_offered_blobs", &[]) == 0.0)
    })
    .await
}

#[tokio::test]
async fn a_node_that_stops_hands_over_what_only_its_containerd_has() -> Result<()> {
    if !can_run("a_node_that_stops_hands_over_what_only_its_containerd_has", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(2, 400).await?;
    let pushed = swarm.push(52, &[12 * MIB, 3 * MIB]).await?;
    pull_before_darter(&mut swarm, &pushed).await?;
    offers_image(&swarm, &pushed).await?;
    swarm.node_mut(0).stop_agent().await?;
    last(swarm.pull_on(&[1], &pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| format!("{}\n{}", swarm.story(0), swarm.story(1)))
}

/// While the agent of the first node pulls the layer, its containerd gets it another way, and it is told so.
async fn gets_it_another_way(swarm: &Swarm, layer: &Item) -> Result<()> {
    swarm.reader(0..1, 4 * MIB).await?;
    let dir = swarm.node(0).containerd().root().join("io.containerd.content.v1.content");
    fs::create_dir_all(dir.join("blobs/sha256"))?;
    fs::write(dir.join("other"), layer.content.to_bytes())?;
    fs::rename(dir.join("other"), dir.join("blobs/sha256").join(layer.digest().hex()))?;
    // And of what the agent has: an index, a manifest and a configuration.
    offers(swarm, layer.size(), 4).await?;
    let log = swarm.agent(0)?.log();
    let is_over = |line: &str| line.contains("pulled a blob") && line.contains(&layer.digest().to_string());
    ensure!(!log.lines().any(is_over), "the pull was over too soon for this test");
    Ok(())
}

#[tokio::test]
async fn a_pull_goes_on_with_the_others_while_containerd_gets_the_blob_another_way() -> Result<()> {
    if !can_run("a_pull_goes_on_with_the_others_while_containerd_gets_the_blob_another_way", &NEEDS) {
        return Ok(());
    }
    // Slow enough for all that happens meanwhile.
    let swarm = start(2, 50).await?;
    let pushed = swarm.push(53, &[48 * MIB]).await?;
    let (read, meanwhile) =
        tokio::join!(swarm.read_on(&[0], &pushed), gets_it_another_way(&swarm, &pushed.image.layers[0]));
    meanwhile?;
    last(read)?;
    last(swarm.read_on(&[1], &pushed).await)?;
    swarm.ensure_peaceful().await?;
    swarm.copies_of_layer(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn what_containerd_got_while_its_agent_gave_up_is_given_to_others() -> Result<()> {
    if !can_run("what_containerd_got_while_its_agent_gave_up_is_given_to_others", &NEEDS) {
        return Ok(());
    }
    let swarm = start(2, 50).await?;
    let pushed = swarm.push(54, &[48 * MIB]).await?;
    let layer = &pushed.image.layers[0];
    tokio::select! {
        // Its client goes.
        read = swarm.read_on(&[0], &pushed) => { last(read)?; }
        meanwhile = gets_it_another_way(&swarm, layer) => meanwhile?,
    }
    eventually("the pull is given up", async || {
        Ok(swarm.agent(0)?.log().contains("stopped a pull that nobody waits for"))
    })
    .await?;
    let seen = swarm.ecr().log().len();
    last(swarm.read_on(&[1], &pushed).await)?;
    let read = Copies::of_blob(&swarm.ecr().log().split_off(seen), layer);
    ensure!(read.sent == 0, "the registry gave {read}\n{}", swarm.told());
    swarm.ensure_nobody_alone().await
}
