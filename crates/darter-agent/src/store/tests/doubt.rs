//! What happens to a blob in doubt, on real files.

use std::time::{Duration, Instant};

use super::*;

/// A blob of three pieces that was given to its end and is wanted again.
async fn in_doubt(store: &Store, seed: u64) -> (Blob, Doubt, Instant) {
    let digest = store_blob(store, &seeded(seed, 2 * MIB + 5)).await;
    let (blob, now) = (store.get(&digest).unwrap(), Instant::now());
    assert!(store.doubt(&blob, now).is_none());
    store.given(&blob, now);
    let doubt = store.doubt(&blob, now + Duration::from_secs(300)).unwrap();
    (blob, doubt, now)
}

#[tokio::test]
async fn a_blob_that_is_right_is_given_and_in_no_doubt_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (blob, doubt, now) = in_doubt(&store, 300).await;
    assert!(doubt.check(span(MIB - 1, MIB + 1)).await.is_ok());
    assert!(store.doubt(&blob, now).is_some(), "its last piece was not looked at");
    // What was right is not hashed again.
    flip(&store.shared.disk.data(Shelf::Blobs, blob.digest()), 5);
    assert!(doubt.check(span(0, 2 * MIB + 5)).await.is_ok());
    assert!(store.doubt(&blob, now).is_none());
    assert!(doubt.check(span(0, 2 * MIB + 5)).await.is_ok());
}

#[tokio::test]
async fn a_piece_that_is_wrong_is_not_sent_and_the_blob_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (blob, doubt, now) = in_doubt(&store, 301).await;
    flip(&store.shared.disk.data(Shelf::Blobs, blob.digest()), MIB + 9);
    assert!(doubt.check(span(0, 65_536)).await.is_ok());
    assert!(doubt.check(span(MIB - 100, MIB)).await.is_ok());
    assert!(doubt.check(span(MIB - 100, MIB + 1)).await.is_err());
    // Until the whole was hashed the next one gets no wrong byte either.
    assert!(store.doubt(&blob, now).unwrap().check(span(MIB, MIB + 1)).await.is_err());
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 0);
    upkeep(&store).await;
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 1);
    assert!(!store.holds(blob.digest()));
    // Who still reads it from its open file gets no byte that nobody vouches for.
    assert!(doubt.check(span(0, 1)).await.is_err());
    // What is fetched in its place is another blob.
    store_blob(&store, &seeded(301, 2 * MIB + 5)).await;
    assert!(store.doubt(&store.get(blob.digest()).unwrap(), now).is_none());
}

#[tokio::test]
async fn a_record_that_is_wrong_costs_one_body_and_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (blob, doubt, now) = in_doubt(&store, 302).await;
    std::fs::remove_file(store.shared.disk.record(Shelf::Blobs, blob.digest())).unwrap();
    assert!(doubt.check(span(0, 1)).await.is_err());
    upkeep(&store).await;
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 0);
    let again = store.doubt(&blob, now).unwrap();
    assert!(again.check(span(0, 2 * MIB + 5)).await.is_ok());
    assert!(store.doubt(&blob, now).is_none());
}

#[tokio::test]
async fn a_blob_of_containerd_is_never_in_doubt() {
    let dir = tempfile::tempdir().unwrap();
    let content = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"layer");
    std::fs::write(content.path().join(digest.hex()), b"layer").unwrap();
    let metrics = Arc::new(Metrics::new("", ""));
    let store = Store::open(dir.path().to_owned(), &settings(1 << 30), Some(content.path().to_owned()), metrics).await;
    let (blob, now) = (store.get_from_containerd(&digest).await.unwrap(), Instant::now());
    store.put(&digest, Bytes::from_static(b"layer")).await.unwrap();
    store.given(&blob, now);
    assert!(store.doubt(&blob, now).is_none() && store.doubt(&store.get(&digest).unwrap(), now).is_none());
}
