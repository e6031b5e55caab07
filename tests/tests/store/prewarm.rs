//! `darter prewarm`, the real command against a running agent: an image is here before anybody asks.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options, darter};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::{Auth, Fault, Kind, Rule};
use darter_tests::image::{Format, Image, Item};
use darter_tests::net::Place;
use darter_tests::process::{self, Output, Process};
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Pair, REPOSITORY, Stage, TAG, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};
use rustix::process::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

fn command(place: &Place, config: &Path, arguments: &[&str]) -> Result<std::process::Command> {
    let mut command = darter(place)?;
    command.arg("prewarm").arg("--config").arg(config).args(arguments);
    Ok(command)
}

/// Runs `darter prewarm` with the configuration of an agent, to its end.
async fn prewarm(place: &Place, agent: &Agent, arguments: &[&str]) -> Result<Output> {
    process::run("darter prewarm", command(place, &agent.dir().join("darter.toml"), arguments)?, PATIENCE).await
}

/// The same with a credential.
async fn prewarm_as(place: &Place, agent: &Agent, password: &str, images: &[&str]) -> Result<Output> {
    let arguments = [["--username", "AWS", "--password-stdin"].as_slice(), images].concat();
    let command = command(place, &agent.dir().join("darter.toml"), &arguments)?;
    process::run_with_input("darter prewarm", command, password, PATIENCE).await
}

async fn pair(layers: &[u64]) -> Result<Pair> {
    Pair::with(layers, Auth::Public, &[("access", "public".into())], |options| options).await
}

fn reference(pair: &Pair) -> String {
    format!("{}/{REPOSITORY}:{TAG}", pair.ecr.name())
}

