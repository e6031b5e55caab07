//! Token servers: one request for many, and a fresh token when one is refused.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;

use super::*;

/// A registry with its token server, which gives `t<n>`; the newest token is the one that is taken.
async fn registry_with_tokens(wants_user: bool) -> (Server, Arc<AtomicUsize>) {
    let good = Arc::new(AtomicUsize::new(0));
    let newest = good.clone();
    let server = Server::start(move |seen| {
        if seen.path() == "/token" {
            if wants_user && seen.header("authorization") != Some("Basic dXNlcjpodW50ZXIy") {
                return Reply::new(401, "");
            }
            let token = newest.fetch_add(1, Ordering::Relaxed) + 1;
            let reply = Reply::new(200, format!(r#"{{"access_token":"t{token}","expires_in":300}}"#));
            return Reply { delay: Duration::from_millis(50), ..reply };
        }
        let wanted = format!("Bearer t{}", newest.load(Ordering::Relaxed));
        if seen.header("authorization") == Some(&wanted) {
            return Reply::new(200, "{}");
        }
        let host = seen.header("host").unwrap();
        let challenge =
            format!(r#"Bearer realm="http://{host}/token?x=y",service="a, b",scope="repository:other:pull""#);
        Reply::new(401, "").header("www-authenticate", "Negotiate").header("www-authenticate", challenge)
    })
    .await;
    (server, good)
}

async fn head(origin: &Origin, who: &Credential) -> Result<Described, OriginError> {
    origin.head_manifest(&repository(), &tag(), who).await
}

#[tokio::test]
async fn many_requests_make_one_request_for_a_token() {
    let (server, _) = registry_with_tokens(false).await;
    let origin = origin(&server).await;
    for answer in join_all((0..16).map(|_| head(&origin, &Credential::Anonymous))).await {
        answer.unwrap();
    }
    assert_eq!(server.count("/token"), 1);
    let asked = server.seen().into_iter().find(|seen| seen.path() == "/token").unwrap();
    assert_eq!(asked.target, "/token?x=y&service=a%2C%20b&scope=repository:team/app:pull");
    let before = server.seen().len();
    head(&origin, &Credential::Anonymous).await.unwrap();
    assert_eq!(server.seen().len(), before + 1, "the token is shown at once");
}

#[tokio::test]
async fn a_token_that_is_refused_is_replaced_once() {
    let (server, good) = registry_with_tokens(false).await;
    let origin = origin(&server).await;
    head(&origin, &Credential::Anonymous).await.unwrap();
    good.fetch_add(1, Ordering::Relaxed);
    head(&origin, &Credential::Anonymous).await.unwrap();
    assert_eq!(server.count("/token"), 2);
}

#[tokio::test]
async fn a_registry_that_takes_no_token_is_not_asked_for_ever() {
    let server = Server::start(|seen| {
        let host = seen.header("host").unwrap();
        let challenge = format!(r#"Bearer realm="http://{host}/token""#);
        match seen.path() {
            "/token" => Reply::new(200, r#"{"token":"t"}"#),
            _ => Reply::new(401, "").header("www-authenticate", challenge),
        }
    })
    .await;
    let error = head(&origin(&server).await, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Denied { status: 401 }), "{error:?}");
    assert_eq!((server.count("/token"), server.count("/v2/")), (1, 2));
}

#[tokio::test]
async fn tokens_are_given_to_credentials_and_kept_apart() {
    let (server, _) = registry_with_tokens(true).await;
    let origin = origin(&server).await;
    head(&origin, &caller()).await.unwrap();
    let error = head(&origin, &Credential::Anonymous).await.unwrap_err();
    assert!(matches!(error, OriginError::Denied { status: 401 }), "{error:?}");
    let wrong = Credential::Caller(Basic::of("user", "guess"));
    let error = head(&origin, &wrong).await.unwrap_err();
    assert!(matches!(error, OriginError::Denied { status: 401 }), "the token of another is not used: {error:?}");
    assert!(!printed(&error).contains("guess"));
}

/// A registry that the node reads with the identity token of a docker configuration.
async fn with_identity(server: &Server, directory: &tempfile::TempDir) -> Origin {
    let path = directory.path().join("config.json");
    let text = r#"{"auths":{"reg.example":{"auth":"dXNlcjo=","identitytoken":"hunter2+/="}}}"#;
    std::fs::write(&path, text).unwrap();
    let mut registry = registry(server);
    registry.docker_config = Some(path);
    origin_with(&config(), &registry).await
}

#[tokio::test]
async fn an_identity_token_is_exchanged_at_the_token_server_and_shown_to_nobody_else() {
    let server = Server::start(|seen| {
        let host = seen.header("host").unwrap();
        match (seen.path(), seen.header("authorization")) {
            ("/token", _) => Reply::new(200, r#"{"access_token":"t1","expires_in":300,"refresh_token":"other"}"#),
            (_, Some("Bearer t1")) => Reply::new(200, "{}"),
            _ => Reply::new(401, "")
                .header("www-authenticate", format!(r#"Bearer realm="http://{host}/token",service="a, b""#)),
        }
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let origin = with_identity(&server, &directory).await;
    for _ in 0..2 {
        head(&origin, &Credential::Node).await.unwrap();
    }
    let tokens: Vec<_> = server.seen().into_iter().filter(|seen| seen.path() == "/token").collect();
    assert_eq!(tokens.len(), 1, "the access token is kept");
    assert_eq!((tokens[0].method.as_str(), tokens[0].target.as_str()), ("POST", "/token"));
    assert_eq!(tokens[0].header("content-type"), Some("application/x-www-form-urlencoded"));
    assert_eq!(
        tokens[0].body,
        "grant_type=refresh_token&client_id=darter&service=a%2C%20b&scope=repository:team/app:pull\
         &refresh_token=hunter2%2B/%3D"
    );
    let others: Vec<_> = server.seen().into_iter().filter(|seen| seen.path() != "/token").collect();
    assert!(others.iter().all(|seen| !format!("{:?}{}", seen.headers, seen.body).contains("hunter2")));
}

#[tokio::test]
async fn an_identity_token_that_is_over_is_a_refusal_and_follows_no_redirect() {
    for (reply, status) in [
        (Reply::new(400, r#"{"error":"invalid_grant"}"#), Some(400)),
        (Reply::new(401, ""), Some(401)),
        (Reply::redirect("/elsewhere"), None),
        (Reply::new(404, ""), None),
    ] {
        let server = Server::start(move |seen| {
            let host = seen.header("host").unwrap();
            match seen.path() {
                "/token" => reply.clone(),
                _ => Reply::new(401, "").header("www-authenticate", format!(r#"Bearer realm="http://{host}/token""#)),
            }
        })
        .await;
        let directory = tempfile::tempdir().unwrap();
        let error = head(&with_identity(&server, &directory).await, &Credential::Node).await.unwrap_err();
        let denied = if let OriginError::Denied { status } = &error { Some(*status) } else { None };
        assert_eq!(denied, status, "{error:?}");
        assert!(!printed(&error).contains("hunter2"), "{error:?}");
        assert_eq!(server.count("/elsewhere"), 0);
    }
}
