//! The mirror against nginx (local hits) and against a direct fetch (cold pulls), and what it costs.
//!
//! All on this machine's loopback, client and server on the same cores. Origins generate their
//! content, so no disk but the store's is in the way. An argument (`hit`, `first-byte`, `cold`,
//! `memory`, `down`) runs one part.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use darter_benches::client::{self, Download, Sink};
use darter_benches::hyper_file::{self, HyperFile};
use darter_benches::{Better, Report, agent_down, gib, median, megabytes_per_second, percentile};
use darter_tests::agent::{Agent, Options};
use darter_tests::fake_ecr::{self, Auth, FakeEcr};
use darter_tests::image::{Format, Image};
use darter_tests::net::Place;
use darter_tests::nginx::Nginx;
use darter_tests::tools::{Need, can_run};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Alternating, so that a slow minute of the machine hits both sides.
const REPEATS: usize = 5;
const ORIGIN_BYTES_PER_SECOND: u64 = 100_000_000;

#[tokio::main]
async fn main() -> Result<()> {
    tokio::select! {
        outcome = bench() => outcome,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    }
}

async fn bench() -> Result<()> {
    if hyper_file::serve_if_asked().await? {
        return Ok(());
    }
    let only = std::env::args().nth(1);
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    // Before minutes of measuring, not after them: a figure that is missing is no figure that was reached.
    let mut needs = vec![Need::Darter, Need::Nginx];
    if wanted("down") {
        needs.extend(agent_down::RELEASES.map(|(release, _)| Need::Containerd(release)));
    }
    ensure!(can_run("bench-mirror", &needs), "the benchmark cannot run here");
    let mut report = Report::default();
    if wanted("hit") {
        local_hit(&mut report).await?;
    }
    if wanted("first-byte") {
        first_bytes(&mut report).await?;
    }
    if wanted("cold") {
        cold_pull(&mut report, Some(ORIGIN_BYTES_PER_SECOND)).await?;
        cold_pull(&mut report, None).await?;
    }
    if wanted("memory") {
        memory(&mut report).await?;
    }
    if wanted("down") {
        agent_down::run(&mut report).await?;
    }
    report.finish(only.as_deref().map_or("mirror", |_| "mirror-part"))
}

/// A registry, an agent that mirrors it, and images of these layers, each in a repository of its own.
struct Stage {
    ecr: FakeEcr,
    agent: Agent,
    images: Vec<Image>,
}

impl Stage {
    async fn new(images: Vec<Image>) -> Result<Self> {
        let options = fake_ecr::Options { auth: Auth::Public, redirect: false, ..fake_ecr::Options::default() };
        let ecr = FakeEcr::start(&Place::Host, options)?;
        for (number, image) in images.iter().enumerate() {
            ecr.push(image, &format!("bench/{number}"), "v1");
        }
        let options = Options::new(&Place::Host)
            .set("log.level", "warn")
            .set("mirror.prefetch", "off")
            .set("store.limit", "64GiB")
            .set("store.min_free", "1GiB")
            .registry(
                &ecr.name(),
                &[("endpoint", ecr.url().into()), ("plain_http", true.into()), ("access", "public".into())],
            );
        let agent = Agent::start(options).await?;
        Ok(Self { ecr, agent, images })
    }

    /// The path of the only layer of an image, at the registry and at the mirror.
    fn paths(&self, number: usize) -> (String, String) {
        let path = format!("/v2/bench/{number}/blobs/{}", self.images[number].layers[0].digest());
        let mirrored = format!("{path}?ns={}", self.ecr.name());
        (path, mirrored)
    }

    async fn direct(&self, number: usize, sink: Sink) -> Result<Download> {
        let address = self.ecr.url().trim_start_matches("http://").parse()?;
        fetch(address, self.paths(number).0, sink).await
    }

