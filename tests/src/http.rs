//! A plain HTTP client for tests: one request, one connection, no redirects, no decompression.
//!
//! Not here: a client that tells how a connection ended; that is `emulator`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::net::Place;

/// No answer in a test takes longer, whatever the machine does besides.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where requests are sent from, and with what.
#[derive(Debug, Clone)]
pub struct Client {
    place: Place,
    tls: Option<Arc<ClientConfig>>,
    authorization: Option<String>,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// A header as text; empty if absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    /// Sends from here, without credentials.
    pub const fn new(place: Place) -> Self {
        Self { place, tls: None, authorization: None }
    }

    /// Trusts this authority for https.
    pub fn trusting(mut self, config: Arc<ClientConfig>) -> Self {
        self.tls = Some(config);
        self
    }

    /// Sends user and password with every request.
    pub fn basic(mut self, user: &str, password: &str) -> Self {
        self.authorization = Some(basic(user, password));
        self
    }

    /// GET of an absolute URL whose host is an address.
    pub async fn get(&self, url: &str) -> Result<Answer> {
        self.call(Method::GET, url, &[]).await
    }

    /// HEAD of such a URL.
    pub async fn head(&self, url: &str) -> Result<Answer> {
        self.call(Method::HEAD, url, &[]).await
    }

    /// Any request without a body.
    pub async fn call(&self, method: Method, url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.whole(request.body(Empty::<Bytes>::new())?).await
    }

    /// A request with a body of known bytes.
    pub async fn send_bytes(&self, method: Method, url: &str, media_type: &str, body: Bytes) -> Result<Answer> {
        let request = Request::builder().method(method).uri(url).header(header::CONTENT_TYPE, media_type);
        self.whole(request.body(Full::new(body))?).await
    }

    /// Any request, and its whole answer.
    pub async fn whole<B>(&self, request: Request<B>) -> Result<Answer>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync,
    {
        let what = format!("{} {}", request.method(), request.uri());
        let exchange = async {
            let (parts, body) = self.send(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Answer { status: parts.status, headers: parts.headers, body })
        };
        let answer = tokio::time::timeout(PATIENCE, exchange).await;
        answer.unwrap_or_else(|_| bail!("no answer after {PATIENCE:?}")).context(what)
    }

    /// Any request; the body of the answer is read by the caller.
    pub async fn send<B>(&self, mut request: Request<B>) -> Result<Response<Incoming>>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync,
    {
        let uri = request.uri().clone();
        let authority = uri.authority().context("a URL has no host")?.clone();
        let headers = request.headers_mut();
        headers.insert(header::HOST, authority.as_str().parse()?);
        if let Some(authorization) = &self.authorization
            && !headers.contains_key(header::AUTHORIZATION)
        {
            headers.insert(header::AUTHORIZATION, authorization.parse()?);
        }
        *request.uri_mut() = uri.path_and_query().context("a URL has no path")?.as_str().parse::<Uri>()?;
        let address: SocketAddr = authority.as_str().parse().with_context(|| format!("{authority}: no address"))?;
        let stream = self.place.connect(address).await?;
        if uri.scheme_str() == Some("https") {
            let config = self.tls.clone().context("https without an authority to trust")?;
            let name = ServerName::IpAddress(address.ip().into());
            exchange(tokio_rustls::TlsConnector::from(config).connect(name, stream).await?, request).await
        } else {
            exchange(stream, request).await
        }
    }
}

async fn exchange<S, B>(stream: S, request: Request<B>) -> Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: std::error::Error + Send + Sync,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the exchange: nobody keeps the sender.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// The value of an Authorization header.
pub fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}
