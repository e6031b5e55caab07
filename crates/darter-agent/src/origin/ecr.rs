//! Tokens of Amazon ECR: one signed request gives a password for all registries of a region, and another
//! one for ECR Public, whose token server takes it.
//!
//! Hand-made, because it is one request and the ECR SDK is 200,000 lines. The credentials behind it
//! come from the SDK's chain: environment, profile, IRSA, Pod Identity, instance metadata.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use bytes::Bytes;
use darter_core::ecr;
use http::{HeaderValue, Method, Request, Uri};
use http_body_util::Full;
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio::time::Instant;
use tracing::warn;

use super::OriginError;
use super::credential::Basic;
use super::send::{Wire, check, collect};
use super::slots::Slots;
use super::url::Place;
use crate::log::chain;

const PRIVATE: Api = Api { name: "ecr", target: "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" };
const PUBLIC: Api = Api { name: "ecr-public", target: "SpencerFrontendService.GetAuthorizationToken" };
/// Regions that one node pulls from.
const TOKENS_MAX: usize = 64;
/// The answer holds one token of about 3 KiB.
const ANSWER_MAX_BYTES: u64 = 256 * 1024;
/// What a token lasts if the answer does not say (the API's documentation).
const LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);
/// A token with less left than this is used all the same, for so long.
const LIFETIME_MIN: Duration = Duration::from_secs(2);
/// How long an old token is used before the next try, where there is no new one.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a chain without credentials is not asked again: off EC2 each look takes seconds, and
/// containerd waits for it. The Pod Identity agent may start after us, so not for longer.
const NO_CREDENTIALS: Duration = Duration::from_secs(5);
/// The chain asks up to four places, of which most are not there.
const CREDENTIALS_PATIENCE: Duration = Duration::from_secs(10);

/// One of the two APIs that give out tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Api {
    /// What a signature is for.
    name: &'static str,
    target: &'static str,
}

/// An API, as one region has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Giver {
    api: Api,
    region: String,
    endpoint: String,
}

/// The tokens of all regions, and the credentials they are got with.
pub(super) struct Ecr {
    tokens: Slots<Giver, Token>,
    credentials: OnceCell<SharedCredentialsProvider>,
    /// When there were no credentials last.
    failed: Mutex<Option<Instant>>,
    settings: crate::config::Aws,
    has_roots: bool,
    stall: Duration,
}

struct Token {
    basic: Basic,
    since: Instant,
    /// When to ask for the next one.
    until: Instant,
    /// When it opens nothing any more.
    end: Instant,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    authorization_data: OneOrMany,
}

/// The private API gives a list of one, the public one without the list.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    Many(Vec<Data>),
    One(Data),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    authorization_token: String,
    expires_at: Option<f64>,
}

impl Ecr {
    pub(super) fn new(config: &crate::config::Config, has_roots: bool) -> Self {
        let patience = CREDENTIALS_PATIENCE + config.origin.header_timeout.0;
        Self {
            tokens: Slots::new(TOKENS_MAX, patience),
            credentials: OnceCell::new(),
            failed: Mutex::new(None),
            settings: config.aws.clone(),
            has_roots,
            stall: config.origin.stall.0,
        }
    }

    /// The password for a registry: kept, or asked for now. Not `refused`, if that is at least
    /// `suspect` old.
    pub(super) async fn get(
        &self,
        wire: &Wire,
        registry: &ecr::Ecr,
        refused: Option<&Basic>,
        suspect: Duration,
    ) -> Result<Basic, OriginError> {
        let giver = self.giver(registry);
        let mut slot = self.tokens.lock(&giver).await?;
        let now = Instant::now();
        let is_refused = |token: &Token| refused == Some(&token.basic) && now.duration_since(token.since) >= suspect;
        match &*slot {
            Some(token) if is_refused(token) => *slot = None,
            Some(token) if token.until > now => return Ok(token.basic.clone()),
            _ => {}
        }
        match (self.ask(wire, &giver).await, &mut *slot) {
            (Ok(token), slot) => Ok(slot.insert(token).basic.clone()),
            // AWS is away, but what it gave is good for hours.
            (Err(error), Some(old)) if old.end > now => {
                warn!(error = %chain(&error), "no new ECR token; using the old one for now");
                old.until = now + AGAIN;
                Ok(old.basic.clone())
            }
            (Err(error), _) => Err(error),
        }
    }

