//! Who this node is to AWS: account and region, from the instance metadata service (`IMDSv2`).
//!
//! Asked once, at start. Off EC2 nobody answers, and that must not hold up the start: one second
//! in all. From a pod network the answer to the PUT gets lost too (hop limit 1).

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;

use crate::config;

const ENDPOINT: &str = "http://169.254.169.254";
/// On EC2 it answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// The token is used once, for the request after it.
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

/// Why there is no identity.
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

/// Account and region of this node.
pub async fn identity(aws: &config::Aws) -> Result<Identity, ImdsError> {
    let endpoint = aws.imds_endpoint.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/');
    tokio::time::timeout(PATIENCE, ask(endpoint)).await.unwrap_or(Err(ImdsError::TimedOut))
}

async fn ask(endpoint: &str) -> Result<Identity, ImdsError> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let token = Request::builder()
        .method(Method::PUT)
        .uri(format!("{endpoint}/latest/api/token"))
        .header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS)
        .body(Empty::new())
        .map_err(ImdsError::Url)?;
    let token = send(&client, token).await?;
    let document = Request::builder()
        .uri(format!("{endpoint}/latest/dynamic/instance-identity/document"))
        .header("x-aws-ec2-metadata-token", &*token)
        .body(Empty::new())
        .map_err(|_| ImdsError::Unreadable)?;
    let document = send(&client, document).await?;
    serde_json::from_slice(&document).map_err(|_| ImdsError::Unreadable)
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
