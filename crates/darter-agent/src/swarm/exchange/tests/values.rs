//! What all pieces of a blob are: asked of honest nodes and of others, and how much of it there is at once.

use super::servers::{Script, lies};
use super::*;

fn of(blob: &Blob, address: SocketAddr) -> ValuesRequest {
    let (peer, patience) = (identity(1).peer(), Duration::from_secs(5));
    ValuesRequest { peer, address, blob: blob.digest, layout: blob.layout, token: None, patience }
}

#[tokio::test]
async fn the_values_of_all_pieces_come_over_the_same_connection() {
    let (shelf, node, client, metrics) = pair(Limits::default());
    let (address, connections) = counting(&node).await;
    let request = of(&shelf.blob, address);
    assert_eq!(client.values(&request).await.unwrap(), shelf.blob.values());
    let line = |direction| format!("darter_peer_bytes_total{{direction=\"{direction}\",zone_relation=\"same\"}}");
    assert_eq!(count(&metrics, &line("received")), 4 * 32);
    assert_eq!(count(&node.metrics, &line("sent")), 4 * 32);
    // Of a blob that is not here, and of one that has another number of pieces.
    let other = ValuesRequest { blob: Digest::of(b"other"), ..request.clone() };
    assert!(matches!(client.values(&other).await, Err(FetchError::NotHere)));
    client.fetch(&shelf.blob.request(&identity(1), address, 0)).await.unwrap();
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let longer = ValuesRequest { layout: Layout::new(shelf.blob.layout.size() + MIB), ..request.clone() };
    let wrong = client.values(&longer).await.unwrap_err();
    assert!(matches!(wrong, FetchError::Broken(client::Broken::Length { told: 128, expected: 160 })), "{wrong:?}");
    // Nobody but members learns what is here.
    shelf.members.lock().unwrap().remove(&identity(2).peer());
    let refused = client.values(&request).await.unwrap_err();
    assert!(matches!(refused, FetchError::Broken(_)), "{refused:?}");
    assert!(rejected(&node.metrics, "not_member") > 0);
    assert_eq!(rejected(&metrics, "bad_answer"), 1, "the wrong length");
}

#[tokio::test]
async fn an_answer_that_no_node_gives_is_counted_as_that_to_a_fetch_is() {
    let values = Blob::new().values().as_flattened().to_vec();
    let says = |length: usize, body: &[u8]| {
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes(), body].concat()
    };
    for (script, reason) in [
        (Script::says(says(values.len() + 32, &values)), "bad_answer"),
        (Script::says(says(values.len(), &[&values[..], b"more"].concat())), "bad_answer"),
        (Script::says(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()), "bad_answer"),
        (Script::says(b"garbage\r\n\r\n".to_vec()), "bad_answer"),
        (Script::hangs_after(says(values.len(), &values[..40])), "stalled"),
    ] {
        let two = identity(2);
        let shelf = Shelf::of(&[&identity(1), &two]);
        let (address, liar) = lies(script).await;
        let (client, metrics) = client(&two, &shelf, Limits::default());
        let request = ValuesRequest { patience: Duration::from_millis(500), ..of(&shelf.blob, address) };
        let error = client.values(&request).await.expect_err("it was believed");
        assert_eq!(rejected(&metrics, reason), 1, "{error:?}");
        drop(client);
        liar.await.unwrap();
    }
}

#[tokio::test]
async fn only_so_many_answers_are_in_memory_at_once_and_the_others_wait() {
    let (shelf, node, client, _) =
        pair(Limits { values: 2, pool_per_peer: 4, connections_per_peer: 4, ..Limits::default() });
    *shelf.values_take.lock().unwrap() = Duration::from_millis(100);
    let request = of(&shelf.blob, node.address);
    for said in futures_util::future::join_all((0..4).map(|_| client.values(&request))).await {
        assert_eq!(said.unwrap(), shelf.blob.values());
    }
    assert_eq!(shelf.slots.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn who_waits_for_too_long_is_told_that_the_node_is_busy() {
    let decision = Duration::from_millis(100);
    let (shelf, node, client, metrics) = pair(Limits { decision, ..Limits::default() });
    let (address, connections) = counting(&node).await;
    *shelf.values_take.lock().unwrap() = Duration::from_secs(3600);
    let request = of(&shelf.blob, address);
    let busy = client.values(&request).await.unwrap_err();
    assert!(matches!(busy, FetchError::Busy(after) if after == decision), "{busy:?}");
    assert_eq!((shelf.slots.used.load(Ordering::SeqCst), rejected(&metrics, "bad_answer")), (0, 0));
    *shelf.values_take.lock().unwrap() = Duration::ZERO;
    assert!(client.values(&request).await.is_ok(), "its place was not given back");
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}
