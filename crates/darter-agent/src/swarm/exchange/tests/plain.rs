//! The plaintext option: the same pieces, sent by the kernel, behind a token.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{SystemTime, UNIX_EPOCH};

use darter_core::swarm::token::{self, Token};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use super::client::Broken;
use super::*;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

fn plain(limits: Limits) -> (Arc<Shelf>, Node, Client, Secret) {
    let (secret, shelf) = (Secret([5; 32]), Shelf::of(&[&identity(2)]));
    let node = serve(Gate::Token(secret.clone()), &shelf, limits.clone());
    let client = Client::new(None, shelf.clone(), limits, metrics());
    (shelf, node, client, secret)
}

#[tokio::test]
async fn a_piece_arrives_with_a_token() {
    let (shelf, node, client, secret) = plain(Limits::default());
    let (address, connections) = counting(&node).await;
    for piece in 0..4 {
        let mut request = shelf.blob.request(&identity(1), address, piece);
        request.token = Some(Token::new(&secret, identity(2).peer(), &shelf.blob.digest, LOCAL, now()));
        let got = client.fetch(&request).await.unwrap();
        assert!(*got.bytes == *shelf.blob.bytes(piece), "piece {piece}");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1, "one connection was enough");
}

#[tokio::test]
async fn no_token_an_old_one_or_anothers_opens_nothing() {
    let (shelf, node, client, secret) = plain(Limits::default());
    let (blob, member) = (shelf.blob.digest, identity(2).peer());
    let elsewhere = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
    let tokens = [
        None,
        Some(Token::new(&secret, member, &blob, LOCAL, now() - token::LIFETIME)),
        Some(Token::new(&secret, member, &Digest::of(b"x"), LOCAL, now())),
        Some(Token::new(&secret, member, &blob, elsewhere, now())),
        Some(Token::new(&Secret([6; 32]), member, &blob, LOCAL, now())),
    ];
    for (number, token) in tokens.into_iter().enumerate() {
        let mut request = shelf.blob.request(&identity(1), node.address, 0);
        request.token = token;
        let error = client.fetch(&request).await.unwrap_err();
        assert!(matches!(error, FetchError::Broken(Broken::Refused(403))), "{number}: {error:?}");
        assert_eq!(rejected(&node.metrics, "token"), number as u64 + 1, "{number}");
    }
    // A right token of somebody who is no member any more.
    let mut request = shelf.blob.request(&identity(1), node.address, 0);
    request.token = Some(Token::new(&secret, identity(3).peer(), &blob, LOCAL, now()));
    assert!(client.fetch(&request).await.is_err());
    assert_eq!(rejected(&node.metrics, "not_member"), 1);
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn the_values_of_all_pieces_need_a_token_too() {
    let (shelf, node, client, secret) = plain(Limits::default());
    let Blob { digest: blob, layout, .. } = shelf.blob;
    let right = |blob: &Digest| Token::new(&secret, identity(2).peer(), blob, LOCAL, now());
    let (peer, address, patience) = (identity(1).peer(), node.address, Duration::from_secs(5));
    for token in [None, Some(right(&Digest::of(b"x")))] {
        let error = client.values(&ValuesRequest { peer, address, blob, layout, token, patience }).await.unwrap_err();
        assert!(error.is_denied(), "{error:?}");
    }
    assert_eq!(rejected(&node.metrics, "token"), 2);
    let request = ValuesRequest { peer, address, blob, layout, token: Some(right(&blob)), patience };
    let values: Vec<_> = (0..4).map(|piece| shelf.blob.attest(piece).cv).collect();
    assert_eq!(client.values(&request).await.unwrap(), values);
}

#[tokio::test]
async fn a_token_that_was_overheard_does_not_work_from_another_address() {
    let (shelf, node, _, secret) = plain(Limits::default());
    let token = Token::new(&secret, identity(2).peer(), &shelf.blob.digest, LOCAL, now());
    for (from, status) in [("127.0.0.1:0", "200"), ("127.0.0.2:0", "403")] {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(from.parse().unwrap()).unwrap();
        let mut stream = socket.connect(node.address).await.unwrap();
        let head = format!("GET /p/{}/3 HTTP/1.1\r\n{}: {token}\r\n\r\n", shelf.blob.digest.hex(), token::HEADER);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut start).await.unwrap();
        assert_eq!(start, *format!("HTTP/1.1 {status}").as_bytes(), "{from}");
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_dropped_here_too() {
    let (shelf, node, _, secret) = plain(Limits { block: Duration::from_millis(200), ..Limits::default() });
    shelf.answer_instead(clients::big);
    let token = Token::new(&secret, identity(2).peer(), &shelf.blob.digest, LOCAL, now());
    let mut stream = tokio::net::TcpStream::connect(node.address).await.unwrap();
    let head = format!("GET /p/{}/3 HTTP/1.1\r\n{}: {token}\r\n\r\n", shelf.blob.digest.hex(), token::HEADER);
    stream.write_all(head.as_bytes()).await.unwrap();
    while rejected(&node.metrics, "slow_client") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(shelf.slots.used.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn with_tls_nobody_is_served_in_plaintext_and_without_it_nobody_over_tls() {
    let (one, two, secret) = (identity(1), identity(2), Secret([5; 32]));
    let shelf = Shelf::of(&[&one, &two]);
    let over_tls = serve(Gate::Tls(one.clone()), &shelf, Limits::default());
    let in_plain = serve(Gate::Token(secret.clone()), &shelf, Limits::default());
    let token = Token::new(&secret, two.peer(), &shelf.blob.digest, LOCAL, now());
    let clients = [None, Some(two)].map(|identity| Client::new(identity, shelf.clone(), Limits::default(), metrics()));
    for (node, client) in [(&over_tls, &clients[0]), (&in_plain, &clients[1])] {
        let mut request = shelf.blob.request(&one, node.address, 0);
        request.token = Some(token);
        let error = client.fetch(&request).await.unwrap_err();
        assert!(matches!(error, FetchError::Broken(_)), "{error:?}");
    }
    assert_eq!(rejected(&in_plain.metrics, "garbage"), 1);
    // Its alert is sent before it is counted.
    let counted = async {
        while rejected(&over_tls.metrics, "handshake") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), counted).await.expect("it is counted");
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0);
}
