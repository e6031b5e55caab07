//! Servers that lie, stall or break, and a client that believes none of them.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::client::{Broken, Corrupt};
use super::*;

/// What a liar says to one request: all of it, and whether it then hangs or closes.
pub(super) struct Script {
    answer: Vec<u8>,
    then_hangs: bool,
}

impl Script {
    pub(super) fn says(answer: impl Into<Vec<u8>>) -> Self {
        Self { answer: answer.into(), then_hangs: false }
    }

    pub(super) fn hangs_after(answer: impl Into<Vec<u8>>) -> Self {
        Self { answer: answer.into(), then_hangs: true }
    }
}

fn piece(attest: &Attest, told: usize, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {told}\r\ndarter-attest: {attest}\r\n\r\n").as_bytes(), body].concat()
}

/// A liar with identity 1, for one request.
pub(super) async fn lies(script: Script) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(identity(1).server_config().unwrap()));
    let liar = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut stream = acceptor.accept(socket).await.unwrap();
        let mut request = vec![0; 1024];
        assert!(stream.read(&mut request).await.unwrap() > 0);
        // The client hangs up when it has seen enough.
        let _ = stream.write_all(&script.answer).await;
        let _ = stream.flush().await;
        if script.then_hangs {
            let _ = stream.read(&mut request).await;
        }
        let _ = stream.shutdown().await;
    });
    (address, liar)
}

/// Fetches piece 0 from a liar. The client is a member's, and has room for ten pieces.
async fn fetch(script: Script, change: impl FnOnce(&mut PieceRequest)) -> (FetchError, Arc<Metrics>) {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&one, &two]);
    let (address, liar) = lies(script).await;
    let (client, metrics) = client(&two, &shelf, Limits::default());
    let mut request = shelf.blob.request(&one, address, 0);
    change(&mut request);
    let error = client.fetch(&request).await.expect_err("a lie was believed");
    assert_eq!(client.available(), Limits::default().fetch_bytes, "its memory is back");
    drop(client);
    liar.await.unwrap();
    (error, metrics)
}

#[tokio::test]
async fn a_wrong_byte_is_corrupt() {
    let blob = Blob::new();
    let mut bytes = blob.bytes(0).to_vec();
    bytes[777_777] ^= 1;
    let script = Script::says(piece(&blob.attest(0), bytes.len(), &bytes));
    let (error, metrics) = fetch(script, |_| ()).await;
    assert!(matches!(error, FetchError::Corrupt(Corrupt::Bytes)), "{error:?}");
    assert_eq!(rejected(&metrics, "corrupt"), 1);
}

#[tokio::test]
async fn bytes_that_are_not_the_known_ones_are_corrupt_whatever_the_peer_attests() {
    let blob = Blob::new();
    let other = vec![7; blob.bytes(0).len()];
    let attest = identity(9).attest(&blob.digest, &blob.layout, 0, chaining_value(0, &other));
    let (error, _) = fetch(Script::says(piece(&attest, other.len(), &other)), |request| {
        request.known = Some(blob.attest(0));
    })
    .await;
    assert!(matches!(error, FetchError::Corrupt(Corrupt::Bytes)), "{error:?}");
}

#[tokio::test]
async fn an_attest_that_its_importer_did_not_sign_for_this_piece_is_corrupt() {
    let blob = Blob::new();
    let (bytes, right) = (blob.bytes(0), blob.attest(0));
    let mut flipped = right;
    flipped.signature[5] ^= 1;
    let by_another = identity(1).attest(&blob.digest, &blob.layout, 0, right.cv);
    let in_anothers_name = Attest { importer: right.importer, ..by_another };
    let of_another_blob = identity(9).attest(&Digest::of(b"x"), &blob.layout, 0, right.cv);
    let of_another_piece = identity(9).attest(&blob.digest, &blob.layout, 1, right.cv);
    for attest in [flipped, in_anothers_name, of_another_blob, of_another_piece] {
        let (error, metrics) = fetch(Script::says(piece(&attest, bytes.len(), bytes)), |_| ()).await;
        assert!(matches!(error, FetchError::Corrupt(Corrupt::Signature)), "{error:?}");
        assert_eq!(rejected(&metrics, "bad_signature"), 1);
    }
}

#[tokio::test]
async fn an_importer_that_nobody_knows_vouches_for_nothing() {
    let blob = Blob::new();
    let attest = identity(66).attest(&blob.digest, &blob.layout, 0, blob.attest(0).cv);
    let (error, metrics) = fetch(Script::says(piece(&attest, blob.bytes(0).len(), blob.bytes(0))), |_| ()).await;
    assert!(matches!(error, FetchError::Corrupt(Corrupt::Importer)), "{error:?}");
    assert_eq!(rejected(&metrics, "unknown_importer"), 1);
}

