//! Clients that are strangers, slow or broken, and a server that spends little on any of them.

use darter_core::swarm::target::Target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;

async fn dial(node: &Node, as_identity: &Identity, to: &Identity) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(node.address).await?;
    let config = as_identity.client_config(to.peer()).map_err(std::io::Error::other)?;
    let name = rustls_pki_types::ServerName::try_from("darter").map_err(std::io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await
}

fn get(blob: &Blob, piece: u32) -> String {
    format!("GET {} HTTP/1.1\r\n\r\n", Target { blob: blob.digest, piece })
}

/// Sends `text` and reads until the server closes. An error of the connection is an end too.
async fn talk(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), text: &[u8]) -> String {
    let _ = stream.write_all(text).await;
    let _ = stream.flush().await;
    let mut answer = Vec::new();
    let mut scrap = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut scrap).await {
        answer.extend_from_slice(&scrap[..count]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Waits until the server has counted one; the counter is all that a dropped connection leaves.
async fn counted(node: &Node, reason: &str) {
    let seen = async {
        while rejected(&node.metrics, reason) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let seen = tokio::time::timeout(Duration::from_secs(10), seen).await;
    assert!(seen.is_ok(), "no {reason}: {}", node.metrics.render());
}

#[tokio::test]
async fn what_is_no_request_for_a_piece_gets_400_and_the_close() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&two]);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits::default());
    let path = Target { blob: shelf.blob.digest, piece: 0 }.to_string();
    let requests = [
        "hello\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        format!("GET {path}/../../etc/passwd HTTP/1.1\r\n\r\n"),
        format!("POST {path} HTTP/1.1\r\n\r\n"),
        format!("HEAD {path} HTTP/1.1\r\n\r\n"),
        format!("GET {path} HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET "),
        format!("GET {path} HTTP/1.1\r\nX: {}", "x".repeat(20_000)),
    ];
    for (number, request) in requests.iter().enumerate() {
        let mut stream = dial(&node, &two, &one).await.unwrap();
        let answer = talk(&mut stream, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{request:.60}: {answer}");
        assert_eq!(rejected(&node.metrics, "garbage"), number as u64 + 1, "{request:.60}");
    }
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0, "nothing was asked for");
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_order() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&two]);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits::default());
    let mut stream = dial(&node, &two, &one).await.unwrap();
    let row = get(&shelf.blob, 3) + &get(&shelf.blob, 4) + &get(&shelf.blob, 3) + "end\r\n\r\n";
    let answer = talk(&mut stream, row.as_bytes()).await;
    let codes: Vec<_> = answer.split("HTTP/1.1 ").skip(1).map(|part| &part[..3]).collect();
    assert_eq!(codes, ["200", "404", "200", "400"]);
}

#[tokio::test]
async fn a_client_without_an_identity_is_not_heard() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&two]);
    let limits = Limits { handshake: Duration::from_millis(200), ..Limits::default() };
    let node = serve(Gate::Tls(one.clone()), &shelf, limits);
    let mut plain = TcpStream::connect(node.address).await.unwrap();
    let answer = talk(&mut plain, get(&shelf.blob, 0).as_bytes()).await;
    assert!(!answer.contains("HTTP/1.1"), "{answer}");
    counted(&node, "handshake").await;

    // TLS 1.3 with the right server, and no key of its own.
    let mut config = two.client_config(one.peer()).unwrap();
    config.client_auth_cert_resolver = Arc::new(NoKey);
    let socket = TcpStream::connect(node.address).await.unwrap();
    let name = rustls_pki_types::ServerName::try_from("darter").unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, socket).await {
        assert_eq!(talk(&mut stream, get(&shelf.blob, 0).as_bytes()).await, "");
    }
    while rejected(&node.metrics, "handshake") < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // One that says nothing costs its place for the handshake's time only.
    let mut silent = TcpStream::connect(node.address).await.unwrap();
    assert_eq!(silent.read(&mut [0; 16]).await.unwrap_or(0), 0);
    assert_eq!(rejected(&node.metrics, "handshake"), 3);
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0);
}

