//! Members that hold the swarm key and lie: who they are is found out, they are cut off and counted, and
//! every node has its images, byte for byte.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::{Join, Message};
use darter_tests::agent::Options;
use darter_tests::cluster::hostile::{Deed, Hostile};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, garbage, last};
use darter_tests::stage::{MIB, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};
use futures_util::future::try_join_all;

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// A peer that sends nothing for so long has stalled.
const STALL: Duration = Duration::from_secs(3);

/// What a peer that stalls may cost beside that: the half second of the failure table, and as much again for what
/// else two pulls on such a machine differ by.
const MOMENT: Duration = Duration::from_secs(1);

/// A node pulls again as often as this: kubelet does so without end.
const TRIES: usize = 3;

async fn start(nodes: usize) -> Result<Swarm> {
    // kubelet waits for 10 s before it tries again, and longer each time.
    let configure = |_: &Seat, options: Options| {
        options
            .set("mirror.handover", "100ms")
            .set("log.level", "info,darter_agent::pulls=debug,darter_agent::swarm::driver=debug")
    };
    Swarm::start(Plan::new(nodes, 100, 1), configure).await
}

/// How often all agents together turned somebody away for this.
async fn rejected(swarm: &Swarm, reason: &str) -> Result<f64> {
    swarm.sum("darter_peer_rejected_total", &[("reason", reason)]).await
}

/// Whether the agent of a node has the largest layer, whose sha256 it has checked then.
fn has_layer(swarm: &Swarm, node: usize, pushed: &Pushed) -> Result<bool> {
    Ok(swarm.agent(node)?.dir().join("data/blobs").join(pushed.image.layers[0].digest().hex()).exists())
}

/// A node pulls as kubelet does, which tries again.
async fn pull_as_kubelet(swarm: &Swarm, node: usize, pushed: &Pushed) -> Result<()> {
    for _ in 1..TRIES {
        if last(swarm.pull_on(&[node], pushed).await).is_ok() {
            return Ok(());
        }
        eventually("the agent has the layer", async || has_layer(swarm, node, pushed)).await?;
    }
    last(swarm.pull_on(&[node], pushed).await).map(drop)
}

/// A hostile member takes part as soon as somebody reads.
async fn meddle(swarm: &Swarm, liar: &Hostile, pushed: &Pushed) -> Result<()> {
    eventually("somebody reads the registry", async || {
        Ok(swarm.sum("darter_origin_bytes_total", &[]).await? > bytes(MIB))
    })
    .await?;
    let layer = &pushed.image.layers[0];
    liar.want(layer.digest(), layer.size()).await
}

/// All nodes pull, and one member among them lies in this way.
async fn pull_beside(deed: Deed, seed: u64, layer: u64) -> Result<(Swarm, Hostile, Pushed)> {
    let mut swarm = start(2).await?;
    let liar = swarm.add_hostile(deed).await?;
    let pushed = swarm.push(seed, &[layer]).await?;
    let (pulls, meddled) = tokio::join!(swarm.pull_all(&pushed), meddle(&swarm, &liar, &pushed));
    meddled?;
    last(pulls)?;
    ensure!(liar.asked() > 0, "nobody asked it for anything: this tests nothing");
    let copies = swarm.copies_of_layer(&pushed);
    ensure!(copies.least >= 1 && copies.average() < 1.5, "{copies}");
    swarm.ensure_nobody_alone().await?;
    Ok((swarm, liar, pushed))
}

#[tokio::test]
async fn a_lying_importer_is_found_out_and_the_registry_is_read_once_more_for_all() -> Result<()> {
    let name = "a_lying_importer_is_found_out_and_the_registry_is_read_once_more_for_all";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(3).await?;
    let liar = swarm.add_hostile(Deed::Lie).await?;
    let pushed = swarm.push(31, &[40 * MIB]).await?;
    let pulls = try_join_all((0..swarm.len()).map(|node| pull_as_kubelet(&swarm, node, &pushed)));
    tokio::try_join!(pulls, meddle(&swarm, &liar, &pushed))?;
    for node in 0..swarm.len() {
        eventually("the agent has the layer", async || has_layer(&swarm, node, &pushed)).await?;
    }
    ensure!(liar.asked() > 0, "nobody asked it for anything: this tests nothing");
    let found = rejected(&swarm, "lied").await?;
    ensure!(found >= 1.0, "nobody found out\n{}", swarm.story(0));
    // Whoever had its bytes has banned it.
    eventually("it is no member any more", async || Ok(liar.others().is_empty())).await?;
    swarm.agents_know(2).await?;
    // Whose pull the lie breaks off reads on by itself.
    let copies = swarm.copies_by_agents(&pushed);
    // One until it is found out, one after; those who find it out later have lost some of the second. Each
    // for itself would be four.
    ensure!(copies.average() < 2.6, "{copies}\n{}", swarm.story(0));
    Ok(())
}