    async fn mirrored(&self, number: usize, sink: Sink) -> Result<Download> {
        fetch(self.agent.mirror(), self.paths(number).1, sink).await
    }

    /// The same blob from the registry itself and through the mirror, in turns first: neither side always has
    /// the warmer machine.
    async fn both(&self, number: usize, sink: Sink) -> Result<(Download, Download)> {
        if number.is_multiple_of(2) {
            let direct = self.direct(number, sink).await?;
            Ok((direct, self.mirrored(number, sink).await?))
        } else {
            let mirrored = self.mirrored(number, sink).await?;
            Ok((self.direct(number, sink).await?, mirrored))
        }
    }

    /// Lets the agent see the manifest: containerd asks for it before any layer, and it tells sizes.
    async fn manifest(&self, number: usize) -> Result<()> {
        let digest = self.images[number].root.digest();
        let path = format!("/v2/bench/{number}/manifests/{digest}?ns={}", self.ecr.name());
        fetch(self.agent.mirror(), path, Sink::Drop).await?;
        Ok(())
    }

    fn layer_file(&self, number: usize) -> PathBuf {
        self.agent.dir().join("data/blobs").join(self.images[number].layers[0].digest().hex())
    }
}

async fn fetch(address: SocketAddr, path: String, sink: Sink) -> Result<Download> {
    tokio::task::spawn_blocking(move || client::get(address, &path, "", sink)).await?
}

fn image(seed: u64, bytes: u64) -> Result<Image> {
    Image::new(Format::Oci, seed, &[bytes])
}

/// A server of the file that all of them serve.
struct Server<'a> {
    address: SocketAddr,
    path: String,
    cpu: Box<dyn Fn() -> Result<Duration> + 'a>,
    rates: Vec<f64>,
    cpu_per_gib: Vec<f64>,
}

impl<'a> Server<'a> {
    fn new(address: SocketAddr, path: &str, cpu: impl Fn() -> Result<Duration> + 'a) -> Self {
        Self { address, path: path.to_owned(), cpu: Box::new(cpu), rates: Vec::new(), cpu_per_gib: Vec::new() }
    }

    async fn measure(&mut self) -> Result<()> {
        let before = (self.cpu)()?;
        let got = fetch(self.address, self.path.clone(), Sink::Drop).await?;
        self.rates.push(megabytes_per_second(got.bytes, got.took));
        self.cpu_per_gib.push(((self.cpu)()? - before).as_secs_f64() / gib(got.bytes));
        Ok(())
    }
}

async fn local_hit(report: &mut Report) -> Result<()> {
    println!("\nlocal hit: one blob of 2 GiB in the page cache, nginx (sendfile on) serving the same file");
    let stage = Stage::new(vec![image(1, 2 * GIB)?]).await?;
    stage.manifest(0).await?;
    stage.mirrored(0, Sink::Hash).await.context("the blob does not come")?;
    let file = stage.layer_file(0);
    let nginx = Nginx::start(file.parent().context("a blob has a directory")?, "").await?;
    let name = format!("/{}", file.file_name().context("a blob has a name")?.to_string_lossy());
    let small = HyperFile::start(&file, 64 << 10).await?;
    let large = HyperFile::start(&file, 256 << 10).await?;
    let mut servers = [
        Server::new(nginx.address(), &name, || nginx.cpu()),
        Server::new(stage.agent.mirror(), &stage.paths(0).1, || Ok(stage.agent.usage()?.cpu)),
        Server::new(small.address(), "/", || small.cpu()),
        Server::new(large.address(), "/", || large.cpu()),
    ];
    for _ in 0..REPEATS {
        for server in &mut servers {
            server.measure().await?;
        }
    }
    let [theirs, ours, small, large] = servers.map(|server| (median(server.rates), median(server.cpu_per_gib)));
    let plain = "; hyper 1, HTTP/1.1, a thread that reads frames ahead with read_exact_at";
    for (whose, (rate, cpu), goals, how) in [
        ("local hit", ours, (Some(0.9), Some(1.3)), ""),
        ("hyper body, frames of 64 KiB", small, (None, None), plain),
        ("hyper body, frames of 256 KiB", large, (None, None), plain),
    ] {
        let conditions = format!("{rate:.0} against {:.0} MB/s, median of {REPEATS}{how}", theirs.0);
        report.add(&format!("{whose}, rate / nginx"), rate / theirs.0, "ratio", Better::Higher, goals.0, conditions);
        let conditions = format!("{cpu:.3} against {:.3} CPU-s per GiB; the clock ticks at 10 ms", theirs.1);
        report.add(&format!("{whose}, CPU / nginx"), cpu / theirs.1, "ratio", Better::Lower, goals.1, conditions);
    }
    Ok(())
}

