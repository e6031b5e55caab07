//! A client that sends what containerd sends, for what a real containerd cannot be made to show.
//!
//! It follows containerd's sources (`core/remotes/docker`: resolver, fetcher, authorizer) in the
//! order of requests, the list of hosts, what makes it go on to the next one, and how it resumes a
//! short body; and it reports what a containerd hides: whether a connection ended by FIN or by RST.
//! Not here: unpacking, TLS, bearer tokens.

pub mod raw;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use darter_core::Digest;
use darter_core::manifest::{self, Descriptor, Manifest, Platform};
use darter_core::oci::percent_encode;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};

pub use raw::{Answer, End, Exchange};

use crate::http::basic;
use crate::net::Place;
use crate::tools::Release;

/// containerd's `max_concurrent_downloads`.
const DOWNLOADS: usize = 3;

/// Requests in all for a host that answers 408 or 429 (`withRetry` of the fetcher and resolver).
const REPEATS: usize = 6;

/// `httpReadSeeker` gives up after more than 3 openings that brought no byte.
const FRUITLESS_MAX: usize = 3;

/// Go's http.Client gives up after 10.
const REDIRECTS_MAX: usize = 10;

/// Bodies up to this size are kept; of larger ones only the digest is.
const KEPT_MAX: u64 = manifest::MANIFEST_MAX_BYTES;

/// One `[host]` of a hosts.toml, or its `server`.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where it is, over plain http.
    pub address: SocketAddr,
    /// Whether it may resolve tags.
    pub resolve: bool,
}

impl Host {
    /// With `capabilities = ["pull", "resolve"]`, as `server` has them too.
    pub const fn new(address: SocketAddr) -> Self {
        Self { address, resolve: true }
    }

    /// With `capabilities = ["pull"]`.
    pub const fn pull_only(address: SocketAddr) -> Self {
        Self { address, resolve: false }
    }
}

/// A containerd that is not one.
#[derive(Debug)]
pub struct Emulator {
    place: Place,
    registry: String,
    hosts: Vec<Host>,
    release: Release,
    credential: Option<(String, String)>,
    patience: Duration,
    /// Hosts that asked for the credential: they get it unasked from then on.
    authorized: Mutex<BTreeSet<SocketAddr>>,
    seen: Mutex<Vec<Exchange>>,
}

/// What resolving a name gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Media type, digest and size, as the answer said.
    pub descriptor: Descriptor,
    /// Which host said so, counted from 0.
    pub host: usize,
}

