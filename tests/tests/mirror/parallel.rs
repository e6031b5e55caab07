//! Ranges: containerd's parallel layer fetch, and every form of Range that the OCI suite asks for but
//! only of a registry that it may push to.
//!
//! An incomplete blob is one stream (200 to `bytes=0-`), because only a stream can be handed over; a
//! complete one is chunks.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::containerd;
use darter_tests::emulator::{Emulator, End, Host};
use darter_tests::fake_ecr::{Auth, Fault, Kind, Rule};
use darter_tests::http::Answer;
use darter_tests::image::Item;
use darter_tests::net::Place;
use darter_tests::stage::{MIB, Pair, REPOSITORY, Stage, TAG, eventually};
use darter_tests::tools::{Need, Release, can_run};

#[tokio::test]
async fn a_cold_pull_by_chunks_is_one_stream_a_layer_and_the_next_one_is_chunks() -> Result<()> {
    let name = "a_cold_pull_by_chunks_is_one_stream_a_layer_and_the_next_one_is_chunks";
    if !can_run(name, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    let options = containerd::Options { concurrent_layer_fetch_buffer: MIB, ..containerd::Options::default() };
    let mut stage = Stage::with(Release::V2, &[6 * MIB, 4 * MIB], Auth::Public, &options).await?;
    stage.start_default().await?;
    // Slow enough that containerd asks while they are still incomplete.
    stage.ecr.set_rate(Some(8 * MIB), None);
    stage.pull().await?;
    let wanted: u64 = stage.image.pulled_blobs().map(Item::size).sum();
    assert_eq!(stage.ecr.blob_bytes(), wanted, "{}", stage.story());
    assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
    let [streams, chunks] = [[("kind", "blob"), ("code", "200")], [("kind", "blob"), ("code", "206")]];
    let requests = "darter_mirror_requests_total";
    // For two layers.
    stage.agent().counted(requests, &streams, |sum| sum >= 2.0).await.with_context(|| stage.story())?;
    let before = stage.metric(requests, &chunks).await?;
    ensure!(before <= 1.0, "{before} chunks, though only the configuration can have been complete");

    stage.containerd.forget().await?;
    stage.ecr.reset_counts();
    stage.pull().await?;
    assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
    // Of 1 MiB, of two layers of 6 and 4.
    stage.agent().counted(requests, &chunks, |sum| sum - before >= 10.0).await.with_context(|| stage.story())?;
    Ok(())
}

/// A node whose agent has the image, and whose containerd has nothing of it and reads it from the agent
/// in chunks of 1 MiB that take their time.
async fn warm(change: impl FnOnce(Options) -> Options) -> Result<Stage> {
    let options = containerd::Options { concurrent_layer_fetch_buffer: MIB, ..containerd::Options::default() };
    let mut stage = Stage::with(Release::V2, &[24 * MIB], Auth::Public, &options).await?;
    stage.start(change(stage.options("public").set("agent.drain", "20s"))).await?;
    stage.pull().await?;
    stage.containerd.forget().await?;
    stage.ecr.reset_counts();
    stage.network.shape_loopback(0, 6 * MIB)?;
    Ok(stage)
}

/// Waits until containerd has written some of the layer.
async fn in_mid_pull(stage: &Stage) -> Result<()> {
    eventually("containerd is in mid-pull", async || Ok(stage.containerd.ingested() > 4 * MIB)).await
}

#[tokio::test]
async fn sigterm_in_a_pull_by_chunks_waits_for_its_last_chunk() -> Result<()> {
    let name = "sigterm_in_a_pull_by_chunks_waits_for_its_last_chunk";
    if !can_run(name, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    let mut stage = warm(|options| options).await?;
    let mut agent = stage.agent.take().context("started")?;
    let stop = async {
        in_mid_pull(&stage).await?;
        let terminated = Instant::now();
        agent.stop().await?;
        anyhow::Ok(terminated.elapsed())
    };
    let (pulled, stopped) = tokio::join!(stage.pull(), stop);
    let stopped = stopped?;
    pulled.with_context(|| agent.log())?;
    assert_eq!(stage.ecr.count_of(Kind::Blob, stage.layer().0).requests, 0, "all of it came from the agent");
    ensure!(stopped < Duration::from_secs(15), "it went on for {stopped:?}, though nothing was asked any more");
    Ok(())
}

#[tokio::test]
async fn a_kill_costs_nothing_where_chunks_are_not_allowed() -> Result<()> {
    if !can_run("a_kill_costs_nothing_where_chunks_are_not_allowed", &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    let mut stage = warm(|options| options.set("mirror.parallel_chunks", false)).await?;
    let mut agent = stage.agent.take().context("started")?;
    let kill = async {
        in_mid_pull(&stage).await?;
        agent.kill().await
    };
    let (pulled, killed) = tokio::join!(stage.pull(), kill);
    killed?;
    pulled.with_context(|| agent.log())?;
    let log = stage.ecr.log();
    let asked = log.iter().filter(|seen| seen.digest == Some(stage.layer().0));
    let asked: Vec<_> = asked.map(|seen| (seen.agent.starts_with("containerd/"), seen.range.as_str())).collect();
    ensure!(!asked.is_empty(), "the agent was killed after the pull");
    let goes_on = |(by_containerd, range): &(bool, &str)| *by_containerd && !matches!(*range, "" | "bytes=0-");
    ensure!(asked.iter().all(goes_on), "what had come was read again: {asked:?}");
    Ok(())
}

/// An agent with a complete blob of 4 MiB, of which a first chunk was just read, that begins to stop.
async fn stopping_after_a_chunk(drain: &str) -> Result<(Pair, String)> {
    let change = |options: Options| options.set("mirror.prefetch", "off").set("agent.drain", drain);
    let pair = Pair::with(&[4 * MIB], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    let path = format!("blobs/{}", pair.layer().digest());
    pair.bring(&pair.layer()).await?;
    assert_eq!(pair.get_with(&path, &[("Range", "bytes=0-")]).await?.status, 206);
    pair.agent.terminate()?;
    let url = format!("{}/v2/", pair.agent.mirror_url());
    eventually("it stops", async || Ok(pair.client().get(&url).await?.status == 404)).await?;
    Ok((pair, path))
}

#[tokio::test]
async fn an_agent_that_stops_gives_chunks_and_refuses_everything_else_at_once() -> Result<()> {
    if !can_run("an_agent_that_stops_gives_chunks_and_refuses_everything_else_at_once", &[Need::Darter]) {
        return Ok(());
    }
    let (mut pair, path) = stopping_after_a_chunk("30s").await?;
    let content = pair.layer().content.to_bytes();
    let quiet = Instant::now();
    for start in [MIB, 3 * MIB] {
        let answer = pair.get_with(&path, &[("Range", &format!("bytes={start}-"))]).await?;
        ensure!(answer.status == 206 && answer.body == content[usize::try_from(start)?..], "{}", answer.status);
    }
    let stopping = async || pair.metric("darter_mirror_refusals_total", &[("reason", "stopping")]).await;
    let before = stopping().await?;
    ensure!(before >= 1.0, "that it stops is no reason");
    let others: [(&str, &[(&str, &str)]); 6] = [
        (&path, &[]),
        (&path, &[("Range", "bytes=0-")]),
        (&path, &[("Range", "bytes=5-9")]),
        (&format!("blobs/{}", pair.image.config.digest()), &[("Range", "bytes=5-")]),
        (&format!("manifests/{TAG}"), &[]),
        (&format!("manifests/{}", pair.image.root.digest()), &[("Range", "bytes=5-")]),
    ];
    for (path, headers) in others {
        let answer = pair.open(path, headers).await?;
        assert_eq!(answer.exchange.status, Some(404), "{path} {headers:?}");
        ensure!(answer.exchange.head_after < Duration::from_secs(5), "{:?}", answer.exchange.head_after);
    }
    // All but the chunk of a blob that is not here.
    eventually("each is counted", async || Ok(stopping().await? == before + 5.0)).await?;
    // One that says nothing does not hold it up.
    let _idle = Place::Host.connect(pair.mirror()).await?;
    let status = pair.agent.process().exit(Duration::from_secs(20)).await?;
    ensure!(status.success(), "{status}");
    ensure!(quiet.elapsed() > Duration::from_secs(1), "a chunk may have followed: {:?}", quiet.elapsed());
    Ok(())
}

#[tokio::test]
async fn an_agent_whose_chunks_never_end_stops_all_the_same() -> Result<()> {
    if !can_run("an_agent_whose_chunks_never_end_stops_all_the_same", &[Need::Darter]) {
        return Ok(());
    }
    let (mut pair, path) = stopping_after_a_chunk("2s").await?;
    // One that nobody reads: whatever the other client does at the end, there is something to cut.
    let _unread = pair.open(&path, &[("Range", "bytes=1-")]).await?;
    let start = Instant::now();
    while pair.get_with(&path, &[("Range", "bytes=1-")]).await.is_ok_and(|answer| answer.status == 206) {
        ensure!(start.elapsed() < Duration::from_secs(20), "it goes on and on");
    }
    ensure!(pair.agent.process().exit(Duration::from_secs(10)).await?.success());
    let log = pair.agent.log();
    ensure!(log.contains("cutting bodies short") && !log.contains("does not stop"), "{log}");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_gave_no_chunks_stops_at_once() -> Result<()> {
    if !can_run("an_agent_that_gave_no_chunks_stops_at_once", &[Need::Darter]) {
        return Ok(());
    }
    let change = |options: Options| options.set("agent.drain", "30s");
    let mut pair = Pair::with(&[MIB], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    pair.bring(&pair.layer()).await?;
    let start = Instant::now();
    pair.agent.stop().await?;
    // Far below the drain, and far above what stopping takes on a machine with much to do.
    ensure!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    Ok(())
}

#[tokio::test]
async fn the_emulator_gets_an_incomplete_blob_by_one_stream_and_a_complete_one_by_chunks() -> Result<()> {
    let name = "the_emulator_gets_an_incomplete_blob_by_one_stream_and_a_complete_one_by_chunks";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[5 * MIB]).await?;
    pair.read_manifests().await?;
    let layer = pair.layer();
    pair.ecr.set_rate(Some(8 * MIB), None);
    for (round, answers) in [vec![200], vec![206; 6]].into_iter().enumerate() {
        let client = Emulator::new(&Place::Host, &pair.ecr.name(), &[Host::new(pair.mirror())]);
        client.chunks(REPOSITORY, &layer.descriptor, MIB).await.with_context(|| format!("round {round}"))?;
        let seen: Vec<u16> = client.seen().iter().filter_map(|exchange| exchange.status).collect();
        assert_eq!(seen, answers);
        assert_eq!(pair.ecr.blob_bytes(), layer.size(), "round {round}");
        eventually("the blob is complete", async || Ok(pair.blob_file(layer.digest()).exists())).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_abort_with_chunks_in_flight_leaves_the_agent_serving() -> Result<()> {
    if !can_run("an_abort_with_chunks_in_flight_leaves_the_agent_serving", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[16 * MIB]).await?;
    pair.read_manifests().await?;
    let (layer, path) = (pair.layer(), format!("blobs/{}", pair.layer().digest()));
    pair.bring(&layer).await?;
    let mut chunks = Vec::new();
    for number in 0..8 {
        let range = format!("bytes={}-", number * MIB);
        // The head is there and the rest on its way: sockets hold less than 8 MiB.
        let chunk = pair.open(&path, &[("Range", range.as_str())]).await?;
        assert_eq!(chunk.exchange.status, Some(206));
        chunks.push(chunk);
    }
    drop(chunks);
    let open = async || Ok(pair.metric("darter_mirror_connections", &[]).await? == 0.0);
    eventually("the connections of the chunks are over", open).await?;
    let whole = pair.get(&path).await?;
    ensure!(darter_core::Digest::of(&whole.body) == layer.digest(), "{}", whole.status);
    assert_eq!(pair.metric("darter_mirror_handovers_total", &[]).await?, 0.0, "a client that left is no failure");
    assert_eq!(pair.ecr.blob_bytes(), layer.size());
    Ok(())
}

#[tokio::test]
async fn a_later_offset_of_an_incomplete_blob_is_a_fast_404_and_starts_no_pull() -> Result<()> {
    if !can_run("a_later_offset_of_an_incomplete_blob_is_a_fast_404_and_starts_no_pull", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[4 * MIB]).await?;
    pair.read_manifests().await?;
    let path = format!("blobs/{}", pair.layer().digest());
    pair.ecr.reset_counts();
    for range in ["bytes=1048576-", "bytes=1-1", "bytes=-100", "bytes=0-99", "bytes=5-4"] {
        let answer = pair.open(&path, &[("Range", range)]).await?;
        assert_eq!(answer.exchange.status, Some(404), "{range}");
    }
    // While a pull of it is running it is no different.
    pair.ecr.set_rate(Some(MIB / 2), None);
    let mut stream = pair.open(&path, &[("Range", "bytes=0-")]).await?;
    assert_eq!(stream.exchange.status, Some(200));
    assert_eq!(pair.open(&path, &[("Range", "bytes=1048576-")]).await?.exchange.status, Some(404));
    // At once, and not because the time was up: each says so.
    let reason = [("reason", "incomplete")];
    pair.agent.counted("darter_mirror_refusals_total", &reason, |sum| sum == 6.0).await?;
    assert_eq!(pair.metric("darter_mirror_refusals_total", &[]).await?, 6.0);
    pair.ecr.set_rate(None, None);
    assert_eq!(stream.read(None, |_| ()).await?, End::Complete);
    // It is counted after its last byte went out.
    eventually("one pull: the stream's", async || Ok(pair.metric("darter_pulls_total", &[]).await? == 1.0)).await?;
    assert_eq!(pair.ecr.blob_bytes(), pair.layer().size());
    Ok(())
}

/// A Range header, and what a body of `size` bytes gives to it: a span, everything (200), or 416.
enum Wanted {
    Part(u64, u64),
    Everything,
    Nothing,
}

fn cases(size: u64, parallel_chunks: bool) -> Vec<(String, Wanted)> {
    use Wanted::{Everything, Nothing, Part};
    let (quarter, last) = (size / 4, size - 1);
    vec![
        ("bytes=0-".into(), if parallel_chunks { Part(0, size) } else { Everything }),
        ("bytes=0-0".into(), Part(0, 1)),
        (format!("bytes={quarter}-{}", 2 * quarter), Part(quarter, 2 * quarter + 1)),
        (format!("bytes={quarter}-"), Part(quarter, size)),
        (format!("bytes=-{quarter}"), Part(size - quarter, size)),
        (format!("bytes=-{}", size + 1), Part(0, size)),
        (format!("bytes={}-{}", last - 5, size + 5000), Part(last - 5, size)),
        (format!("bytes={last}-{last}"), Part(last, size)),
        (format!("bytes={quarter}-0"), Nothing),
        (format!("bytes={size}-"), Nothing),
        (format!("bytes={}-{}", size + 5, size + 10), Nothing),
        ("bytes=-0".into(), Nothing),
        ("bytes=0-1,4-5".into(), Everything),
        ("items=0-1".into(), Everything),
        ("bytes=a-b".into(), Everything),
        ("bytes=".into(), Everything),
    ]
}

fn check(answer: &Answer, header: &str, wanted: &Wanted, content: &[u8]) -> Result<()> {
    let size = content.len() as u64;
    let (status, range, body) = match wanted {
        Wanted::Part(start, end) => {
            let part = &content[usize::try_from(*start)?..usize::try_from(*end)?];
            (206, format!("bytes {start}-{}/{size}", end - 1), Some(part))
        }
        Wanted::Everything => (200, String::new(), Some(content)),
        Wanted::Nothing => (416, format!("bytes */{size}"), None),
    };
    ensure!(answer.status == status, "{header}: {}", answer.status);
    ensure!(answer.header("content-range") == range, "{header}: {:?}", answer.headers);
    match body {
        Some(body) => ensure!(answer.body == body, "{header}: another body"),
        None => ensure!(answer.text().contains("REQUEST_INVALID"), "{header}: {}", answer.text()),
    }
    ensure!(answer.header("content-length") == answer.body.len().to_string(), "{header}: {:?}", answer.headers);
    Ok(())
}

/// The image's manifest and a layer of 2048 bytes, which are complete at the agent.
async fn pair_with_everything(parallel_chunks: bool) -> Result<(Pair, [(String, Item); 2])> {
    let change =
        |options: Options| options.set("mirror.prefetch", "off").set("mirror.parallel_chunks", parallel_chunks);
    let pair = Pair::with(&[512], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    let layer = pair.layer();
    assert_eq!(layer.size(), 2048);
    // It comes while it is read: what is given whole out of the store, and asked for again, is doubted.
    let in_two_parts = Fault::Stall(1024, Duration::from_millis(300));
    pair.ecr.inject(Rule::any().digest(layer.digest()).always(), in_two_parts);
    pair.bring(&layer).await?;
    pair.ecr.clear_faults();
    let manifest = pair.image.manifests[0].clone();
    let paths = [(format!("blobs/{}", layer.digest()), layer), (format!("manifests/{}", manifest.digest()), manifest)];
    Ok((pair, paths))
}

#[tokio::test]
async fn ranges_of_blobs_and_manifests_are_what_the_spec_says() -> Result<()> {
    if !can_run("ranges_of_blobs_and_manifests_are_what_the_spec_says", &[Need::Darter]) {
        return Ok(());
    }
    for parallel_chunks in [true, false] {
        let (pair, items) = pair_with_everything(parallel_chunks).await?;
        for (path, item) in &items {
            let (content, mut unsatisfiable) = (item.content.to_bytes(), 0.0);
            for (range, wanted) in cases(item.size(), parallel_chunks) {
                let answer = pair.get_with(path, &[("Range", range.as_str())]).await?;
                check(&answer, &format!("{path} {range}"), &wanted, &content)?;
                if answer.status == 416 {
                    unsatisfiable += 1.0;
                } else {
                    assert_eq!(answer.header("docker-content-digest"), item.digest().to_string());
                    assert_eq!(answer.header("accept-ranges"), "bytes");
                }
                assert_eq!(answer.header("content-encoding"), "");
                assert_eq!(answer.header("oci-namespace"), pair.ecr.name());
            }
            let kind = if path.starts_with("blobs/") { "blob" } else { "manifest" };
            let labels = [("kind", kind), ("code", "416"), ("registry", &*pair.ecr.name())];
            let counted = async || Ok(pair.metric("darter_mirror_requests_total", &labels).await? == unsatisfiable);
            eventually("each 416 is counted", counted).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn conditions_compare_the_quoted_digest() -> Result<()> {
    if !can_run("conditions_compare_the_quoted_digest", &[Need::Darter]) {
        return Ok(());
    }
    let (pair, items) = pair_with_everything(true).await?;
    for (path, item) in &items {
        let (content, etag) = (item.content.to_bytes(), format!("\"{}\"", item.digest()));
        let range = ("Range", "bytes=10-19");
        for (headers, status) in [
            (vec![range, ("If-Range", etag.as_str())], 206),
            (vec![range, ("If-Range", "\"sha256:other\"")], 200),
            (vec![range, ("If-Range", "Wed, 21 Oct 2015 07:28:00 GMT")], 200),
            (vec![("If-None-Match", etag.as_str())], 304),
            (vec![("If-None-Match", "\"x\", *")], 304),
            (vec![("If-None-Match", "\"sha256:other\"")], 200),
            // RFC 9110 §13.2.2: the condition comes first.
            (vec![range, ("If-None-Match", etag.as_str())], 304),
        ] {
            let answer = pair.get_with(path, &headers).await?;
            assert_eq!(answer.status, status, "{path} {headers:?}");
            assert_eq!(answer.header("etag"), etag, "{path} {headers:?}");
            let body: &[u8] = match status {
                206 => &content[10..20],
                304 => &[],
                _ => &content,
            };
            assert_eq!(answer.body, body, "{path} {headers:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn head_tells_the_size_and_nothing_is_fetched_for_it() -> Result<()> {
    if !can_run("head_tells_the_size_and_nothing_is_fetched_for_it", &[Need::Darter]) {
        return Ok(());
    }
    let (pair, items) = pair_with_everything(true).await?;
    let config = &pair.image.config;
    pair.ecr.reset_counts();
    // What is here, and what only a manifest told of.
    let absent = (format!("blobs/{}", config.digest()), config.clone());
    for (path, item) in items.iter().chain([&absent]) {
        // RFC 9110 §14.2: a Range is for GET alone. containerd takes this length for the size.
        for headers in [vec![], vec![("Range", "bytes=10-19")]] {
            let answer = pair.client().call(http::Method::HEAD, &pair.url(path), &headers).await?;
            assert_eq!(answer.status, 200, "{path} {headers:?}");
            assert_eq!(answer.header("content-length"), item.size().to_string(), "{path} {headers:?}");
            assert_eq!(answer.header("docker-content-digest"), item.digest().to_string());
            assert_eq!(answer.header("etag"), format!("\"{}\"", item.digest()));
            assert_eq!(answer.header("accept-ranges"), "bytes");
        }
    }
    assert_eq!(pair.head(&format!("manifests/{TAG}")).await?.status, 200);
    assert_eq!(pair.ecr.count(Kind::Blob).requests, 0, "a HEAD fetched a blob");
    assert_eq!(pair.ecr.count(Kind::BlobHead).requests, 0, "ECR Public refuses HEAD of a blob");
    let nobodys = darter_core::Digest::of(b"nobody has this");
    assert_eq!(pair.head(&format!("blobs/{nobodys}")).await?.status, 404);
    Ok(())
}
