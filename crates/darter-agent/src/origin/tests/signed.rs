//! Signed URLs: one for all ranges of a blob, and one more when it is over.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;

use super::*;

/// A registry that signs, and a storage that takes the newest signature only.
async fn pair() -> (Server, Server, Arc<AtomicUsize>) {
    let signature = Arc::new(AtomicUsize::new(0));
    let good = signature.clone();
    let storage = Server::start_at("127.0.0.2", move |seen| {
        let wanted = format!("X-Amz-Signature={}", good.load(Ordering::Relaxed));
        if seen.header("authorization").is_some() {
            Reply::new(400, "Only one auth mechanism allowed")
        } else if seen.target.ends_with(&wanted) {
            Reply::ranged(seen, CONTENT)
        } else {
            Reply::new(403, "Request has expired")
        }
    })
    .await;
    let (url, next) = (storage.url(), signature.clone());
    let server = Server::start(move |_| {
        let signature = next.fetch_add(1, Ordering::Relaxed) + 1;
        Reply::redirect(format!("{url}/k?X-Amz-Expires=3600&X-Amz-Signature={signature}"))
    })
    .await;
    (server, storage, signature)
}

#[tokio::test]
async fn the_ranges_of_a_blob_share_one_signature() {
    let (server, storage, _) = pair().await;
    let origin = origin(&server).await;
    let who = caller();
    let ranges = (0..10).map(|n| blob(&origin, Some((2 * n, 2 * n + 2)), &who));
    let parts = join_all(ranges).await;
    let whole: Vec<u8> = parts.into_iter().flat_map(|part| part.unwrap()).collect();
    assert_eq!(whole, CONTENT);
    assert_eq!((server.seen().len(), storage.seen().len()), (1, 10));
}

#[tokio::test]
async fn when_a_signature_is_over_the_registry_is_asked_once() {
    let (server, storage, signature) = pair().await;
    let origin = origin(&server).await;
    blob(&origin, None, &caller()).await.unwrap();
    // The storage no longer takes what was given out.
    signature.fetch_add(1, Ordering::Relaxed);
    let who = caller();
    let ranges = (0..10).map(|n| blob(&origin, Some((2 * n, 2 * n + 2)), &who));
    for part in join_all(ranges).await {
        part.unwrap();
    }
    assert_eq!(server.seen().len(), 2, "exactly one new redirect");
    assert!(storage.seen().len() <= 21);
}

#[tokio::test]
async fn a_proof_of_access_is_asked_of_the_registry_whatever_is_signed() {
    let (server, _storage, _) = pair().await;
    let origin = origin(&server).await;
    blob(&origin, None, &caller()).await.unwrap();
    origin.probe(&repository(), &Digest::of(CONTENT), Span { start: 0, end: 1 }, &caller()).await.unwrap();
    assert_eq!(server.seen().len(), 2, "the storage would not know that the credential was revoked");
}

#[tokio::test]
async fn a_signature_is_not_used_for_another_credential() {
    let (server, _storage, _) = pair().await;
    let origin = origin(&server).await;
    blob(&origin, None, &caller()).await.unwrap();
    blob(&origin, None, &Credential::Anonymous).await.unwrap();
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_storage_that_refuses_a_new_signature_is_no_proof_against_the_caller() {
    let storage = Server::start_at("127.0.0.2", |_| Reply::new(403, "")).await;
    let to = format!("{}/k?X-Amz-Signature=hunter2", storage.url());
    let server = Server::start(move |_| Reply::redirect(to.clone())).await;
    let error = blob(&origin(&server).await, None, &caller()).await.unwrap_err();
    assert!(matches!(error, OriginError::Status { status: 403, .. }), "{error:?}");
    assert!(!printed(&error).contains("hunter2") && !printed(&error).contains("X-Amz"), "{error:?}");
}