#[tokio::test]
async fn who_lies_about_a_blob_that_others_have_is_found_out_before_its_first_piece_is_taken() -> Result<()> {
    let name = "who_lies_about_a_blob_that_others_have_is_found_out_before_its_first_piece_is_taken";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    // With one honest holder the origin decides who of the two lies, with two they agree.
    for (honest, deed, seed) in [(1, Deed::Lie, 60), (2, Deed::Lie, 61), (2, Deed::LieAndBeSilent, 64)] {
        let mut swarm = start(honest + 1).await?;
        let liar = swarm.add_hostile(deed).await?;
        // Which holder is asked for which segment is a matter of their names.
        let mut was_asked = false;
        for seed in seed..seed + 3 {
            was_asked = pull_beside_liar(&swarm, &liar, honest, seed).await?;
            if was_asked {
                break;
            }
        }
        ensure!(was_asked, "{honest} honest, {deed:?}: it is never asked");
    }
    Ok(())
}

/// The last node pulls what the first ones have, and the liar says that it has. Whether it was asked for
/// anything.
async fn pull_beside_liar(swarm: &Swarm, liar: &Hostile, honest: usize, seed: u64) -> Result<bool> {
    let pushed = swarm.push(seed, &[40 * MIB]).await?;
    last(swarm.pull_on(&(0..honest).collect::<Vec<_>>(), &pushed).await)?;
    let before = swarm.sum("darter_origin_bytes_total", &[]).await?;
    let layer = &pushed.image.layers[0];
    liar.claim(layer.digest(), layer.size()).await?;
    // Once: containerd is given no wrong byte that it would stumble over.
    last(swarm.pull_on(&[honest], &pushed).await).with_context(|| swarm.story(honest))?;
    let (differ, disputed) = (rejected(swarm, "differ").await?, rejected(swarm, "disputed").await?);
    if liar.asked() == 0 && differ + disputed < 0.5 {
        return Ok(false);
    }
    let is_found = if honest == 1 { differ > 0.0 } else { differ + disputed > 0.0 };
    ensure!(is_found, "{honest} honest, differ {differ}, disputed {disputed}: {}", swarm.story(honest));
    let read = swarm.sum("darter_origin_bytes_total", &[]).await? - before;
    // One piece tells, and each of those that were on their way from the liar.
    ensure!(read <= bytes(4 * MIB), "{read} bytes were read again: {}", swarm.story(honest));
    swarm.ensure_nobody_alone().await.with_context(|| swarm.story(honest))?;
    Ok(true)
}

#[tokio::test]
async fn wrong_pieces_cost_each_victim_one_and_the_liar_its_place() -> Result<()> {
    if !can_run("wrong_pieces_cost_each_victim_one_and_the_liar_its_place", &NEEDS) {
        return Ok(());
    }
    let (swarm, _liar, _) = pull_beside(Deed::Corrupt, 32, 32 * MIB).await?;
    let corrupt = rejected(&swarm, "corrupt").await?;
    // Two pieces are asked of it at a time.
    ensure!((1.0..=4.0).contains(&corrupt), "{corrupt} wrong pieces");
    let mut members = Vec::new();
    for node in 0..swarm.len() {
        let metrics = swarm.agent(node)?.metrics().await?;
        let was_fooled = metrics.sum("darter_peer_rejected_total", &[("reason", "corrupt")]) > 0.0;
        members.push((was_fooled, metrics.sum("darter_swarm_peers", &[])));
    }
    ensure!(members.iter().all(|(was_fooled, others)| *was_fooled == (*others < 1.5)), "{members:?}");
    Ok(())
}

#[tokio::test]
async fn answers_of_a_wrong_length_or_without_an_end_are_not_read() -> Result<()> {
    if !can_run("answers_of_a_wrong_length_or_without_an_end_are_not_read", &NEEDS) {
        return Ok(());
    }
    for (deed, seed) in [(Deed::Endless, 33), (Deed::TooLong, 34)] {
        let (swarm, ..) = pull_beside(deed, seed, 24 * MIB).await.with_context(|| format!("{deed:?}"))?;
        let bad = rejected(&swarm, "bad_answer").await?;
        ensure!(bad >= 1.0, "{deed:?}: nobody was rejected");
        let received = swarm.sum("darter_peer_bytes_total", &[("direction", "received")]).await?;
        ensure!(received <= 2.0 * bytes(24 * MIB), "{deed:?}: {received} bytes came from others");
    }
    Ok(())
}

#[tokio::test]
async fn who_claims_to_have_everything_and_gives_nothing_is_let_go() -> Result<()> {
    if !can_run("who_claims_to_have_everything_and_gives_nothing_is_let_go", &NEEDS) {
        return Ok(());
    }
    let (swarm, liar, _) = pull_beside(Deed::Nothing, 35, 72 * MIB).await?;
    let boasts = rejected(&swarm, "boast").await?;
    ensure!(boasts >= 1.0, "{} pieces were asked of it, and it is still a neighbour", liar.asked());
    // The same of a blob that it says it has whole: the one source of all of it, if that were true.
    let pushed = swarm.push(36, &[24 * MIB]).await?;
    let layer = &pushed.image.layers[0];
    let asked = liar.asked();
    liar.claim(layer.digest(), layer.size()).await?;
    last(swarm.pull_all(&pushed).await)?;
    ensure!(liar.asked() > asked, "nobody believed it: this tests nothing");
    swarm.copies(&pushed).ensure_exactly(1)?;
    swarm.ensure_nobody_alone().await
}

