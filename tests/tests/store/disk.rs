//! Disks that are full, read-only, torn or lying: a clear state, 404s, and never a broken pull, a
//! wrong byte twice or a crash.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, NOBODY, Options};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::Auth;
use darter_tests::image::{Format, Image, Item};
use darter_tests::on_each_release;
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Pair, REPOSITORY, Stage, TAG, ecr, eventually, flip, pair_options};
use darter_tests::tmpfs::Tmpfs;
use darter_tests::tools::{Need, can_run};

/// State and reason of the check `store`. That `/readyz` is 200 is part of every state here.
async fn store(agent: &Agent) -> Result<(String, String)> {
    let answer = agent.admin("/readyz").await?;
    ensure!(answer.status == 200, "/readyz: {} {}", answer.status, answer.text());
    let json: serde_json::Value = serde_json::from_slice(&answer.body)?;
    let checks = json["checks"].as_array().context("no checks")?;
    let check = checks.iter().find(|check| check["check"] == "store").context("no check of the store")?;
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("reason")))
}

/// Waits until the store says that it is so, and that it is well.
async fn recovered(agent: &Agent) -> Result<()> {
    eventually("the store recovers", async || Ok(store(agent).await?.0 == "ok")).await
}

/// Waits until the store is degraded for a reason that has these words in it.
async fn degraded(agent: &Agent, words: &str) -> Result<()> {
    eventually(&format!("degraded: {words}"), async || {
        let (state, reason) = store(agent).await?;
        Ok(state == "degraded" && reason.contains(words))
    })
    .await
}

fn hosts_toml(pair: &Pair) -> PathBuf {
    pair.agent.dir().join("certs.d").join(pair.ecr.name()).join("hosts.toml")
}

/// Waits until containerd is kept away for a reason that has these words in it.
async fn withdrawn(pair: &Pair, words: &[&str]) -> Result<()> {
    eventually(&format!("withdrawn: {words:?}"), async || {
        let answer = pair.agent.admin("/readyz").await?;
        let json: serde_json::Value = serde_json::from_slice(&answer.body)?;
        let checks = json["checks"].as_array().context("no checks")?;
        let check = checks.iter().find(|check| check["check"] == "mirror").context("no check of the mirror")?;
        let reason = check["reason"].as_str().unwrap_or_default();
        let is_told = check["state"] == "failed" && words.iter().all(|word| reason.contains(word));
        Ok(answer.status == 503 && is_told && !hosts_toml(pair).exists())
    })
    .await
}

/// Waits until containerd is sent here.
async fn in_force(pair: &Pair) -> Result<()> {
    eventually("hosts.toml is there", async || {
        Ok(hosts_toml(pair).exists() && pair.agent.admin("/readyz").await?.status == 200)
    })
    .await
}

/// A file whose opening hangs until this is dropped.
struct Pipe(PathBuf);

impl Pipe {
    fn in_place_of(path: &Path) -> Result<Self> {
        let made = path.with_extension("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &made, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)?;
        fs::rename(&made, path)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Both ends at once: whoever waits for the other goes on.
        let _ = File::options().read(true).write(true).open(&self.0);
    }
}

/// Makes a directory and those in it somebody's, with these rights.
fn give(dir: &Path, to: u32, mode: u32) -> Result<()> {
    chown(dir, Some(to), Some(to))?;
    fs::set_permissions(dir, Permissions::from_mode(mode))?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            give(&path, to, mode)?;
        }
    }
    Ok(())
}

async fn pair(layers: &[u64], change: impl FnOnce(Options) -> Options) -> Result<Pair> {
    let change = |options: Options| change(options.set("mirror.prefetch", "off"));
    Pair::with(layers, Auth::Public, &[("access", "public".into())], change).await
}

