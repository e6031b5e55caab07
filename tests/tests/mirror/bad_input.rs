//! What a broken, hostile or merely odd client gets: the right error or a closed connection, a
//! counter, and an agent that serves the next one.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::stage::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);
/// A registry that nothing answers for: no test here gets that far.
const REGISTRY: &str = "registry.test.example";

async fn agent() -> Result<Agent> {
    agent_with(Options::new(&Place::Host).set("mirror.client_timeout", "2s")).await
}

async fn agent_with(options: Options) -> Result<Agent> {
    Agent::start(options.plain_registry(REGISTRY, "http://127.0.0.1:9")).await
}

/// Sends `bytes` on a connection of its own and reads until the agent closes.
async fn raw(agent: &Agent, bytes: &[u8]) -> Result<String> {
    let mut socket = TcpStream::connect(agent.mirror()).await?;
    socket.write_all(bytes).await?;
    read_to_end(&mut socket).await
}

async fn read_to_end(socket: &mut TcpStream) -> Result<String> {
    let mut answer = Vec::new();
    // An RST would be an error here: the agent ends every connection with a FIN.
    timeout(PATIENCE, socket.read_to_end(&mut answer)).await.context("the agent keeps the connection open")??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn get(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes()
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

/// It was answered so, and counted as that and as nothing else. `before` are the requests and the refusals of
/// all tests before it.
async fn counted(agent: &Agent, code: u16, refusal: Option<&str>, before: (f64, f64)) -> Result<(f64, f64)> {
    let code = code.to_string();
    let labels = [("registry", "other"), ("kind", "unknown"), ("code", &*code), ("source", "none")];
    let sums = async || {
        let metrics = agent.metrics().await?;
        let refusals = |labels: &[_]| metrics.sum("darter_mirror_refusals_total", labels);
        let all = (metrics.sum("darter_mirror_requests_total", &[("kind", "unknown")]), refusals(&[]));
        let of_it = metrics.sum("darter_mirror_requests_total", &labels);
        anyhow::Ok((all, of_it, refusal.map(|reason| refusals(&[("registry", "other"), ("reason", reason)]))))
    };
    // Once it is on the wire, which its client sees first.
    eventually("it is counted", async || Ok(sums().await?.0.0 > before.0)).await?;
    let (all, of_it, refused) = sums().await?;
    assert_eq!(all, (before.0 + 1.0, before.1 + if refusal.is_some() { 1.0 } else { 0.0 }), "{code} {refusal:?}");
    ensure!(of_it >= 1.0 && refused.is_none_or(|refused| refused >= 1.0), "{code} {refusal:?}: {of_it} {refused:?}");
    Ok(all)
}

async fn still_serves(agent: &Agent) -> Result<()> {
    let answer = raw(agent, &get("/v2/")).await?;
    ensure!(status(&answer) == 200, "{answer}");
    Ok(())
}

#[tokio::test]
async fn garbage_paths_digests_and_namespaces_get_the_specs_errors() -> Result<()> {
    let agent = agent().await?;
    let hex = "0".repeat(64);
    let mut counts = (0.0, 0.0);
    for (target, wanted, code) in [
        ("/".to_owned(), 404, "UNSUPPORTED"),
        ("/v1/_ping".to_owned(), 404, "UNSUPPORTED"),
        ("/v2/../../../etc/passwd".to_owned(), 404, "UNSUPPORTED"),
        ("/v2/%2e%2e%2f/manifests/x".to_owned(), 400, "NAME_INVALID"),
        (format!("/v2/a/blobs/sha256:xyz?ns={REGISTRY}"), 400, "DIGEST_INVALID"),
        (format!("/v2/a/blobs/sha512:{hex}?ns={REGISTRY}"), 404, "BLOB_UNKNOWN"),
        (format!("/v2/UPPER/blobs/sha256:{hex}?ns={REGISTRY}"), 400, "NAME_INVALID"),
        (format!("/v2/a/blobs/sha256:{hex}"), 404, "NAME_UNKNOWN"),
        (format!("/v2/a/blobs/sha256:{hex}?ns=169.254.169.254"), 404, "NAME_UNKNOWN"),
        (format!("/v2/a/blobs/sha256:{hex}?ns=../../etc"), 404, "NAME_UNKNOWN"),
        (format!("/v2/a/blobs/sha256:{hex}?ns={REGISTRY}&ns=b.example"), 400, "REQUEST_INVALID"),
    ] {
        let answer = raw(&agent, &get(&target)).await?;
        assert_eq!(status(&answer), wanted, "{target}: {answer}");
        assert!(answer.contains(&format!("{{\"errors\":[{{\"code\":\"{code}\"")), "{target}: {answer}");
        assert!(answer.contains("Content-Type: application/json"), "{target}: {answer}");
        let reason = match (wanted, code) {
            (404, "NAME_UNKNOWN") => Some("not_mirrored"),
            (404, _) => Some("no_endpoint"),
            _ => None,
        };
        counts = counted(&agent, wanted, reason, counts).await.with_context(|| target)?;
    }
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT"] {
        let request = format!("{method} /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let answer = raw(&agent, request.as_bytes()).await?;
        assert_eq!(status(&answer), 405, "{method}");
        assert!(answer.contains(r#"{"errors":[{"code":"UNSUPPORTED""#), "{method}: {answer}");
        counts = counted(&agent, 405, None, counts).await.context(method)?;
    }
    still_serves(&agent).await
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_counted() -> Result<()> {
    let agent = agent().await?;
    assert_eq!(status(&raw(&agent, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03garbage\r\n\r\n").await?), 400);
    assert_eq!(status(&raw(&agent, b"GET / HTTP/9.9\r\n\r\n").await?), 505);
    let long = [b"GET /".as_slice(), &b"a".repeat(100_000)].concat();
    assert_eq!(status(&raw(&agent, &long).await?), 431);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(1000));
    assert_eq!(status(&raw(&agent, many.as_bytes()).await?), 431);
    let garbage = agent.metrics().await?.sum("darter_mirror_rejected_total", &[("reason", "garbage")]);
    assert_eq!(garbage, 4.0);
    still_serves(&agent).await
}

#[tokio::test]
async fn a_request_body_is_refused_and_the_connection_ends_with_a_fin() -> Result<()> {
    let agent = agent().await?;
    // More than the agent reads before it answers: closing with unread bytes would be an RST.
    let body = [b"GET /v2/ HTTP/1.1\r\nContent-Length: 100000\r\n\r\n".as_slice(), &b"x".repeat(100_000)].concat();
    assert_eq!(status(&raw(&agent, &body).await?), 400);
    still_serves(&agent).await
}

#[tokio::test]
async fn a_slow_head_is_cut_off_and_counted() -> Result<()> {
    let agent = agent().await?;
    let mut socket = TcpStream::connect(agent.mirror()).await?;
    // One header a moment, for ever: each write is in time, the head is not.
    let drip = async {
        socket.write_all(b"GET /v2/ HTTP/1.1\r\n").await?;
        for number in 0..1000 {
            if socket.write_all(format!("x{number}: y\r\n").as_bytes()).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, drip).await.context("the slow head was never cut off")??;
    let slow = agent.metrics().await?.sum("darter_mirror_rejected_total", &[("reason", "slow_head")]);
    assert_eq!(slow, 1.0);
    still_serves(&agent).await
}

#[tokio::test]
async fn half_a_head_is_counted() -> Result<()> {
    let agent = agent().await?;
    let mut socket = TcpStream::connect(agent.mirror()).await?;
    socket.write_all(b"GET /v2/ HT").await?;
    socket.shutdown().await?;
    assert_eq!(read_to_end(&mut socket).await?, "");
    let half = agent.metrics().await?.sum("darter_mirror_rejected_total", &[("reason", "half_head")]);
    assert_eq!(half, 1.0);
    still_serves(&agent).await
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_on_one_connection() -> Result<()> {
    let agent = agent().await?;
    let one = "HEAD /v2/ HTTP/1.1\r\nHost: x\r\n\r\n".repeat(3);
    let answer = raw(&agent, format!("{one}GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let statuses: Vec<_> = answer.split("HTTP/1.1 ").skip(1).map(|part| &part[..3]).collect();
    assert_eq!(statuses, ["200", "200", "200", "404"]);
    Ok(())
}

#[tokio::test]
async fn ten_thousand_idle_connections_cost_little_and_keep_nobody_out() -> Result<()> {
    // Both ends are in this test's reach: its own limit of open files must allow them.
    raise_file_limit()?;
    let agent = agent_with(Options::new(&Place::Host).set("mirror.client_timeout", "60s")).await?;
    let before = agent.usage()?.resident_bytes;
    let mut idle = Vec::new();
    for _ in 0..10_000 {
        idle.push(timeout(PATIENCE, TcpStream::connect(agent.mirror())).await??);
    }
    still_serves(&agent).await?;
    let open = agent.metrics().await?.sum("darter_mirror_connections", &[]);
    assert!(open >= 10_000.0, "only {open} connections are open");
    let each = agent.usage()?.resident_bytes.saturating_sub(before) / 10_000;
    assert!(each < 8 * 1024, "an idle connection costs {each} bytes");
    Ok(())
}

fn raise_file_limit() -> Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    ensure!(limit.maximum.is_none_or(|maximum| maximum > 11_000), "this test needs 11,000 open files");
    Ok(())
}

#[tokio::test]
async fn more_connections_than_allowed_wait_and_are_served_in_turn() -> Result<()> {
    let options = Options::new(&Place::Host).set("mirror.client_timeout", "1s").set("mirror.max_connections", 4);
    let agent = agent_with(options).await?;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(TcpStream::connect(agent.mirror()).await?);
    }
    // The first four are idle and end after client_timeout; then there is room for this one.
    still_serves(&agent).await?;
    ensure!(agent.log().contains("mirror.max_connections"), "{}", agent.log());
    let full = async || Ok(agent.metrics().await?.sum("darter_mirror_full_total", &[]) > 0.0);
    eventually("it is counted", full).await
}
