//! Agents that share without TLS between them, on a network that is thought to encrypt already: behind
//! tokens, and only with each other.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::http::Client;
use darter_tests::net::node_address;
use darter_tests::stage::{MIB, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};
use serde_json::Value;

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// All that an agent says, so that a secret in it would be seen.
fn plain(_: &Seat, options: Options) -> Options {
    options.set("swarm.tls", false).set("log.level", "info,darter_agent=trace,darter_core=trace")
}

#[tokio::test]
async fn nodes_without_tls_read_the_origin_exactly_once() -> Result<()> {
    if !can_run("nodes_without_tls_read_the_origin_exactly_once", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(Plan::new(4, 100, 1), plain).await?;
    let pushed = swarm.push(41, &[24 * MIB, 8 * MIB]).await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_peaceful().await?;
    swarm.copies(&pushed).ensure_exactly(1)?;
    let sent = async || swarm.sum("darter_peer_bytes_total", &[("direction", "sent")]).await;
    let all = 3.0 * bytes(pushed.image.layer_bytes());
    eventually("they went from node to node", async || Ok(sent().await? >= all)).await?;
    for node in 0..swarm.len() {
        let log = swarm.agent(node)?.log();
        ensure!(log.contains("Fetch"), "node {node} says too little to give anything away");
        let told = log.lines().find(|line| has_token(line));
        ensure!(told.is_none(), "node {node} logs a token: {told:?}");
    }
    no_stranger_is_served(&swarm, &pushed).await
}

/// Whether there are a time and 64 hex digits after it, as at the end of a token.
fn has_token(line: &str) -> bool {
    let words: Vec<&str> = line.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let is_hex = |word: &str| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_time = |word: &str| word.len() == 13 && word.bytes().all(|byte| byte.is_ascii_digit());
    words.windows(2).any(|pair| is_time(pair[0]) && is_hex(pair[1]))
}

#[test]
fn a_token_in_a_log_would_be_seen() {
    let hash = "0123456789abcdef".repeat(4);
    assert!(has_token(&format!("darter-token: {hash} 1800000000000 {hash}\r")));
    assert!(has_token(&format!("Token {{ blob: [7, 7], token: \"{hash} 1800000000000 {hash}\" }}")));
    assert!(!has_token(&format!("digest=sha256:{hash} took=12")));
}

/// Whoever has the network and not the swarm key gets nothing: a token is the gate, and there is one for
/// members only.
async fn no_stranger_is_served(swarm: &Swarm, pushed: &Pushed) -> Result<()> {
    let piece = format!("http://{}:4003/p/{}/0", node_address(0)?, pushed.image.layers[0].digest().hex());
    let stranger = Client::new(swarm.origin().clone());
    let answer = stranger.get(&piece).await?;
    ensure!(answer.status == 403 && answer.body.is_empty(), "{}: {}", answer.status, answer.text());
    swarm.agent(0)?.counted("darter_peer_rejected_total", &[("reason", "token")], |sum| sum == 1.0).await.map(drop)
}

#[tokio::test]
async fn nodes_that_differ_in_tls_share_with_their_own_kind_and_say_so() -> Result<()> {
    if !can_run("nodes_that_differ_in_tls_share_with_their_own_kind_and_say_so", &NEEDS) {
        return Ok(());
    }
    let mixed = |seat: &Seat, options: Options| options.set("swarm.tls", seat.number < 2);
    // A registry that two swarms at once do not slow down so much that either thinks that a reader is dead.
    let swarm = Swarm::start_apart(Plan::new(4, 100, 4), mixed).await?;
    eventually("each knows its own kind, and that there is another", async || {
        for node in 0..swarm.len() {
            let metrics = swarm.agent(node)?.metrics().await?;
            let (peers, apart) = (
                metrics.sum("darter_swarm_peers", &[]),
                metrics.sum("darter_peer_rejected_total", &[("reason", "tls")]),
            );
            if peers != 1.0 || apart < 2.0 {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await?;
    let pushed = swarm.push(42, &[24 * MIB, 8 * MIB]).await?;
    last(swarm.pull_all(&pushed).await)?;
    // Once for each kind: no piece goes from one to the other.
    swarm.copies(&pushed).ensure_exactly(2).with_context(|| swarm.told())?;
    for node in 0..swarm.len() {
        let agent = swarm.agent(node)?;
        ensure!(agent.log().contains("another swarm.tls"), "node {node} does not say why\n{}", swarm.story(node));
        let ready = agent.admin("/readyz").await?;
        let json: Value = serde_json::from_slice(&ready.body)?;
        let check = json["checks"].as_array().context("no checks")?.iter().find(|check| check["check"] == "swarm");
        let reason = check.and_then(|check| check["reason"].as_str()).unwrap_or_default();
        ensure!(ready.status == 200 && reason.starts_with("1 other members; 2 nodes have another"), "{reason}");
    }
    Ok(())
}
