//! Each 404 that the agent gives by itself is counted by why it gave it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::{Auth, Fault, Kind, Rule};
use darter_tests::image::{Content, Format, Image};
use darter_tests::net::Place;
use darter_tests::stage::{MIB, Pair, REPOSITORY, TAG, eventually};
use darter_tests::tools::{Need, can_run};
use darter_tests::wire::{Reply, Request, Server, Service};
use futures_util::future::try_join_all;

/// One that nothing refers to.
fn absent() -> String {
    format!("blobs/{}", Digest::of(b"nobody has this"))
}

/// GET of this is answered 404 for this reason, and for no other.
async fn refused(pair: &Pair, reason: &str, path: &str, headers: &[(&str, &str)]) -> Result<()> {
    let labels = [("reason", reason), ("registry", &*pair.ecr.name())];
    let counted = async |labels: &[_]| pair.metric("darter_mirror_refusals_total", labels).await;
    let before = (counted(&labels).await?, counted(&[]).await?);
    let answer = pair.get_with(path, headers).await?;
    ensure!(answer.status == 404, "{reason}: {} {}", answer.status, answer.text());
    // Counted once it is on the wire, which its client sees first.
    eventually(reason, async || Ok(counted(&[]).await? > before.1)).await?;
    assert_eq!((counted(&labels).await?, counted(&[]).await?), (before.0 + 1.0, before.1 + 1.0), "{reason}");
    Ok(())
}

/// Every 404 without a source has its reason.
async fn all_have_theirs(pair: &Pair) -> Result<()> {
    let answered = pair.metric("darter_mirror_requests_total", &[("code", "404"), ("source", "none")]).await?;
    ensure!(answered > 0.0);
    assert_eq!(pair.metric("darter_mirror_refusals_total", &[]).await?, answered);
    Ok(())
}