    fn giver(&self, registry: &ecr::Ecr) -> Giver {
        let api = if matches!(registry, ecr::Ecr::Public) { PUBLIC } else { PRIVATE };
        let endpoint = self.settings.ecr_endpoint.clone().unwrap_or_else(|| format!("https://{}", registry.api_host()));
        Giver { api, region: registry.token_region().to_owned(), endpoint }
    }

    /// As if all tokens were older.
    #[cfg(test)]
    pub(super) async fn age(&self, by: Duration) {
        for key in self.tokens.keys() {
            let mut slot = self.tokens.lock(&key).await.unwrap();
            let token = slot.as_mut().unwrap();
            token.until -= by;
            token.end -= by;
        }
    }

    async fn ask(&self, wire: &Wire, giver: &Giver) -> Result<Token, OriginError> {
        let credentials = self.credentials(&giver.region).await?;
        let request = signed(credentials, giver)?;
        let uri = request.uri().clone();
        let answer = match check(&uri, wire.exchange(request, "token").await?) {
            Ok(answer) => answer,
            Err(OriginError::NotFound) => return Err(aws("the ECR API is not there", None)),
            // 400 is what the API says to wrong or expired credentials: no proof against the pull.
            Err(error @ (OriginError::Denied { .. } | OriginError::Status { status: 400, .. })) => {
                return Err(aws("the ECR API refuses this node's credentials", Some(error.into())));
            }
            Err(error) => return Err(error),
        };
        let content = collect(answer, ANSWER_MAX_BYTES, self.stall).await?;
        read(&content, Instant::now(), SystemTime::now())
    }

    async fn credentials(&self, region: &str) -> Result<Credentials, OriginError> {
        if self.failed().is_some_and(|at| at.elapsed() < NO_CREDENTIALS) {
            return Err(aws("no AWS credentials a moment ago", None));
        }
        let found = tokio::time::timeout(CREDENTIALS_PATIENCE, async {
            let provider = self.credentials.get_or_try_init(|| self.provider(region)).await?;
            let credentials = provider.provide_credentials().await;
            credentials.map_err(|error| aws("no AWS credentials", Some(error.into())))
        });
        let found = found.await.unwrap_or_else(|_| Err(aws("no AWS credentials in time", None)));
        *self.failed() = found.is_err().then(Instant::now);
        found
    }

    fn failed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn provider(&self, region: &str) -> Result<SharedCredentialsProvider, OriginError> {
        let trust = TrustStore::empty().with_native_roots(self.has_roots);
        let tls = TlsContext::builder().with_trust_store(trust).build();
        let tls = tls.map_err(|error| aws("no TLS for AWS", Some(error.into())))?;
        let client = aws_smithy_http_client::Builder::new()
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .tls_context(tls)
            .build_https();
        let region = aws_config::Region::new(region.to_owned());
        let config = ProviderConfig::without_region().with_region(Some(region.clone())).with_http_client(client);
        let mut chain = DefaultCredentialsChain::builder().region(region).configure(config.clone());
        if let Some(endpoint) = &self.settings.imds_endpoint {
            let metadata = imds::Client::builder().configure(&config).endpoint(endpoint);
            let metadata = metadata.map_err(|error| aws("aws.imds_endpoint is not a URL", Some(error)))?;
            chain = chain.imds_client(metadata.build());
        }
        Ok(SharedCredentialsProvider::new(chain.build().await))
    }
}

fn aws(reason: &'static str, source: Option<Box<dyn std::error::Error + Send + Sync>>) -> OriginError {
    OriginError::Aws { reason, source }
}

