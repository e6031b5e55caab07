//! Who this node is to AWS: account and region, from the instance metadata service (`IMDSv2`).
//!
//! And what EC2 is about to do with it (`notices`): take it back, maybe, or maintain it.
//!
//! Asked at start. Off EC2 nobody answers, and that must not hold up the start: one second in all.
//! On EC2, as the firmware tells, it is asked again for a while, and then beside the rest (`own_registry`): a
//! node that boots with a hundred others must not be without its registry for good because one answer came
//! late. From a pod network the answer to the PUT gets lost too (hop limit 1).

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tracing::debug;

use crate::config;
use crate::log::chain;

const ENDPOINT: &str = "http://169.254.169.254";
/// On EC2 it answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where it has to be there, it is asked again this often and this long.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Short enough for a liveness probe: in a pod network no answer ever comes.
const EXPECTED_FOR: Duration = Duration::from_secs(5);
/// What the firmware of an EC2 instance calls its maker.
const SYS_VENDOR: &str = "/sys/class/dmi/id/sys_vendor";
/// The token is used for the requests right after it.
const TOKEN_SECONDS: &str = "60";
/// The document has about 500 bytes, a token 56.
const ANSWER_MAX_BYTES: usize = 64 * 1024;

/// What the metadata service says of this node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Identity {
    /// The 12 digits of the account.
    #[serde(rename = "accountId")]
    pub account: String,
    /// Such as `us-east-1`.
    pub region: String,
}

/// What EC2 is about to do with a spot instance, two minutes ahead.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SpotNotice {
    /// `terminate`, `stop` or `hibernate`.
    pub action: String,
    /// When, in UTC.
    pub time: String,
}

/// EC2's advice to move elsewhere: it is likelier than before to take the spot instance back.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Rebalance {
    /// Since when, in UTC.
    #[serde(rename = "noticeTime")]
    pub time: String,
}

/// Maintenance that EC2 plans, days ahead.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Scheduled {
    /// Such as `instance-stop`, `instance-retirement` or `system-reboot`.
    pub code: String,
    /// Not before this, in UTC.
    #[serde(default)]
    pub not_before: String,
    /// `active`, or over: `completed`, `canceled`.
    #[serde(default)]
    pub state: String,
}

