//! Agents as processes: they find each other, one is killed, and without a key nothing listens.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::cluster::skew::Other;
use darter_tests::fake_ecr::Auth;
use darter_tests::net::{Place, Port};
use darter_tests::process;
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Pair, eventually};
use darter_tests::tools::{self, Need, can_run};
use serde_json::Value;
use toml_edit::Array;

/// Past this it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// A key as `darter swarm key` prints it.
async fn key() -> Result<String> {
    let mut command = Place::Host.command(tools::darter()?);
    command.args(["swarm", "key"]);
    let output = process::run("swarm key", command, PATIENCE).await?;
    ensure!(output.status.success(), "darter swarm key: {}", output.status);
    Ok(output.stdout)
}

/// An agent of a swarm; its ports are kept as long as the second part lives.
async fn member(dir: &Scratch, key: &str, peers: &[SocketAddr]) -> Result<(Agent, SocketAddr, [Port; 2])> {
    let file = dir.join("swarm.key");
    fs::write(&file, key)?;
    let ports = [Place::Host.port()?, Place::Host.port()?];
    let [control, exchange] = [&ports[0], &ports[1]].map(|port| SocketAddr::from(([127, 0, 0, 1], port.number())));
    let options = Options::new(&Place::Host)
        .set("swarm.key_file", file.display().to_string())
        .set("swarm.listen", control.to_string())
        .set("swarm.exchange_listen", exchange.to_string())
        .set("swarm.lookup_every", "1s")
        .set("swarm.peers", Array::from_iter(peers.iter().map(ToString::to_string)));
    Ok((Agent::start(options).await?, control, ports))
}

async fn check(agent: &Agent) -> Result<(String, String)> {
    let json: Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
    let checks = json["checks"].as_array().context("no checks")?;
    let check = checks.iter().find(|check| check["check"] == "swarm").context("no check of the swarm")?;
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("reason")))
}

