//! What comes is what was asked for, in time, or an error.

use super::*;

#[tokio::test]
async fn a_blob_comes_whole_and_in_ranges() {
    let server = Server::start(|seen| Reply::ranged(seen, CONTENT)).await;
    let origin = origin(&server).await;
    assert_eq!(blob(&origin, None, &Credential::Anonymous).await.unwrap(), CONTENT);
    assert_eq!(blob(&origin, Some((5, 12)), &Credential::Anonymous).await.unwrap(), &CONTENT[5..12]);
    let seen = server.seen();
    assert_eq!(seen[1].header("range"), Some("bytes=5-11"));
    assert_eq!(seen[1].header("accept-encoding"), Some("identity"));
    assert!(seen[1].header("user-agent").unwrap().starts_with("darter/"));
    assert_eq!(seen[1].path(), format!("/v2/team/app/blobs/{}", blob_digest()));
    let text = origin.inner.wire.metrics.render();
    assert!(
        text.contains(r#"darter_origin_requests_total{registry="reg.example",kind="blob",code="206"} 1"#),
        "{text}"
    );
    assert!(text.contains(r#"darter_origin_bytes_total{registry="reg.example"} 27"#), "{text}");
}

#[tokio::test]
async fn an_origin_without_ranges_sends_all_from_the_start() {
    let server = Server::start(|_| Reply::new(200, CONTENT)).await;
    let span = Some(Span { start: 5, end: 9 });
    let stream = origin(&server).await.blob(&repository(), &blob_digest(), span, &Credential::Anonymous).await.unwrap();
    assert_eq!((stream.start, stream.end, stream.size), (0, Some(20), Some(20)));
}

#[tokio::test]
async fn another_range_than_was_asked_for_is_a_lie() {
    let server = Server::start(|_| Reply::new(206, "01234").header("content-range", "bytes 0-4/20")).await;
    let error = blob(&origin(&server).await, Some((5, 10)), &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Lied(_)) && !error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn a_body_that_ends_early_is_truncated() {
    let server = Server::start(|_| {
        let reply = Reply::new(200, &CONTENT[..7]);
        Reply { length: Some(20), ..reply }
    })
    .await;
    let error = blob(&origin(&server).await, None, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Truncated { got: 7, wanted: 20 }), "{error:?}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn a_body_that_stops_is_given_up() {
    let server = Server::start(|_| {
        let reply = Reply::new(200, &CONTENT[..7]);
        Reply { length: Some(20), linger: Duration::from_secs(20), ..reply }
    })
    .await;
    let error = blob(&origin(&server).await, None, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Stalled { .. }), "{error:?}");
}

#[tokio::test]
async fn a_manifest_has_the_digest_that_was_asked_for_and_told() {
    let server = Server::start(|seen| match seen.path().rsplit('/').next().unwrap() {
        "latest" => Reply::new(200, "{}").header("content-type", "application/x; charset=utf-8"),
        "liar" => Reply::new(200, "{}").header("docker-content-digest", blob_digest().to_string()),
        "sha512" => Reply::new(200, "{}").header("docker-content-digest", "sha512:00"),
        _ => Reply::new(200, "{ }"),
    })
    .await;
    let origin = origin(&server).await;
    let get = async |reference: Reference| origin.manifest(&repository(), &reference, &Credential::Anonymous).await;
    let fetched = get(tag()).await.unwrap();
    assert_eq!((fetched.digest, fetched.media_type.as_str()), (Digest::of(b"{}"), "application/x"));
    assert_eq!(server.seen()[0].header("accept"), Some(ACCEPT));
    assert!(get("sha512".parse().unwrap()).await.is_ok(), "an algorithm that we do not know proves nothing");
    for lie in ["liar".parse().unwrap(), Reference::Digest(Digest::of(b"{}"))] {
        let error = get(lie).await.unwrap_err();
        assert!(matches!(error, OriginError::Lied(_)), "{error:?}");
    }
}

#[tokio::test]
async fn an_oversized_manifest_is_refused_announced_or_not() {
    for length in [None, Some(0x7fff_ffff)] {
        let server = Server::start(move |_| {
            let body = if length.is_some() { Vec::new() } else { vec![b' '; (4 << 20) + 1] };
            Reply { length, ..Reply::new(200, body) }
        })
        .await;
        let error = origin(&server).await.manifest(&repository(), &tag(), &Credential::Anonymous).await.unwrap_err();
        assert!(matches!(error, OriginError::TooLarge { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_list_is_passed_on_and_a_404_too() {
    let server = Server::start(|seen| match seen.path() {
        "/v2/team/app/tags/list" => {
            Reply::new(200, "[]").header("link", "</v2/x>; rel=\"next\"").header("x-secret", "1")
        }
        _ => Reply::new(404, ""),
    })
    .await;
    let origin = origin(&server).await;
    let passed = origin.pass("team/app/tags/list?n=5", &Credential::Anonymous).await.unwrap();
    assert_eq!((passed.status, &*passed.content), (200, &b"[]"[..]));
    assert_eq!(passed.headers, [("link".to_owned(), "</v2/x>; rel=\"next\"".to_owned())]);
    assert_eq!(server.seen()[0].target, "/v2/team/app/tags/list?n=5");
    assert_eq!(origin.pass("other/tags/list", &Credential::Anonymous).await.unwrap().status, 404);
}

#[tokio::test]
async fn a_connection_is_taken_until_its_body_is_read() {
    let server = Server::start(|_| Reply::new(200, CONTENT)).await;
    let mut registry = registry(&server);
    registry.connections = Some(1);
    let origin = origin_with(&config(), &registry).await;
    let (repository, digest) = (repository(), blob_digest());
    let open = || origin.blob(&repository, &digest, None, &Credential::Anonymous);
    let first = open().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), open()).await.is_err());
    drop(first);
    assert!(open().await.is_ok());
}

#[tokio::test]
async fn a_limit_of_bandwidth_holds() {
    let server = Server::start(|_| Reply::new(200, CONTENT)).await;
    let mut registry = registry(&server);
    registry.bandwidth = Some(darter_core::units::Rate(100));
    let start = std::time::Instant::now();
    blob(&origin_with(&config(), &registry).await, None, &Credential::Anonymous).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(190), "20 bytes at 100 a second");
}

#[tokio::test]
async fn a_limit_of_bandwidth_holds_up_what_comes_next_and_not_what_came() {
    let server = Server::start(|_| Reply::new(200, CONTENT)).await;
    let mut registry = registry(&server);
    registry.bandwidth = Some(darter_core::units::Rate(10));
    let origin = origin_with(&config(), &registry).await;
    let start = std::time::Instant::now();
    let mut stream = origin.blob(&repository(), &blob_digest(), None, &Credential::Anonymous).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), CONTENT);
    assert!(start.elapsed() < Duration::from_secs(1), "they cost two seconds, which somebody would have waited");
    assert!(stream.next().await.is_none());
    assert!(start.elapsed() >= Duration::from_millis(1900));
}
