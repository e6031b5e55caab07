//! One fetch per blob, whatever the number of readers, and how long it goes on; and what is fetched
//! before it is asked for.

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::{Auth, Kind};
use darter_tests::image::{Format, Image, Item};
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Pair, REPOSITORY, TAG, bytes, ecr, eventually, pair_options};
use darter_tests::tools::{Need, can_run};
use futures_util::future::try_join_all;
use sha2::{Digest as _, Sha256};

const CLIENTS: usize = 16;

/// A pair that fetches ahead.
async fn prefetching(layers: &[u64]) -> Result<Pair> {
    Pair::with(layers, Auth::Public, &[("access", "public".into())], |options| options).await
}

/// Reads a whole blob as containerd does, and checks it.
async fn read(pair: &Pair, blob: &Item) -> Result<()> {
    let mut answer = pair.open(&format!("blobs/{}", blob.digest()), &[]).await?;
    if answer.exchange.status != Some(200) {
        let reason = String::from_utf8_lossy(&answer.body().await?).into_owned();
        anyhow::bail!("{:?}: {reason}", answer.exchange.status);
    }
    let mut hash = Sha256::new();
    let end = answer.read(None, |bytes| hash.update(bytes)).await?;
    ensure!(end == End::Complete, "{:?}", answer.exchange);
    ensure!(Digest::from_bytes(hash.finalize().into()) == blob.digest(), "the bytes are wrong");
    Ok(())
}

#[tokio::test]
async fn many_clients_at_once_cost_one_fetch() -> Result<()> {
    if !can_run("many_clients_at_once_cost_one_fetch", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[12 * MIB]).await?;
    pair.read_manifests().await?;
    pair.ecr.reset_counts();
    // They come while it is still on its way.
    pair.ecr.set_rate(Some(12 * MIB), None);
    let layer = pair.layer();
    try_join_all((0..CLIENTS).map(|_| read(&pair, &layer))).await?;
    let count = pair.ecr.count_of(Kind::Blob, layer.digest());
    assert_eq!(count.bytes, layer.size());
    // One request for each segment of 8 MiB.
    assert_eq!(count.requests, 2);
    pair.agent.counted("darter_pulls_total", &[("outcome", "complete")], |sum| sum == 1.0).await?;
    let given = bytes(CLIENTS as u64 * layer.size());
    pair.agent.counted("darter_mirror_bytes_total", &[], |sum| sum >= given).await?;
    Ok(())
}

#[tokio::test]
async fn many_clients_of_a_blob_that_no_manifest_told_of_cost_one_fetch_too() -> Result<()> {
    let name = "many_clients_of_a_blob_that_no_manifest_told_of_cost_one_fetch_too";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    // As after a restart of the agent in the middle of a pull: containerd has the manifests.
    let pair = Pair::new(&[4 * MIB]).await?;
    pair.ecr.set_rate(Some(8 * MIB), None);
    let layer = pair.layer();
    try_join_all((0..CLIENTS).map(|_| read(&pair, &layer))).await?;
    let count = pair.ecr.count_of(Kind::Blob, layer.digest());
    // The first byte is the proof of access.
    assert_eq!((count.bytes, count.requests), (layer.size() + 1, 2));
    pair.agent.counted("darter_pulls_total", &[("outcome", "complete")], |sum| sum == 1.0).await?;
    Ok(())
}

#[tokio::test]
async fn many_clients_of_a_manifest_cost_one_fetch() -> Result<()> {
    if !can_run("many_clients_of_a_manifest_cost_one_fetch", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[4096]).await?;
    let path = format!("manifests/{TAG}");
    let answers = try_join_all((0..CLIENTS).map(|_| pair.get(&path))).await?;
    for answer in answers {
        assert_eq!(answer.status, 200);
        assert_eq!(Digest::of(&answer.body), pair.image.root.digest());
    }
    assert_eq!(pair.ecr.count(Kind::ManifestHead).requests, 1, "HEAD of the tag");
    assert_eq!(pair.ecr.count(Kind::Manifest).requests, 1, "GET of the manifest");
    Ok(())
}

