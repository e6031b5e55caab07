//! Redirects and origins: who is asked, with what, and where nobody goes.

use super::*;

#[tokio::test]
async fn a_credential_stays_with_its_host_and_the_range_goes_along() {
    let storage = Server::start_at("127.0.0.2", |seen| Reply::ranged(seen, CONTENT)).await;
    let (target, again) = (format!("{}/k?sig=secret", storage.url()), "/elsewhere".to_owned());
    let server = Server::start(move |seen| match seen.path() {
        "/elsewhere" => Reply::redirect(target.clone()),
        _ => Reply::redirect(again.clone()),
    })
    .await;
    let bytes = blob(&origin(&server).await, Some((3, 8)), &caller()).await.unwrap();
    assert_eq!(bytes, &CONTENT[3..8]);
    let (seen, stored) = (server.seen(), storage.seen());
    assert!(seen[0].header("authorization").is_some() && seen[1].header("authorization").is_some(), "the same host");
    assert_eq!((stored[0].header("authorization"), stored[0].header("range")), (None, Some("bytes=3-7")));
    assert_eq!(stored[0].target, "/k?sig=secret");
}

#[tokio::test]
async fn another_port_is_another_host() {
    let other = Server::start(|_| Reply::new(200, "{}")).await;
    let to = format!("{}/m", other.url());
    let server = Server::start(move |_| Reply::redirect(to.clone())).await;
    let mut config = config();
    config.origin.allow_local.push(other.address.to_string());
    let origin = origin_with(&config, &registry(&server)).await;
    origin.manifest(&repository(), &tag(), &caller()).await.unwrap();
    assert_eq!(other.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn no_redirect_leads_to_this_node_or_to_the_metadata_service() {
    let inside = Server::start(|_| Reply::new(200, CONTENT)).await;
    let port = inside.address.port();
    for host in [
        format!("127.0.0.1:{port}"),
        // A name that resolves to loopback.
        format!("localhost:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        "169.254.169.254".to_owned(),
        "[fd00:ec2::254]".to_owned(),
        format!("0.0.0.0:{port}"),
    ] {
        let to = format!("http://{host}/latest/meta-data?token=hunter2");
        let server = Server::start(move |_| Reply::redirect(to.clone())).await;
        let error = blob(&origin(&server).await, None, &Credential::Anonymous).await.unwrap_err();
        assert!(matches!(error, OriginError::Refused { .. }), "{host}: {error:?}");
        assert!(!printed(&error).contains("hunter2"), "{error:?}");
        assert!(!error.is_away() && !error.is_retryable());
    }
    assert_eq!(inside.seen().len(), 0);
}

#[tokio::test]
async fn a_token_server_at_the_metadata_service_is_refused() {
    let challenge = r#"Bearer realm="http://169.254.169.254/token",service="s""#;
    let server = Server::start(move |_| Reply::new(401, "").header("www-authenticate", challenge)).await;
    let error = origin(&server).await.head_manifest(&repository(), &tag(), &caller()).await.unwrap_err();
    assert!(matches!(error, OriginError::Refused { .. }), "{error:?}");
}

#[tokio::test]
async fn redirects_come_to_an_end() {
    let server = Server::start(|_| Reply::redirect("/again")).await;
    let error = blob(&origin(&server).await, None, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Lied(_)), "{error:?}");
    assert_eq!(server.seen().len(), 12, "the first, one looked at for its signature, and ten followed");
}

#[tokio::test]
async fn nothing_that_came_encrypted_goes_on_in_the_clear() {
    let server = Server::start(|_| Reply::new(200, "")).await;
    let wire = &origin(&server).await.inner.wire;
    let mut strict = wire.clone();
    strict.plain_http = false;
    let ask = send::Ask::get("https://reg.example/v2/".parse().unwrap(), "blob");
    let answer = ::http::Response::builder().status(302).header("location", "http://s3.example/k").body(()).unwrap();
    assert!(matches!(strict.next_hop(&ask, &answer), Err(OriginError::Refused { .. })));
    assert!(wire.next_hop(&ask, &answer).unwrap().is_some(), "plain_http = true");
}

#[tokio::test]
async fn origins_are_asked_in_order_and_only_the_registry_sees_credentials() {
    let away = Server::start(|_| Reply::new(503, "")).await;
    let cache =
        Server::start(
            |seen| {
                if seen.path().ends_with("/latest") { Reply::new(200, "{}") } else { Reply::new(404, "") }
            },
        )
        .await;
    let server = Server::start(|seen| Reply::ranged(seen, CONTENT)).await;
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    std::fs::write(&password, "hunter2\n").unwrap();
    let mut registry = registry(&server);
    registry.origins = vec![format!("{}/v2/proxy", cache.url())];
    (registry.username, registry.password_file) = (Some("node".into()), Some(password.clone()));
    let config = config();
    let shared = Shared::new(&config).await.unwrap();
    let origin = Origin::new(&config, &registry, &[foreign(&away.url(), true)], &shared, metrics()).unwrap();
    let origin = origin.of(Whom::Anyone);
    assert!(origin.has_node_credential());

    let fetched = origin.manifest(&repository(), &tag(), &Credential::Node).await.unwrap();
    assert_eq!(fetched.digest, Digest::of(b"{}"));
    assert_eq!((away.count("/v2/team/app/manifests/latest"), server.seen().len()), (1, 0));
    assert_eq!(cache.count("/v2/proxy/team/app/manifests/latest"), 1);

    assert_eq!(blob(&origin, None, &Credential::Node).await.unwrap(), CONTENT);
    let shown = server.seen()[0].header("authorization").map(str::to_owned);
    assert_eq!(shown.as_deref(), Some("Basic bm9kZTpodW50ZXIy"));
    assert!(cache.seen().iter().chain(&away.seen()).all(|seen| seen.header("authorization").is_none()));

    // A password file is read again at each use.
    std::fs::write(&password, "other").unwrap();
    blob(&origin, None, &Credential::Node).await.unwrap();
    assert_eq!(server.seen()[1].header("authorization"), Some("Basic bm9kZTpvdGhlcg=="));
}

#[tokio::test]
async fn the_hosts_before_the_registry_bring_a_callers_bytes_and_never_see_the_credential() {
    let cache = Server::start(|seen| Reply::ranged(seen, CONTENT)).await;
    let server = Server::start(|_| Reply::new(403, "")).await;
    let mut registry = registry(&server);
    registry.origins = vec![cache.url()];
    let origin = origin_with(&config(), &registry).await;
    let error = origin.head_manifest(&repository(), &tag(), &caller()).await.unwrap_err();
    assert!(matches!(error, OriginError::Denied { status: 403 }), "{error:?}");
    assert_eq!(cache.seen().len(), 0, "a mirror that serves everybody proves nothing of a caller");
    assert_eq!(blob(&origin.of(Whom::Anyone), None, &caller()).await.unwrap(), CONTENT);
    assert_eq!(cache.seen()[0].header("authorization"), None);
}
