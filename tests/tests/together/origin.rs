//! A registry that throttles or whose signed URLs end, images that share layers, and nodes that have no
//! room: the others read it once all the same, and no pull fails.

use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Copies, Plan, Pushed, Seat, last};
use darter_tests::fake_ecr::{Fault, Kind, Rule, Seen};
use darter_tests::stage::{MIB, bytes, eventually};
use darter_tests::tmpfs::Tmpfs;
use darter_tests::tools::{Need, Release, can_run};

/// So long a registry throttles, that asks to be left alone for a second each time.
const BUSY: Duration = Duration::from_secs(3);

/// The same in seconds, where it asks for longer than nodes wait for one that is silent.
const LONG: u64 = 9;

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// Nobody read alone, and every byte was read once.
async fn read_once(swarm: &Swarm, pushed: &Pushed) -> Result<()> {
    swarm.ensure_peaceful().await?;
    swarm.copies(pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn a_registry_that_throttles_is_left_alone_and_read_once() -> Result<()> {
    if !can_run("a_registry_that_throttles_is_left_alone_and_read_once", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(71, &[48 * MIB]).await?;
    let layer = pushed.image.layers[0].digest();
    let busy = Rule::on(Kind::Object).digest(layer).always();
    swarm.ecr().inject(busy, Fault::Status(503, Some(1)));
    let recovers = async {
        tokio::time::sleep(BUSY).await;
        swarm.ecr().clear_faults();
    };
    let (pulls, ()) = tokio::join!(swarm.pull_all(&pushed), recovers);
    last(pulls)?;
    let refused = swarm.ecr().log().iter().filter(|seen| seen.status == 503).count();
    // Eight that are asked for at the start, and after each second half as many as before.
    ensure!((2..=16).contains(&refused), "{refused} requests in {BUSY:?} were refused");
    read_once(&swarm, &pushed).await
}

#[tokio::test]
async fn a_registry_that_asks_for_more_patience_than_a_node_has_is_left_alone_and_read_once() -> Result<()> {
    let name = "a_registry_that_asks_for_more_patience_than_a_node_has_is_left_alone_and_read_once";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    // Pods wait as kubelet makes them; what is begun goes on meanwhile.
    let patient = |_: &Seat, options: Options| options.set("mirror.linger", "60s");
    let swarm = Swarm::start(Plan::new(3, 100, 1), patient).await?;
    let pushed = swarm.push(76, &[48 * MIB]).await?;
    let layer = pushed.image.layers[0].digest();
    let busy = Rule::on(Kind::Object).digest(layer).always();
    swarm.ecr().inject(busy, Fault::Status(503, Some(LONG)));
    let recovers = async {
        tokio::time::sleep(Duration::from_secs(LONG)).await;
        swarm.ecr().clear_faults();
    };
    // containerd does not wait so long for a first byte, and asks a registry that refuses it too.
    let (_, ()) = tokio::join!(swarm.pull_all(&pushed), recovers);
    let refused: Vec<Seen> = swarm.ecr().log().into_iter().filter(|seen| seen.status == 503).collect();
    let by_agents = refused.iter().filter(|seen| !seen.agent.starts_with("containerd/")).count();
    ensure!((1..=6).contains(&by_agents), "agents were refused {by_agents} times");
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_nobody_alone().await?;
    swarm.copies_by_agents(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}

#[tokio::test]
async fn what_nodes_read_each_for_itself_is_seen_beside_what_was_read_once() -> Result<()> {
    if !can_run("what_nodes_read_each_for_itself_is_seen_beside_what_was_read_once", &NEEDS) {
        return Ok(());
    }
    let patient = |_: &Seat, options: Options| options.set("mirror.linger", "60s");
    let swarm = Swarm::start(Plan::new(2, 100, 1), patient).await?;
    let pushed = swarm.push(77, &[24 * MIB]).await?;
    let layer = &pushed.image.layers[0];
    // Nothing has come yet when they lose patience.
    swarm.ecr().inject(Rule::on(Kind::Object).digest(layer.digest()).always(), Fault::Delay(Duration::MAX));
    let go_alone = async {
        let alone = async || Ok(swarm.sum("darter_swarm_fallbacks_total", &[("reason", "stalled")]).await? >= 2.0);
        let went = eventually("both read alone", alone).await;
        swarm.ecr().clear_faults();
        went
    };
    let (_, went) = tokio::join!(swarm.pull_all(&pushed), go_alone);
    went?;
    // containerd has gone to the registry by itself, and what is begun goes on.
    eventually("both have read it", async || Ok(swarm.copies_by_agents(&pushed).average() > 1.9)).await?;
    let unique = swarm.sum("darter_origin_unique_bytes_total", &[]).await?;
    // All but the layer was read together.
    ensure!(unique < bytes(layer.size()), "{unique} bytes are said to have been read once");
    Ok(())
}

#[tokio::test]
async fn a_signed_url_that_ends_in_the_middle_costs_each_reader_one_more() -> Result<()> {
    if !can_run("a_signed_url_that_ends_in_the_middle_costs_each_reader_one_more", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    // Twelve segments, of which four are read at a time: the others are asked for afterwards.
    let pushed = swarm.push(72, &[96 * MIB]).await?;
    let layer = pushed.image.layers[0].digest();
    let end = async {
        let reads = async || Ok(swarm.ecr().count_of(Kind::Object, layer).bytes > 0);
        eventually("the first bytes are read", reads).await?;
        swarm.ecr().expire_signatures();
        anyhow::Ok(())
    };
    let (pulls, ended) = tokio::join!(swarm.pull_all(&pushed), end);
    ended?;
    last(pulls)?;
    let refused = swarm.ecr().log().iter().filter(|seen| seen.kind == Kind::Object && seen.status == 403).count();
    ensure!(refused > 0, "no URL was refused: this tests nothing");
    let signed = swarm.ecr().count_of(Kind::Blob, layer).requests;
    ensure!(signed <= 8, "{signed} URLs for four readers, before and after");
    read_once(&swarm, &pushed).await
}

#[tokio::test]
async fn images_with_layers_in_common_are_read_as_often_as_their_unique_bytes() -> Result<()> {
    if !can_run("images_with_layers_in_common_are_read_as_often_as_their_unique_bytes", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let base = [16 * MIB, 6 * MIB];
    let one = swarm.push_as("one", 73, &[base[0], base[1], 5 * MIB]).await?;
    let other = swarm.push_as("other", 73, &[base[0], base[1], 4 * MIB, 3 * MIB]).await?;
    let shared = |n: usize| one.image.layers[n].digest() == other.image.layers[n].digest();
    ensure!(shared(0) && shared(1) && !shared(2), "not the images that this is about");
    let (these, those) = tokio::join!(swarm.pull_on(&[0, 1], &one), swarm.pull_on(&[2, 3], &other));
    last(these)?;
    last(those)?;
    read_once(&swarm, &one).await?;
    read_once(&swarm, &other).await
}

#[tokio::test]
async fn a_blob_that_is_evicted_while_another_node_fetches_it_fails_nothing() -> Result<()> {
    if !can_run("a_blob_that_is_evicted_while_another_node_fetches_it_fails_nothing", &NEEDS) {
        return Ok(());
    }
    let plan = Plan::new(2, 200, 1);
    let thin = plan.link / 10;
    let small = |seat: &Seat, options: Options| {
        let options = options.set("log.level", "debug").set("mirror.prefetch", "off");
        if seat.number == 0 { options.set("store.limit", "24MiB") } else { options }
    };
    let swarm = Swarm::start(plan, small).await?;
    let [pushed, next] = [swarm.push(75, &[16 * MIB]).await?, swarm.push(76, &[14 * MIB]).await?];
    last(swarm.pull_on(&[0], &pushed).await)?;
    swarm.network().limit_link(1, thin)?;
    let evict = async {
        let received = async || {
            let metrics = swarm.agent(1)?.metrics().await?;
            anyhow::Ok(metrics.sum("darter_peer_bytes_total", &[("direction", "received")]))
        };
        eventually("the other node fetches it", async || Ok(received().await? > bytes(2 * MIB))).await?;
        last(swarm.pull_on(&[0], &next).await)?;
        let file = swarm.agent(0)?.dir().join("data/blobs").join(pushed.image.layers[0].digest().hex());
        eventually("it is evicted", async || Ok(!file.exists())).await.with_context(|| swarm.story(0))?;
        let got = received().await?;
        ensure!(got < bytes(14 * MIB), "it had come before: this tests nothing");
        anyhow::Ok(())
    };
    let (pulls, evicted) = tokio::join!(swarm.pull_on(&[1], &pushed), evict);
    evicted?;
    last(pulls)?;
    swarm.ensure_peaceful().await?;
    // What had come is not read again, and what was open came whole.
    let copies = Copies::of_blob(&swarm.ecr().log(), &pushed.image.layers[0]);
    let got = swarm.agent(1)?.metrics().await?.sum("darter_peer_bytes_total", &[("direction", "received")]);
    ensure!(copies.most <= 2 && bytes(copies.sent) + got <= 2.0 * bytes(copies.size) + bytes(MIB), "{copies}, {got}");
    Ok(())
}

#[tokio::test]
async fn a_node_without_room_pulls_from_the_registry_and_the_others_share() -> Result<()> {
    if !can_run("a_node_without_room_pulls_from_the_registry_and_the_others_share", &NEEDS) {
        return Ok(());
    }
    let tmpfs = Tmpfs::new(96 * MIB)?;
    let data = Mutex::new(tmpfs.path().join("data").display().to_string());
    let on_tmpfs = move |seat: &Seat, options: Options| {
        let data = data.lock().map(|data| data.clone()).unwrap_or_default();
        if seat.number == 2 { options.set("agent.data_dir", data).set("store.min_free", "1MiB") } else { options }
    };
    let swarm = Swarm::start(Plan::new(3, 100, 2), on_tmpfs).await?;
    let pushed = swarm.push(77, &[24 * MIB]).await?;
    tmpfs.fill()?;
    last(swarm.pull_all(&pushed).await)?;
    // The node without room may be told to read, and sees that it has none when the first bytes are there.
    let copies = swarm.copies_by_agents(&pushed);
    ensure!(copies.least == 1 && copies.sent - copies.size < MIB, "{copies}\n{}", swarm.told());
    let log = swarm.ecr().log();
    let itself: u64 = log.iter().filter(|seen| seen.agent.starts_with("containerd/")).map(Seen::bytes).sum();
    ensure!(itself >= pushed.image.layer_bytes(), "{itself} bytes were read by the node without room");
    swarm.ensure_peaceful().await?;
    // With room it is one of them again.
    tmpfs.empty()?;
    let ready = swarm.agent(2)?;
    eventually("the store takes blobs", async || {
        let answer = ready.admin("/readyz").await?;
        Ok(!answer.text().contains("takes no new blobs") && !answer.text().contains("degraded"))
    })
    .await
    .with_context(|| swarm.story(2))?;
    let next = swarm.push(78, &[8 * MIB]).await?;
    last(swarm.pull_all(&next).await)?;
    read_once(&swarm, &next).await
}
