//! Hosts that a hosts.toml names before the registry: what they cost when they are down, and what
//! they are not asked.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;

async fn behind(foreign: Vec<ForeignOrigin>, server: &Server, attempts: u32) -> Origin {
    let mut config = config();
    config.origin.attempts = attempts;
    let shared = Shared::new(&config).await.unwrap();
    Origin::new(&config, &registry(server), &foreign, &shared, metrics()).unwrap().of(Whom::Anyone)
}

async fn registry_server() -> Server {
    Server::start(
        |seen| {
            if seen.path().contains("/blobs/") { Reply::ranged(seen, CONTENT) } else { Reply::new(200, "{}") }
        },
    )
    .await
}

/// Takes connections and never says a word, as a host whose machine hangs. How many came.
async fn silent() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let came = Arc::new(AtomicUsize::new(0));
    let count = came.clone();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            held.push(stream);
        }
    });
    (url, came)
}

/// A port where nobody listens.
async fn closed() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn a_silent_host_costs_one_second_once() {
    let (url, came) = silent().await;
    let server = registry_server().await;
    let origin = behind(vec![foreign(&url, true)], &server, 1).await;
    let start = Instant::now();
    origin.manifest(&repository(), &tag(), &Credential::Anonymous).await.unwrap();
    let first = start.elapsed();
    // `header_timeout` is three seconds here, and containerd would be gone.
    assert!(first < Duration::from_millis(2000), "{first:?}");

    let start = Instant::now();
    for range in [None, Some((0, 5)), Some((5, 10))] {
        blob(&origin, range, &Credential::Anonymous).await.unwrap();
    }
    origin.head_manifest(&repository(), &tag(), &Credential::Anonymous).await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!((came.load(Ordering::Relaxed), server.seen().len()), (1, 5));
    let text = origin.inner.wire.metrics.render();
    assert!(text.contains(r#"kind="manifest",code="0"} 1"#), "{text}");
}

#[tokio::test]
async fn ranges_of_one_blob_wait_for_a_silent_host_together() {
    let (url, _) = silent().await;
    let server = registry_server().await;
    let origin = behind(vec![foreign(&url, true)], &server, 1).await;
    let start = Instant::now();
    let ask = |span| blob(&origin, Some(span), &Credential::Anonymous);
    let (one, two, three) = tokio::join!(ask((0, 5)), ask((5, 10)), ask((10, 15)));
    assert_eq!([one.unwrap(), two.unwrap(), three.unwrap()].concat(), &CONTENT[..15]);
    assert!(start.elapsed() < Duration::from_millis(2000), "{:?}", start.elapsed());
}

#[tokio::test]
async fn who_waits_for_a_connection_meanwhile_hears_of_it() {
    let (url, came) = silent().await;
    let server = registry_server().await;
    let mut config = config();
    config.origin.connections = 1;
    let shared = Shared::new(&config).await.unwrap();
    let origin = Origin::new(&config, &registry(&server), &[foreign(&url, true)], &shared, metrics()).unwrap();
    let origin = origin.of(Whom::Anyone);
    let start = Instant::now();
    let ask = |span| blob(&origin, Some(span), &Credential::Anonymous);
    let (one, two, three) = tokio::join!(ask((0, 5)), ask((5, 10)), ask((10, 15)));
    assert_eq!([one.unwrap(), two.unwrap(), three.unwrap()].concat(), &CONTENT[..15]);
    assert!(start.elapsed() < Duration::from_millis(2000), "{:?}", start.elapsed());
    assert_eq!(came.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_host_that_refuses_is_asked_once_and_the_registry_always() {
    let url = closed().await;
    let server = Server::start(|_| Reply::new(503, "")).await;
    let origin = behind(vec![foreign(&url, true)], &server, 3).await;
    let refused = |origin: &Origin| {
        let text = origin.inner.wire.metrics.render();
        let line = text.lines().find(|line| line.contains(r#"code="0"}"#)).unwrap_or_default().to_owned();
        line.rsplit(' ').next().unwrap_or_default().to_owned()
    };
    for asked in [3, 6] {
        let error = blob(&origin, None, &Credential::Anonymous).await.unwrap_err();
        assert!(matches!(error, OriginError::Status { status: 503, .. }), "{error:?}");
        assert_eq!(server.seen().len(), asked, "the registry is never skipped");
        assert_eq!(refused(&origin), "1");
    }
}

#[tokio::test]
async fn a_host_that_says_no_is_asked_once_a_request_and_is_not_away() {
    let cache = Server::start(|_| Reply::new(404, "")).await;
    let server = Server::start(|_| Reply::new(503, "")).await;
    let origin = behind(vec![foreign(&cache.url(), true)], &server, 2).await;
    for asked in 1..=2 {
        blob(&origin, None, &Credential::Anonymous).await.unwrap_err();
        assert_eq!((cache.seen().len(), server.seen().len()), (asked, asked * 2));
    }
}

#[tokio::test]
async fn a_host_without_resolve_is_asked_by_digest_only() {
    let cache = registry_server().await;
    let server = registry_server().await;
    let origin = behind(vec![foreign(&cache.url(), false)], &server, 1).await;
    let who = &Credential::Anonymous;
    origin.head_manifest(&repository(), &tag(), who).await.unwrap();
    origin.manifest(&repository(), &tag(), who).await.unwrap();
    origin.pass("team/app/tags/list?n=10", who).await.unwrap();
    assert_eq!((cache.seen().len(), server.seen().len()), (0, 3));

    let digest = Digest::of(b"{}");
    origin.manifest(&repository(), &Reference::Digest(digest), who).await.unwrap();
    origin.head_manifest(&repository(), &Reference::Digest(digest), who).await.unwrap();
    origin.pass(&format!("team/app/referrers/{digest}"), who).await.unwrap();
    blob(&origin, None, who).await.unwrap();
    assert_eq!((cache.seen().len(), server.seen().len()), (4, 3));
}

#[tokio::test]
async fn whose_answer_will_do_is_who_is_asked() {
    let cache = registry_server().await;
    let server = Server::start(|_| Reply::new(403, "")).await;
    let origin = behind(vec![foreign(&cache.url(), true)], &server, 1).await;
    let who = &Credential::Node;
    let ask = async |whom| origin.of(whom).head_manifest(&repository(), &tag(), who).await.map(drop);
    let denied = ask(Whom::Registry).await.unwrap_err();
    assert!(matches!(denied, OriginError::Denied { status: 403 }), "{denied:?}");
    assert_eq!((cache.seen().len(), server.seen().len()), (0, 1));
    ask(Whom::Others).await.unwrap();
    ask(Whom::Anyone).await.unwrap();
    assert_eq!((cache.seen().len(), server.seen().len()), (2, 1));

    let cache = Server::start(|_| Reply::new(404, "")).await;
    let origin = behind(vec![foreign(&cache.url(), true)], &server, 1).await;
    let missing = origin.of(Whom::Others).head_manifest(&repository(), &tag(), who).await.unwrap_err();
    assert!(matches!(missing, OriginError::NotFound), "{missing:?}");
    assert_eq!((cache.seen().len(), server.seen().len()), (1, 1), "the registry was not meant");
}
