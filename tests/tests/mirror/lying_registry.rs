//! What a registry gets that lies: nothing of it looks whole and is wrong, nothing of it is kept, the
//! lie is counted, and the next pull after it is right.

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::Options;
use darter_tests::emulator::raw::End;
use darter_tests::fake_ecr::{Auth, Fault, Kind, Rule};
use darter_tests::image::{Format, Image, Item};
use darter_tests::stage::{MIB, Pair, REPOSITORY, eventually};
use darter_tests::tools::{Need, can_run};
use serde_json::Value;

/// One range of a blob at a time, and nobody is sent away for a while after a failure: the next
/// request shows what the agent itself can do.
async fn pair() -> Result<Pair> {
    let change =
        |options: Options| options.set("mirror.prefetch", "off").set("origin.ranges", 1).set("mirror.handover", "1ms");
    Pair::with(&[3 * MIB], Auth::Public, &[("access", "public".into())], change).await
}

/// GETs a blob that the registry lies about: whatever comes is no whole body, or the right one.
async fn ask_for(pair: &Pair, digest: Digest) -> Result<()> {
    let mut answer = pair.open(&format!("blobs/{digest}"), &[]).await?;
    let mut body = Vec::new();
    let end = answer.read(None, |bytes| body.extend_from_slice(bytes)).await?;
    match answer.exchange.status {
        Some(404) => Ok(()),
        Some(200) => {
            ensure!(end == End::Fin, "{} bytes, and the end is {end:?}", body.len());
            ensure!(Digest::of(&body) != digest, "all of it came, and it was cut short");
            Ok(())
        }
        other => anyhow::bail!("{other:?}"),
    }
}

/// The lie is over: the blob comes, is right, and is kept.
async fn comes_right(pair: &Pair, blob: &Item) -> Result<()> {
    pair.ecr.clear_faults();
    pair.bring(blob).await
}

/// So many manifests were answered 404 for what the registry said, and for nothing else.
async fn not_used(pair: &Pair, manifests: f64) -> Result<()> {
    let unknown = [("kind", "manifest"), ("code", "404")];
    pair.agent.counted("darter_mirror_refusals_total", &[], |sum| sum == manifests).await?;
    assert_eq!(pair.metric("darter_mirror_refusals_total", &[("reason", "origin")]).await?, manifests);
    assert_eq!(pair.metric("darter_mirror_requests_total", &unknown).await?, manifests);
    Ok(())
}

async fn outcomes(pair: &Pair, outcome: &str) -> Result<f64> {
    pair.metric("darter_pulls_total", &[("outcome", outcome)]).await
}

