//! One request and its redirects, followed by hand: a credential stays where it was meant to go.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use darter_core::range::Span;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RANGE, USER_AGENT};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};

use super::OriginError;
use super::http::Http;
use super::retry::{Pauses, retry_after};
use super::url::{Place, resolve, shown};
use crate::metrics::{Metrics, OriginLabels, RegistryLabel};

/// As many as curl and Go follow, give or take: more is a loop.
const REDIRECTS_MAX: usize = 10;
/// Bodies of redirects and challenges that are read to save a connection.
const DISCARD_MAX_BYTES: u64 = 16 * 1024;
/// Such a body comes with its head, or is not worth the wait.
const DISCARD_PATIENCE: Duration = Duration::from_millis(100);
pub(super) const AGENT: &str = concat!("darter/", env!("CARGO_PKG_VERSION"));

/// One request.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) uri: Uri,
    /// The word in the metrics.
    pub(super) kind: &'static str,
    pub(super) accept: Option<&'static str>,
    pub(super) range: Option<Span>,
    pub(super) authorization: Option<HeaderValue>,
}

impl Ask {
    pub(super) const fn get(uri: Uri, kind: &'static str) -> Self {
        Self { method: Method::GET, uri, kind, accept: None, range: None, authorization: None }
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        // A digest is over the bytes as they are stored.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(accept) = self.accept {
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
        }
        if let Some(Span { start, end }) = self.range {
            headers.insert(RANGE, header_of(format!("bytes={start}-{}", end - 1)));
        }
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

fn header_of(text: String) -> HeaderValue {
    // Digits and ASCII letters only: covered by every test that sends a range.
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The way to one registry and to what it redirects to.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) http: Http,
    pub(super) plain_http: bool,
    pub(super) metrics: Arc<Metrics>,
    pub(super) label: RegistryLabel,
    /// Until when what registries redirect to is left alone. Of all registries: two may have one storage.
    pub(super) storages: Arc<Pauses>,
}

impl Wire {
    /// One exchange, counted.
    pub(super) async fn once(&self, ask: &Ask) -> Result<Response<Incoming>, OriginError> {
        self.exchange(ask.request(), ask.kind).await
    }

    /// Any request, counted.
    pub(super) async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        kind: &'static str,
    ) -> Result<Response<Incoming>, OriginError> {
        let outcome = self.http.exchange(request).await;
        self.count(kind, outcome.as_ref().map_or(0, |response| response.status().as_u16()));
        outcome
    }

    /// Counts an exchange; code 0 is no answer.
    pub(super) fn count(&self, kind: &'static str, code: u16) {
        let labels = OriginLabels { registry: self.label.clone(), kind, code };
        self.metrics.origin_requests.get_or_create(&labels).inc();
    }

    /// One exchange with what an answer redirects to, unless that wants to be left alone. When it does, all
    /// requests of this node hear it.
    pub(super) async fn hop(&self, ask: &Ask) -> Result<Response<Incoming>, OriginError> {
        let Some(place) = Place::of(&ask.uri) else { return self.once(ask).await };
        self.storages.check(&place)?;
        let answer = self.once(ask).await?;
        self.storages.heed(&place, &answer);
        Ok(answer)
    }

    /// Goes on from the answer to `ask` until one is no redirect.
    pub(super) async fn follow(
        &self,
        mut ask: Ask,
        mut answer: Response<Incoming>,
    ) -> Result<Response<Incoming>, OriginError> {
        for _ in 0..REDIRECTS_MAX {
            let Some(next) = self.next_hop(&ask, &answer)? else { return Ok(answer) };
            discard(answer).await;
            ask = next;
            answer = self.hop(&ask).await?;
        }
        Err(OriginError::Lied("it redirects without end"))
    }

    /// The request that a redirect asks for; `None` if the answer is none.
    pub(super) fn next_hop<B>(&self, ask: &Ask, answer: &Response<B>) -> Result<Option<Ask>, OriginError> {
        if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let uri = location.and_then(|location| resolve(&ask.uri, location));
        let uri = uri.ok_or(OriginError::Lied("it redirects to no URL"))?;
        let (here, there) = (Place::of(&ask.uri), Place::of(&uri));
        self.check_scheme(here.as_ref(), &uri)?;
        let mut next = ask.clone();
        if here != there {
            next.authorization = None;
        }
        next.uri = uri;
        Ok(Some(next))
    }

    /// No step from https to http, unless the operator allows http for this registry.
    pub(super) fn check_scheme(&self, from: Option<&Place>, to: &Uri) -> Result<(), OriginError> {
        let is_https = |place: &Place| place.https;
        if from.is_some_and(is_https) && !Place::of(to).as_ref().is_some_and(is_https) && !self.plain_http {
            return Err(OriginError::Refused { host: shown(to), reason: "it is not encrypted" });
        }
        Ok(())
    }
}

/// What a final status means.
pub(super) fn check(uri: &Uri, answer: Response<Incoming>) -> Result<Response<Incoming>, OriginError> {
    match answer.status() {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
        StatusCode::NOT_FOUND => Err(OriginError::NotFound),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(OriginError::Denied { status: answer.status().as_u16() })
        }
        status => Err(OriginError::Status {
            host: shown(uri),
            status: status.as_u16(),
            retry_after: retry_after(answer.headers(), SystemTime::now()),
        }),
    }
}

/// Reads a small body to its end, so that its connection can be used again: each blob of ECR begins
/// with a redirect, and a TLS handshake costs more than that.
pub(super) async fn discard(answer: Response<Incoming>) {
    let body = answer.into_body();
    if body.size_hint().upper().is_some_and(|bytes| bytes <= DISCARD_MAX_BYTES) {
        // Late or broken, the connection is closed, which is right.
        let _ = tokio::time::timeout(DISCARD_PATIENCE, body.collect()).await;
    }
}

/// A body as a whole, if it has at most `limit` bytes and does not stop for `stall`.
pub(super) async fn collect(answer: Response<Incoming>, limit: u64, stall: Duration) -> Result<Bytes, OriginError> {
    let length = answer.headers().get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > limit) {
        return Err(OriginError::TooLarge { limit });
    }
    let bounded = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut body = Limited::new(answer.into_body(), bounded);
    let mut content = Vec::new();
    loop {
        match tokio::time::timeout(stall, body.frame()).await {
            Err(_) => return Err(OriginError::Stalled { after: stall }),
            Ok(None) => return Ok(content.into()),
            Ok(Some(Ok(frame))) => content.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
            Ok(Some(Err(error))) => {
                return Err(match error.downcast::<hyper::Error>() {
                    Ok(error) => OriginError::Broken(*error),
                    Err(error) if error.is::<LengthLimitError>() => OriginError::TooLarge { limit },
                    Err(_) => OriginError::Lied("its body cannot be read"),
                });
            }
        }
    }
}
