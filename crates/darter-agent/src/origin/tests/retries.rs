//! What is asked again, and what is not.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;

/// Answers `first` so many times, and then as it should.
async fn after(times: usize, first: Reply) -> Server {
    let made = AtomicUsize::new(0);
    Server::start(move |seen| {
        if made.fetch_add(1, Ordering::Relaxed) < times { first.clone() } else { Reply::ranged(seen, CONTENT) }
    })
    .await
}

async fn try_three_times(server: &Server) -> (Result<Vec<u8>, OriginError>, Origin) {
    let mut config = config();
    config.origin.attempts = 3;
    let origin = origin_with(&config, &registry(server)).await;
    (blob(&origin, None, &Credential::Anonymous).await, origin)
}

#[tokio::test]
async fn an_origin_that_is_busy_is_asked_again() {
    let server = after(2, Reply::new(503, "")).await;
    let (bytes, origin) = try_three_times(&server).await;
    assert_eq!(bytes.unwrap(), CONTENT);
    let text = origin.inner.wire.metrics.render();
    assert!(text.contains(r#"darter_origin_retries_total{reason="server_error"} 2"#), "{text}");
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let server = after(1, Reply::new(429, "").header("retry-after", "1")).await;
    let start = Instant::now();
    assert_eq!(try_three_times(&server).await.0.unwrap(), CONTENT);
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn who_asks_for_more_than_anybody_waits_is_not_asked_again_before() {
    let server = after(1, Reply::new(429, "").header("retry-after", "31")).await;
    let (answer, origin) = try_three_times(&server).await;
    let error = answer.unwrap_err();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(31)), "{error:?}");
    assert_eq!(server.seen().len(), 1);
    assert!(!origin.inner.wire.metrics.render().contains("darter_origin_retries_total{"));
}

/// The first request is told to come back later, which the client knows when this returns; then, by a task
/// that is still waiting, the layer.
async fn paused(
    seconds: &'static str,
    answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (Server, Origin, tokio::task::JoinHandle<Result<Vec<u8>, OriginError>>) {
    let made = AtomicUsize::new(0);
    let server = Server::start(move |seen| match made.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::new(429, "").header("retry-after", seconds),
        _ => answer(seen),
    });
    let server = server.await;
    let mut config = config();
    config.origin.attempts = 2;
    let origin = origin_with(&config, &registry(&server)).await;
    let asked = origin.clone();
    let first = tokio::spawn(async move { blob(&asked, None, &Credential::Anonymous).await });
    while !origin.inner.kept.pauses.holds(&origin.inner.targets[0].place) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    (server, origin, first)
}

#[tokio::test]
async fn what_a_registry_asks_one_request_for_all_others_keep_too() {
    let start = Instant::now();
    let (asked, times) = (Arc::new(Mutex::new(Vec::new())), Duration::from_secs(2));
    let log = asked.clone();
    let (server, origin, first) = paused("2", move |seen| {
        log.lock().unwrap().push(start.elapsed());
        Reply::ranged(seen, CONTENT)
    })
    .await;
    let (who, tag, repository) = (Credential::Anonymous, tag(), repository());
    let others = (0..7).map(|_| blob(&origin, None, &who));
    let (blobs, _) =
        tokio::join!(futures_util::future::join_all(others), origin.head_manifest(&repository, &tag, &who));
    assert!(blobs.into_iter().all(|blob| blob.unwrap() == CONTENT));
    assert_eq!(first.await.unwrap().unwrap(), CONTENT);
    assert_eq!(server.seen().len(), 1 + 9);
    let asked = asked.lock().unwrap();
    assert!(asked.iter().all(|at| *at >= times), "{asked:?}");
}

#[tokio::test]
async fn who_does_not_wait_or_would_for_too_long_hears_what_the_registry_said_and_does_not_ask_it() {
    let (server, origin, first) = paused("40", |seen| Reply::ranged(seen, CONTENT)).await;
    for origin in [origin.telling_throttles(), origin.clone()] {
        let error = blob(&origin, None, &Credential::Anonymous).await.unwrap_err();
        assert!(error.is_throttling() && error.is_away(), "{error:?}");
        let left = error.retry_after().unwrap();
        assert!(left > Duration::from_secs(30) && left <= Duration::from_secs(40), "{left:?}");
    }
    assert!(first.await.unwrap().is_err());
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_registry_that_wants_to_be_left_alone_keeps_nobody_from_the_storage_behind_it() {
    let storage = Server::start_at("127.0.0.2", |seen| Reply::ranged(seen, CONTENT)).await;
    let (to, made) = (format!("{}/k?X-Amz-Expires=100", storage.url()), AtomicUsize::new(0));
    let server = Server::start(move |_| match made.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::redirect(&to),
        _ => Reply::new(429, "").header("retry-after", "50"),
    })
    .await;
    let origin = origin(&server).await;
    assert_eq!(blob(&origin, None, &Credential::Anonymous).await.unwrap(), CONTENT);
    let refused = origin.head_manifest(&repository(), &tag(), &Credential::Anonymous).await.unwrap_err();
    assert!(refused.is_throttling(), "{refused:?}");
    assert_eq!(blob(&origin, None, &Credential::Anonymous).await.unwrap(), CONTENT);
    assert_eq!((server.seen().len(), storage.seen().len()), (2, 2));
}

/// Two registries with one storage, which tells the first request that gets there to come back later; and when
/// it was asked.
async fn with_one_storage(seconds: &'static str) -> ([(Server, Origin); 2], Server, Arc<Mutex<Vec<Instant>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    let storage = Server::start_at("127.0.0.2", move |seen| {
        let mut log = log.lock().unwrap();
        log.push(Instant::now());
        match log.len() {
            1 => Reply::new(503, "").header("retry-after", seconds),
            _ => Reply::ranged(seen, CONTENT),
        }
    })
    .await;
    let mut config = config();
    config.origin.attempts = 2;
    let shared = Shared::new(&config).await.unwrap();
    let mut both = Vec::new();
    for _ in 0..2 {
        let to = format!("{}/k?X-Amz-Expires=100", storage.url());
        let redirects = move |seen: &Seen| match seen.target.contains("/blobs/") {
            true => Reply::redirect(&to),
            false => Reply::new(200, ""),
        };
        let server = Server::start(redirects).await;
        let origin = Origin::new(&config, &registry(&server), &[], &shared, metrics()).unwrap();
        both.push((server, origin));
    }
    (both.try_into().ok().unwrap(), storage, asked)
}