async fn first_bytes(report: &mut Report) -> Result<()> {
    println!("\nfirst byte: blobs of 1 MiB");
    let blobs: usize = 256;
    let images = (0..blobs).map(|number| image(1000 + number as u64, MIB)).collect::<Result<Vec<_>>>()?;
    let stage = Stage::new(images).await?;
    let (mut direct, mut added) = (Vec::new(), Vec::new());
    for number in 0..blobs {
        stage.manifest(number).await?;
        let (origin, ours) = stage.both(number, Sink::Drop).await?;
        let [origin, ours] = [origin, ours].map(|got| got.first_byte.as_secs_f64() * 1e3);
        direct.push(origin);
        // Of the same blob, one after the other: a difference of two percentiles would be nobody's.
        added.push(ours - origin);
    }
    let conditions = format!(
        "p99 of {blobs} blobs, each against the same blob from the origin; median {:.2} ms, the origin's own p99 {:.2} ms",
        median(added.clone()),
        percentile(direct, 0.99)
    );
    let added = percentile(added, 0.99);
    report.add("first byte of a miss, over the origin's", added, "ms", Better::Lower, Some(5.0), conditions);

    let nginx = Nginx::start(stage.layer_file(0).parent().context("a blob has a directory")?, "").await?;
    let hits: Vec<String> = (0..READERS).map(|number| stage.paths(number).1).collect();
    let files: Vec<String> =
        stage.images.iter().take(READERS).map(|image| format!("/{}", image.layers[0].digest().hex())).collect();
    for (name, pause, goal) in [
        ("64 readers, 20 a second each", Duration::from_millis(50), Some(3.0)),
        ("64 readers without a pause", Duration::ZERO, Some(3.0)),
    ] {
        let theirs = percentile(readers(nginx.address(), &files, pause).await?, 0.99);
        let ours = percentile(readers(stage.agent.mirror(), &hits, pause).await?, 0.99);
        let conditions = format!("blobs of 1 MiB, connect included; nginx {theirs:.2} ms");
        report.add(&format!("first byte of a hit, p99, {name}"), ours, "ms", Better::Lower, goal, conditions);
        let conditions = format!("{ours:.2} against {theirs:.2} ms");
        report.add(&format!("the same / nginx, {name}"), ours / theirs, "ratio", Better::Lower, None, conditions);
    }
    Ok(())
}

/// How many read at once.
const READERS: usize = 64;

/// First bytes, in ms, of 64 readers at once, each reading one file after the other.
async fn readers(address: SocketAddr, paths: &[String], pause: Duration) -> Result<Vec<f64>> {
    const ROUNDS: usize = 40;
    let mut tasks = Vec::new();
    for reader in 0..READERS {
        let path = paths[reader % paths.len()].clone();
        tasks.push(tokio::task::spawn_blocking(move || {
            // Not all at the same instant: they are nodes' containerds, not a choir.
            std::thread::sleep(pause * u32::try_from(reader)? / u32::try_from(READERS)?);
            let mut times = Vec::new();
            for _ in 0..ROUNDS {
                times.push(client::get(address, &path, "", Sink::Drop)?.first_byte.as_secs_f64() * 1e3);
                std::thread::sleep(pause);
            }
            anyhow::Ok(times)
        }));
    }
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    Ok(times)
}

