//! ECR: credentials of the metadata service, a signed request, a password, and another when it is over.

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::join_all;

use super::*;
use crate::config::Access;
use crate::imds;

const REGISTRY: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";

const ROLE: &str = "/latest/meta-data/iam/security-credentials";

/// The year 2100.
const FAR: f64 = 4_102_444_800.5;

/// What the metadata service says of the node's role.
fn role(path: &str) -> Reply {
    match path.strip_prefix(ROLE) {
        None => Reply::new(200, "imds").header("x-aws-ec2-metadata-token-ttl-seconds", "60"),
        Some("" | "/") => Reply::new(200, "node"),
        Some(_) => Reply::new(
            200,
            r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"hunter2",
               "Token":"session","LastUpdated":"2026-01-01T00:00:00Z","Expiration":"2099-01-01T00:00:00Z"}"#,
        ),
    }
}

async fn aws(refusal: u16) -> (Server, Arc<AtomicUsize>) {
    aws_until(refusal, FAR).await
}

/// Metadata service, API and registry in one; the newest password is the one that is taken. If it
/// is not good for long, the API gives no other.
async fn aws_until(refusal: u16, expires: f64) -> (Server, Arc<AtomicUsize>) {
    let good = Arc::new(AtomicUsize::new(0));
    let newest = good.clone();
    let server = Server::start(move |seen| match seen.path() {
        "/latest/dynamic/instance-identity/document" if seen.header("x-aws-ec2-metadata-token") == Some("imds") => {
            Reply::new(200, r#"{"accountId":"123456789012","region":"eu-west-1","version":"2017-09-30"}"#)
        }
        path if path.starts_with("/latest/api/") || path.starts_with(ROLE) => role(path),
        "/" => {
            let signature = seen.header("authorization").unwrap_or_default();
            if seen.method != "POST" || !signature.contains("/eu-west-1/ecr/aws4_request") {
                return Reply::new(400, r#"{"__type":"InvalidSignatureException"}"#);
            }
            if expires < FAR && newest.load(Ordering::Relaxed) > 0 {
                return Reply::new(500, "");
            }
            let token = BASE64.encode(format!("AWS:p{}", newest.fetch_add(1, Ordering::Relaxed) + 1));
            let data = format!(r#"{{"authorizationData":[{{"authorizationToken":"{token}","expiresAt":{expires}}}]}}"#);
            Reply { delay: Duration::from_millis(50), ..Reply::new(200, data) }
        }
        _ => {
            let wanted = format!("Basic {}", BASE64.encode(format!("AWS:p{}", newest.load(Ordering::Relaxed))));
            let challenge =
                r#"Basic realm="https://123456789012.dkr.ecr.eu-west-1.amazonaws.com/",service="ecr.amazonaws.com""#;
            if seen.header("authorization") == Some(&wanted) {
                Reply::new(200, "{}")
            } else {
                Reply::new(refusal, "").header("www-authenticate", challenge)
            }
        }
    })
    .await;
    (server, good)
}

async fn ecr_origin(server: &Server) -> Origin {
    origin_named(server, REGISTRY, None).await
}

async fn origin_named(server: &Server, name: &str, access: Option<Access>) -> Origin {
    let mut config = config();
    config.aws.ecr_endpoint = Some(server.url());
    config.aws.imds_endpoint = Some(server.url());
    let mut registry = registry(server);
    (registry.name, registry.access) = (name.parse().unwrap(), access);
    origin_with(&config, &registry).await
}

async fn head(origin: &Origin) -> Result<Described, OriginError> {
    origin.head_manifest(&repository(), &tag(), &Credential::Node).await
}

#[tokio::test]
async fn one_password_serves_many_requests_and_is_replaced_once_when_it_is_over() {
    let (server, good) = aws(401).await;
    let origin = ecr_origin(&server).await;
    assert!(origin.has_node_credential());
    for answer in join_all((0..8).map(|_| head(&origin))).await {
        answer.unwrap();
    }
    let tokens = || server.seen().iter().filter(|seen| seen.path() == "/").count();
    assert_eq!(tokens(), 1);
    good.fetch_add(1, Ordering::Relaxed);
    head(&origin).await.unwrap();
    assert_eq!(tokens(), 2);
}

#[tokio::test]
async fn a_403_to_a_new_password_costs_no_other() {
    let (server, good) = aws(403).await;
    let origin = ecr_origin(&server).await;
    head(&origin).await.unwrap();
    good.fetch_add(1, Ordering::Relaxed);
    assert!(matches!(head(&origin).await, Err(OriginError::Denied { status: 403 })));
    assert_eq!(server.seen().iter().filter(|seen| seen.path() == "/").count(), 1);
}

#[tokio::test]
async fn an_old_password_is_used_while_there_is_no_new_one() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let (server, _) = aws_until(401, (now + Duration::from_secs(20)).as_secs_f64()).await;
    let mut config = config();
    config.aws.ecr_endpoint = Some(server.url());
    config.aws.imds_endpoint = Some(server.url());
    let shared = Shared::new(&config).await.unwrap();
    let mut registry = registry(&server);
    registry.name = REGISTRY.parse().unwrap();
    let origin = Origin::new(&config, &registry, &[], &shared, metrics()).unwrap();
    head(&origin).await.unwrap();
    shared.ecr.age(Duration::from_secs(11)).await;
    head(&origin).await.unwrap();
    assert_eq!(server.seen().iter().filter(|seen| seen.path() == "/").count(), 2, "it was tried");
    shared.ecr.age(Duration::from_secs(80)).await;
    assert!(head(&origin).await.unwrap_err().is_away(), "over is over");
}

/// ECR Public: another API, whose answer has another form, and a token server that takes its password.
async fn public_ecr() -> Server {
    Server::start(|seen| match seen.path() {
        path if path.starts_with("/latest/") => role(path),
        "/" => {
            let signature = seen.header("authorization").unwrap_or_default();
            let is_signed = signature.contains("/us-east-1/ecr-public/aws4_request");
            let target = seen.header("x-amz-target").unwrap_or_default();
            if !is_signed || target != "SpencerFrontendService.GetAuthorizationToken" {
                return Reply::new(400, r#"{"__type":"UnknownOperationException"}"#);
            }
            let token = BASE64.encode("AWS:p");
            Reply::new(200, format!(r#"{{"authorizationData":{{"authorizationToken":"{token}","expiresAt":{FAR}}}}}"#))
        }
        "/token" => match seen.header("authorization") {
            Some(basic) if *basic == format!("Basic {}", BASE64.encode("AWS:p")) => {
                Reply::new(200, r#"{"token":"known"}"#)
            }
            Some(_) => Reply::new(401, ""),
            None => Reply::new(200, r#"{"token":"anonymous"}"#),
        },
        _ => match seen.header("authorization") {
            Some("Bearer known" | "Bearer anonymous") => Reply::new(200, "{}"),
            _ => {
                let host = seen.header("host").unwrap_or_default();
                Reply::new(401, "").header("www-authenticate", format!(r#"Bearer realm="http://{host}/token""#))
            }
        },
    })
    .await
}

#[tokio::test]
async fn ecr_public_is_asked_by_whoever_the_node_is_where_that_is_configured_and_else_by_nobody() {
    let asks_as = async |access, credential| {
        let server = public_ecr().await;
        let origin = origin_named(&server, "public.ecr.aws", access).await;
        assert_eq!(origin.has_node_credential(), access.is_some());
        origin.head_manifest(&repository(), &tag(), &credential).await.unwrap();
        let seen = server.seen();
        let last = seen.last().unwrap().header("authorization").unwrap_or_default().to_owned();
        (last, seen.iter().filter(|seen| seen.path() == "/").count())
    };
    assert_eq!(asks_as(Some(Access::Node), Credential::Node).await, ("Bearer known".into(), 1));
    assert_eq!(asks_as(None, Credential::Anonymous).await, ("Bearer anonymous".into(), 0));
}

#[tokio::test]
async fn without_credentials_the_origin_is_away_and_nobody_waits_twice() {
    let server = Server::start(|_| Reply::new(404, "")).await;
    let origin = ecr_origin(&server).await;
    let error = head(&origin).await.unwrap_err();
    assert!(matches!(error, OriginError::Aws { .. }) && error.is_away(), "{error:?}");
    let asked = server.seen().len();
    assert!(head(&origin).await.is_err());
    assert_eq!(server.seen().len(), asked, "no second look at once");
}

#[tokio::test]
async fn the_metadata_service_tells_account_and_region() {
    let (server, _) = aws(401).await;
    let mut aws = config().aws;
    aws.imds_endpoint = Some(server.url());
    let identity = imds::identity(&aws).await.unwrap();
    assert_eq!((identity.account.as_str(), identity.region.as_str()), ("123456789012", "eu-west-1"));
}

#[tokio::test]
async fn a_metadata_service_that_says_nothing_holds_nobody_up() {
    let server = Server::start(|_| Reply { delay: Duration::from_secs(20), ..Reply::new(200, "") }).await;
    let mut aws = config().aws;
    aws.imds_endpoint = Some(server.url());
    let start = std::time::Instant::now();
    assert!(matches!(imds::identity(&aws).await, Err(imds::ImdsError::TimedOut)));
    assert!(start.elapsed() < Duration::from_secs(3));
}
