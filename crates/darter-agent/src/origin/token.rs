//! Tokens of the servers that registries name in their challenges (Docker Hub, GHCR, Quay, Harbor).
//!
//! <https://distribution.github.io/distribution/spec/auth/token/>: GET realm?service=…&scope=…, with
//! the user's Basic credential where there is one. For an identity token
//! <https://distribution.github.io/distribution/spec/auth/oauth/>: POST with the grant `refresh_token`.

use std::time::Duration;

use bytes::Bytes;
use darter_core::access::CredentialKey;
use darter_core::oci::percent_encode;
use http::header::{CONTENT_TYPE, USER_AGENT};
use http::{HeaderValue, Method, Request, Uri};
use http_body_util::Full;
use serde::Deserialize;
use tokio::time::Instant;

use super::OriginError;
use super::challenge::Bearer;
use super::credential::{Account, Credential, Secret, sensitive};
use super::send::{AGENT, Ask, Wire, check, collect};
use super::slots::Slots;
use super::url::Place;

/// Tokens kept: one for each repository and credential in use on a node, of about 2 KiB.
const TOKENS_MAX: usize = 1024;
/// Answers of token servers that are read: JSON with two copies of a token of a few KiB.
const ANSWER_MAX_BYTES: u64 = 256 * 1024;
/// The lifetime of a token that names none (the specification).
const LIFETIME: Duration = Duration::from_secs(60);
/// No token is used for longer, whatever it says: what it opens may have been withdrawn.
const LIFETIME_MAX: Duration = Duration::from_secs(60 * 60);

/// The tokens of one registry.
pub(super) struct Tokens {
    slots: Slots<Key, Token>,
    stall: Duration,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    realm: String,
    service: Option<String>,
    scope: String,
    credential: CredentialKey,
}

struct Token {
    header: HeaderValue,
    until: Instant,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// What a token is asked for.
pub(super) struct Wanted<'a> {
    /// The registry that named the token server.
    pub(super) from: &'a Place,
    pub(super) bearer: &'a Bearer,
    pub(super) repository: &'a str,
    pub(super) account: Option<&'a Account>,
}

impl Tokens {
    pub(super) fn new(patience: Duration, stall: Duration) -> Self {
        Self { slots: Slots::new(TOKENS_MAX, patience), stall }
    }

    /// The Authorization for `wanted`: kept, or asked for now. Never `refused`, which the registry
    /// did not take a moment ago.
    pub(super) async fn get(
        &self,
        wire: &Wire,
        wanted: &Wanted<'_>,
        refused: Option<&HeaderValue>,
    ) -> Result<HeaderValue, OriginError> {
        let scope = format!("repository:{}:pull", wanted.repository);
        let key = Key {
            realm: wanted.bearer.realm.clone(),
            service: wanted.bearer.service.clone(),
            scope,
            credential: wanted.account.map_or_else(|| Credential::Anonymous.key(), Account::key),
        };
        let mut slot = self.slots.lock(&key).await?;
        if let Some(token) = &*slot
            && token.until > Instant::now()
            && Some(&token.header) != refused
        {
            return Ok(token.header.clone());
        }
        *slot = None;
        let token = self.ask(wire, wanted, &key.scope).await?;
        let header = token.header.clone();
        *slot = Some(token);
        Ok(header)
    }