#[tokio::test]
async fn a_client_that_leaves_does_not_stop_the_others() -> Result<()> {
    if !can_run("a_client_that_leaves_does_not_stop_the_others", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[6 * MIB]).await?;
    pair.read_manifests().await?;
    pair.ecr.reset_counts();
    pair.ecr.set_rate(Some(6 * MIB), None);
    let layer = pair.layer();
    // The one that started the pull is the one that leaves.
    let mut first = pair.open(&format!("blobs/{}", layer.digest()), &[]).await?;
    let leaves = async {
        first.read(Some(64 * 1024), |_| ()).await?;
        drop(first);
        anyhow::Ok(())
    };
    let (others, left) = tokio::join!(try_join_all((0..3).map(|_| read(&pair, &layer))), leaves);
    left?;
    others?;
    assert_eq!(pair.ecr.blob_bytes(), layer.size());
    assert_eq!(pair.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
    Ok(())
}

#[tokio::test]
async fn a_blob_that_everybody_left_is_stopped_and_what_has_arrived_is_kept() -> Result<()> {
    if !can_run("a_blob_that_everybody_left_is_stopped_and_what_has_arrived_is_kept", &[Need::Darter]) {
        return Ok(());
    }
    let change = |options: Options| options.set("mirror.prefetch", "off").set("mirror.linger", "1s");
    let pair = Pair::with(&[40 * MIB], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    // The agent waits that second for somebody to come back: the blob must last much longer.
    pair.ecr.set_rate(Some(4 * MIB), None);
    let layer = pair.layer();
    let reader = pair.open(&format!("blobs/{}", layer.digest()), &[]).await?;
    eventually("much of it came", async || Ok(pair.ecr.blob_bytes() > 16 * MIB)).await?;
    drop(reader);
    let stopped = async || Ok(pair.metric("darter_pulls_total", &[("outcome", "abandoned")]).await? == 1.0);
    eventually("the pull is stopped", stopped).await?;
    ensure!(pair.ingest_file(layer.digest()).exists(), "nothing is kept");
    // What the registry has sent is more: some of it was on the wire when the pull stopped.
    let kept = pair.metric("darter_origin_unique_bytes_total", &[]).await?;
    ensure!(kept > bytes(10 * MIB) && kept < bytes(layer.size()), "{kept} bytes came");

    pair.ecr.set_rate(None, None);
    pair.ecr.reset_counts();
    let mirrored = "darter_mirror_bytes_total";
    assert_eq!(pair.metric(mirrored, &[("source", "cache")]).await?, 0.0);
    // What the reader that left had got is counted once the agent has noticed.
    let before = pair.agent.counted(mirrored, &[("source", "origin")], |sum| sum > 0.0).await?;
    read(&pair, &layer).await?;
    assert_eq!(pair.metric("darter_origin_unique_bytes_total", &[]).await?, bytes(layer.size()));
    // Trailed from the first byte to the last, and of two sources.
    pair.agent.counted(mirrored, &[("source", "cache")], |sum| sum == kept).await?;
    pair.agent.counted(mirrored, &[("source", "origin")], |sum| sum - before == bytes(layer.size()) - kept).await?;
    let again = bytes(pair.ecr.blob_bytes());
    // A pull asks for the first 8 MiB before it looks at what is here; nobody reads that answer.
    ensure!(again <= bytes(layer.size() + 8 * MIB) - kept, "{kept} came before, {again} again");
    Ok(())
}

#[tokio::test]
async fn a_manifest_that_is_read_brings_the_blobs_of_this_platform_and_no_others() -> Result<()> {
    let name = "a_manifest_that_is_read_brings_the_blobs_of_this_platform_and_no_others";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    for by_index in [true, false] {
        let pair = prefetching(&[3 * MIB, 2 * MIB, MIB, 4096, 100]).await?;
        let amd64 = &pair.image.manifests[0];
        let reference = if by_index { TAG.to_owned() } else { amd64.digest().to_string() };
        assert_eq!(pair.get(&format!("manifests/{reference}")).await?.status, 200);
        let here = async || Ok(pair.image.pulled_blobs().all(|blob| pair.blob_file(blob.digest()).exists()));
        eventually("configuration and layers are in the store", here).await?;
        for blob in pair.image.pulled_blobs() {
            assert_eq!(pair.ecr.count_of(Kind::Blob, blob.digest()).bytes, blob.size());
        }
        for other in pair.image.others.iter().chain(&pair.image.manifests[1..]) {
            let asked = [Kind::Blob, Kind::Manifest].map(|kind| pair.ecr.count_of(kind, other.digest()).requests);
            assert_eq!(asked, [0, 0], "{} is of another platform", other.digest());
        }
        // All of it is here: the pull itself costs nothing more.
        pair.ecr.reset_counts();
        pair.read_manifests().await?;
        for blob in pair.image.pulled_blobs() {
            read(&pair, blob).await?;
        }
        assert_eq!(pair.ecr.blob_bytes(), 0);
    }
    Ok(())
}

#[tokio::test]
async fn what_containerd_keeps_is_not_fetched_ahead() -> Result<()> {
    if !can_run("what_containerd_keeps_is_not_fetched_ahead", &[Need::Darter]) {
        return Ok(());
    }
    let (ecr, image) = (ecr(Auth::Public)?, Image::index(Format::Oci, 7, &[MIB, 4096])?);
    ecr.push(&image, REPOSITORY, TAG);
    let dir = Scratch::new()?;
    let kept = dir.dir("root/io.containerd.content.v1.content/blobs/sha256")?;
    let layer = &image.layers[0];
    std::fs::write(kept.join(layer.digest().hex()), layer.content.to_bytes())?;
    let config = dir.join("config.toml");
    std::fs::write(&config, format!("version = 2\nroot = {:?}\n", dir.join("root")))?;
    let options = pair_options(&ecr, &[("access", "public".into())]);
    let agent = Agent::start(options.set("containerd.config", config.display().to_string())).await?;
    let pair = Pair { agent, ecr, image };
    assert_eq!(pair.get(&format!("manifests/{TAG}")).await?.status, 200);
    let others = || pair.image.pulled_blobs().filter(|blob| blob.digest() != pair.layer().digest());
    let here = async || Ok(others().all(|blob| pair.blob_file(blob.digest()).exists()));
    eventually("the others are in the store", here).await?;
    assert_eq!(pair.ecr.count_of(Kind::Blob, pair.layer().digest()).requests, 0);
    // It is served from there.
    read(&pair, &pair.layer()).await?;
    assert_eq!(pair.ecr.count_of(Kind::Blob, pair.layer().digest()).requests, 0);
    Ok(())
}

#[tokio::test]
async fn head_of_a_tag_fetches_nothing_ahead() -> Result<()> {
    if !can_run("head_of_a_tag_fetches_nothing_ahead", &[Need::Darter]) {
        return Ok(());
    }
    let pair = prefetching(&[MIB, 4096]).await?;
    let second = Image::index(Format::Oci, 99, &[MIB, 4096])?;
    pair.ecr.push(&second, REPOSITORY, "v2");
    // kubelet looks at the tag of an image that it has, too (AlwaysPull).
    assert_eq!(pair.head(&format!("manifests/{TAG}")).await?.status, 200);
    // A GET after it does fetch ahead; once that is through, the HEAD would have, too.
    assert_eq!(pair.get("manifests/v2").await?.status, 200);
    let here = async || Ok(second.pulled_blobs().all(|blob| pair.blob_file(blob.digest()).exists()));
    eventually("the blobs of the manifest that was read are here", here).await?;
    for blob in pair.image.pulled_blobs() {
        assert_eq!(pair.ecr.count_of(Kind::Blob, blob.digest()).requests, 0, "a HEAD says nothing about a pull");
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_fetched_ahead_where_the_operator_says_so() -> Result<()> {
    if !can_run("nothing_is_fetched_ahead_where_the_operator_says_so", &[Need::Darter]) {
        return Ok(());
    }
    let off = |options: Options| options.set("mirror.prefetch", "off");
    let pair = Pair::with(&[MIB, 4096], Auth::Public, &[("access", "public".into())], off).await?;
    pair.read_manifests().await?;
    read(&pair, &pair.image.config).await?;
    for layer in &pair.image.layers {
        assert_eq!(pair.ecr.count_of(Kind::Blob, layer.digest()).requests, 0);
    }
    Ok(())
}

#[tokio::test]
async fn a_hit_has_one_line_of_its_own_and_a_chunk_only_where_somebody_looks_closely() -> Result<()> {
    let name = "a_hit_has_one_line_of_its_own_and_a_chunk_only_where_somebody_looks_closely";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[2 * MIB]).await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    let said = |words: &str| {
        let of = format!("digest={}", layer.digest());
        let log = pair.agent.log();
        log.lines().filter(|line| line.contains(words) && line.contains(&of)).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = said("gave a blob that is here").len();
    let path = format!("blobs/{}", layer.digest());
    for number in 1..=2 {
        read(&pair, &layer).await?;
        eventually("it has its line", async || Ok(said("gave a blob that is here").len() == before + number)).await?;
    }
    assert_eq!(pair.get_with(&path, &[("Range", "bytes=0-99")]).await?.status, 206);
    eventually("it has its line", async || Ok(said("gave a part of a blob").len() == 1)).await?;
    let (whole, part) = (said("gave a blob that is here"), said("gave a part of a blob"));
    assert_eq!(whole.len(), before + 2);
    let (of, size) = (format!("repository={REPOSITORY}"), format!("bytes={} ", layer.size()));
    for words in ["INFO", "source=\"cache\"", "seconds=", "first_byte_seconds=0.0", &of, &size] {
        ensure!(whole.iter().all(|line| line.contains(words)), "{words}: {whole:#?}");
    }
    ensure!(part[0].contains("DEBUG") && part[0].contains("bytes=100"), "{part:#?}");
    Ok(())
}