async fn cold_pull(report: &mut Report, rate: Option<u64>) -> Result<()> {
    let (bytes, repeats) = (2 * GIB, 4);
    println!(
        "\ncold pull: a blob of 2 GiB, sha256 verified by the client, origin {}",
        match rate {
            Some(rate) => format!("limited to {} MB/s", rate / 1_000_000),
            None => "not limited".to_owned(),
        }
    );
    let images = (0..repeats)
        .map(|number| image(2000 + number as u64 + rate.unwrap_or(0), bytes))
        .collect::<Result<Vec<_>>>()?;
    let stage = Stage::new(images).await?;
    stage.ecr.set_rate(rate, None);
    let mut ratios = Vec::new();
    let mut told = String::new();
    for number in 0..repeats {
        stage.manifest(number).await?;
        let (direct, mirrored) = stage.both(number, Sink::Hash).await?;
        let [direct, mirrored] = [direct, mirrored].map(|got| got.took.as_secs_f64());
        ratios.push(mirrored / direct);
        told += &format!("{mirrored:.2}/{direct:.2} s ");
    }
    let (name, goal) = match rate {
        Some(_) => ("cold pull at 100 MB/s, time / direct", Some(1.03)),
        None => ("cold pull unlimited, time / direct", None),
    };
    report.add(name, median(ratios), "ratio", Better::Lower, goal, told);
    Ok(())
}

async fn memory(report: &mut Report) -> Result<()> {
    println!("\nmemory: resident, idle and with 8 pulls of 2 GiB at once, and with 8 of an eighth of that");
    let small = pulls_at_once(3100, 256 * MIB).await?;
    let large = pulls_at_once(3000, 2 * GIB).await?;
    let mut add = |name: &str, value, unit, goal, conditions: &str| {
        report.add(name, value, unit, Better::Lower, Some(goal), conditions);
    };
    add("resident, idle", large.fresh, "MiB", 30.0, "just started");
    let took = format!("peak, {PULLS} cold pulls in {:.0} s", large.seconds);
    add("resident, 8 pulls of 2 GiB", large.peak, "MiB", 80.0, &took);
    // Pieces are larger in larger blobs, up to a limit; a bitfield of 2 GiB is 64 bytes.
    let compared = format!("peak, {:.1} against {:.1} MiB with 8 pulls of 256 MiB", large.peak, small.peak);
    add("the same / with blobs of an eighth", large.peak / small.peak, "ratio", 1.25, &compared);
    add("resident, idle after the pulls", large.after, "MiB", 30.0, "at once after the last");
    Ok(())
}

const PULLS: u64 = 8;

/// What an agent had resident, in MiB, in all: when it had started, at most, and when all was there.
struct Resident {
    fresh: f64,
    peak: f64,
    after: f64,
    seconds: f64,
}

async fn pulls_at_once(seed: u64, bytes: u64) -> Result<Resident> {
    let images = (0..PULLS).map(|number| image(seed + number, bytes)).collect::<Result<Vec<_>>>()?;
    let stage = Stage::new(images).await?;
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let fresh = mib(stage.agent.usage()?.resident_bytes);
    let started = Instant::now();
    let mut running = Vec::new();
    for number in 0..usize::try_from(PULLS)? {
        stage.manifest(number).await?;
        running.push(tokio::spawn(fetch(stage.agent.mirror(), stage.paths(number).1, Sink::Drop)));
    }
    for pull in running {
        pull.await??;
    }
    let usage = stage.agent.usage()?;
    let (peak, after) = (mib(usage.peak_bytes), mib(usage.resident_bytes));
    Ok(Resident { fresh, peak, after, seconds: started.elapsed().as_secs_f64() })
}
