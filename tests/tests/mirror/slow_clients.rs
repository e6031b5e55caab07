//! Clients that ask and do not read: they cost no memory, end, and are counted.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::fake_ecr::Auth;
use darter_tests::image::{Format, Image};
use darter_tests::stage::{MIB, Pair, REPOSITORY, eventually};
use darter_tests::tools::{Need, can_run};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};

/// Asks for something, and has no room for the answer.
async fn ask(pair: &Pair, path: &str) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(pair.agent.mirror()).await?;
    let target = pair.target(REPOSITORY, path);
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await?;
    Ok(stream)
}

/// Waits until the answer begins, and leaves it where it is.
async fn is_answered(stream: &TcpStream) -> Result<()> {
    let mut start = [0; 12];
    let answered = async {
        while stream.peek(&mut start).await? < start.len() {
            tokio::task::yield_now().await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), answered).await.context("no answer")??;
    ensure!(&start == b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&start));
    Ok(())
}

#[tokio::test]
async fn clients_that_read_nothing_of_a_large_manifest_cost_no_memory() -> Result<()> {
    if !can_run("clients_that_read_nothing_of_a_large_manifest_cost_no_memory", &[Need::Darter]) {
        return Ok(());
    }
    // Each is read and hashed, some at a time, which takes as long as it takes.
    let patient = |options: Options| options.set("mirror.prefetch", "off").set("mirror.answer_within", "29s");
    let pair = Pair::with(&[4096], Auth::Public, &[("access", "public".into())], patient).await?;
    let mut manifest: Value = serde_json::from_slice(&pair.image.manifests[0].content.to_bytes())?;
    manifest["annotations"] = serde_json::json!({ "padding": "x".repeat(4_000_000) });
    let image = Image::new(Format::Oci, 31, &[4096])?.with_root(manifest.to_string().into());
    pair.ecr.push(&image, REPOSITORY, "large");
    let path = format!("manifests/{}", image.root.digest());
    // Once, so that it is kept.
    assert_eq!(pair.get(&path).await?.status, 200);
    eventually("it is kept", async || Ok(pair.blob_file(image.root.digest()).exists())).await?;
    let before = pair.agent.usage()?.resident_bytes;
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(ask(&pair, &path).await?);
    }
    for client in &clients {
        is_answered(client).await?;
    }
    let after = pair.agent.usage()?.resident_bytes;
    let more = after.saturating_sub(before) / MIB;
    // As many as are hashed at once, and what the allocator keeps of them; all of them are 380 MiB.
    ensure!(more < 150, "100 clients that read nothing cost {more} MiB");
    // And nobody else waits for them.
    assert_eq!(pair.get(&path).await?.status, 200);
    drop(clients);
    Ok(())
}

#[tokio::test]
async fn a_client_that_reads_nothing_for_too_long_is_ended_and_counted() -> Result<()> {
    if !can_run("a_client_that_reads_nothing_for_too_long_is_ended_and_counted", &[Need::Darter]) {
        return Ok(());
    }
    let keys = [("access", "public".into())];
    let pair =
        Pair::with(&[32 * MIB], Auth::Public, &keys, |options| options.set("mirror.client_timeout", "1s")).await?;
    pair.read_manifests().await?;
    let layer = pair.layer().clone();
    pair.bring(&layer).await?;
    let client = ask(&pair, &format!("blobs/{}", layer.digest())).await?;
    is_answered(&client).await?;
    let counted = async || Ok(pair.metric("darter_mirror_rejected_total", &[("reason", "slow_client")]).await? == 1.0);
    eventually("it is counted", counted).await?;
    ensure!(pair.agent.log().contains("a client that does not read"), "{}", pair.agent.log());
    // It is nobody's fault but the client's: the blob is given as before, and nothing was handed over.
    assert_eq!(pair.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
    let again = pair.get(&format!("blobs/{}", layer.digest())).await?;
    assert_eq!(again.body.len() as u64, layer.size());
    Ok(())
}
