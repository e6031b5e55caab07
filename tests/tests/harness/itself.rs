//! What the harness starts: processes, networks, registries and containerds.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::conformance;
use darter_tests::containerd::{ConfigPath, Containerd, Options, hosts_toml};
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Kind};
use darter_tests::http::Client;
use darter_tests::image::{Format, Image};
use darter_tests::net::{Network, Place};
use darter_tests::process::{self, Process};
use darter_tests::registry::{self, Registry};
use darter_tests::scratch::Scratch;
use darter_tests::stage::Stage;
use darter_tests::tools::{Need, Release, can_run};
use darter_tests::wire::{Reply, Request, Server, Service};

const ECR: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";
const KIB: u64 = 1024;

#[tokio::test]
async fn a_process_ends_with_its_owner_and_with_the_whole_run() -> Result<()> {
    let dir = Scratch::new()?;
    let mut command = process::command("sleep");
    command.arg("1000");
    let process = Process::start("sleep", command, &dir.join("log"))?;
    let proc = format!("/proc/{}", process.pid());
    ensure!(Path::new(&proc).exists());
    drop(process);
    ensure!(!Path::new(&proc).exists());

    // A run of its own, which starts a process and is killed.
    let mut command = process::command(std::env::current_exe()?);
    command.args(["--exact", "itself::a_run_to_be_killed", "--nocapture"]).env(TO_BE_KILLED, "1");
    let mut runner = Process::start("a run", command, &dir.join("runner"))?;
    let child = loop {
        let log = runner.log();
        if let Some((_, rest)) = log.split_once("started ") {
            break format!("/proc/{}", rest.split_whitespace().next().context("no pid")?);
        }
        ensure!(runner.exited()?.is_none(), "{log}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    runner.signal(rustix::process::Signal::KILL)?;
    runner.exit(Duration::from_secs(10)).await?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    // A zombie until init collects it.
    while std::fs::read_to_string(format!("{child}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        ensure!(tokio::time::Instant::now() < deadline, "{child} lives on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

const TO_BE_KILLED: &str = "HARNESS_TO_BE_KILLED";

/// Not a test: the run that the test above kills.
#[tokio::test]
async fn a_run_to_be_killed() -> Result<()> {
    if std::env::var_os(TO_BE_KILLED).is_none() {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let mut command = process::command("sleep");
    command.arg("1000");
    let mut process = Process::start("sleep", command, &dir.join("log"))?;
    println!("started {} ", process.pid());
    process.exit(Duration::from_secs(1000)).await.map(drop)
}

#[tokio::test]
async fn nodes_reach_the_hub_and_each_has_its_own_loopback() -> Result<()> {
    if !can_run("nodes_reach_the_hub_and_each_has_its_own_loopback", &[Need::Root]) {
        return Ok(());
    }
    let (network, other) = (Network::new(2)?, Network::new(1)?);
    let listener = network.hub().listen("10.77.0.1:5000".parse()?)?;
    // The same address in another network is another place.
    let elsewhere = other.hub().listen("10.77.0.1:5000".parse()?)?;
    for node in 0..2 {
        network.node(node).connect(listener.local_addr()?).await?;
        let (_, from) = listener.accept().await?;
        ensure!(from.ip() == network.node(node).address(), "{from}");
        network.node(node).listen("127.0.0.1:4001".parse()?)?;
    }
    other.node(0).connect(elsewhere.local_addr()?).await?;
    ensure!(network.node(0).connect("127.0.0.1:4001".parse()?).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_port_is_kept_until_whoever_it_is_for_listens() -> Result<()> {
    let ports = (0..100).map(|_| Place::Host.port()).collect::<Result<Vec<_>>>()?;
    let numbers: BTreeSet<u16> = ports.iter().map(|port| port.number()).collect();
    assert_eq!(numbers.len(), ports.len());
    let address = SocketAddr::new(Place::Host.address(), ports[0].number());
    ensure!(tokio::net::TcpSocket::new_v4()?.bind(address).is_err(), "it could be had");
    ensure!(Place::Host.connect(address).await.is_err(), "nobody listens yet");
    let listener = Place::Host.listen(address)?;
    let client = Place::Host.connect(address).await?;
    assert_eq!(listener.accept().await?.1, client.local_addr()?);
    Ok(())
}

#[tokio::test]
async fn a_shaped_card_is_as_slow_as_asked() -> Result<()> {
    if !can_run("a_shaped_card_is_as_slow_as_asked", &[Need::Root]) {
        return Ok(());
    }
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let network = Network::new(1)?;
    network.shape_hub(10_000_000)?;
    let listener = network.hub().listen("10.77.0.1:5000".parse()?)?;
    let mut client = network.node(0).connect(listener.local_addr()?).await?;
    let (mut server, _) = listener.accept().await?;
    let send = tokio::spawn(async move { server.write_all(&vec![0; 3_000_000]).await });
    let start = tokio::time::Instant::now();
    client.read_to_end(&mut Vec::new()).await?;
    send.await??;
    let took = start.elapsed().as_secs_f64();
    ensure!((0.2..0.6).contains(&took), "3 MB at 10 MB/s took {took} s");
    Ok(())
}

#[tokio::test]
async fn a_registry_with_a_password_takes_an_image_and_gives_it_back() -> Result<()> {
    if !can_run("a_registry_with_a_password_takes_an_image_and_gives_it_back", &[Need::DockerRegistry]) {
        return Ok(());
    }
    for tls in [false, true] {
        let options = registry::Options { tls, ..registry::Options::with_password("ann", "secret") };
        let registry = Registry::start(&Place::Host, options).await?;
        let image = Image::index(Format::Oci, 1, &[300 * KIB, 5])?;
        registry.push(&image, "team/app", "v1").await?;

        let blob = format!("{}/v2/team/app/blobs/{}", registry.url(), image.layers[0].digest());
        let answer = registry.client().get(&blob).await?;
        ensure!(answer.status == 200 && answer.body == image.layers[0].content.to_bytes());
        let mut anonymous = Client::new(Place::Host);
        if let Some(trust) = registry.trust()? {
            anonymous = anonymous.trusting(trust);
        }
        let refused = anonymous.get(&blob).await?;
        ensure!(refused.status == 401 && refused.header("www-authenticate").starts_with("Basic "));
    }
    Ok(())
}

/// The recipe: the mirror's address refuses, so containerd pulls from `server`.
async fn pull_twice(release: Release) -> Result<()> {
    let network = Network::new(1)?;
    let registry = Registry::start(&network.hub(), registry::Options::with_password("ann", "secret")).await?;
    let image = Image::index(Format::Oci, 2, &[700 * KIB, 300 * KIB, 1])?;
    registry.push(&image, "team/app", "v1").await?;
    let containerd = Containerd::start(release, &network.node(0), &Options::default()).await?;
    containerd.write_hosts(ECR, &hosts_toml(&registry.url(), Some("http://127.0.0.1:4001"), &["pull", "resolve"]))?;
    let name = format!("{ECR}/team/app:v1");

    ensure!(containerd.cri().pull(&name, Some(("ann", "wrong"))).await.is_err());
    for round in 1..=2 {
        containerd.cri().pull(&name, registry.password()).await.with_context(|| containerd.log())?;
        ensure!(containerd.cri().status(&name).await?.is_some());
        let layer = format!("blobs/{}", image.layers[0].digest());
        let gets = registry.log().lines().filter(|line| line.contains(&layer) && line.contains("completed")).count();
        // Each time 401 and then 200, in docker-registry's log of finished requests.
        ensure!(gets >= round, "round {round}: {gets} GETs of the layer");
        containerd.forget().await?;
        ensure!(containerd.cri().status(&name).await?.is_none());
    }

    containerd.ctr_pull(&name, registry.password()).await?;
    ensure!(containerd.blobs()?.contains(&image.layers[0].digest().hex()));
    containerd.forget().await
}

#[tokio::test]
async fn containerd_1_6_pulls_removes_and_pulls_again() -> Result<()> {
    let needs = [Need::Containerd(Release::V1), Need::DockerRegistry];
    if !can_run("containerd_1_6_pulls_removes_and_pulls_again", &needs) {
        return Ok(());
    }
    pull_twice(Release::V1).await
}

#[tokio::test]
async fn containerd_2_2_pulls_removes_and_pulls_again() -> Result<()> {
    let needs = [Need::Containerd(Release::V2), Need::DockerRegistry];
    if !can_run("containerd_2_2_pulls_removes_and_pulls_again", &needs) {
        return Ok(());
    }
    pull_twice(Release::V2).await
}

#[tokio::test]
async fn containerd_unpacks_images_of_every_format() -> Result<()> {
    let test = "containerd_unpacks_images_of_every_format";
    for release in Release::ALL {
        if !can_run(&format!("{test} ({release:?})"), &[Need::Containerd(release)]) {
            continue;
        }
        let network = Network::new(1)?;
        let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options { auth: Auth::Public, ..Default::default() })?;
        let containerd = Containerd::start(release, &network.node(0), &Options::default()).await?;
        containerd.write_hosts(&ecr.name(), &hosts_toml(&ecr.url(), None, &[]))?;
        for (seed, format) in [(10, Format::Oci), (20, Format::OciGzip), (30, Format::Docker)] {
            let tag = format!("{format:?}").to_lowercase();
            ecr.push(&Image::index(format, seed, &[100 * KIB, 10])?, "team/app", &tag);
            ecr.push(&Image::new(format, seed, &[100 * KIB, 10])?, "team/app", &format!("{tag}-single"));
            for tag in [&tag, &format!("{tag}-single")] {
                containerd.cri().pull(&format!("{}/team/app:{tag}", ecr.name()), None).await?;
            }
        }
        containerd.forget().await?;
    }
    Ok(())
}

#[tokio::test]
async fn containerd_2_2_pulls_by_the_transfer_service_where_that_is_meant_and_nowhere_else() -> Result<()> {
    let test = "containerd_2_2_pulls_by_the_transfer_service_where_that_is_meant_and_nowhere_else";
    if !can_run(test, &[Need::Containerd(Release::V2Transfer)]) {
        return Ok(());
    }
    for (release, is_meant) in [(Release::V2, false), (Release::V2Transfer, true)] {
        let stage = Stage::new(release, &[4096]).await?;
        stage.containerd.write_hosts(&stage.ecr.name(), &hosts_toml(&stage.ecr.url(), None, &[]))?;
        stage.pull().await?;
        // Its own words, at debug level.
        ensure!(stage.containerd.log().contains("Calling cri transfer service") == is_meant, "{}", stage.story());
    }
    Ok(())
}

#[tokio::test]
async fn containerd_2_2_fetches_a_layer_in_chunks_when_told_to() -> Result<()> {
    let test = "containerd_2_2_fetches_a_layer_in_chunks_when_told_to";
    if !can_run(test, &[Need::Containerd(Release::V2)]) {
        return Ok(());
    }
    let network = Network::new(1)?;
    let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options { auth: Auth::Public, ..Default::default() })?;
    let image = Image::new(Format::Oci, 5, &[2048 * KIB])?;
    ecr.push(&image, "team/app", "v1");
    let options = Options { concurrent_layer_fetch_buffer: 512 * KIB, ..Options::default() };
    let containerd = Containerd::start(Release::V2, &network.node(0), &options).await?;
    containerd.write_hosts(&ecr.name(), &hosts_toml(&ecr.url(), None, &[]))?;
    containerd.cri().pull(&format!("{}/team/app:v1", ecr.name()), None).await?;
    let layer = Some(image.layers[0].digest());
    let log = ecr.log().into_iter().filter(|seen| seen.kind == Kind::Object && seen.digest == layer);
    let mut ranges: Vec<String> = log.map(|seen| seen.range).collect();
    ranges.sort();
    ensure!(
        ranges == ["bytes=0-", "bytes=1048576-", "bytes=1572864-", "bytes=2097152-", "bytes=524288-"],
        "{ranges:?}"
    );
    Ok(())
}

/// Stands where darter will: counts, and has nothing.
#[derive(Default)]
struct EmptyMirror(AtomicUsize);

impl Service for EmptyMirror {
    async fn answer(&self, _: Request) -> Reply {
        self.0.fetch_add(1, Ordering::Relaxed);
        Reply::text(404, "application/json", r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"not here"}]}"#)
    }
}

/// Pulls from a fake ECR with a mirror in front. Gives back how many requests the mirror got and
/// whether the pull succeeded.
async fn requests_at_the_mirror(release: Release, options: &Options) -> Result<(usize, bool)> {
    let network = Network::new(1)?;
    let node = network.node(0);
    let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options::default())?;
    let image = Image::index(Format::Oci, 3, &[200 * KIB, 100 * KIB, 1])?;
    ecr.push(&image, "team/app", "v1");
    let mirror = Arc::new(EmptyMirror::default());
    let _server = Server::start_at(&node, "127.0.0.1:4001".parse()?, None, mirror.clone())?;
    let containerd = Containerd::start(release, &node, options).await?;
    let hosts = hosts_toml(&ecr.url(), Some("http://127.0.0.1:4001"), &["pull", "resolve"]);
    containerd.write_hosts(&ecr.name(), &hosts)?;
    let name = format!("{}/team/app:v1", ecr.name());
    let pulled = containerd.cri().pull(&name, Some(("AWS", &ecr.password()))).await;
    if pulled.is_ok() {
        for blob in image.pulled_blobs() {
            let count = ecr.count_of(Kind::Object, blob.digest());
            ensure!(count.bytes == blob.size() && count.granted == 1, "{}: {count:?}", blob.digest());
        }
    }
    Ok((mirror.0.load(Ordering::Relaxed), pulled.is_ok()))
}

/// resolve, index, manifest, configuration, 3 layers
const WHOLE_PULL: (usize, bool) = (7, true);

#[tokio::test]
async fn containerd_1_6_honours_two_directories() -> Result<()> {
    if !can_run("containerd_1_6_honours_two_directories", &[Need::Containerd(Release::V1)]) {
        return Ok(());
    }
    let seen = requests_at_the_mirror(Release::V1, &Options::default()).await?;
    ensure!(seen == WHOLE_PULL, "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn containerd_2_2_honours_two_directories_only_on_the_local_pull_path() -> Result<()> {
    let test = "containerd_2_2_honours_two_directories_only_on_the_local_pull_path";
    if !can_run(test, &[Need::Containerd(Release::V2)]) {
        return Ok(());
    }
    for (discard_unpacked_layers, config_path, expected) in [
        (true, ConfigPath::Two, WHOLE_PULL),
        (false, ConfigPath::One, WHOLE_PULL),
        // Neither the mirror nor `server`: https to the image's own host, which does not exist here.
        (false, ConfigPath::Two, (0, false)),
    ] {
        let options = Options { discard_unpacked_layers, config_path, ..Options::default() };
        let seen = requests_at_the_mirror(Release::V2, &options).await?;
        ensure!(seen == expected, "discard {discard_unpacked_layers}, {config_path:?}: {seen:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_conformance_suite_tells_what_a_registry_lacks() -> Result<()> {
    let needs = [Need::Conformance, Need::DockerRegistry];
    if !can_run("the_conformance_suite_tells_what_a_registry_lacks", &needs) {
        return Ok(());
    }
    let registry = Registry::start(&Place::Host, registry::Options::default()).await?;
    let image = Image::index(Format::Oci, 4, &[2048])?;
    registry.push(&image, "team/app", "v1").await?;
    let report = conformance::read_only(&Place::Host, registry.address(), &image, "team/app", "v1").await?;
    // docker-registry 2.8 is older than the referrers API, and answers 500 to some broken digests.
    let expected = [
        "empty",
        "empty/referrers",
        "read-only",
        "read-only/referrers",
        "invalid-digest-format",
        "invalid-digest-format/manifest-get",
    ];
    ensure!(report.with("FAIL") == expected, "{}", report.text);
    for test in ["ping", "read-only/tag-list", "read-only/head/manifest-head-by-tag", "read-only/pull/blob-get"] {
        ensure!(report.with("Pass").contains(&test), "{test}\n{}", report.text);
    }
    Ok(())
}