/// The first request of a layer, by a task that is still waiting, once the node knows what the storage said.
async fn told_to_wait(origin: &Origin, storage: &Server) -> tokio::task::JoinHandle<Result<Vec<u8>, OriginError>> {
    let asked = origin.clone();
    let first = tokio::spawn(async move { blob(&asked, None, &Credential::Anonymous).await });
    let place = place(&storage.url()).unwrap();
    while !origin.inner.wire.storages.holds(&place) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    first
}

#[tokio::test]
async fn what_a_storage_asks_one_request_for_all_others_keep_too_whatever_registry_sent_them_there() {
    let ([(server, origin), (_other_server, other)], storage, asked) = with_one_storage("2").await;
    let first = told_to_wait(&origin, &storage).await;
    let who = Credential::Anonymous;
    // The registry itself said nothing, and is asked meanwhile.
    origin.head_manifest(&repository(), &tag(), &who).await.unwrap();
    assert_eq!(asked.lock().unwrap().len(), 1);
    let others = [&origin, &origin, &origin, &other, &other].map(|origin| blob(origin, None, &who));
    for bytes in futures_util::future::join_all(others).await {
        assert_eq!(bytes.unwrap(), CONTENT);
    }
    assert_eq!(first.await.unwrap().unwrap(), CONTENT);
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 1 + 6);
    assert!(asked[1..].iter().all(|at| at.duration_since(asked[0]) >= Duration::from_secs(2)), "{asked:?}");
    // The layer's signed URL was asked for once, and the tag.
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_storage_is_left_alone_for_a_minute_at_most_and_who_would_wait_too_long_hears_it_at_once() {
    let ([(_server, origin), (_other_server, other)], storage, asked) = with_one_storage("3600").await;
    let first = told_to_wait(&origin, &storage).await;
    // By a URL that is known, by one that the registry just gave, and for whoever does not wait at all.
    for origin in [&origin, &other, &origin.telling_throttles()] {
        let error = blob(origin, None, &Credential::Anonymous).await.unwrap_err();
        assert!(error.is_throttling() && error.is_away(), "{error:?}");
        let left = error.retry_after().unwrap();
        assert!(left > Duration::from_secs(30) && left <= Duration::from_secs(60), "{left:?}");
    }
    assert!(first.await.unwrap().is_err());
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn attempts_come_to_an_end() {
    let server = after(usize::MAX, Reply::new(500, "")).await;
    let error = try_three_times(&server).await.0.unwrap_err();
    assert!(matches!(error, OriginError::Status { status: 500, .. }) && error.is_away(), "{error:?}");
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn no_is_an_answer() {
    for (status, is_denied) in [(404, false), (401, true), (403, true)] {
        let server = after(usize::MAX, Reply::new(status, "")).await;
        let error = try_three_times(&server).await.0.unwrap_err();
        assert_eq!(matches!(error, OriginError::Denied { .. }), is_denied, "{error:?}");
        assert_eq!(matches!(error, OriginError::NotFound), !is_denied, "{error:?}");
        assert!(!error.is_retryable() && !error.is_away());
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn nobody_there_is_code_0_and_away() {
    let server = Server::start(|_| Reply::new(200, "")).await;
    let registry = registry(&server);
    drop(server);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let origin = origin_with(&config(), &registry).await;
    let error = blob(&origin, None, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Unreachable { .. }) && error.is_away(), "{error:?}");
    assert!(origin.inner.wire.metrics.render().contains(r#"kind="blob",code="0"} 1"#));
}

#[tokio::test]
async fn an_origin_that_says_nothing_is_given_up() {
    let server = Server::start(|_| Reply { delay: Duration::from_secs(20), ..Reply::new(200, "") }).await;
    let mut config = config();
    config.origin.header_timeout = Seconds(Duration::from_millis(200));
    let origin = origin_with(&config, &registry(&server)).await;
    let error = blob(&origin, None, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::TimedOut { .. }) && error.is_away(), "{error:?}");
}