/// The one request, signed.
fn signed(credentials: Credentials, giver: &Giver) -> Result<Request<Full<Bytes>>, OriginError> {
    const BODY: &[u8] = b"{}";
    let Giver { api, region, endpoint } = giver;
    let uri: Uri = endpoint.parse().map_err(|_| OriginError::Url("aws.ecr_endpoint".to_owned()))?;
    let place = Place::of(&uri).ok_or_else(|| OriginError::Url("aws.ecr_endpoint".to_owned()))?;
    let host = uri.authority().map_or_else(|| place.to_string(), |authority| authority.as_str().to_owned());
    let uri: Uri = format!("{}/", endpoint.trim_end_matches('/')).parse().unwrap_or(uri);
    let headers =
        [("host", host.as_str()), ("x-amz-target", api.target), ("content-type", "application/x-amz-json-1.1")];
    let identity = credentials.into();
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| aws("the request cannot be signed", Some(error));
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name(api.name)
        .time(SystemTime::now())
        .settings(SigningSettings::default())
        .build()
        .map_err(|error| wrong(error.into()))?
        .into();
    let url = uri.to_string();
    let signable = SignableRequest::new("POST", &url, headers.into_iter(), SignableBody::Bytes(BODY))
        .map_err(|error| wrong(error.into()))?;
    let (instructions, _) = sign(signable, &parameters).map_err(|error| wrong(error.into()))?.into_parts();
    let mut request = Request::new(Full::new(Bytes::from_static(BODY)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri;
    for (name, value) in headers {
        let value = HeaderValue::from_str(value).map_err(|error| wrong(error.into()))?;
        request.headers_mut().insert(name, value);
    }
    instructions.apply_to_request_http1x(&mut request);
    Ok(request)
}

fn read(content: &[u8], now: Instant, clock: SystemTime) -> Result<Token, OriginError> {
    let answer: Option<Answer> = serde_json::from_slice(content).ok();
    let data = answer.and_then(|answer| match answer.authorization_data {
        OneOrMany::One(data) => Some(data),
        OneOrMany::Many(data) => data.into_iter().next(),
    });
    let wrong = || aws("the ECR API gives no token", None);
    let Data { authorization_token, expires_at } = data.ok_or_else(wrong)?;
    let basic = Basic::of_encoded(&authorization_token).ok_or_else(wrong)?;
    let clock = clock.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let left = expires_at.and_then(|end| Duration::try_from_secs_f64(end - clock).ok()).unwrap_or(LIFETIME);
    // Half of it: there are hours to get the next one in if AWS is away.
    let left = left.min(LIFETIME);
    Ok(Token { basic, since: now, until: now + (left / 2).max(LIFETIME_MIN), end: now + left })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_the_one_that_the_api_knows() {
        let credentials = Credentials::for_tests_with_session_token();
        let giver = |api| Giver { api, region: "eu-west-1".into(), endpoint: "http://10.0.0.1:8080".into() };
        let request = signed(credentials.clone(), &giver(PRIVATE)).unwrap();
        let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(request.uri(), "http://10.0.0.1:8080/");
        assert_eq!((header("x-amz-target").as_str(), header("host").as_str()), (PRIVATE.target, "10.0.0.1:8080"));
        let authorization = header("authorization");
        assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential="), "{authorization}");
        assert!(authorization.contains("/eu-west-1/ecr/aws4_request"), "{authorization}");
        assert!(authorization.contains("host;x-amz-date;x-amz-security-token;x-amz-target"), "{authorization}");
        assert!(!header("x-amz-date").is_empty());
        let request = signed(credentials, &giver(PUBLIC)).unwrap();
        assert_eq!(request.headers()["x-amz-target"], PUBLIC.target);
        let authorization = request.headers()["authorization"].to_str().unwrap();
        assert!(authorization.contains("/eu-west-1/ecr-public/aws4_request"), "{authorization}");
    }

    #[test]
    fn a_token_is_used_for_half_its_life() {
        let (now, clock) = (Instant::now(), UNIX_EPOCH + Duration::from_secs(1_000_000));
        let token = |end: &str| {
            let content = format!(r#"{{"authorizationData":[{{"authorizationToken":"QVdTOng=","expiresAt":{end}}}]}}"#);
            read(content.as_bytes(), now, clock).map(|token| token.until - now)
        };
        assert_eq!(token("1000100.5").unwrap(), Duration::from_millis(50_250));
        assert_eq!(token("null").unwrap(), LIFETIME / 2);
        assert_eq!(token("1e300").unwrap(), LIFETIME / 2);
        assert!(matches!(read(b"{}", now, clock), Err(OriginError::Aws { .. })));
        let error = read(br#"{"authorizationData":[{"authorizationToken":"secret"}]}"#, now, clock).err().unwrap();
        assert!(!format!("{error:?}").contains("secret"));
    }
}
