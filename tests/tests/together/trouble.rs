//! Nodes that die, stand still, are slow or cut off, or boot all at once: what the simulator plays with
//! thousands of them, on real sockets.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Seat, last};
use darter_tests::stage::{MIB, bytes};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// What readers who died, stood still or were cut off had begun: a segment for each of their leases.
const BEGUN: u64 = 32 * MIB;

#[tokio::test]
async fn a_coordinator_that_dies_in_the_middle_is_followed_by_another() -> Result<()> {
    if !can_run("a_coordinator_that_dies_in_the_middle_is_followed_by_another", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(61, &[48 * MIB]).await?;
    let victim = swarm.coordinator(pushed.image.layers[0].digest())?;
    let fault = async {
        swarm.reader(0..swarm.len(), 3 * MIB).await?;
        swarm.kill_agent(victim)?;
        let copies = swarm.copies_of_layer(&pushed);
        ensure!(copies.sent < copies.size, "all of it was read before: this tests nothing");
        anyhow::Ok(())
    };
    let (pulls, killed) = tokio::join!(swarm.pull_all(&pushed), fault);
    killed?;
    last(pulls)?;
    let copies = swarm.copies_by_agents(&pushed);
    ensure!(copies.least == 1 && copies.sent - copies.size <= BEGUN, "{copies}\n{}", swarm.told());
    swarm.ensure_nobody_alone().await
}

#[tokio::test]
async fn a_node_that_stands_still_holds_up_nobody_and_goes_on_afterwards() -> Result<()> {
    if !can_run("a_node_that_stands_still_holds_up_nobody_and_goes_on_afterwards", &NEEDS) {
        return Ok(());
    }
    // As long as this takes over these links no node waits that hears nothing: 6 s.
    let swarm = Swarm::start(Plan::new(4, 80, 1), |_, options| options).await?;
    let pushed = swarm.push(62, &[64 * MIB]).await?;
    // The kernel goes on accepting what is sent to it, and nothing comes back.
    let pulling: Vec<_> = (0..swarm.len()).map(|node| tokio::spawn(swarm.pull_alone(node, &pushed))).collect();
    let paused = swarm.reader(0..swarm.len(), 4 * MIB).await?;
    swarm.pause(paused)?;
    let mut waits = None;
    for (node, pull) in pulling.into_iter().enumerate() {
        if node == paused {
            waits = Some(pull);
        } else {
            pull.await?.with_context(|| swarm.story(node))?;
        }
    }
    swarm.resume(paused)?;
    waits.context("nobody was paused")?.await?.with_context(|| swarm.story(paused))?;
    for node in 0..swarm.len() {
        swarm.verify(node, &pushed).await?;
    }
    let copies = swarm.copies_of_layer(&pushed);
    ensure!(copies.least == 1 && copies.sent - copies.size <= BEGUN, "{copies}\n{}", swarm.told());
    swarm.ensure_nobody_alone().await
}

#[tokio::test]
async fn a_reader_on_a_thin_link_makes_nobody_go_on_alone() -> Result<()> {
    if !can_run("a_reader_on_a_thin_link_makes_nobody_go_on_alone", &NEEDS) {
        return Ok(());
    }
    let plan = Plan::new(4, 400, 1);
    let (thin, link) = (3, plan.link);
    let swarm = Swarm::start(plan, |_, options| options).await?;
    swarm.network().limit_link(thin, link / 10)?;
    let pushed = swarm.push(63, &[32 * MIB]).await?;
    // It comes first, and has been told to read a good part of it before anybody knows how slow it is.
    let others = async {
        swarm.reader(thin..thin + 1, MIB).await?;
        anyhow::Ok(swarm.pull_on(&[0, 1, 2], &pushed).await)
    };
    let slow = async { swarm.pull_on(&[thin], &pushed).await };
    let (slow, others) = tokio::join!(slow, others);
    last(slow)?;
    last(others?)?;
    let read = swarm.agent(thin)?.metrics().await?.sum("darter_origin_bytes_total", &[]);
    ensure!(read >= bytes(8 * MIB), "it read {read} bytes for the others: this tests nothing");
    // Where they are done with all else some of it is read once more, by one of them for all.
    swarm.ensure_nobody_alone().await?;
    let copies = swarm.copies(&pushed);
    ensure!(copies.least == 1 && copies.most <= 2, "{copies}\n{}", swarm.told());
    Ok(())
}

#[tokio::test]
async fn nodes_that_boot_and_pull_at_once_read_the_registry_once() -> Result<()> {
    if !can_run("nodes_that_boot_and_pull_at_once_read_the_registry_once", &NEEDS) {
        return Ok(());
    }
    // None waits until it knows the others: they are as they start.
    let mut swarm = Swarm::start_apart(Plan::new(6, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(64, &[12 * MIB, 4 * MIB]).await?;
    swarm.stop_agents().await?;
    swarm.start_agents_again().await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_nobody_alone().await?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

/// A name of agents that nobody answers for.
const NAME: &str = "darter.gpu.svc.cluster.local";

const HALF: [usize; 2] = [0, 1];

#[tokio::test]
async fn both_halves_of_a_swarm_that_is_cut_in_the_middle_finish() -> Result<()> {
    if !can_run("both_halves_of_a_swarm_that_is_cut_in_the_middle_finish", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 2), |_, options| options).await?;
    let pushed = swarm.push(65, &[32 * MIB]).await?;
    let cut = async {
        swarm.reader(0..swarm.len(), 3 * MIB).await?;
        swarm.partition(&HALF)?;
        let copies = swarm.copies_of_layer(&pushed);
        ensure!(copies.sent < copies.size, "all of it was read before: this tests nothing");
        anyhow::Ok(())
    };
    let (pulls, cut) = tokio::join!(swarm.pull_all(&pushed), cut);
    cut?;
    last(pulls)?;
    swarm.ensure_nobody_alone().await?;
    let copies = swarm.copies_of_layer(&pushed);
    // One for each half. What a half had begun for a coordinator that is in the other now is read once more.
    let most = 2 * copies.size + BEGUN / 2;
    ensure!(copies.least >= 1 && copies.sent <= most, "{copies}\n{}", swarm.told());
    // That is why: they are two swarms.
    swarm.agents_know(1).await
}

#[tokio::test]
async fn halves_that_find_each_other_in_the_middle_go_on_as_one() -> Result<()> {
    if !can_run("halves_that_find_each_other_in_the_middle_go_on_as_one", &NEEDS) {
        return Ok(());
    }
    // A registry so slow that they find each other before either half has everything.
    let plan = Plan { origin: 8 * MIB, ..Plan::new(4, 100, 1) };
    let mut swarm = Swarm::start_apart(plan, |_, options| options).await?;
    swarm.stop_agents().await?;
    swarm.partition(&HALF)?;
    swarm.start_agents_again().await?;
    swarm.agents_know(1).await?;
    let pushed = swarm.push(67, &[2 * MIB; 30]).await?;
    let heal = async {
        swarm.reader(0..2, MIB).await?;
        swarm.reader(2..4, MIB).await?;
        swarm.heal(&HALF)
    };
    let (pulls, healed) = tokio::join!(swarm.pull_all(&pushed), heal);
    healed?;
    last(pulls)?;
    swarm.ensure_nobody_alone().await?;
    let copies = swarm.copies(&pushed);
    // Two of each layer if they had not found each other.
    ensure!(copies.least == 1 && copies.average() < 1.9, "{copies}\n{}", swarm.told());
    swarm.complete().await?;
    let next = swarm.push(66, &[8 * MIB, 4 * MIB]).await?;
    last(swarm.pull_all(&next).await)?;
    swarm.ensure_nobody_alone().await?;
    swarm.copies(&next).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn a_name_that_is_not_answered_keeps_nobody_from_the_others() -> Result<()> {
    if !can_run("a_name_that_is_not_answered_keeps_nobody_from_the_others", &NEEDS) {
        return Ok(());
    }
    // No DNS server answers here; the addresses of the list need none.
    let named = |_: &Seat, options: Options| options.set("swarm.dns", NAME);
    let mut swarm = Swarm::start_apart(Plan::new(2, 200, 1), named).await?;
    let pushed = swarm.push(69, &[12 * MIB, MIB]).await?;
    swarm.stop_agents().await?;
    swarm.start_agents_again().await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.story(0))
}

#[tokio::test]
async fn a_node_that_hears_of_nobody_at_its_boot_serves_and_joins_later() -> Result<()> {
    if !can_run("a_node_that_hears_of_nobody_at_its_boot_serves_and_joins_later", &NEEDS) {
        return Ok(());
    }
    // No DNS server answers here, and no address of the list does at first. A first byte that comes later
    // than this is a 404, and the client knows no other host.
    let lost = |seat: &Seat, options: Options| {
        let options = options.set("swarm.lookup_every", "1s").set("mirror.answer_within", "3s");
        if seat.number == 0 { options.set("swarm.dns", NAME) } else { options }
    };
    let mut swarm = Swarm::start_apart(Plan::new(2, 200, 1), lost).await?;
    let pushed = swarm.push(68, &[16 * MIB, MIB]).await?;
    swarm.node_mut(0).stop_agent().await?;
    swarm.partition(&[0])?;
    swarm.node_mut(0).start_agent_again().await?;
    last(swarm.read_on(&[0], &pushed).await).with_context(|| swarm.story(0))?;
    swarm.heal(&[0])?;
    swarm.complete().await?;
    last(swarm.pull_on(&[1], &pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}