/// What EC2 is about to do with this node; each is asked for by itself, and none hides another.
#[derive(Debug)]
pub struct Notices {
    /// It takes the spot instance back.
    pub spot: Result<Option<SpotNotice>, ImdsError>,
    /// It may.
    pub rebalance: Result<Option<Rebalance>, ImdsError>,
    /// Maintenance that is still to come.
    pub scheduled: Result<Vec<Scheduled>, ImdsError>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ImdsError {
    /// Nobody there, as everywhere but on EC2.
    #[error("no answer from the instance metadata service within {PATIENCE:?}")]
    TimedOut,
    /// The connection fails.
    #[error("cannot reach the instance metadata service")]
    Unreachable(#[source] hyper_util::client::legacy::Error),
    /// Somebody else answers, or the service is switched off.
    #[error("the instance metadata service answers {0}")]
    Status(StatusCode),
    /// Not the document that was asked for.
    #[error("the answer of the instance metadata service cannot be read")]
    Unreadable,
    /// `aws.imds_endpoint` is not a URL.
    #[error("aws.imds_endpoint is not a URL")]
    Url(#[source] http::Error),
}

impl ImdsError {
    /// Whether another try may do better.
    fn may_pass(&self) -> bool {
        match self {
            Self::TimedOut | Self::Unreachable(_) => true,
            Self::Status(status) => status.is_server_error(),
            Self::Unreadable | Self::Url(_) => false,
        }
    }
}

/// Account and region of this node.
pub async fn identity(aws: &config::Aws) -> Result<Identity, ImdsError> {
    // Another endpoint than EC2's own says nothing of where this node is.
    let is_expected = aws.imds_endpoint.is_none() && is_ec2();
    asked_for(endpoint(aws), if is_expected { EXPECTED_FOR } else { Duration::ZERO }).await
}

/// The same, asked once.
pub async fn identity_now(aws: &config::Aws) -> Result<Identity, ImdsError> {
    asked_for(endpoint(aws), Duration::ZERO).await
}

fn endpoint(aws: &config::Aws) -> &str {
    aws.imds_endpoint.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/')
}

async fn asked_for(endpoint: &str, period: Duration) -> Result<Identity, ImdsError> {
    let until = Instant::now() + period;
    loop {
        match within(ask(endpoint)).await {
            Err(error) if error.may_pass() && Instant::now() + AGAIN_AFTER < until => {
                debug!(error = %chain(&error), "the instance metadata service is asked again");
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            answer => return answer,
        }
    }
}

/// What EC2 is about to do with this node.
///
/// # Errors
/// There is no token, and so nothing was asked for.
pub async fn notices(aws: &config::Aws) -> Result<Notices, ImdsError> {
    let session = within(Session::open(endpoint(aws))).await?;
    // At once: none waits for another that gets no answer.
    let (spot, rebalance, scheduled) = tokio::join!(
        announced(&session, "/latest/meta-data/spot/instance-action"),
        announced(&session, "/latest/meta-data/events/recommendations/rebalance"),
        announced::<Vec<Scheduled>>(&session, "/latest/meta-data/events/maintenance/scheduled"),
    );
    let is_to_come = |event: &Scheduled| event.state == "active";
    let scheduled = scheduled.map(|events| events.unwrap_or_default().into_iter().filter(is_to_come).collect());
    Ok(Notices { spot, rebalance, scheduled })
}

/// What is there; nothing where nothing is announced.
async fn announced<T: DeserializeOwned>(session: &Session<'_>, path: &str) -> Result<Option<T>, ImdsError> {
    match within(session.get(path)).await {
        Ok(notice) => serde_json::from_slice(&notice).map(Some).map_err(|_| ImdsError::Unreadable),
        // That is how it says so.
        Err(ImdsError::Status(StatusCode::NOT_FOUND)) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn within<T>(asked: impl Future<Output = Result<T, ImdsError>>) -> Result<T, ImdsError> {
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or(Err(ImdsError::TimedOut))
}

/// Whether the service has to be there, as the firmware tells.
pub fn is_ec2() -> bool {
    std::fs::read_to_string(SYS_VENDOR).is_ok_and(|vendor| vendor.starts_with("Amazon EC2"))
}

async fn ask(endpoint: &str) -> Result<Identity, ImdsError> {
    let document = Session::open(endpoint).await?.get("/latest/dynamic/instance-identity/document").await?;
    serde_json::from_slice(&document).map_err(|_| ImdsError::Unreadable)
}

/// Who has a token, and may ask.
struct Session<'a> {
    endpoint: &'a str,
    client: Client<HttpConnector, Empty<Bytes>>,
    token: Bytes,
}

impl<'a> Session<'a> {
    async fn open(endpoint: &'a str) -> Result<Self, ImdsError> {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::builder()
            .method(Method::PUT)
            .uri(format!("{endpoint}/latest/api/token"))
            .header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS)
            .body(Empty::new())
            .map_err(ImdsError::Url)?;
        let token = send(&client, request).await?;
        Ok(Self { endpoint, client, token })
    }

    /// What the service has at a path.
    async fn get(&self, path: &str) -> Result<Bytes, ImdsError> {
        let document = Request::builder()
            .uri(format!("{}{path}", self.endpoint))
            .header("x-aws-ec2-metadata-token", &*self.token)
            .body(Empty::new())
            .map_err(|_| ImdsError::Unreadable)?;
        send(&self.client, document).await
    }
}

async fn send(
    client: &Client<HttpConnector, Empty<Bytes>>,
    request: Request<Empty<Bytes>>,
) -> Result<Bytes, ImdsError> {
    let answer = client.request(request).await.map_err(ImdsError::Unreachable)?;
    if answer.status() != StatusCode::OK {
        return Err(ImdsError::Status(answer.status()));
    }
    let content = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await;
    content.map(http_body_util::Collected::to_bytes).map_err(|_| ImdsError::Unreadable)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Answers one request on each connection, in this order.
    async fn serve(answers: [&str; 4]) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answers = answers.map(str::to_owned);
        tokio::spawn(async move {
            for answer in answers {
                let (mut socket, _) = listener.accept().await.unwrap();
                let _ = socket.read(&mut [0; 4096]).await.unwrap();
                socket.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        url
    }

    fn ok(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn a_service_that_fails_at_first_is_asked_again() {
        let busy = "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let document = ok(r#"{"accountId": "123456789012", "region": "us-east-1"}"#);
        let endpoint = serve([busy, busy, &ok("token"), &document]).await;
        let found = asked_for(&endpoint, EXPECTED_FOR).await.unwrap();
        assert_eq!((found.account.as_str(), found.region.as_str()), ("123456789012", "us-east-1"));
    }
}