fn events(output: &Output) -> Result<Vec<Value>> {
    output.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

#[tokio::test]
async fn an_image_is_in_the_store_and_every_step_is_told() -> Result<()> {
    if !can_run("an_image_is_in_the_store_and_every_step_is_told", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[3 * MIB, 4096, 2 * MIB]).await?;
    let output = prewarm(&Place::Host, &pair.agent, &["--json", &reference(&pair)]).await?;
    ensure!(output.status.success(), "{output:?}");
    let events = events(&output)?;
    let [first, .., last] = events.as_slice() else { anyhow::bail!("{}", output.stdout) };
    assert_eq!((&first["event"], &last["event"]), (&"image".into(), &"done".into()));
    assert_eq!(first["digest"], pair.image.manifests[0].digest().to_string());
    let wanted: Vec<(String, u64)> =
        pair.image.pulled_blobs().map(|blob| (blob.digest().to_string(), blob.size())).collect();
    let told = first["blobs"].as_array().context("no blobs")?.iter();
    let told: Vec<_> = told.map(|blob| (blob["digest"].as_str(), blob["size"].as_u64())).collect();
    assert_eq!(told, wanted.iter().map(|(digest, size)| (Some(digest.as_str()), Some(*size))).collect::<Vec<_>>());
    for (digest, size) in &wanted {
        let whole = |event: &&Value| event["digest"] == **digest && event["bytes"] == *size;
        ensure!(events.iter().filter(|event| event["event"] == "blob").any(|event| whole(&event)), "{digest}");
    }
    assert_eq!(last["bytes"], pair.image.pulled_blobs().map(Item::size).sum::<u64>());
    ensure!(last["image_ref"].is_null(), "there is no containerd here: {last}");
    for blob in pair.image.pulled_blobs() {
        eventually("the blob is complete", async || Ok(pair.blob_file(blob.digest()).exists())).await?;
        assert_eq!(pair.ecr.count_of(Kind::Blob, blob.digest()).bytes, blob.size());
    }
    // The second time it costs nothing, and a person reads plain lines.
    pair.ecr.reset_counts();
    let output = prewarm(&Place::Host, &pair.agent, &[&reference(&pair)]).await?;
    ensure!(output.status.success() && output.stdout.contains("in the store"), "{output:?}");
    ensure!(!output.stdout.contains('\u{1b}') && !output.stderr.contains('\u{1b}'), "{output:?}");
    assert_eq!(pair.ecr.blob_bytes(), 0);
    Ok(())
}

#[tokio::test]
async fn with_a_containerd_the_image_is_pulled_and_unpacked_and_kubelet_finds_it() -> Result<()> {
    for release in Release::ALL {
        let name = format!("with_a_containerd_the_image_is_pulled_and_unpacked_and_kubelet_finds_it on {release:?}");
        if !can_run(&name, &[Need::Containerd(release), Need::Darter]) {
            continue;
        }
        let mut stage = Stage::new(release, &[2 * MIB, MIB]).await?;
        let options = stage.options("public");
        stage.start(options.set("containerd.socket", stage.containerd.socket().display().to_string())).await?;
        let (place, image) = (stage.network.node(0), stage.reference());
        // Only where that was not ruled out.
        let output = prewarm(&place, stage.agent(), &["--store-only", &image]).await?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(stage.containerd.cri().status(&image).await?.is_none(), "pulled in spite of --store-only");
        let bytes = stage.ecr.blob_bytes();
        let output = prewarm(&place, stage.agent(), &["--json", &image]).await?;
        ensure!(output.status.success(), "{output:?}\n{}", stage.story());
        let steps: Vec<_> = events(&output)?.iter().map(|event| event["event"].clone()).collect();
        ensure!(steps.contains(&"unpacking".into()), "{steps:?}");
        let status = stage.containerd.cri().status(&image).await?.context("kubelet does not find the image")?;
        assert_eq!(events(&output)?.last().context("no event")?["image_ref"], status.id);
        ensure!(stage.containerd.ctr(&["snapshots", "ls"]).await?.lines().count() > 2, "nothing was unpacked");
        assert_eq!(stage.ecr.blob_bytes(), bytes, "containerd's pull came from the store");
        assert_eq!(stage.read_by_containerd(), 0);
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_brought_is_said_and_the_command_fails() -> Result<()> {
    if !can_run("what_cannot_be_brought_is_said_and_the_command_fails", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[4096]).await?;
    let name = pair.ecr.name();
    for (image, words) in [
        ("other.example/team/app:v1".to_owned(), "other.example is not mirrored here: add a [[registry]]"),
        (format!("{name}/team/app:never"), "cannot get the manifest never: the origin was asked"),
        (format!("{name}/team/none:v1"), "cannot get the manifest v1"),
        ("not a name".to_owned(), "not a name"),
        ("no-registry:v1".to_owned(), "no-registry"),
    ] {
        let output = prewarm(&Place::Host, &pair.agent, &[&image]).await?;
        assert_eq!(output.status.code(), Some(1), "{image}: {output:?}");
        ensure!(output.stderr.contains(words), "{image}: {output:?}");
        assert_eq!(output.stdout, "");
    }
    // One that fails does not keep the others from coming, and is not forgotten.
    let (bad, good) = (format!("{name}/team/app:never"), reference(&pair));
    let output = prewarm(&Place::Host, &pair.agent, &[&bad, &good]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    ensure!(output.stdout.contains("in the store"), "{output:?}");
    Ok(())
}

#[tokio::test]
async fn without_an_agent_the_error_says_what_to_do() -> Result<()> {
    if !can_run("without_an_agent_the_error_says_what_to_do", &[Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let config = dir.join("darter.toml");
    std::fs::write(&config, format!("[admin]\nsocket = {:?}\n", dir.join("admin.sock")))?;
    for has_dead_socket in [false, true] {
        if has_dead_socket {
            // As a killed agent leaves it.
            drop(std::os::unix::net::UnixListener::bind(dir.join("admin.sock"))?);
        }
        let output =
            process::run("darter prewarm", command(&Place::Host, &config, &["a.example/b:c"])?, PATIENCE).await?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        ensure!(output.stderr.contains("start `darter agent` first"), "{output:?}");
        ensure!(output.stderr.contains("admin.sock"), "{output:?}");
    }
    Ok(())
}

#[tokio::test]
async fn ctrl_c_leaves_what_has_arrived_and_an_agent_that_goes_on() -> Result<()> {
    if !can_run("ctrl_c_leaves_what_has_arrived_and_an_agent_that_goes_on", &[Need::Darter]) {
        return Ok(());
    }
    // Far more than comes in the second that a pull waits for somebody to come back.
    let linger = |options: Options| options.set("mirror.linger", "1s");
    let pair = Pair::with(&[48 * MIB], Auth::Public, &[("access", "public".into())], linger).await?;
    let layer = pair.layer();
    pair.ecr.set_rate(Some(4 * MIB), None);
    let dir = Scratch::new()?;
    let config = pair.agent.dir().join("darter.toml");
    let command = command(&Place::Host, &config, &[&reference(&pair)])?;
    let mut running = Process::start("darter prewarm", command, &dir.join("log"))?;
    eventually("much of it came", async || Ok(pair.ecr.blob_bytes() > 16 * MIB)).await?;
    running.signal(Signal::INT)?;
    let status = running.exit(PATIENCE).await?;
    assert_eq!(status.code(), Some(1), "{}", running.log());
    ensure!(running.log().contains("what has arrived is kept"), "{}", running.log());
    // The pull itself goes on a little, for whoever comes back; then it stops.
    let stopped = async || Ok(pair.metric("darter_pulls_total", &[("outcome", "abandoned")]).await? == 1.0);
    eventually("the pull is stopped", stopped).await?;
    ensure!(pair.ingest_file(layer.digest()).exists(), "nothing is kept");
    // What the registry has sent is more: some of it was on the wire when the pull stopped.
    let kept = pair.metric("darter_origin_unique_bytes_total", &[]).await?;
    let all = bytes(pair.image.pulled_blobs().map(Item::size).sum());
    ensure!(kept > bytes(10 * MIB) && kept < all, "{kept} bytes of {all} came");
    pair.ecr.set_rate(None, None);
    pair.ecr.reset_counts();
    let output = prewarm(&Place::Host, &pair.agent, &[&reference(&pair)]).await?;
    ensure!(output.status.success(), "{output:?}");
    assert_eq!(pair.metric("darter_origin_unique_bytes_total", &[]).await?, all);
    let again = bytes(pair.ecr.blob_bytes());
    // A pull asks for the first 8 MiB before it looks at what is here; nobody reads that answer.
    ensure!(again <= all - kept + bytes(8 * MIB), "{kept} came before, {again} again");
    Ok(())
}

#[tokio::test]
async fn only_the_owner_of_the_unix_socket_can_order() -> Result<()> {
    if !can_run("only_the_owner_of_the_unix_socket_can_order", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[4096]).await?;
    let mode = std::fs::metadata(pair.agent.admin_socket())?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let order = serde_json::json!({"image": reference(&pair)}).to_string();
    for path in ["prewarm", "unpin"] {
        let (url, order) = (format!("http://{}/v1/{path}", pair.agent.admin_address()), order.clone());
        let answer = pair.client().send_bytes(http::Method::POST, &url, "application/json", order.into()).await?;
        assert_eq!(answer.status, 403, "{}", answer.text());
        ensure!(answer.text().contains("unix socket"), "{}", answer.text());
    }
    ensure!(pair.ecr.log().is_empty(), "it was carried out all the same");
    // An order that is none is refused with what is wrong with it.
    for (order, words) in [
        ("{", "EOF"),
        (r#"{"image":"a","force":true}"#, "unknown field `force`"),
        (r#"{"image":"a","pin":"5"}"#, "`5` is not a duration"),
    ] {
        let answer = by_socket(&pair.agent.admin_socket(), order).await?;
        ensure!(answer.starts_with("HTTP/1.0 400") && answer.contains(words), "{order}: {answer}");
    }
    Ok(())
}

#[tokio::test]
async fn sizes_that_no_number_holds_together_fail_the_order_and_nothing_else() -> Result<()> {
    if !can_run("sizes_that_no_number_holds_together_fail_the_order_and_nothing_else", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[4096]).await?;
    let image = Image::new(Format::Oci, 8, &[4096, 8192])?;
    let mut manifest: Value = serde_json::from_slice(&image.root.content.to_bytes())?;
    for layer in 0..2 {
        manifest["layers"][layer]["size"] = u64::MAX.into();
    }
    pair.ecr.push(&image.with_root(manifest.to_string().into()), REPOSITORY, "huge");
    let order = serde_json::json!({"image": format!("{}/{REPOSITORY}:huge", pair.ecr.name())}).to_string();
    let answer = by_socket(&pair.agent.admin_socket(), &order).await?;
    let last = answer.lines().last().unwrap_or_default();
    ensure!(last.contains(r#""event":"failed""#), "{answer}");
    ensure!(!pair.agent.log().contains("panicked"), "{}", pair.agent.log());
    Ok(())
}

#[tokio::test]
async fn more_orders_than_are_carried_out_at_once_are_busy_and_probes_are_answered() -> Result<()> {
    if !can_run("more_orders_than_are_carried_out_at_once_are_busy_and_probes_are_answered", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[4096]).await?;
    let (socket, order) = (pair.agent.admin_socket(), serde_json::json!({"image": reference(&pair)}).to_string());
    // The registry is silent: each order is held until whoever sent it is gone.
    pair.ecr.inject(Rule::any().always(), Fault::Delay(Duration::MAX));
    let mut orders = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (socket, order) = (socket.clone(), order.clone());
        orders.spawn(async move { by_socket(&socket, &order).await });
    }
    for _ in 0..56 {
        let answer = tokio::time::timeout(PATIENCE, orders.join_next()).await?.context("no order")???;
        let last = answer.lines().last().unwrap_or_default();
        ensure!(last.contains(r#""event":"failed","reason":"busy: 8 images"#), "{answer}");
    }
    // Connections that say nothing, as many as the socket takes and more: not the kubelet's matter.
    let mut idle = Vec::new();
    for _ in 0..80 {
        idle.push(tokio::net::UnixStream::connect(&socket).await?);
    }
    // So many that the agent takes in all of them meanwhile.
    for _ in 0..100 {
        let probe = tokio::time::timeout(Duration::from_secs(5), pair.agent.admin("/healthz")).await;
        assert_eq!(probe.context("the probe waits for the unix socket")??.status, 200);
    }
    drop((idle, orders));
    // Who was told "busy" gets it once there is room.
    pair.ecr.clear_faults();
    let done = async || Ok(by_socket(&socket, &order).await?.contains(r#""event":"done""#));
    eventually("an order is taken again", done).await
}

/// Images of two layers, pushed and pulled until more has come than a store of 20 MiB holds.
async fn crowd(pair: &Pair, seeds: std::ops::Range<u64>) -> Result<()> {
    for seed in seeds {
        let image = Image::new(Format::Oci, seed, &[3 * MIB, 2 * MIB])?;
        pair.ecr.push(&image, REPOSITORY, &format!("v{seed}"));
        assert_eq!(pair.get(&format!("manifests/v{seed}")).await?.status, 200);
        for layer in &image.layers {
            pair.bring(layer).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_pinned_image_is_here_whatever_else_comes_until_it_is_released() -> Result<()> {
    if !can_run("a_pinned_image_is_here_whatever_else_comes_until_it_is_released", &[Need::Darter]) {
        return Ok(());
    }
    let small =
        |options: Options| options.set("store.limit", "20MiB").set("mirror.prefetch", "off").set("log.level", "info");
    let mut pair = Pair::with(&[4 * MIB, 3 * MIB], Auth::Public, &[("access", "public".into())], small).await?;
    let image = reference(&pair);
    let output = prewarm(&Place::Host, &pair.agent, &["--json", "--pin", "48h", &image]).await?;
    ensure!(output.status.success(), "{output:?}");
    let last = events(&output)?.pop().context("no event")?;
    assert_eq!((&last["pin"]["state"], &last["pin"]["lifetime"]), (&"set".into(), &"2d".into()), "{last}");
    let in_two_days = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs() + 48 * 3600;
    let until = last["pin"]["until"].as_u64().context("no end")?;
    ensure!((in_two_days - 60..=in_two_days).contains(&until), "{until}");
    // The index, the manifest of this platform, and what that refers to: in the order of a pull.
    let manifests = [&pair.image.root, &pair.image.manifests[0]];
    let items: Vec<Item> = manifests.into_iter().chain(pair.image.pulled_blobs()).cloned().collect();
    #[expect(clippy::cast_precision_loss, reason = "a few MiB")]
    let pinned = items.iter().map(Item::size).sum::<u64>() as f64;
    assert_eq!(pair.metric("darter_store_pinned_bytes", &[]).await?, pinned);

    for round in 0..2 {
        crowd(&pair, 100 + 10 * round..106 + 10 * round).await?;
        ensure!(pair.metric("darter_store_evictions_total", &[]).await? >= 4.0, "nothing was evicted");
        pair.ecr.reset_counts();
        for item in &items {
            let is_manifest = manifests.iter().any(|manifest| manifest.digest() == item.digest());
            let kind = if is_manifest { "manifests" } else { "blobs" };
            let answer = pair.get(&format!("{kind}/{}", item.digest())).await?;
            assert_eq!(Digest::of(&answer.body), item.digest(), "{} of round {round}", answer.status);
            assert_eq!(answer.header("x-darter-source"), "cache", "{kind} of round {round}");
        }
        assert_eq!(pair.ecr.blob_bytes(), 0, "round {round}\n{}", pair.agent.log());
        // A kill writes nothing down that was not written before.
        pair.agent.kill().await?;
        pair.agent.start_again().await?;
        assert_eq!(pair.metric("darter_store_pinned_bytes", &[]).await?, pinned);
    }
    // What it means now is not asked: the registry may be away.
    pair.ecr.inject(Rule::any().always(), Fault::Status(503, None));
    let output = prewarm(&Place::Host, &pair.agent, &["--unpin", &image]).await?;
    ensure!(output.status.success() && output.stdout.contains("no longer pinned"), "{output:?}");
    let output = prewarm(&Place::Host, &pair.agent, &["--unpin", "--json", &image]).await?;
    assert_eq!(events(&output)?, [serde_json::json!({"event": "unpinned", "was_pinned": false})]);
    pair.ecr.clear_faults();
    crowd(&pair, 120..126).await?;
    for layer in &pair.image.layers {
        ensure!(!pair.blob_file(layer.digest()).exists(), "it is still here");
    }
    Ok(())
}

#[tokio::test]
async fn what_came_of_an_image_stays_while_the_rest_is_on_its_way() -> Result<()> {
    if !can_run("what_came_of_an_image_stays_while_the_rest_is_on_its_way", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::with(&[3 * MIB, MIB], Auth::Public, &[("access", "public".into())], |options| {
        let options = options.set("store.limit", "20MiB").set("mirror.prefetch", "off");
        options.set("origin.header_timeout", "500ms").set("origin.attempts", 60)
    })
    .await?;
    let [first, last] = [pair.image.layers[0].digest(), pair.image.layers[1].digest()];
    pair.ecr.inject(Rule::on(Kind::Blob).digest(last).always(), Fault::Delay(Duration::MAX));
    let socket = pair.agent.admin_socket();
    let order = serde_json::json!({"image": reference(&pair)}).to_string();
    let running = tokio::spawn(async move { by_socket(&socket, &order).await });
    eventually("the first layer is here", async || Ok(pair.blob_file(first).exists())).await?;
    crowd(&pair, 100..108).await?;
    ensure!(pair.metric("darter_store_evictions_total", &[]).await? >= 8.0, "nothing was evicted");
    ensure!(pair.blob_file(first).exists(), "it was evicted\n{}", pair.agent.log());
    pair.ecr.clear_faults();
    let answer = running.await??;
    ensure!(answer.contains(r#""state":"set""#), "{answer}");
    Ok(())
}

#[tokio::test]
async fn an_image_past_the_share_of_pins_is_here_and_the_command_says_that_it_is_not_pinned() -> Result<()> {
    let name = "an_image_past_the_share_of_pins_is_here_and_the_command_says_that_it_is_not_pinned";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::with(&[6 * MIB, 5 * MIB], Auth::Public, &[("access", "public".into())], |options| {
        options.set("store.limit", "20MiB").set("store.pin_for", "2h")
    })
    .await?;
    let large = reference(&pair);
    pair.ecr.push(&Image::new(Format::Oci, 50, &[MIB])?, REPOSITORY, "small");
    let small = format!("{}/{REPOSITORY}:small", pair.ecr.name());
    let output = prewarm(&Place::Host, &pair.agent, &[&large, &small]).await?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    ensure!(output.stderr.contains(&format!("{large}: it is here, but not pinned")), "{output:?}");
    ensure!(output.stderr.contains("may take 10485760: store.pin_share"), "{output:?}");
    ensure!(output.stdout.contains("in the store, pinned for 2h"), "the other one is: {output:?}");
    ensure!(pair.image.layers.iter().all(|layer| pair.blob_file(layer.digest()).exists()), "it is not here");
    let output = prewarm(&Place::Host, &pair.agent, &["--json", &large]).await?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let last = events(&output)?.pop().context("no event")?;
    assert_eq!((&last["event"], &last["pin"]["state"]), (&"done".into(), &"refused".into()), "{last}");
    // Where no pin is wanted, none is missed.
    let output = prewarm(&Place::Host, &pair.agent, &["--json", "--pin", "0", &large]).await?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let last = events(&output)?.pop().context("no event")?;
    assert_eq!(last["pin"], serde_json::json!({"state": "not_ordered"}));
    let output = prewarm(&Place::Host, &pair.agent, &["--pin", "31d", &small]).await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    ensure!(output.stderr.contains("30d at most"), "{output:?}");
    Ok(())
}

async fn by_socket(socket: &Path, body: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    let request = format!("POST /v1/prewarm HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn what_was_handed_over_a_moment_ago_is_prewarmed_all_the_same() -> Result<()> {
    if !can_run("what_was_handed_over_a_moment_ago_is_prewarmed_all_the_same", &[Need::Darter]) {
        return Ok(());
    }
    let pair = pair(&[24 * MIB]).await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    let path = format!("blobs/{}", layer.digest());
    let mut reader = pair.open(&path, &[]).await?;
    let file = pair.blob_file(layer.digest());
    std::fs::File::options().write(true).open(&file)?.set_len(MIB)?;
    assert_eq!(reader.read(None, |_| ()).await?, End::Fin);
    assert_eq!(pair.get(&path).await?.status, 404, "containerd has another host; a prewarm has none");
    let output = prewarm(&Place::Host, &pair.agent, &[&reference(&pair)]).await?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(Digest::of(&std::fs::read(&file)?) == layer.digest(), "it is not here, or wrong");
    Ok(())
}

#[tokio::test]
async fn a_registry_that_asks_each_pull_for_its_credential_is_prewarmed_with_one() -> Result<()> {
    let name = "a_registry_that_asks_each_pull_for_its_credential_is_prewarmed_with_one";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    // The most that can be logged: whatever it says, no credential may be in it.
    let trace = |options: Options| options.set("log.level", "trace");
    let caller = Pair::with(&[MIB], Auth::Ecr, &[("access", "caller".into())], trace).await?;
    let (image, secret) = (reference(&caller), caller.ecr.password());
    let aws = async |pair: &Pair, key: &str, images: &[&str]| prewarm_as(&Place::Host, &pair.agent, key, images).await;
    let failed = |output: &Output, words: &str| {
        ensure!(output.status.code() == Some(1) && output.stderr.contains(words), "{words}: {output:?}");
        Ok(())
    };
    failed(&prewarm(&Place::Host, &caller.agent, &[&image]).await?, "give this one --username and --password-stdin")?;
    failed(&aws(&caller, "no-password-of-anybody", &[&image]).await?, "cannot get the manifest")?;
    failed(&aws(&caller, "", &[&image]).await?, "standard input has no password")?;
    failed(&aws(&caller, "x", &[&image, "other.example/a:1"]).await?, "--username is for one registry")?;
    let layer = caller.layer().digest();
    ensure!(!caller.blob_file(layer).exists(), "it came without a credential");
    let output = aws(&caller, &format!("{secret}\n"), &[&image]).await?;
    ensure!(output.status.success() && caller.blob_file(layer).exists(), "{output:?}");
    assert_eq!(caller.get(&format!("blobs/{layer}")).await?.status, 401, "it was for that call");
    failed(&prewarm(&Place::Host, &caller.agent, &[&image]).await?, "asks each pull for its own credential")?;
    for text in [secret.clone(), darter_tests::http::basic("AWS", &secret).replace("Basic ", "")] {
        ensure!(!caller.agent.log().contains(&text), "the credential is in the log");
    }
    // Where another credential is used, this one is not silently left out.
    let public = pair(&[4096]).await?;
    failed(&aws(&public, "x", &[&reference(&public)]).await?, "leave --username out")
}

#[tokio::test]
async fn containerd_pulls_with_the_credential_of_the_prewarm() -> Result<()> {
    for release in Release::ALL {
        let name = format!("containerd_pulls_with_the_credential_of_the_prewarm on {release:?}");
        if !can_run(&name, &[Need::Containerd(release), Need::Darter]) {
            continue;
        }
        let containerd = darter_tests::containerd::Options::default();
        let mut stage = Stage::with(release, &[2 * MIB, MIB], Auth::Ecr, &containerd).await?;
        let options = stage.options("caller");
        stage.start(options.set("containerd.socket", stage.containerd.socket().display().to_string())).await?;
        let (place, image) = (stage.network.node(0), stage.reference());
        let output = prewarm_as(&place, stage.agent(), &stage.ecr.password(), &[&image]).await?;
        ensure!(output.status.success(), "{output:?}\n{}", stage.story());
        stage.containerd.cri().status(&image).await?.context("kubelet does not find the image")?;
        assert_eq!(stage.read_by_containerd(), 0, "its pull came from the store\n{}", stage.story());
    }
    Ok(())
}
