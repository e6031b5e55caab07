//! A stored blob that rots: the pull that meets it fails, because containerd alone checks what was
//! sent and tells nobody; the next try must not meet it again.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::emulator::{Emulator, Host};
use darter_tests::net::Place;
use darter_tests::on_each_release;
use darter_tests::stage::{MIB, Pair, REPOSITORY, Stage, eventually, flip};

/// An agent that was just started and has an image whose largest layer rotted at this offset, and a
/// containerd without it. Nothing but a sign of it has the blob looked at.
async fn rotten(stage: &mut Stage, offset: u64) -> Result<()> {
    let options = stage.options("public").set("store.verify_one_in", 0).set("mirror.handover", "2s");
    stage.start(options).await?;
    stage.pull().await?;
    stage.containerd.forget().await?;
    let file = layer_file(stage);
    eventually("the layer is complete", async || Ok(file.exists())).await?;
    let agent = stage.agent.as_mut().context("no agent")?;
    agent.stop().await?;
    flip(&file, offset)?;
    agent.start_again().await?;
    stage.ecr.reset_counts();
    Ok(())
}

fn layer_file(stage: &Stage) -> PathBuf {
    stage.agent().dir().join("data/blobs").join(stage.layer().0.hex())
}

/// Pulls, and has it fail for what containerd found.
async fn fails(stage: &Stage) -> Result<()> {
    let failed = stage.containerd.cri().pull(&stage.reference(), None).await;
    let error = format!("{:#}", failed.err().context("containerd took a wrong layer")?);
    ensure!(error.contains("unexpected commit digest"), "{error}");
    ensure!(stage.ecr.blob_bytes() == 0, "the layer came from the origin");
    // Until it has collected what it did not accept, containerd takes up from there and asks nobody. The
    // kubelet's next try comes later.
    let collected = async || Ok(stage.containerd.ctr(&["content", "active"]).await?.lines().count() <= 1);
    eventually("containerd threw it away", collected).await
}

/// After the try that succeeded: what is wrong is counted and gone, and the next pull has it whole.
async fn healed(stage: &Stage) -> Result<()> {
    let dropped = async || Ok(stage.metric("darter_store_corruptions_total", &[]).await? == 1.0);
    eventually("it is dropped", dropped).await?;
    assert_eq!(stage.metric("darter_mirror_handovers_total", &[("reason", "rotten")]).await?, 1.0);
    let ((layer, size), file) = (stage.layer(), layer_file(stage));
    // Once the hand-over is over.
    eventually("it is fetched anew", async || {
        stage.containerd.forget().await?;
        stage.pull().await?;
        Ok(file.exists())
    })
    .await?;
    ensure!(Digest::of(&std::fs::read(&file)?) == layer, "{size} bytes are wrong again");
    assert_eq!(stage.metric("darter_store_corruptions_total", &[]).await?, 1.0);
    Ok(())
}

on_each_release! {
    a_layer_that_rotted_fails_one_pull_and_the_next_try_has_the_right_bytes(release) {
        let mut stage = Stage::new(release, &[12 * MIB, MIB]).await?;
        rotten(&mut stage, 5 * MIB + 9).await?;
        fails(&stage).await?;
        stage.pull().await?;
        let by_containerd = stage.read_by_containerd();
        let (_, size) = stage.layer();
        // The piece that is wrong starts at 5 MiB, and what is looked at at once is half of one.
        let wanted = size - 5 * MIB..=size - 5 * MIB + MIB / 2;
        ensure!(wanted.contains(&by_containerd), "{by_containerd} of {size} came from the origin\n{}", stage.story());
        healed(&stage).await
    }

    a_layer_whose_first_bytes_rotted_comes_from_the_origin_at_the_next_try(release) {
        let mut stage = Stage::new(release, &[3 * MIB, MIB]).await?;
        rotten(&mut stage, 9).await?;
        fails(&stage).await?;
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), stage.layer().1, "{}", stage.story());
        healed(&stage).await
    }

    a_layer_that_is_right_is_given_again_and_costs_the_origin_nothing(release) {
        let mut stage = Stage::new(release, &[12 * MIB, MIB]).await?;
        stage.start_default().await?;
        for round in 0..4 {
            stage.pull().await?;
            stage.containerd.forget().await?;
            if round == 0 {
                stage.ecr.reset_counts();
            }
        }
        assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
        assert_eq!(stage.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
        Ok(())
    }
}

#[tokio::test]
async fn a_blob_in_doubt_is_one_stream_for_a_client_of_chunks_and_once_it_is_cleared_chunks_again() -> Result<()> {
    use darter_tests::tools::{Need, can_run};
    let name = "a_blob_in_doubt_is_one_stream_for_a_client_of_chunks_and_once_it_is_cleared_chunks_again";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[5 * MIB]).await?;
    pair.read_manifests().await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    for (round, answers) in [vec![206; 6], vec![200], vec![206; 6]].into_iter().enumerate() {
        let client = Emulator::new(&Place::Host, &pair.ecr.name(), &[Host::new(pair.mirror())]);
        client.chunks(REPOSITORY, &layer.descriptor, MIB).await.with_context(|| format!("round {round}"))?;
        let seen: Vec<u16> = client.seen().iter().filter_map(|exchange| exchange.status).collect();
        assert_eq!(seen, answers, "round {round}");
    }
    assert_eq!(pair.ecr.blob_bytes(), layer.size());
    Ok(())
}