/// Waits until a metric has a value: nothing tells of it.
async fn counts(agent: &Agent, name: &str, labels: &[(&str, &str)], wanted: impl Fn(f64) -> bool) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let found = agent.metrics().await?.sum(name, labels);
        if wanted(found) {
            return Ok(start.elapsed());
        }
        ensure!(start.elapsed() < PATIENCE, "{name} stays {found}:\n{}", process::tail(&agent.log()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn agents_find_each_other_and_notice_a_kill() -> Result<()> {
    let (dir, key) = (Scratch::new()?, key().await?);
    let (first, seed, _ports) = member(&dir, &key, &[]).await?;
    ensure!(
        check(&first).await? == ("ok".into(), "alone: no other agent is known".into()),
        "{:?}",
        check(&first).await?
    );
    let (second, _, _ports) = member(&dir, &key, &[seed]).await?;
    let (mut third, _, _ports) = member(&dir, &key, &[seed]).await?;
    for agent in [&first, &second, &third] {
        counts(agent, "darter_swarm_peers", &[], |peers| peers == 2.0).await?;
    }
    let identity = fs::metadata(first.dir().join("data/identity.key"))?;
    ensure!(identity.permissions().mode() & 0o777 == 0o600, "{:o}", identity.permissions().mode());
    let (state, reason) = check(&second).await?;
    ensure!(state == "ok" && reason.starts_with("2 other members"), "{state}: {reason}");
    third.kill().await?;
    for agent in [&first, &second] {
        let waited = counts(agent, "darter_swarm_peers", &[], |peers| peers == 1.0).await?;
        ensure!(waited < Duration::from_secs(2), "{waited:?}");
    }
    // The same node comes back under the same name, and is found by those that lost it.
    third.start_again().await?;
    for agent in [&first, &second, &third] {
        counts(agent, "darter_swarm_peers", &[], |peers| peers == 2.0).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_agent_with_another_key_is_ready_and_alone() -> Result<()> {
    let dirs = [Scratch::new()?, Scratch::new()?];
    let (first, seed, _ports) = member(&dirs[0], &key().await?, &[]).await?;
    let (stranger, _, _ports) = member(&dirs[1], &key().await?, &[seed]).await?;
    counts(&first, "darter_peer_rejected_total", &[("reason", "handshake")], |count| count > 0.0).await?;
    let (state, reason) = check(&stranger).await?;
    ensure!(state == "degraded" && reason.starts_with("alone"), "{state}: {reason}");
    ensure!(stranger.admin("/readyz").await?.status == 200, "a swarm never makes a node unready");
    ensure!(first.metrics().await?.sum("darter_swarm_peers", &[]) == 0.0);
    Ok(())
}

#[tokio::test]
async fn without_a_key_nothing_listens() -> Result<()> {
    let ports = [Place::Host.port()?, Place::Host.port()?];
    let [control, exchange] = ports.each_ref().map(|port| SocketAddr::from(([127, 0, 0, 1], port.number())));
    let options = Options::new(&Place::Host).set("swarm.listen", control.to_string());
    let agent = Agent::start(options.set("swarm.exchange_listen", exchange.to_string())).await?;
    for address in [control, exchange] {
        ensure!(tokio::net::TcpStream::connect(address).await.is_err(), "somebody listens on {address}");
    }
    let (state, reason) = check(&agent).await?;
    ensure!(state == "ok" && reason.contains("swarm.key_file"), "{state}: {reason}");
    ensure!(!agent.dir().join("data/identity.key").exists(), "a node that is in no swarm needs no name");
    Ok(())
}

#[tokio::test]
async fn who_comes_back_to_a_blob_that_was_just_left_goes_on_where_it_stopped() -> Result<()> {
    if !can_run("who_comes_back_to_a_blob_that_was_just_left_goes_on_where_it_stopped", &[Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let file = dir.join("swarm.key");
    fs::write(&file, key().await?)?;
    let ports = [Place::Host.port()?, Place::Host.port()?];
    let [control, exchange] = [&ports[0], &ports[1]].map(|port| format!("127.0.0.1:{}", port.number()));
    let change = move |options: Options| {
        let options = options.set("mirror.prefetch", "off").set("mirror.linger", "1ms");
        let options = options.set("swarm.key_file", file.display().to_string());
        options.set("swarm.listen", control.as_str()).set("swarm.exchange_listen", exchange.as_str())
    };
    let pair = Pair::with(&[40 * MIB], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    pair.ecr.set_rate(Some(16 * MIB), None);
    let layer = pair.layer();
    let path = format!("blobs/{}", layer.digest());
    for time in 1..=5_u32 {
        let answer = pair.open(&path, &[]).await?;
        ensure!(answer.exchange.status == Some(200), "{:?} the {time}th time\n{}", answer.exchange, pair.agent.log());
        drop(answer);
        let left =
            async || Ok(pair.metric("darter_pulls_total", &[("outcome", "abandoned")]).await? == f64::from(time));
        eventually("the pull stops", left).await?;
    }
    pair.ecr.set_rate(None, None);
    let answer = pair.get(&path).await?;
    ensure!(answer.status == 200 && Digest::of(&answer.body) == layer.digest(), "it came wrong: {}", answer.status);
    Ok(())
}

/// The bits of whoever knows `Take`, and `RoomWanted`.
const TAKES: u64 = 1;
const ROOM: u64 = 16;

#[tokio::test]
async fn members_of_another_version_are_told_what_they_know_and_nothing_else() -> Result<()> {
    if !can_run("members_of_another_version_are_told_what_they_know_and_nothing_else", &[Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let file = dir.join("swarm.key");
    fs::write(&file, key().await?)?;
    // An older one that knows of no features, and a newer one that has all of them and says more besides.
    for features in [0, u64::MAX] {
        let ports = [Place::Host.port()?, Place::Host.port()?];
        let [control, exchange] = [&ports[0], &ports[1]].map(|port| SocketAddr::from(([127, 0, 0, 1], port.number())));
        let change = |options: Options| {
            let options = options.set("mirror.prefetch", "off").set("swarm.key_file", file.display().to_string());
            options.set("swarm.listen", control.to_string()).set("swarm.exchange_listen", exchange.to_string())
        };
        let mut pair = Pair::with(&[MIB], Auth::Public, &[("access", "public".into())], change).await?;
        let other = Other::start(&Place::Host, &file, control, features)?;
        counts(&pair.agent, "darter_swarm_peers", &[], |peers| peers == 1.0).await?;
        let said = |word: &str| other.heard().iter().any(|frame| frame.contains(word));
        pair.bring(&pair.layer()).await?;
        eventually("it is told what is here", async || Ok(said("body: Some(Holds("))).await?;
        // What only this node has goes to others, if they can take it.
        pair.agent.stop().await?;
        for (word, feature) in [("body: Some(Take(", TAKES), ("body: Some(RoomWanted(", ROOM)] {
            ensure!(said(word) == (features & feature != 0), "features {features:x}: {:?}", other.heard());
        }
    }
    Ok(())
}
