//! Manifests by digest come from any node that has them; tags, and the right to read, from the registry.

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Seat, last};
use darter_tests::fake_ecr::{Fault, Kind, Rule};
use darter_tests::stage::{MIB, REPOSITORY, bytes};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

#[tokio::test]
async fn four_nodes_at_once_read_each_manifest_once() -> Result<()> {
    if !can_run("four_nodes_at_once_read_each_manifest_once", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), |_, options| options).await?;
    let pushed = swarm.push(11, &[2 * MIB, MIB]).await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_peaceful().await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    let (index, child) = (pushed.image.root.digest(), pushed.image.child()?);
    for manifest in [index, child] {
        let read = swarm.ecr().count_of(Kind::Manifest, manifest).requests;
        ensure!(read == 1, "{manifest} was read {read} times (index {index}, child {child})");
    }
    // Each node has proved its own access all the same: to the tag, and to the manifest that it leads to.
    let log = swarm.ecr().log();
    let proofs = log.iter().filter(|seen| seen.kind == Kind::ManifestHead && seen.line.contains("/manifests/seed-"));
    ensure!(proofs.count() >= 4, "a tag was not asked at the registry by each node");
    let of_child = log.iter().filter(|seen| seen.digest == Some(child) && seen.status == 200).count();
    ensure!(of_child >= 4, "{of_child} proofs of access to the manifest");
    Ok(())
}

#[tokio::test]
async fn with_the_registry_away_a_pull_by_digest_takes_what_it_proved_before_from_other_nodes() -> Result<()> {
    let name = "with_the_registry_away_a_pull_by_digest_takes_what_it_proved_before_from_other_nodes";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let small = |seat: &Seat, options: Options| match seat.number {
        1 => options.set("store.limit", "20MiB"),
        _ => options,
    };
    let swarm = Swarm::start(Plan::new(2, 400, 1), small).await?;
    let pushed = swarm.push(12, &[8 * MIB, 4 * MIB]).await?;
    last(swarm.pull_all(&pushed).await)?;
    // The store of the second node has room for one of the two: all of the first image is gone there.
    let other = swarm.push(13, &[16 * MIB]).await?;
    last(swarm.pull_on(&[1], &other).await)?;
    swarm.forget().await?;
    let agent = swarm.node(1).running_agent().context("no agent")?;
    let stored = |digest: Digest| agent.dir().join("data/blobs").join(digest.to_string().trim_start_matches("sha256:"));
    let index = pushed.image.root.digest();
    for manifest in [index, pushed.image.child()?] {
        ensure!(!stored(manifest).exists(), "{} is still on the node", stored(manifest).display());
    }
    let received = [("direction", "received")];
    let before = agent.metrics().await?.sum("darter_peer_bytes_total", &received);
    swarm.ecr().inject(Rule::any().always(), Fault::Status(503, None));
    let log = swarm.ecr().log().len();
    let by_digest = format!("{}/{REPOSITORY}@{index}", swarm.ecr().name());
    swarm.node(1).containerd().cri().pull(&by_digest, None).await.with_context(|| swarm.story(1))?;
    let given: Vec<_> = swarm.ecr().log().split_off(log).into_iter().filter(|seen| seen.status < 300).collect();
    ensure!(given.is_empty(), "the registry gave {given:?}");
    let got = agent.metrics().await?.sum("darter_peer_bytes_total", &received) - before;
    ensure!(got > bytes(8 * MIB), "{got} bytes came from the other node");
    Ok(())
}
