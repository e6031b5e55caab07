//! Agents that share: N real containerds pull at the same moment, and the registry is read once.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::fake_ecr::{Fault, Kind, Rule};
use darter_tests::stage::{MIB, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// 100 Mbit/s, in bytes a second.
const LINK: u64 = 12_500_000;

#[tokio::test]
async fn four_nodes_at_once_read_the_origin_exactly_once() -> Result<()> {
    if !can_run("four_nodes_at_once_read_the_origin_exactly_once", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(1, &[24 * MIB, 8 * MIB]).await?;
    let took = last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_peaceful().await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    // Without each other: four copies over one link.
    let alone = Duration::from_secs_f64(4.0 * bytes(pushed.image.layer_bytes()) / bytes(LINK));
    ensure!(took < alone * 3 / 4, "{took:?}, alone it would be {alone:?}");
    let layers = bytes(pushed.image.layer_bytes());
    let sent = async || swarm.sum("darter_peer_bytes_total", &[("direction", "sent")]).await;
    eventually("they went from node to node", async || Ok(sent().await? >= 3.0 * layers)).await?;
    // What containerd got is told by where it came from: of four nodes' blobs one copy is the registry's.
    let given = async || swarm.sum("darter_mirror_bytes_total", &[]).await;
    eventually("each containerd got it all", async || Ok(given().await? >= 4.0 * layers)).await?;
    let told = async |source| swarm.sum("darter_mirror_bytes_total", &[("source", source)]).await;
    let (peers, origin) = (told("peer").await?, told("origin").await?);
    let share = origin / (peers + origin);
    ensure!((0.2..0.4).contains(&share), "{origin} bytes from the registry, {peers} from peers");
    Ok(())
}

#[tokio::test]
async fn many_small_layers_are_read_once_and_no_node_goes_on_alone() -> Result<()> {
    if !can_run("many_small_layers_are_read_once_and_no_node_goes_on_alone", &NEEDS) {
        return Ok(());
    }
    // The first node has a start, and with it every layer first: the others must not all wait for it.
    let swarm = Swarm::start(Plan::new(4, 200, 1), |_, options| options).await?;
    let pushed = swarm.push(7, &[MIB - 1536; 100]).await?;
    let others = async {
        eventually("the first has some", async || {
            let agent = swarm.node(0).running_agent().context("an agent is gone")?;
            Ok(agent.metrics().await?.sum("darter_origin_bytes_total", &[]) > bytes(4 * MIB))
        })
        .await?;
        anyhow::Ok(swarm.pull_on(&[1, 2, 3], &pushed).await)
    };
    let (first, others) = tokio::join!(swarm.pull_on(&[0], &pushed), others);
    last(first)?;
    last(others?)?;
    swarm.ensure_peaceful().await?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn a_registry_of_slow_connections_is_read_once_too() -> Result<()> {
    if !can_run("a_registry_of_slow_connections_is_read_once_too", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(3, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(8, &[MIB]).await?;
    // Longer than a lease may show nothing at all.
    let layer = pushed.image.layers[0].digest();
    swarm.ecr().inject(Rule::on(Kind::Object).digest(layer).always(), Fault::Slow(MIB / 7));
    last(swarm.pull_all(&pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn containerd_waits_for_a_first_byte_that_others_overtake() -> Result<()> {
    if !can_run("containerd_waits_for_a_first_byte_that_others_overtake", &NEEDS) {
        return Ok(());
    }
    let impatient = |_: &Seat, options: Options| options.set("mirror.answer_within", "500ms").set("mirror.stall", "2s");
    let swarm = Swarm::start(Plan::new(2, 80, 1), impatient).await?;
    let pushed = swarm.push(6, &[64 * MIB]).await?;
    // Whoever reads the first bytes gets none for twice as long as a body may stand still.
    let layer = pushed.image.layers[0].digest();
    swarm.ecr().inject(Rule::on(Kind::Object).digest(layer).first_bytes(), Fault::Delay(Duration::from_secs(4)));
    last(swarm.pull_on(&[0], &pushed).await)?;
    swarm.copies_of_layer(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn a_killed_importer_costs_nothing_but_time() -> Result<()> {
    if !can_run("a_killed_importer_costs_nothing_but_time", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(2, &[64 * MIB]).await?;
    let layer = pushed.image.layer_bytes();
    let faults = async {
        // Whoever has read a good part of the layer from the registry, and still reads.
        let victim = swarm.reader(0..swarm.len(), layer / 8).await?;
        swarm.kill_agent(victim)?;
        Ok::<_, anyhow::Error>(victim)
    };
    let (pulls, victim) = tokio::join!(swarm.pull_all(&pushed), faults);
    let victim = victim?;
    last(pulls)?;
    ensure!(swarm.node(victim).running_agent().is_none(), "the agent was not killed");
    // What containerd of the victim's node reads by itself from then on is not the swarm's.
    let copies = swarm.copies_by_agents(&pushed);
    // The pieces that it had read and not yet given to anybody are read again: a segment for each lease.
    ensure!(copies.least == 1, "{copies}");
    ensure!(copies.sent - copies.size <= 24 * MIB, "{copies}");
    Ok(())
}

#[tokio::test]
async fn a_node_that_comes_late_takes_nothing_from_the_registry() -> Result<()> {
    if !can_run("a_node_that_comes_late_takes_nothing_from_the_registry", &NEEDS) {
        return Ok(());
    }
    let mut swarm = Swarm::start(Plan::new(2, 200, 1), |_, options| options).await?;
    let pushed = swarm.push(3, &[24 * MIB, 3 * MIB]).await?;
    last(swarm.pull_on(&[0], &pushed).await)?;
    let newcomer = swarm.add_node().await?;
    swarm.complete().await?;
    last(swarm.pull_on(&[1, newcomer], &pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    // What an agent keeps is offered again after its restart.
    swarm.forget().await?;
    for node in [0, 1] {
        swarm.node_mut(node).stop_agent().await?;
    }
    swarm.node_mut(newcomer).stop_agent().await?;
    swarm.node_mut(newcomer).start_agent_again().await?;
    let last_one = swarm.add_node().await?;
    swarm.complete().await?;
    last(swarm.pull_on(&[last_one], &pushed).await)?;
    swarm.copies(&pushed).ensure_exactly(1)
}

#[tokio::test]
async fn a_node_that_loses_its_power_is_missed_by_nobody() -> Result<()> {
    if !can_run("a_node_that_loses_its_power_is_missed_by_nobody", &NEEDS) {
        return Ok(());
    }
    let swarm = start_four().await?;
    let pushed = swarm.push(4, &[96 * MIB]).await?;
    let size = pushed.image.layer_bytes();
    let victim = async {
        let agent = swarm.node(3).running_agent().context("an agent is gone")?;
        eventually("it reads the registry", async || {
            Ok(agent.metrics().await?.sum("darter_origin_bytes_total", &[]) > bytes(size) / 16.0)
        })
        .await?;
        Ok(3)
    };
    without_power(&swarm, &pushed, victim).await
}

#[tokio::test]
async fn the_first_bytes_of_a_node_without_power_come_from_another() -> Result<()> {
    if !can_run("the_first_bytes_of_a_node_without_power_come_from_another", &NEEDS) {
        return Ok(());
    }
    let swarm = start_four().await?;
    let pushed = swarm.push(5, &[96 * MIB]).await?;
    let layer = pushed.image.layers[0].digest();
    let (wish, order) = (format!("Want {{ blob: {layer},"), format!("Import {{ blob: {layer}, segment: 0,"));
    let victim = async {
        let mut victim = None;
        // By then all have the manifests, which come from each other too.
        eventually("all want the layer, and one is to read the first of it", async || {
            let logs: Vec<_> = (0..swarm.len()).filter_map(|node| swarm.node(node).agent()).map(Agent::log).collect();
            victim = logs.iter().position(|log| log.contains(&order));
            Ok(victim.is_some() && logs.iter().all(|log| log.contains(&wish)))
        })
        .await?;
        victim.context("nobody reads")
    };
    without_power(&swarm, &pushed, victim).await
}

async fn start_four() -> Result<Swarm> {
    Swarm::start(Plan::new(4, 100, 1), |_, options| {
        options.set("log.level", "info,darter_agent::swarm=trace,darter_agent::pulls=debug")
    })
    .await
}

/// All pull, and one of them is gone without a word as soon as it is known which.
async fn without_power(swarm: &Swarm, pushed: &Pushed, victim: impl Future<Output = Result<usize>>) -> Result<()> {
    let fault = async {
        let victim = victim.await?;
        // The cable first: nobody hears a FIN.
        swarm.network().unplug(victim)?;
        swarm.kill_agent(victim)?;
        anyhow::Ok(victim)
    };
    tokio::pin!(fault);
    let mut pulls: FuturesUnordered<_> =
        (0..swarm.len()).map(|node| async move { swarm.pull_on(&[node], pushed).await }).collect();
    let (mut gone, mut done) = (None, Vec::new());
    while gone.is_none() || done.len() + 1 < swarm.len() {
        tokio::select! {
            victim = &mut fault, if gone.is_none() => gone = Some(victim?),
            Some(pull) = pulls.next() => done.extend(pull),
        }
        // What becomes of a pull without a network is of no interest.
        done.retain(|pull| Some(pull.node) != gone);
    }
    last(done)?;
    let copies = swarm.copies_of_layer(pushed);
    // The pieces that it had read and not yet given to anybody are read again: a segment for each lease.
    let is_missed_by_nobody = copies.least == 1 && copies.sent - copies.size <= 32 * MIB;
    ensure!(is_missed_by_nobody, "{copies}\n{}", swarm.told());
    swarm.ensure_nobody_alone().await
}