#[tokio::test]
async fn who_takes_requests_and_answers_none_holds_nobody_up() -> Result<()> {
    if !can_run("who_takes_requests_and_answers_none_holds_nobody_up", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(3).await?;
    let calm = last(swarm.pull_all(&swarm.push(45, &[32 * MIB]).await?).await)?;
    let silent = swarm.add_hostile(Deed::Silence).await?;
    let pushed = swarm.push(46, &[32 * MIB]).await?;
    let comes = async {
        // Nobody knows how long a piece takes before some have come.
        eventually("it is being read", async || Ok(swarm.copies_of_layer(&pushed).sent > 4 * MIB)).await?;
        let layer = &pushed.image.layers[0];
        silent.want(layer.digest(), layer.size()).await
    };
    let (pulls, came) = tokio::join!(swarm.pull_all(&pushed), comes);
    came?;
    let took = last(pulls)?;
    ensure!(silent.asked() > 0, "nobody asked it for anything: this tests nothing");
    // What nobody else has is asked of it once for all that time, or twice where it was to read that too, and is
    // then read by another.
    ensure!(took <= calm + 2 * STALL + MOMENT, "{took:?}, and {calm:?} without it\n{}", swarm.told());
    let copies = swarm.copies_of_layer(&pushed);
    ensure!(copies.least == 1 && copies.sent - copies.size <= 16 * MIB, "{copies}\n{}", swarm.told());
    swarm.ensure_nobody_alone().await
}

/// A wish for a blob that does not exist.
fn wish(size: u64) -> Message {
    let have = Bitfield::new(Layout::new(size).pieces());
    Message::Join(Join { size, have, leased: Vec::new(), can_import: true, is_going: false, neighbours: Vec::new() })
}

#[tokio::test]
async fn a_flood_of_wishes_for_blobs_that_do_not_exist_ends_in_a_ban() -> Result<()> {
    if !can_run("a_flood_of_wishes_for_blobs_that_do_not_exist_ends_in_a_ban", &NEEDS) {
        return Ok(());
    }
    // Many small ones, and some of the largest size that there is.
    for (size, batch, seed) in [(MIB, 200, 37), (8 << 40, 2, 38)] {
        let mut swarm = start(2).await?;
        let flood = swarm.add_hostile(Deed::Nothing).await?;
        let pushed = swarm.push(seed, &[24 * MIB]).await?;
        let agents = flood.others();
        let mut wished = 0_u32;
        let flooding = eventually("it is banned everywhere", async || {
            for _ in 0..batch {
                wished += 1;
                agents.iter().for_each(|agent| flood.say(*agent, Digest::of(&wished.to_le_bytes()), wish(size)));
            }
            Ok(flood.others().is_empty())
        });
        let (pulls, flooded) = tokio::join!(swarm.pull_all(&pushed), flooding);
        flooded?;
        last(pulls)?;
        swarm.agents_know(1).await?;
        swarm.copies(&pushed).ensure_exactly(1)?;
        ensure!(rejected(&swarm, "flood").await? >= 2.0, "not counted");
        for usage in swarm.usage().into_iter().flatten() {
            ensure!(usage.peak_bytes < 200 * MIB, "{} bytes at the peak", usage.peak_bytes);
        }
    }
    Ok(())
}

#[tokio::test]
async fn garbage_in_the_middle_of_a_pull_costs_its_sender_the_connection() -> Result<()> {
    if !can_run("garbage_in_the_middle_of_a_pull_costs_its_sender_the_connection", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(2).await?;
    let place = swarm.add_stranger()?;
    let pushed = swarm.push(39, &[24 * MIB]).await?;
    let key = swarm.key_file();
    let agents = swarm.places().into_iter().map(|place| SocketAddr::new(place.address(), 4002));
    // A length beyond all bounds, a frame that is no protobuf, and a message before any hello.
    let frames = [vec![0xff; 64], vec![0, 0, 0, 2, 0xff, 0xff], vec![0, 0, 0, 0]];
    let talks = agents.flat_map(|agent| frames.clone().map(|bytes| garbage::say(&place, &key, agent, bytes)));
    let (pulls, said) = tokio::join!(swarm.pull_all(&pushed), try_join_all(talks));
    said?;
    last(pulls)?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    let bad = rejected(&swarm, "bad_frame").await?;
    ensure!((bad - 6.0).abs() < 0.5, "{bad} of 6 were counted");
    swarm.agents_know(1).await
}