    async fn ask(&self, wire: &Wire, wanted: &Wanted<'_>, scope: &str) -> Result<Token, OriginError> {
        let identity = match wanted.account {
            Some(Account::Identity(token)) => Some(token),
            Some(Account::Password(_)) | None => None,
        };
        let query = identity.is_none().then_some(scope);
        let uri = token_url(wanted.bearer, query).ok_or(OriginError::Lied("its token server is no URL"))?;
        wire.check_scheme(Some(wanted.from), &uri)?;
        let answer = match identity {
            // A redirect is not followed: what is sent opens all that the user may read.
            Some(token) => wire.exchange(refresh(&uri, wanted.bearer, scope, token), "token").await?,
            None => {
                let mut ask = Ask::get(uri.clone(), "token");
                ask.authorization = wanted.account.and_then(Account::header);
                let answer = wire.once(&ask).await?;
                wire.follow(ask, answer).await?
            }
        };
        let answer = match check(&uri, answer) {
            // How OAuth2 says that a refresh token is over (RFC 6749 §5.2).
            Err(OriginError::Status { status: status @ 400, .. }) if identity.is_some() => {
                return Err(OriginError::Denied { status });
            }
            // Of the token server, this says nothing about the image.
            Err(OriginError::NotFound) => return Err(OriginError::Lied("its token server is not there")),
            answer => answer?,
        };
        let content = collect(answer, ANSWER_MAX_BYTES, self.stall).await?;
        read(&content, Instant::now())
    }
}

fn read(content: &[u8], now: Instant) -> Result<Token, OriginError> {
    let wrong = OriginError::Lied("its token server gives no token");
    let Ok(answer) = serde_json::from_slice::<Answer>(content) else { return Err(wrong) };
    let text = [answer.token, answer.access_token].into_iter().flatten().find(|token| !token.is_empty());
    let header = text.and_then(|token| sensitive(&format!("Bearer {token}"))).ok_or(wrong)?;
    let lifetime = answer.expires_in.map_or(LIFETIME, Duration::from_secs).min(LIFETIME_MAX);
    // A quarter early: it has to last until the registry has read it, whose clock may differ.
    Ok(Token { header, until: now + lifetime * 3 / 4 })
}

/// Where a token is asked for; with what is asked in its query.
fn token_url(bearer: &Bearer, scope: Option<&str>) -> Option<Uri> {
    let realm = bearer.realm.split('#').next()?;
    let uri: Uri = match scope {
        Some(scope) => {
            let separator = if realm.contains('?') { '&' } else { '?' };
            format!("{realm}{separator}{}", question(bearer, scope)).parse().ok()?
        }
        None => realm.parse().ok()?,
    };
    Place::of(&uri).map(|_| uri)
}

fn question(bearer: &Bearer, scope: &str) -> String {
    let service = bearer.service.as_ref().map(|service| format!("service={}&", percent_encode(service)));
    format!("{}scope={}", service.unwrap_or_default(), percent_encode(scope))
}

/// The order for an access token in exchange for an identity token, which stays good.
fn refresh(uri: &Uri, bearer: &Bearer, scope: &str, token: &Secret) -> Request<Full<Bytes>> {
    let token = percent_encode(token.expose());
    let form = format!("grant_type=refresh_token&client_id=darter&{}&refresh_token={token}", question(bearer, scope));
    let mut request = Request::new(Full::new(Bytes::from(form)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    let headers = request.headers_mut();
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_before_it_is_over() {
        let now = Instant::now();
        let until = |content: &str| read(content.as_bytes(), now).map(|token| token.until - now);
        assert_eq!(until(r#"{"token":"t"}"#).unwrap(), Duration::from_secs(45));
        assert_eq!(until(r#"{"access_token":"t","expires_in":300}"#).unwrap(), Duration::from_secs(225));
        assert_eq!(until(r#"{"token":"t","expires_in":18446744073709551615}"#).unwrap(), LIFETIME_MAX * 3 / 4);
        for wrong in ["", "{}", r#"{"token":""}"#, "[]", r#"{"token":"a\nb"}"#] {
            assert!(matches!(until(wrong), Err(OriginError::Lied(_))), "{wrong}");
        }
    }

    #[test]
    fn the_question_is_encoded() {
        let bearer = Bearer { realm: "https://auth.example/t?a=b".into(), service: Some("s&x y".into()) };
        let url = token_url(&bearer, Some("repository:a/b:pull")).unwrap().to_string();
        assert_eq!(url, "https://auth.example/t?a=b&service=s%26x%20y&scope=repository:a/b:pull");
        assert!(token_url(&Bearer { realm: "token".into(), service: None }, Some("s")).is_none());
    }
}
