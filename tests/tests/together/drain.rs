//! A node that stops takes nothing with it: what only it has goes to others, and what it gives ends well.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Seat, last};
use darter_tests::emulator::{Emulator, Host};
use darter_tests::fake_ecr::{Fault, Rule};
use darter_tests::process;
use darter_tests::stage::{MIB, REPOSITORY, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

#[tokio::test]
async fn a_node_that_stops_hands_over_what_only_it_has() -> Result<()> {
    if !can_run("a_node_that_stops_hands_over_what_only_it_has", &NEEDS) {
        return Ok(());
    }
    let alone = |seat: &Seat, options: Options| match seat.number {
        0 => options,
        // What they have they were given, and did not fetch ahead.
        _ => options.set("mirror.prefetch", "off"),
    };
    let mut swarm = Swarm::start(Plan::new(3, 400, 1), alone).await?;
    let pushed = swarm.push(21, &[12 * MIB, 3 * MIB]).await?;
    last(swarm.pull_on(&[0], &pushed).await)?;
    // The second node has proved that it may read the image, and has nothing of it but its manifests.
    let agent = swarm.node(1).running_agent().context("no agent")?;
    let client = Emulator::new(&swarm.places()[1], &swarm.ecr().name(), &[Host::new(agent.mirror())]);
    client.resolve(REPOSITORY, &pushed.tag).await?;
    client.resolve(REPOSITORY, &pushed.image.child()?.to_string()).await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    swarm.node_mut(0).stop_agent().await?;
    // The registry gives nothing from here on.
    swarm.ecr().inject(Rule::any().always(), Fault::Status(503, None));
    let seen = swarm.ecr().log().len();
    let by_digest = format!("{}/{REPOSITORY}@{}", swarm.ecr().name(), pushed.image.root.digest());
    let pulled = swarm.node(1).containerd().cri().pull(&by_digest, None).await;
    pulled.with_context(|| format!("{}\n--- the node that stopped\n{}", swarm.story(1), swarm.story(0)))?;
    let given: Vec<_> = swarm.ecr().log().split_off(seen).into_iter().filter(|seen| seen.status < 400).collect();
    ensure!(given.is_empty(), "the registry gave {given:?}");
    swarm.copies(&pushed).ensure_exactly(1)
}

#[tokio::test]
async fn a_handover_takes_the_time_that_the_operator_gives_it() -> Result<()> {
    if !can_run("a_handover_takes_the_time_that_the_operator_gives_it", &NEEDS) {
        return Ok(());
    }
    // By then one has what it takes eight seconds to bring, and the other not.
    for (handover, is_whole) in [("25s", true), ("2s", false)] {
        let patient = move |_: &Seat, options: Options| options.set("swarm.handover", handover);
        let mut swarm = Swarm::start(Plan::new(2, 400, 1), patient).await?;
        let pushed = swarm.push(24, &[16 * MIB]).await?;
        last(swarm.pull_on(&[0], &pushed).await)?;
        swarm.network().limit_link(0, 2 * MIB)?;
        let began = Instant::now();
        swarm.node_mut(0).stop_agent().await?;
        let took = began.elapsed();
        let layer = swarm.agent(1)?.dir().join("data/blobs").join(pushed.image.layers[0].digest().hex());
        ensure!(layer.exists() == is_whole, "{handover}, {took:?}\n{}\n{}", swarm.story(0), swarm.story(1));
        ensure!(!is_whole || took > Duration::from_secs(5), "{took:?}: this tests nothing");
    }
    Ok(())
}

#[tokio::test]
async fn of_two_that_can_take_what_a_node_had_the_one_with_more_room_does() -> Result<()> {
    if !can_run("of_two_that_can_take_what_a_node_had_the_one_with_more_room_does", &NEEDS) {
        return Ok(());
    }
    // There is room for all of it on both.
    let limited = |seat: &Seat, options: Options| match seat.number {
        1 => options.set("store.limit", "64MiB"),
        _ => options.set("store.limit", "1GiB"),
    };
    let mut swarm = Swarm::start(Plan::new(3, 400, 1), limited).await?;
    let pushed = swarm.push(23, &[3 * MIB, 4 * MIB, 5 * MIB, 6 * MIB]).await?;
    last(swarm.pull_on(&[0], &pushed).await)?;
    swarm.node_mut(0).stop_agent().await?;
    for layer in &pushed.image.layers {
        let has = |node: usize| Ok(swarm.agent(node)?.dir().join("data/blobs").join(layer.digest().hex()).exists());
        let (little, much): (Result<bool>, Result<bool>) = (has(1), has(2));
        ensure!(!little? && much?, "{}\n{}\n{}", swarm.story(0), swarm.story(1), swarm.story(2));
    }
    Ok(())
}

#[tokio::test]
async fn uploads_of_a_node_that_stops_end_well() -> Result<()> {
    if !can_run("uploads_of_a_node_that_stops_end_well", &NEEDS) {
        return Ok(());
    }
    let talkative = |_: &Seat, options: Options| options.set("log.level", "debug");
    let mut swarm = Swarm::start(Plan::new(3, 100, 1), talkative).await?;
    let pushed = swarm.push(22, &[32 * MIB]).await?;
    last(swarm.pull_on(&[0], &pushed).await)?;
    let reading = async {
        let places = swarm.places();
        let read = async |node: usize| {
            let mirror = swarm.node(node).running_agent().context("no agent")?.mirror();
            let client = Emulator::new(&places[node], &swarm.ecr().name(), &[Host::new(mirror)]);
            client.pull(REPOSITORY, &pushed.tag).await.map(drop)
        };
        let (one, other) = tokio::join!(read(1), read(2));
        one.and(other)
    };
    let stopping = async {
        let agent = swarm.node(0).running_agent().context("no agent")?;
        eventually("the holder gives pieces", async || {
            let sent = agent.metrics().await?.sum("darter_peer_bytes_total", &[("direction", "sent")]);
            Ok(sent > bytes(4 * MIB))
        })
        .await?;
        agent.terminate()
    };
    let (read, stopped) = tokio::join!(reading, stopping);
    stopped?;
    read.with_context(|| format!("{}\n{}", swarm.story(1), swarm.story(2)))?;
    swarm.node_mut(0).ended().await?;
    swarm.ensure_peaceful().await?;
    for node in [1, 2] {
        let log = swarm.node(node).agent().context("no agent")?.log();
        let broken: Vec<&str> = log.lines().filter(|line| line.contains("the connection to the peer broke")).collect();
        ensure!(broken.is_empty(), "node {node}: {}", process::tail(&broken.join("\n")));
    }
    swarm.copies(&pushed).ensure_exactly(1)
}