/// GET of a blob: its status, and whether a 200 had the right bytes.
async fn get(pair: &Pair, blob: &Item) -> Result<(u16, bool)> {
    let answer = pair.get(&format!("blobs/{}", blob.digest())).await?;
    if answer.status != 200 {
        // Shown where the test fails, hidden where this was expected.
        println!("{}: {}", answer.status, answer.text());
    }
    Ok((answer.status.as_u16(), Digest::of(&answer.body) == blob.digest()))
}

const RIGHT: (u16, bool) = (200, true);

on_each_release! {
    a_full_disk_is_degraded_and_the_pull_succeeds_past_us(release) {
        let tmpfs = Tmpfs::new(48 * MIB)?;
        let mut stage = Stage::new(release, &[4 * MIB, MIB]).await?;
        let options = stage.options("public").set("agent.data_dir", tmpfs.path().join("data").display().to_string());
        stage.start(options.set("store.min_free", "1MiB")).await?;
        tmpfs.fill()?;
        stage.pull().await?;
        degraded(stage.agent(), "full").await?;
        // Past us is a quick way: nothing is gained by taking the file away, for two self-tests and more.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let file = stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml");
        ensure!(fs::read_to_string(&file)?.contains(&stage.agent().mirror_url()), "withdrawn\n{}", stage.story());
        let layers = stage.image.layer_bytes();
        ensure!(stage.read_by_containerd() >= layers, "who read the layers?\n{}", stage.story());
        tmpfs.empty()?;
        recovered(stage.agent()).await?;
        stage.containerd.forget().await?;
        stage.ecr.reset_counts();
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        Ok(())
    }
}

#[tokio::test]
async fn a_read_only_disk_serves_what_is_there_and_takes_nothing_new() -> Result<()> {
    if !can_run("a_read_only_disk_serves_what_is_there_and_takes_nothing_new", &[Need::Root, Need::Darter]) {
        return Ok(());
    }
    let tmpfs = Tmpfs::new(48 * MIB)?;
    let data = tmpfs.path().join("data");
    let here =
        |options: Options| options.set("agent.data_dir", data.display().to_string()).set("store.min_free", "1MiB");
    let mut pair = pair(&[2 * MIB, 4096], here).await?;
    let [here, absent] = [pair.image.layers[0].clone(), pair.image.layers[1].clone()];
    assert_eq!(get(&pair, &here).await?, RIGHT);
    let kept = async || Ok(data.join("blobs").join(here.digest().hex()).exists());
    eventually("the blob is complete", kept).await?;
    pair.agent.stop().await?;
    tmpfs.read_only()?;
    pair.agent.start_again().await?;
    degraded(&pair.agent, "read-only").await?;
    pair.ecr.reset_counts();
    assert_eq!(get(&pair, &here).await?, RIGHT);
    ensure!(pair.ecr.blob_bytes() <= 1, "what is here was read again");
    assert_eq!(get(&pair, &absent).await?.0, 404);
    tmpfs.read_write()?;
    recovered(&pair.agent).await?;
    assert_eq!(get(&pair, &absent).await?, RIGHT);
    Ok(())
}