#[derive(Debug)]
struct NoKey;

impl rustls::client::ResolvesClientCert for NoKey {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn an_identity_that_is_no_member_gets_nothing_and_one_that_leaves_403() {
    let (one, two, three) = (identity(1), identity(2), identity(3));
    let shelf = Shelf::of(&[&two]);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits::default());
    let mut stream = dial(&node, &three, &one).await.unwrap();
    // Before it asked: it must not hold a place among those that may.
    assert_eq!(talk(&mut stream, b"").await, "");
    counted(&node, "not_member").await;

    // A member that leaves is refused on the connection it has.
    let mut stream = dial(&node, &two, &one).await.unwrap();
    stream.write_all(get(&shelf.blob, 3).as_bytes()).await.unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    shelf.members.lock().unwrap().remove(&two.peer());
    let answer = talk(&mut stream, get(&shelf.blob, 0).as_bytes()).await;
    assert!(answer.contains("HTTP/1.1 403 "), "{answer:.300}");
}

#[tokio::test]
async fn a_key_that_its_holder_cannot_sign_with_opens_nothing() {
    // Identity 3 shows the public key of member 2, and signs with its own.
    let (one, two, three) = (identity(1), identity(2), identity(3));
    let shelf = Shelf::of(&[&two]);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits::default());
    let thief = three.showing(&two);
    if let Ok(mut stream) = dial(&node, &thief, &one).await {
        assert_eq!(talk(&mut stream, get(&shelf.blob, 0).as_bytes()).await, "");
    }
    counted(&node, "handshake").await;
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_client_that_reads_nothing_loses_its_connection_and_its_slot() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&two]);
    shelf.answer_instead(big);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits { block: Duration::from_millis(200), ..Limits::default() });
    let mut stream = dial(&node, &two, &one).await.unwrap();
    stream.write_all(get(&shelf.blob, 0).as_bytes()).await.unwrap();
    counted(&node, "slow_client").await;
    assert_eq!(shelf.slots.used.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_head_that_never_ends_is_given_up() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&two]);
    let node = serve(Gate::Tls(one.clone()), &shelf, Limits { head: Duration::from_millis(100), ..Limits::default() });
    let mut stream = dial(&node, &two, &one).await.unwrap();
    assert_eq!(talk(&mut stream, b"GET /p/").await, "");
    counted(&node, "slow_head").await;
}

#[tokio::test]
async fn one_peer_cannot_take_all_connections() {
    let (one, two, three) = (identity(1), identity(2), identity(3));
    let shelf = Shelf::of(&[&two, &three]);
    let node =
        serve(Gate::Tls(one.clone()), &shelf, Limits { connections: 3, connections_per_peer: 2, ..Limits::default() });
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut stream = dial(&node, &two, &one).await.unwrap();
        stream.write_all(get(&shelf.blob, 4).as_bytes()).await.unwrap();
        assert_eq!(stream.read(&mut [0; 4096]).await.unwrap_or(0).min(1), 1);
        kept.push(stream);
    }
    let mut third = dial(&node, &two, &one).await.unwrap();
    assert_eq!(talk(&mut third, get(&shelf.blob, 4).as_bytes()).await, "");
    assert_eq!(rejected(&node.metrics, "too_many"), 1);
    let mut other = dial(&node, &three, &one).await.unwrap();
    other.write_all(get(&shelf.blob, 4).as_bytes()).await.unwrap();
    assert_eq!(other.read(&mut [0; 4096]).await.unwrap_or(0).min(1), 1, "there is room for another peer");
    let mut more = dial(&node, &three, &one).await.unwrap();
    assert_eq!(talk(&mut more, get(&shelf.blob, 4).as_bytes()).await, "", "but only so much");
    drop(kept);
}

/// A file with nothing in it but a length: more than fits into the buffers of sockets.
pub(super) fn big(shelf: &Shelf) -> Decision {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    let (span, slot) = (Span { start: 0, end: 64 * MIB }, Slot::take(&shelf.slots));
    Decision::Serve(Upload { file: Arc::new(file), span, attest: Some(shelf.blob.attest(0)), slot })
}