impl Emulator {
    /// A containerd at this place that pulls images of `registry` through these hosts, in order.
    pub fn new(place: &Place, registry: &str, hosts: &[Host]) -> Self {
        Self {
            place: place.clone(),
            registry: registry.to_owned(),
            hosts: hosts.to_vec(),
            release: Release::V2,
            credential: None,
            patience: Duration::from_secs(30),
            authorized: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// Behaves like this release.
    pub fn release(mut self, release: Release) -> Self {
        self.release = release;
        self
    }

    /// Has this credential for whoever asks by 401 Basic.
    pub fn credential(mut self, user: &str, password: &str) -> Self {
        self.credential = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// Waits so long for a head, and for each byte after it. containerd waits longer.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Every exchange that is over, in the order of their ends.
    pub fn seen(&self) -> Vec<Exchange> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Pulls an image: resolve, manifests, configuration, layers. Gives back its layers.
    pub async fn pull(&self, repository: &str, reference: &str) -> Result<Vec<Descriptor>> {
        let resolved = self.resolve(repository, reference).await?;
        let mut manifest = self.manifest(repository, &resolved.descriptor).await?;
        if let Manifest::Index { .. } = &manifest {
            let amd64 = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
            let child = manifest.for_platform(&amd64).context("no image for this platform")?.clone();
            manifest = self.manifest(repository, &child).await?;
        }
        let Manifest::Image { config, layers, .. } = manifest else { bail!("an index in an index") };
        let blobs = stream::iter(std::iter::once(&config).chain(&layers).map(|blob| self.blob(repository, blob)));
        blobs.buffer_unordered(DOWNLOADS).try_collect::<Vec<_>>().await?;
        Ok(layers)
    }

    /// HEAD of a tag or digest, and GET where the answer says too little.
    pub async fn resolve(&self, repository: &str, reference: &str) -> Result<Resolved> {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let is_tag = reference.parse::<Digest>().is_err();
        let accept = format!("{}, */*", manifest::ACCEPT);
        let (host, answer) = self.over_hosts("HEAD", &path, &accept, None, is_tag).await?;
        let media_type = answer.exchange.header("content-type").split(';').next().unwrap_or_default().to_owned();
        let said = answer.exchange.header("docker-content-digest").parse::<Digest>().ok();
        let length = answer.exchange.length();
        self.over(answer);
        if let (Some(digest), Some(size)) = (said, length) {
            return Ok(Resolved { descriptor: Descriptor { media_type, digest, size }, host });
        }
        let mut answer = self.ask(&self.hosts[host], "GET", &path, &accept, None).await?;
        let body = answer.body().await?;
        self.over(answer);
        let descriptor = Descriptor { media_type, digest: Digest::of(&body), size: body.len() as u64 };
        Ok(Resolved { descriptor, host })
    }

    async fn manifest(&self, repository: &str, wanted: &Descriptor) -> Result<Manifest> {
        let path = format!("/v2/{repository}/manifests/{}", wanted.digest);
        Ok(Manifest::parse(&self.fetch(&path, wanted, None).await?)?)
    }

    /// Fetches a blob as one stream, resuming it over the host list where it is cut short. Gives it
    /// back if it is small; its digest is right in any case.
    pub async fn blob(&self, repository: &str, wanted: &Descriptor) -> Result<Vec<u8>> {
        self.fetch(&format!("/v2/{repository}/blobs/{}", wanted.digest), wanted, None).await
    }

    /// `opened` is an answer that has the content from its first byte on, if there is one already.
    async fn fetch(&self, path: &str, wanted: &Descriptor, mut opened: Option<Answer>) -> Result<Vec<u8>> {
        let accept = format!("{}, */*", wanted.media_type);
        let (mut offset, mut fruitless) = (0, 0);
        let (mut hash, mut kept) = (Sha256::new(), Vec::new());
        loop {
            let range = (offset > 0).then(|| format!("bytes={offset}-"));
            let mut answer = match opened.take() {
                Some(answer) => answer,
                None => self.over_hosts("GET", path, &accept, range.as_deref(), false).await?.1,
            };
            // A 200 to a Range request: what was there before is read and thrown away.
            let mut skip = if answer.exchange.status == Some(206) { 0 } else { offset };
            let before = offset;
            let end = answer
                .read(None, |mut bytes| {
                    let skipped = skip.min(bytes.len() as u64);
                    skip -= skipped;
                    bytes = &bytes[usize::try_from(skipped).unwrap_or_default()..];
                    offset += bytes.len() as u64;
                    hash.update(bytes);
                    if wanted.size <= KEPT_MAX {
                        kept.extend_from_slice(bytes);
                    }
                })
                .await?;
            self.over(answer);
            match end {
                End::Complete => break,
                End::Fin => {
                    fruitless = if offset == before { fruitless + 1 } else { 0 };
                    ensure!(fruitless <= FRUITLESS_MAX, "{path}: unexpected EOF at {offset}");
                }
                // Not retried by containerd: the pull fails.
                other => bail!("{path}: {other:?} at {offset}"),
            }
        }
        ensure!(offset == wanted.size, "{path}: {offset} bytes, expected {}", wanted.size);
        let digest = Digest::from_bytes(hash.finalize().into());
        ensure!(digest == wanted.digest, "{path}: unexpected digest {digest}");
        Ok(kept)
    }

    /// Fetches a blob as containerd 2.1 does with `concurrent_layer_fetch_buffer`: chunks of so many
    /// bytes, each asked for by an open-ended range and closed when its bytes are there. Where the
    /// first answer is 200, as one stream.
    pub async fn chunks(&self, repository: &str, wanted: &Descriptor, chunk: u64) -> Result<()> {
        let path = format!("/v2/{repository}/blobs/{}", wanted.digest);
        let accept = format!("{}, */*", wanted.media_type);
        let (host, mut first) = self.over_hosts("GET", &path, &accept, Some("bytes=0-"), false).await?;
        if first.exchange.status == Some(200) {
            return self.fetch(&path, wanted, Some(first)).await.map(drop);
        }
        let mut start = Vec::new();
        let end = first.read(Some(chunk.min(wanted.size)), |bytes| start.extend_from_slice(bytes)).await?;
        self.over(first);
        ensure!(matches!(end, End::Complete | End::Left), "{path}: {end:?} in the first chunk");
        let offsets = (1..).map(|number| number * chunk).take_while(|offset| *offset < wanted.size);
        let parts = stream::iter(offsets.map(|offset| {
            let length = chunk.min(wanted.size - offset);
            self.chunk(host, &path, &accept, offset, length)
        }));
        let parts: Vec<Vec<u8>> = parts.buffered(DOWNLOADS).try_collect().await?;
        let mut hash = Sha256::new_with_prefix(&start);
        parts.iter().for_each(|part| hash.update(part));
        ensure!(Digest::from_bytes(hash.finalize().into()) == wanted.digest, "{path}: unexpected digest");
        Ok(())
    }

    /// One chunk, from one host only.
    async fn chunk(&self, host: usize, path: &str, accept: &str, offset: u64, length: u64) -> Result<Vec<u8>> {
        let range = format!("bytes={offset}-");
        let mut answer = self.ask(&self.hosts[host], "GET", path, accept, Some(&range)).await?;
        ensure!(answer.exchange.status == Some(206), "{path} {range}: {:?}", answer.exchange.status);
        let mut part = Vec::new();
        let end = answer.read(Some(length), |bytes| part.extend_from_slice(bytes)).await?;
        self.over(answer);
        ensure!(matches!(end, End::Complete | End::Left), "{path} {range}: {end:?}");
        Ok(part)
    }

    /// Asks the hosts in order until one answers 2xx.
    async fn over_hosts(
        &self,
        method: &str,
        path: &str,
        accept: &str,
        range: Option<&str>,
        needs_resolve: bool,
    ) -> Result<(usize, Answer)> {
        let mut answers = Vec::new();
        for (number, host) in self.hosts.iter().enumerate().filter(|(_, host)| host.resolve || !needs_resolve) {
            let mut repeats = 0;
            loop {
                let answer = self.ask(host, method, path, accept, range).await?;
                match answer.exchange.status {
                    Some(200..=299) => return Ok((number, answer)),
                    Some(408 | 429) if repeats + 1 < REPEATS => repeats += 1,
                    _ if answer.exchange.end == End::Silent => bail!("{path}: no head from {}", host.address),
                    status => {
                        answers.push(format!("{}: {status:?} {:?}", host.address, answer.exchange.end));
                        self.over(answer);
                        break;
                    }
                }
                self.over(answer);
            }
        }
        bail!("{method} {path}: no host has it: {}", answers.join(", "))
    }

    /// Asks one host, with the credential if it wants one, and follows it where it points.
    async fn ask(&self, host: &Host, method: &str, path: &str, accept: &str, range: Option<&str>) -> Result<Answer> {
        // Sent wherever the host is not the image's own by name.
        let is_own = host.address.to_string() == self.registry;
        let namespace = if is_own { String::new() } else { format!("?ns={}", percent_encode(&self.registry)) };
        let target = format!("{path}{namespace}");
        let authorization = self.credential.as_ref().map(|(user, password)| basic(user, password));
        let unasked = authorization.as_deref().filter(|_| self.authorized().contains(&host.address));
        let mut answer = self.send(host.address, method, &target, accept, range, unasked).await?;
        let wants_basic = answer.exchange.header("www-authenticate").starts_with("Basic");
        if answer.exchange.status == Some(401) && wants_basic && authorization.is_some() && unasked.is_none() {
            self.over(answer);
            self.authorized().insert(host.address);
            answer = self.send(host.address, method, &target, accept, range, authorization.as_deref()).await?;
        }
        self.follow(answer, method, accept, range).await
    }

    fn authorized(&self) -> MutexGuard<'_, BTreeSet<SocketAddr>> {
        self.authorized.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows redirects. Authorization is not sent along: they lead to another host.
    async fn follow(&self, mut answer: Answer, method: &str, accept: &str, range: Option<&str>) -> Result<Answer> {
        for _ in 0..REDIRECTS_MAX {
            if !matches!(answer.exchange.status, Some(301 | 302 | 303 | 307 | 308)) {
                return Ok(answer);
            }
            let location = answer.exchange.header("location").to_owned();
            self.over(answer);
            let rest = location.strip_prefix("http://").with_context(|| format!("redirect to {location}"))?;
            let (address, target) = rest.split_once('/').context("a redirect without a path")?;
            answer = self.send(address.parse()?, method, &format!("/{target}"), accept, range, None).await?;
        }
        bail!("stopped after {REDIRECTS_MAX} redirects")
    }

    async fn send(
        &self,
        address: SocketAddr,
        method: &str,
        target: &str,
        accept: &str,
        range: Option<&str>,
        authorization: Option<&str>,
    ) -> Result<Answer> {
        let agent = match self.release {
            Release::V1 => "containerd/1.6.20~ds1",
            Release::V2 | Release::V2Transfer => "containerd/v2.2.4",
        };
        let mut headers = vec![("User-Agent", agent), ("Accept", accept)];
        headers.extend(range.map(|range| ("Range", range)));
        headers.extend(authorization.map(|authorization| ("Authorization", authorization)));
        if self.release != Release::V1 && method == "GET" {
            headers.push(("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"));
        }
        let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        raw::send(&self.place, address, &format!("{method} {target}"), &headers, self.patience).await
    }

    /// Writes an exchange down as over.
    fn over(&self, answer: Answer) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(answer.exchange);
    }
}