#[tokio::test]
async fn a_body_of_another_length_is_not_read() {
    let blob = Blob::new();
    let bytes = blob.bytes(0);
    for told in [bytes.len() - 1, bytes.len() + 1, 0, usize::MAX] {
        let (error, metrics) = fetch(Script::says(piece(&blob.attest(0), told, bytes)), |_| ()).await;
        assert!(matches!(error, FetchError::Broken(Broken::Length { .. })), "{told}: {error:?}");
        assert_eq!(rejected(&metrics, "bad_answer"), 1);
    }
}

#[tokio::test]
async fn a_body_that_ends_early_is_broken() {
    let blob = Blob::new();
    let bytes = blob.bytes(0);
    let short = piece(&blob.attest(0), bytes.len(), &bytes[..bytes.len() - 1]);
    let (error, _) = fetch(Script::says(short), |_| ()).await;
    assert!(matches!(error, FetchError::Broken(Broken::Io(_))), "{error:?}");
}

#[tokio::test]
async fn an_endless_body_or_head_ends_at_its_bound() {
    let attest = Blob::new().attest(0);
    let no_length = format!("HTTP/1.1 200 OK\r\ndarter-attest: {attest}\r\n\r\n");
    let chunked = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\ndarter-attest: {attest}\r\n\r\n");
    let endless_head = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(1 << 20));
    for head in [no_length, chunked] {
        let endless = [head.as_bytes(), &[0; 1 << 20]].concat();
        let (error, metrics) = fetch(Script::hangs_after(endless), |_| ()).await;
        assert!(matches!(error, FetchError::Broken(Broken::Answer(_))), "{error:?}");
        assert_eq!(rejected(&metrics, "bad_answer"), 1);
    }
    let (error, _) = fetch(Script::hangs_after(endless_head), |_| ()).await;
    assert!(matches!(error, FetchError::Broken(Broken::Answer("a head without an end"))), "{error:?}");
}

#[tokio::test]
async fn more_bytes_than_the_piece_has_are_never_taken_for_its_own() {
    // The last piece has 5 bytes, so all of it comes with the head.
    let blob = Blob::new();
    let long = piece(&blob.attest(3), 5, &[blob.bytes(3), b"and more"].concat());
    let (error, _) = fetch(Script::says(long), |request| request.piece = 3).await;
    assert!(matches!(error, FetchError::Broken(Broken::Answer("more bytes than it says"))), "{error:?}");
}

#[tokio::test]
async fn answers_that_are_none_are_broken() {
    let blob = Blob::new();
    let (attest, len) = (blob.attest(0), blob.bytes(0).len());
    for answer in [
        "SSH-2.0-OpenSSH\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\ndarter-attest: deadbeef\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nContent-Length: 5\r\ndarter-attest: {attest}\r\n\r\n"),
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nTransfer-Encoding: chunked\r\ndarter-attest: {attest}\r\n\r\n"
        ),
        format!("HTTP/1.1 200 OK\r\nContent-Length: -{len}\r\ndarter-attest: {attest}\r\n\r\n"),
        "HTTP/1.1 200 OK\r\n".to_owned(),
    ] {
        let (error, metrics) = fetch(Script::says(answer.clone()), |_| ()).await;
        assert!(matches!(error, FetchError::Broken(Broken::Answer(_))), "{answer}: {error:?}");
        assert_eq!(rejected(&metrics, "bad_answer"), 1, "{answer}");
    }
    let (error, _) =
        fetch(Script::says("HTTP/1.1 503 x\r\nContent-Length: 0\r\nretry-after-ms: 99999999\r\n\r\n"), |_| ()).await;
    assert!(matches!(error, FetchError::Busy(after) if after == Duration::from_secs(10)), "not for a day: {error:?}");
}

#[tokio::test]
async fn a_peer_that_stops_in_the_middle_is_given_up_after_its_patience() {
    let blob = Blob::new();
    let half = piece(&blob.attest(0), blob.bytes(0).len(), &blob.bytes(0)[..600_000]);
    for answer in [half, Vec::new()] {
        let (error, metrics) = fetch(Script::hangs_after(answer), |request| {
            request.patience = Duration::from_millis(300);
        })
        .await;
        assert!(matches!(error, FetchError::Broken(Broken::Stalled(_))), "{error:?}");
        assert_eq!(rejected(&metrics, "stalled"), 1);
    }
}

#[tokio::test]
async fn only_the_peer_that_was_dialled_is_talked_to() {
    let (one, two) = (identity(1), identity(2));
    let shelf = Shelf::of(&[&one, &two]);
    let node = serve(Gate::Tls(one), &shelf, Limits::default());
    let (client, _) = client(&two, &shelf, Limits::default());
    // Identity 3 is a member too, but it is not who answers there.
    let request = shelf.blob.request(&identity(3), node.address, 0);
    let error = client.fetch(&request).await.unwrap_err();
    assert!(matches!(error, FetchError::Broken(Broken::Dial(_))), "{error:?}");
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 0, "it was not even asked");
}