#[tokio::test]
async fn a_wrong_length_is_never_a_body_that_looks_whole() -> Result<()> {
    if !can_run("a_wrong_length_is_never_a_body_that_looks_whole", &[Need::Darter]) {
        return Ok(());
    }
    for error in [1, 100_000, -1, -100_000] {
        for has_manifest in [true, false] {
            let pair = pair().await?;
            let layer = pair.layer();
            // Without its manifest the registry is asked once more, whether it lets this asker read.
            let honest = if has_manifest {
                pair.read_manifests().await?;
                0
            } else {
                1
            };
            let rule = Rule::on(Kind::Blob).digest(layer.digest()).after(honest).always();
            pair.ecr.inject(rule, Fault::WrongLength(error));
            let story = || format!("{error} more, manifest read: {has_manifest}\n{}", pair.agent.log());
            ask_for(&pair, layer.digest()).await.with_context(story)?;
            let counted = async || Ok(outcomes(&pair, "origin_failed").await? == 1.0);
            eventually("the lie is counted", counted).await.with_context(story)?;
            assert_eq!(outcomes(&pair, "complete").await?, 0.0, "{}", story());
            ensure!(!pair.blob_file(layer.digest()).exists(), "a wrong blob is kept: {}", story());
            comes_right(&pair, &layer).await.with_context(story)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_manifest_and_a_blob_of_two_sizes_are_no_blob_here() -> Result<()> {
    if !can_run("a_manifest_and_a_blob_of_two_sizes_are_no_blob_here", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair().await?;
    for (number, told) in [(1, MIB), (2, 8 * MIB)] {
        let image = Image::new(Format::Oci, 20 + number, &[2 * MIB])?;
        let mut manifest: Value = serde_json::from_slice(&image.root.content.to_bytes())?;
        manifest["layers"][0]["size"] = told.into();
        let image = image.with_root(manifest.to_string().into());
        pair.ecr.push(&image, REPOSITORY, "lie");
        let layer = image.layers[0].clone();
        assert_eq!(pair.get(&format!("manifests/{}", image.root.digest())).await?.status, 200);
        ask_for(&pair, layer.digest()).await.with_context(|| pair.agent.log())?;
        let sum = f64::from(u32::try_from(number)?);
        let counted = async || Ok(outcomes(&pair, "bad_length").await? == sum);
        eventually("the lie is counted", counted).await.with_context(|| pair.agent.log())?;
        ensure!(!pair.blob_file(layer.digest()).exists(), "a wrong blob is kept");
    }
    // Others come as ever.
    pair.read_manifests().await?;
    comes_right(&pair, &pair.layer()).await
}

#[tokio::test]
async fn a_blob_of_another_digest_is_cut_short_and_nothing_of_it_is_kept() -> Result<()> {
    if !can_run("a_blob_of_another_digest_is_cut_short_and_nothing_of_it_is_kept", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair().await?;
    let layer = pair.layer();
    pair.read_manifests().await?;
    for wrong in [0, MIB, layer.size() - 1] {
        pair.ecr.inject(Rule::on(Kind::Blob).digest(layer.digest()).always(), Fault::WrongByte(wrong));
        let before = outcomes(&pair, "store_failed").await?;
        ask_for(&pair, layer.digest()).await.with_context(|| pair.agent.log())?;
        let counted = async || Ok(outcomes(&pair, "store_failed").await? > before);
        eventually("the lie is counted", counted).await.with_context(|| pair.agent.log())?;
        for file in [pair.blob_file(layer.digest()), pair.ingest_file(layer.digest())] {
            ensure!(!file.exists(), "{} is kept", file.display());
        }
        pair.ecr.clear_faults();
    }
    comes_right(&pair, &layer).await
}

#[tokio::test]
async fn a_manifest_past_4_mib_is_unknown_here_and_not_kept() -> Result<()> {
    if !can_run("a_manifest_past_4_mib_is_unknown_here_and_not_kept", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair().await?;
    let image = Image::new(Format::Oci, 30, &[4096])?;
    let mut manifest: Value = serde_json::from_slice(&image.root.content.to_bytes())?;
    let mut of_size = |size: u64| -> Result<Image> {
        manifest["annotations"] = serde_json::json!({"padding": ""});
        let empty = u64::try_from(manifest.to_string().len())?;
        manifest["annotations"]["padding"] = "x".repeat(usize::try_from(size - empty)?).into();
        Ok(image.clone().with_root(manifest.to_string().into()))
    };
    for (size, tag, status) in [(4 * MIB, "most", 200), (4 * MIB + 1, "more", 404)] {
        let image = of_size(size)?;
        assert_eq!(image.root.size(), size);
        pair.ecr.push(&image, REPOSITORY, tag);
        for reference in [image.root.digest().to_string(), tag.to_owned()] {
            let answer = pair.get(&format!("manifests/{reference}")).await?;
            assert_eq!(answer.status, status, "{reference} of {size} bytes");
            ensure!(status == 200 || answer.text().contains("MANIFEST_UNKNOWN"), "{}", answer.text());
        }
        assert_eq!(pair.blob_file(image.root.digest()).exists(), status == 200, "{size}");
        ensure!(!pair.ingest_file(image.root.digest()).exists(), "a part is kept");
    }
    not_used(&pair, 2.0).await
}

#[tokio::test]
async fn a_manifest_that_is_not_what_its_digest_says_is_unknown_here() -> Result<()> {
    if !can_run("a_manifest_that_is_not_what_its_digest_says_is_unknown_here", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair().await?;
    let root = &pair.image.root;
    for (sum, fault) in (1..).zip([Fault::WrongByte(9), Fault::WrongLength(1), Fault::WrongLength(-1)]) {
        pair.ecr.inject(Rule::on(Kind::Manifest).digest(root.digest()).always(), fault.clone());
        let answer = pair.get(&format!("manifests/{}", root.digest())).await?;
        assert_eq!(answer.status, 404, "{fault:?}");
        ensure!(answer.text().contains("MANIFEST_UNKNOWN"), "{}", answer.text());
        ensure!(!pair.blob_file(root.digest()).exists(), "{fault:?} is kept");
        not_used(&pair, sum.into()).await.with_context(|| format!("{fault:?}"))?;
        pair.ecr.clear_faults();
    }
    let answer = pair.get(&format!("manifests/{}", root.digest())).await?;
    ensure!(answer.status == 200 && Digest::of(&answer.body) == root.digest(), "{}", answer.status);
    Ok(())
}