#[tokio::test]
async fn a_data_directory_that_is_a_file_is_said_and_waited_for() -> Result<()> {
    if !can_run("a_data_directory_that_is_a_file_is_said_and_waited_for", &[Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let data = dir.join("data");
    fs::write(&data, "not a directory")?;
    let (ecr, image) = (ecr(Auth::Public)?, Image::index(Format::Oci, 7, &[4096])?);
    ecr.push(&image, REPOSITORY, TAG);
    let options = pair_options(&ecr, &[("access", "public".into())]).set("mirror.prefetch", "off");
    let agent = Agent::start_unready(options.set("agent.data_dir", data.display().to_string())).await?;
    let pair = Pair { agent, ecr, image };
    withdrawn(&pair, &["the store is unavailable", &data.display().to_string()]).await?;
    let layer = pair.layer();
    assert_eq!(get(&pair, &layer).await?.0, 404);
    // Manifests need no disk.
    pair.read_manifests().await?;
    assert_eq!(fs::read_to_string(&data)?, "not a directory", "what is not ours was touched");
    fs::remove_file(&data)?;
    in_force(&pair).await?;
    recovered(&pair.agent).await?;
    assert_eq!(get(&pair, &layer).await?, RIGHT);
    Ok(())
}

#[tokio::test]
async fn a_directory_that_is_closed_to_the_agent_is_said_and_used_once_it_is_open() -> Result<()> {
    let name = "a_directory_that_is_closed_to_the_agent_is_said_and_used_once_it_is_open";
    if !can_run(name, &[Need::Root, Need::Darter]) {
        return Ok(());
    }
    let mut pair = pair(&[2 * MIB, 4096], Options::nobody).await?;
    let [here, absent] = [pair.image.layers[0].clone(), pair.image.layers[1].clone()];
    pair.bring(&here).await?;
    // As where somebody restored a backup or changed runAsUser: one of them is another's, or all are and read or
    // not even that; also from the start.
    let data = pair.agent.dir().join("data");
    for (closed, mode, is_running) in [
        (data.join("ingest"), 0o755, true),
        (data.join("blobs"), 0o755, true),
        (data.clone(), 0o755, true),
        (data.clone(), 0o700, true),
        (data.clone(), 0o700, false),
    ] {
        if !is_running {
            pair.agent.stop().await?;
        }
        give(&closed, 0, mode)?;
        if !is_running {
            pair.agent.start_again_unready().await?;
        }
        withdrawn(&pair, &["the store", &closed.display().to_string(), "ermission denied"]).await?;
        assert_eq!(get(&pair, &absent).await?.0, 404);
        give(&closed, NOBODY, 0o700)?;
        in_force(&pair).await?;
        assert_eq!(get(&pair, &here).await?, RIGHT);
    }
    recovered(&pair.agent).await?;
    assert_eq!(get(&pair, &absent).await?, RIGHT);
    Ok(())
}

#[tokio::test]
async fn a_disk_that_hangs_takes_hosts_toml_away_until_it_answers() -> Result<()> {
    if !can_run("a_disk_that_hangs_takes_hosts_toml_away_until_it_answers", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[2 * MIB], |options| options.set("mirror.answer_within", "500ms")).await?;
    let layer = pair.layer();
    assert_eq!(get(&pair, &layer).await?, RIGHT);
    let blob = pair.blob_file(layer.digest());
    eventually("the blob is complete", async || Ok(blob.exists())).await?;
    in_force(&pair).await?;
    // Opening a pipe waits for its other end: once where blobs are read, once where they are written.
    for path in [&blob, &pair.agent.dir().join("data/ingest/probe")] {
        let pipe = Pipe::in_place_of(path)?;
        withdrawn(&pair, &["the store's disk does not answer within 500ms (mirror.answer_within)"]).await?;
        // The agent itself goes on.
        assert_eq!(pair.agent.admin("/healthz").await?.status, 200);
        drop(pipe);
        in_force(&pair).await?;
    }
    eventually("it is read again", async || Ok(get(&pair, &layer).await? == RIGHT)).await
}

#[tokio::test]
async fn a_blob_that_is_larger_than_the_store_is_a_fast_404() -> Result<()> {
    if !can_run("a_blob_that_is_larger_than_the_store_is_a_fast_404", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[4 * MIB, MIB], |options| options.set("store.limit", "2MiB")).await?;
    pair.read_manifests().await?;
    pair.ecr.reset_counts();
    let answer = pair.open(&format!("blobs/{}", pair.layer().digest()), &[]).await?;
    assert_eq!(answer.exchange.status, Some(404));
    // At once, and not because the time was up.
    let refused = pair.agent.counted("darter_mirror_refusals_total", &[("reason", "store")], |sum| sum >= 1.0);
    refused.await?;
    assert_eq!(pair.ecr.blob_bytes(), 0);
    assert_eq!(get(&pair, &pair.image.layers[1]).await?, RIGHT);
    // No lasting trouble of the store; while the blob of half its size is read it is full for a moment.
    recovered(&pair.agent).await
}

#[tokio::test]
async fn a_store_that_is_too_small_evicts_and_never_what_is_being_read() -> Result<()> {
    if !can_run("a_store_that_is_too_small_evicts_and_never_what_is_being_read", &[Need::Darter]) {
        return Ok(());
    }
    const LIMIT: u64 = 20 * MIB;
    let pair = pair(&[12 * MIB], |options| options.set("store.limit", "20MiB")).await?;
    let first = pair.layer();
    pair.bring(&first).await?;
    // More than sockets hold: most of it is read from the file, when the client takes it.
    let mut reader = Some(pair.open(&format!("blobs/{}", first.digest()), &[]).await?);
    for seed in 100..106 {
        let image = Image::new(Format::Oci, seed, &[3 * MIB, 2 * MIB])?;
        pair.ecr.push(&image, REPOSITORY, &format!("v{seed}"));
        assert_eq!(pair.get(&format!("manifests/v{seed}")).await?.status, 200);
        for layer in &image.layers {
            assert_eq!(get(&pair, layer).await?, RIGHT, "{}", pair.agent.log());
        }
        let used: u64 = du(&pair.agent.dir().join("data"))?;
        ensure!(used <= LIMIT + MIB, "{used} bytes are on the disk");
        if seed == 103 {
            // Whole, though blobs around it went.
            let mut bytes = Vec::new();
            let mut held = reader.take().context("still open")?;
            let end = held.read(None, |part| bytes.extend_from_slice(part)).await?;
            assert_eq!(end, End::Complete);
            assert_eq!(Digest::of(&bytes), first.digest());
        }
    }
    ensure!(pair.metric("darter_store_evictions_total", &[]).await? >= 1.0, "nothing was evicted");
    ensure!(!pair.blob_file(first.digest()).exists(), "the oldest is still here");
    assert_eq!(get(&pair, &first).await?, RIGHT);
    Ok(())
}

/// Bytes of all files below a directory.
fn du(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // Gone meanwhile is no bytes.
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += if metadata.is_dir() { du(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[tokio::test]
async fn an_ingest_that_a_kill_left_and_somebody_spoiled_is_resumed_right() -> Result<()> {
    if !can_run("an_ingest_that_a_kill_left_and_somebody_spoiled_is_resumed_right", &[Need::Darter]) {
        return Ok(());
    }
    let mut pair = pair(&[24 * MIB], |options| options).await?;
    pair.read_manifests().await?;
    let layer = pair.layer();
    pair.ecr.set_rate(None, Some(4 * MIB));
    let reader = pair.open(&format!("blobs/{}", layer.digest()), &[]).await?;
    eventually("half of it came", async || Ok(pair.ecr.blob_bytes() > 12 * MIB)).await?;
    pair.agent.kill().await?;
    drop(reader);
    // Pieces of 1 MiB, of which the first three are there: one is spoiled at its start, one inside.
    for offset in [0, MIB + 4321] {
        flip(&pair.ingest_file(layer.digest()), offset)?;
    }
    pair.ecr.set_rate(None, None);
    pair.ecr.reset_counts();
    pair.agent.start_again().await?;
    assert_eq!(get(&pair, &layer).await?, RIGHT, "{}", pair.agent.log());
    let again = pair.ecr.blob_bytes();
    ensure!((2 * MIB..layer.size() - 4 * MIB).contains(&again), "{again} of {} bytes were read again", layer.size());
    Ok(())
}

#[tokio::test]
async fn a_blob_that_rots_on_the_disk_is_found_dropped_and_fetched_again() -> Result<()> {
    if !can_run("a_blob_that_rots_on_the_disk_is_found_dropped_and_fetched_again", &[Need::Darter]) {
        return Ok(());
    }
    // Every read has a piece looked at, and this blob has one piece.
    let pair = pair(&[MIB / 2], |options| options.set("store.verify_one_in", 1)).await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    flip(&pair.blob_file(layer.digest()), 1000)?;
    // The read that has it looked at is answered before it was: disks are trusted that far.
    get(&pair, &layer).await?;
    let found = async || Ok(pair.metric("darter_store_corruptions_total", &[]).await? == 1.0);
    eventually("the rot is found", found).await?;
    pair.ecr.reset_counts();
    assert_eq!(get(&pair, &layer).await?, RIGHT, "{}", pair.agent.log());
    assert_eq!(pair.ecr.blob_bytes(), layer.size());
    assert_eq!(pair.metric("darter_store_corruptions_total", &[]).await?, 1.0);
    Ok(())
}

#[tokio::test]
async fn a_manifest_that_rots_on_the_disk_is_never_served() -> Result<()> {
    if !can_run("a_manifest_that_rots_on_the_disk_is_never_served", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[512], |options| options).await?;
    pair.read_manifests().await?;
    let manifest = pair.image.manifests[0].clone();
    eventually("it is kept", async || Ok(pair.blob_file(manifest.digest()).exists())).await?;
    flip(&pair.blob_file(manifest.digest()), 20)?;
    let answer = pair.get(&format!("manifests/{}", manifest.digest())).await?;
    assert_eq!(Digest::of(&answer.body), manifest.digest(), "{}", answer.status);
    assert_eq!(pair.metric("darter_store_corruptions_total", &[]).await?, 1.0);
    Ok(())
}

#[tokio::test]
async fn a_blob_that_is_cut_while_the_agent_is_away_is_dropped_at_its_start() -> Result<()> {
    if !can_run("a_blob_that_is_cut_while_the_agent_is_away_is_dropped_at_its_start", &[Need::Darter]) {
        return Ok(());
    }
    let mut pair = pair(&[2 * MIB], |options| options).await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    pair.agent.stop().await?;
    File::options().write(true).open(pair.blob_file(layer.digest()))?.set_len(MIB)?;
    pair.agent.start_again().await?;
    assert_eq!(pair.metric("darter_store_corruptions_total", &[]).await?, 1.0);
    ensure!(!pair.blob_file(layer.digest()).exists(), "it is still there");
    assert_eq!(get(&pair, &layer).await?, RIGHT);
    Ok(())
}

#[tokio::test]
async fn a_blob_that_is_cut_under_its_reader_ends_in_a_fin_and_is_fetched_again() -> Result<()> {
    if !can_run("a_blob_that_is_cut_under_its_reader_ends_in_a_fin_and_is_fetched_again", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[24 * MIB], |options| options.set("mirror.handover", "500ms")).await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    let path = format!("blobs/{}", layer.digest());
    // One stream, and one that goes on from where another ended.
    let mut readers = Vec::new();
    for headers in [&[][..], &[("Range", "bytes=4194304-")]] {
        let reader = pair.open(&path, headers).await?;
        assert_eq!(reader.exchange.status, Some(if headers.is_empty() { 200 } else { 206 }));
        readers.push(reader);
    }
    File::options().write(true).open(pair.blob_file(layer.digest()))?.set_len(MIB)?;
    // A FIN short of the length, as if the origin had broken off: containerd goes on elsewhere.
    for reader in &mut readers {
        assert_eq!(reader.read(None, |_| ()).await?, End::Fin);
    }
    assert_eq!(pair.metric("darter_mirror_handovers_total", &[("reason", "store")]).await?, 2.0);
    assert_eq!(pair.get_with(&path, &[("Range", "bytes=4194304-")]).await?.status, 404);
    let again = async || Ok(get(&pair, &layer).await.with_context(|| pair.agent.log())? == RIGHT);
    eventually("it is fetched again", again).await
}