#[tokio::test]
async fn a_404_because_the_registry_is_away_says_so() -> Result<()> {
    if !can_run("a_404_because_the_registry_is_away_says_so", &[Need::Darter]) {
        return Ok(());
    }
    // It is asked more than once, which on a busy machine takes a while.
    let change = |options: Options| options.set("mirror.answer_within", "9s");
    let mut pair = Pair::with(&[512], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    pair.ecr.down().await;
    refused(&pair, "away", "manifests/another", &[]).await?;
    all_have_theirs(&pair).await
}

#[tokio::test]
async fn a_404_has_the_reason_for_which_it_was_given() -> Result<()> {
    if !can_run("a_404_has_the_reason_for_which_it_was_given", &[Need::Darter]) {
        return Ok(());
    }
    let change = |options: Options| {
        let options = options.set("mirror.prefetch", "off").set("mirror.answer_within", "1s").set("mirror.stall", "1s");
        options.set("origin.ranges", 1).set("store.limit", "14MiB")
    };
    let sizes = [20 * MIB, 6 * MIB, 5 * MIB];
    let pair = Pair::with(&sizes, Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    let [large, cut, late] = [0, 1, 2].map(|at: usize| pair.image.layers[at].digest());
    refused(&pair, "not_found", &absent(), &[]).await?;
    refused(&pair, "incomplete", &format!("blobs/{cut}"), &[("Range", "bytes=100-")]).await?;
    refused(&pair, "store", &format!("blobs/{large}"), &[]).await?;
    pair.ecr.inject(Rule::on(Kind::Blob).digest(late), Fault::Delay(Duration::MAX));
    refused(&pair, "late", &format!("blobs/{late}"), &[]).await?;
    pair.ecr.inject(Rule::on(Kind::Blob).digest(cut).always(), Fault::Stall(MIB, Duration::from_secs(60)));
    let mut body = pair.open(&format!("blobs/{cut}"), &[]).await?;
    assert_eq!(body.read(None, |_| ()).await?, End::Fin);
    refused(&pair, "handed_over", &format!("blobs/{cut}"), &[]).await?;
    // Whoever asks for what no registry of ours has: their name is no time series.
    let other = format!("{}/v2/{REPOSITORY}/manifests/{TAG}?ns=elsewhere.example", pair.agent.mirror_url());
    for (url, reason) in [(other, "not_mirrored"), (format!("{}/favicon.ico", pair.agent.mirror_url()), "no_endpoint")]
    {
        assert_eq!(pair.client().get(&url).await?.status, 404);
        let labels = [("reason", reason), ("registry", "other")];
        let counted = async || Ok(pair.metric("darter_mirror_refusals_total", &labels).await? == 1.0);
        eventually(reason, counted).await?;
    }
    all_have_theirs(&pair).await
}

#[tokio::test]
async fn whatever_the_registry_answers_the_mirror_says_404() -> Result<()> {
    if !can_run("whatever_the_registry_answers_the_mirror_says_404", &[Need::Darter]) {
        return Ok(());
    }
    // containerd asks again at once after 408, 429 and some of 5xx, and again, before it goes anywhere else.
    let kinds = [Kind::ManifestHead, Kind::Manifest, Kind::Blob];
    let cases = kinds.into_iter().flat_map(|kind| [401, 429, 503].map(|status| (kind, status)));
    try_join_all(cases.map(async |(kind, status)| {
        let pair = Pair::new(&[512]).await?;
        pair.read_manifests().await?;
        pair.ecr.push(&Image::new(Format::Oci, 9, &[512])?, REPOSITORY, "other");
        pair.ecr.inject(Rule::on(kind).always(), Fault::Status(status, Some(1)));
        let answer = match kind {
            Kind::ManifestHead => pair.head("manifests/other").await?,
            Kind::Manifest => pair.get("manifests/other").await?,
            // What the manifest says of it is answered to a HEAD without asking.
            _ => pair.get(&format!("blobs/{}", pair.layer().digest())).await?,
        };
        ensure!(answer.status == 404, "{kind:?}, {status}: {}", answer.status);
        anyhow::Ok(())
    }))
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_404_for_what_the_registry_says_has_its_reason() -> Result<()> {
    if !can_run("a_404_for_what_the_registry_says_has_its_reason", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[MIB]).await?;
    pair.read_manifests().await?;
    let config = pair.image.config.digest();
    // It is not what its digest says.
    pair.ecr.inject(Rule::on(Kind::Manifest).always(), Fault::WrongByte(9));
    let other = Image::new(Format::Oci, 9, &[512])?;
    pair.ecr.push(&other, REPOSITORY, "other");
    refused(&pair, "origin", &format!("manifests/{}", other.root.digest()), &[]).await?;
    pair.ecr.clear_faults();
    // A manifest names another size than the registry.
    let liar = Image::new(Format::Oci, 20, &[2 * MIB])?;
    let mut manifest: serde_json::Value = serde_json::from_slice(&liar.root.content.to_bytes())?;
    manifest["layers"][0]["size"] = MIB.into();
    let liar = liar.with_root(manifest.to_string().into());
    pair.ecr.push(&liar, REPOSITORY, "liar");
    ensure!(pair.get(&format!("manifests/{}", liar.root.digest())).await?.status == 200);
    refused(&pair, "bad_length", &format!("blobs/{}", liar.layers[0].digest()), &[]).await?;
    pair.ecr.inject(Rule::on(Kind::Blob).digest(config).always(), Fault::Status(403, None));
    refused(&pair, "denied", &format!("blobs/{config}"), &[]).await?;
    all_have_theirs(&pair).await
}

/// A registry that gives the first byte of anything, and never says of how many.
struct Silent;

impl Service for Silent {
    async fn answer(&self, _: Request) -> Reply {
        let byte = Content::Bytes(Bytes::from_static(b"x"));
        Reply::new(206, byte).header("content-range", "bytes 0-0/*")
    }
}

#[tokio::test]
async fn a_404_because_nobody_tells_how_large_a_blob_is_says_so() -> Result<()> {
    if !can_run("a_404_because_nobody_tells_how_large_a_blob_is_says_so", &[Need::Darter]) {
        return Ok(());
    }
    let server = Server::start(&Place::Host, None, Arc::new(Silent))?;
    let (name, url) = ("registry.example", format!("http://{}", server.address()));
    let keys = [("endpoint", url.into()), ("plain_http", true.into()), ("access", "public".into())];
    let agent = Agent::start(Options::new(&Place::Host).registry(name, &keys)).await?;
    let ask = format!("{}/v2/{REPOSITORY}/{}?ns={name}", agent.mirror_url(), absent());
    let answer = agent.client().head(&ask).await?;
    ensure!(answer.status == 404, "{}", answer.status);
    agent
        .counted("darter_mirror_refusals_total", &[("reason", "no_size"), ("registry", name)], |sum| sum == 1.0)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_404_because_too_many_pulls_run_says_so() -> Result<()> {
    if !can_run("a_404_because_too_many_pulls_run_says_so", &[Need::Darter]) {
        return Ok(());
    }
    // One more than the agent runs at once; none of them ever gets a byte.
    const RUNNING_MAX: usize = 256;
    let change = |options: Options| options.set("mirror.prefetch", "off").set("mirror.answer_within", "3s");
    let pair = Pair::with(&[512; RUNNING_MAX + 1], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    pair.ecr.inject(Rule::on(Kind::Blob).always(), Fault::Delay(Duration::MAX));
    let paths: Vec<_> = pair.image.layers.iter().map(|layer| format!("blobs/{}", layer.digest())).collect();
    let (last, others) = paths.split_last().expect("layers");
    let late = try_join_all(others.iter().map(|path| pair.get(path))).await?;
    ensure!(late.iter().all(|answer| answer.status == 404));
    // They go on without a reader for `mirror.linger`.
    let counted = async || Ok(pair.metric("darter_mirror_refusals_total", &[("reason", "late")]).await? == 256.0);
    eventually("each is late", counted).await?;
    refused(&pair, "busy", last, &[]).await?;
    all_have_theirs(&pair).await
}

#[tokio::test]
async fn a_404_by_a_policy_has_its_reason_and_a_401_is_none() -> Result<()> {
    if !can_run("a_404_by_a_policy_has_its_reason_and_a_401_is_none", &[Need::Darter]) {
        return Ok(());
    }
    let tag = format!("manifests/{TAG}");
    let unresolved = [("access", "public".into()), ("resolve", false.into())];
    let off = [("access", "off".into())];
    let denied = [("access", "public".into())];
    for (reason, keys) in [("unresolved", &unresolved[..]), ("off", &off), ("denied", &denied)] {
        let pair = Pair::with(&[4096], Auth::Ecr, keys, |options| options).await?;
        refused(&pair, reason, &tag, &[]).await?;
        all_have_theirs(&pair).await?;
    }
    let pair = Pair::with(&[4096], Auth::Ecr, &[("access", "caller".into())], |options| options).await?;
    assert_eq!(pair.get(&tag).await?.status, 401);
    let is_counted = async || Ok(pair.metric("darter_mirror_requests_total", &[("code", "401")]).await? == 1.0);
    eventually("it is counted", is_counted).await?;
    assert_eq!(pair.metric("darter_mirror_refusals_total", &[]).await?, 0.0);
    Ok(())
}
