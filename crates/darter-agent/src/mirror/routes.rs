//! From a request to its answer: the rules of the distribution API on top of `images`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_core::access::Place;
use darter_core::oci::{self, Call, Code, OciError, Request};
use darter_core::range::{ByteRange, Span};
use darter_core::{Digest, Reference, Repository};
use tokio::time::timeout_at;
use tracing::{debug, info};

use super::answer::{Answer, Body};
use super::chunks::{self, Chunks};
use super::seen::Seen;
use super::send::{Patience, SendError, Sent};
use crate::config::Config;
use crate::head::{Head, Method};
use crate::images::{Asker, BlobFound, Images, ManifestFound, Refusal, Share};
use crate::log::chain;
use crate::metrics::{
    BytesLabels, FirstByteLabels, Metrics, ReasonLabels, RegistryLabel, RegistryReasonLabels, RequestLabels, Source,
};
use crate::origin::{Credential, OriginError};
use crate::pulls::PullError;
use crate::sites::{Site, Sites};

/// A manifest up to this is sent from memory: a socket takes it at once. A larger one goes out of its file.
const IN_MEMORY_MAX: u64 = 16 * 1024;

/// What blobs are called: nothing that a client acts on, and never to be unpacked on the way.
const OCTET_STREAM: &str = "application/octet-stream";

/// containerd 2.3 and later give a host up that sends no headers for 30 s.
const FIRST_BYTE_MAX: Duration = Duration::from_secs(25);

/// A request, as far as it was understood: what the metrics name.
pub(super) struct Counted {
    kind: &'static str,
    registry: RegistryLabel,
    /// When its head was read.
    started: Instant,
    /// Of a pull by chunks, if it is answered 206.
    is_chunk: bool,
}

/// All that an answer is made from.
pub(super) struct Routes {
    sites: Arc<Sites>,
    images: Images,
    metrics: Arc<Metrics>,
    answer_within: Duration,
    patience: Patience,
    parallel_chunks: bool,
    seen: Seen,
    chunks: Chunks,
}

impl Routes {
    pub(super) fn new(config: &Config, sites: Arc<Sites>, images: Images, metrics: Arc<Metrics>) -> Self {
        let patience = Patience { client: config.mirror.client_timeout.0, pull: config.mirror.stall.0 };
        Self {
            sites,
            images,
            metrics,
            answer_within: config.mirror.answer_within.0,
            patience,
            parallel_chunks: config.mirror.parallel_chunks,
            seen: Seen::default(),
            chunks: Chunks::default(),
        }
    }

    pub(super) const fn patience(&self) -> Patience {
        self.patience
    }

    pub(super) fn seen(&self) -> Seen {
        self.seen.clone()
    }

    pub(super) const fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// The answer to a request. Always within `answer_within`, for a blob that waits for its turn from then
    /// on, or where other nodes are asked for it within `stall` of its last byte that came; and within
    /// `FIRST_BYTE_MAX`: containerd before 2.3 would wait for ever. While `stopping` only what no other host
    /// would be asked for is looked for.
    pub(super) async fn answer(&self, head: &Head, stopping: bool) -> (Counted, Answer) {
        let started = Instant::now();
        self.seen.note(head.user_agent.as_deref());
        let (kind, registry, answer) = match self.understand(head) {
            Ok((call, site)) => {
                let label = site.as_ref().map_or_else(RegistryLabel::other, |site| site.label.clone());
                let kind = call.request.kind();
                let answer = if stopping && !is_later_chunk(head, &call.request) {
                    Answer::error(&OciError::not_here(&call.request, "darter: the agent is stopping"))
                        .because("stopping")
                } else {
                    self.in_time(head, &call, site.as_ref()).await
                };
                (kind, label, answer.namespace(call.registry.as_ref()))
            }
            Err(error) => ("unknown", RegistryLabel::other(), misunderstood(&error)),
        };
        let is_chunk = kind == "blob" && matches!(range(head), Some(ByteRange::From(_)));
        (Counted { kind, registry, started, is_chunk }, answer)
    }

    async fn in_time(&self, head: &Head, call: &Call, site: Option<&Arc<Site>>) -> Answer {
        let started = Instant::now();
        let mut within = self.answer_within;
        let route = self.route(head, call, site);
        tokio::pin!(route);
        loop {
            if let Ok(answer) = timeout_at((started + within).into(), &mut route).await {
                return answer;
            }
            match self.worth_waiting(&call.request, started) {
                Some(longer) if longer > within => within = longer,
                _ => break,
            }
        }
        info!(target = %head.target, ?within, "no answer in time: containerd goes to the registry");
        Answer::error(&OciError::not_here(&call.request, "darter: no answer from the origin in time")).because("late")
    }

    /// How long after `started` there may still be an answer. A blob that waits behind others of a registry
    /// that is slow is none that it does not give: containerd would wait there too, and slow down the others.
    /// With other nodes the first piece of a blob comes when one has read it, and where that one dies, when
    /// the next has: it is waited for as the rest of a body is.
    fn worth_waiting(&self, request: &Request, started: Instant) -> Option<Duration> {
        let Request::Blob { digest, .. } = request else { return None };
        let came = self.images.came_last(digest, FIRST_BYTE_MAX)?.max(started);
        let patience = if self.images.have_company() { self.patience.pull } else { self.answer_within };
        let longer = came.saturating_duration_since(started) + patience;
        Some(longer.min(FIRST_BYTE_MAX.max(self.patience.pull)))
    }

    fn understand(&self, head: &Head) -> Result<(Call, Option<Arc<Site>>), OciError> {
        if head.method == Method::Other {
            return Err(OciError::new(405, Code::Unsupported, "darter: a pull-only mirror answers GET and HEAD"));
        }
        if head.has_body {
            return Err(OciError::new(400, Code::RequestInvalid, "darter: no request of a pull has a body"));
        }
        let call = oci::parse(&head.target)?;
        let site = self.sites.get(call.registry.as_ref());
        if site.is_none() && call.request != Request::Base {
            let message = match &call.registry {
                Some(registry) => format!("darter: {registry} is not mirrored here"),
                None => {
                    "darter: the request names no registry (ns=), and mirror.default_registry is not set".to_owned()
                }
            };
            return Err(OciError::new(404, Code::NameUnknown, message));
        }
        Ok((call, site))
    }

    async fn route(&self, head: &Head, call: &Call, site: Option<&Arc<Site>>) -> Answer {
        let Some(site) = site else {
            return Answer::new(200, Source::None, Body::Bytes(Bytes::from_static(b"{}")))
                .header("Content-Type", "application/json");
        };
        let asker = |repository: &Repository| Asker {
            site: site.clone(),
            repository: repository.clone(),
            caller: head.authorization.as_deref().and_then(Credential::from_header),
        };
        let outcome = match &call.request {
            Request::Base => {
                return Answer::new(200, Source::None, Body::Bytes(Bytes::from_static(b"{}")))
                    .header("Content-Type", "application/json");
            }
            Request::Manifest { repository, reference } => self.manifest(head, &asker(repository), reference).await,
            Request::Blob { repository, digest } => self.blob(head, &asker(repository), *digest).await,
            Request::Tags { repository, query } => {
                self.pass(&asker(repository), format!("{repository}/tags/list"), query).await
            }
            Request::Referrers { repository, digest, query } => {
                self.pass(&asker(repository), format!("{repository}/referrers/{digest}"), query).await
            }
        };
        outcome.unwrap_or_else(|refusal| refused(&call.request, &refusal))
    }

    async fn manifest(&self, head: &Head, asker: &Asker, reference: &Reference) -> Result<Answer, Refusal> {
        // containerd HEADs a tag even when it has the image (AlwaysPull); only a GET says that the
        // layers will follow.
        let ahead = head.method == Method::Get;
        let ManifestFound { digest, media_type, content, source, kept, room } =
            self.images.manifest(asker, reference, ahead).await?;
        if matches_etag(head.if_none_match.as_deref(), &digest) {
            let answer = Answer::new(304, source, Body::Bytes(Bytes::new()));
            return Ok(answer.content(digest, &media_type));
        }
        let size = content.len() as u64;
        // A client that does not read must not keep megabytes here.
        let file = kept.filter(|_| size > IN_MEMORY_MAX);
        let body = |span: Span| match &file {
            Some(blob) => Some(Body::File(blob.clone(), span, None)),
            None => {
                let (start, end) = (usize::try_from(span.start).ok()?, usize::try_from(span.end).ok()?);
                Some(Body::Bytes(content.slice(start..end)))
            }
        };
        let room = room.filter(|_| file.is_none());
        let answer = match self.wanted_span(head, &digest, size) {
            Wanted::Everything => body(Span { start: 0, end: size }).map(|body| Answer::new(200, source, body)),
            Wanted::Part(span) => body(span).map(|body| partial(source, body, span, size)),
            Wanted::Nothing => None,
        };
        Ok(answer.map_or_else(|| unsatisfiable(size), |answer| answer.content(digest, &media_type)).taking(room))
    }

    async fn blob(&self, head: &Head, asker: &Asker, digest: Digest) -> Result<Answer, Refusal> {
        if head.method == Method::Head {
            let size = self.images.blob_size(asker, digest).await?;
            return Ok(Answer::new(200, Source::None, Body::Absent(size)).content(digest, OCTET_STREAM));
        }
        // A later offset of a blob that is not whole here is the origin's: containerd reads on
        // there, and a chunk of a parallel fetch must never start a download of its own.
        let from_the_start = range(head).is_none_or(ByteRange::is_everything);
        let found = if from_the_start {
            self.images.blob(asker, digest).await?
        } else {
            self.images.complete_blob(asker, digest).await?
        };
        let answer = match found {
            BlobFound::Complete(blob) => self.complete(head, digest, &blob),
            // 200 also to `bytes=0-`: a 206 would make containerd open parallel ranges, on which no
            // hand-over works.
            BlobFound::Coming(reader) => {
                Answer::new(200, reader.source(), Body::Trail(reader)).content(digest, OCTET_STREAM)
            }
        };
        Ok(answer.to(self.images.share(asker, digest)?))
    }

    fn complete(&self, head: &Head, digest: Digest, blob: &crate::store::Blob) -> Answer {
        let (source, size) = (blob.source(), blob.size());
        if matches_etag(head.if_none_match.as_deref(), &digest) {
            return Answer::new(304, source, Body::Bytes(Bytes::new())).content(digest, OCTET_STREAM);
        }
        let doubt = self.images.doubt(blob);
        let wanted = match self.wanted_span(head, &digest, size) {
            // As one that is not complete: a body that may be cut short must be one stream.
            Wanted::Part(span) if doubt.is_some() && span.len() == size => Wanted::Everything,
            wanted => wanted,
        };
        let body = |span| Body::File(blob.clone(), span, doubt);
        let answer = match wanted {
            Wanted::Everything => Answer::new(200, source, body(Span { start: 0, end: size })),
            Wanted::Part(span) => partial(source, body(span), span, size),
            Wanted::Nothing => return unsatisfiable(size),
        };
        answer.content(digest, OCTET_STREAM)
    }

    fn wanted_span(&self, head: &Head, digest: &Digest, size: u64) -> Wanted {
        // RFC 9110 §14.2: a Range is for GET. containerd takes the length that a HEAD tells for the size.
        if head.method != Method::Get {
            return Wanted::Everything;
        }
        let Some(range) = range(head) else { return Wanted::Everything };
        // A 206 would make containerd open chunks. A server may leave any Range unheeded (RFC 9110 §14.2).
        if range.is_everything() && !self.parallel_chunks {
            return Wanted::Everything;
        }
        // If-Range with another validator than ours: what the client has is of something else.
        if head.if_range.is_some() && !matches_etag(head.if_range.as_deref(), digest) {
            return Wanted::Everything;
        }
        range.resolve(size).map_or(Wanted::Nothing, Wanted::Part)
    }

    /// Tags and referrers are the origin's to tell; a 404 of its own is passed on too.
    async fn pass(&self, asker: &Asker, path: String, query: &str) -> Result<Answer, Refusal> {
        let path = if query.is_empty() { path } else { format!("{path}?{query}") };
        let (passed, room) = self.images.pass(asker, &path).await?;
        let mut answer = Answer::new(passed.status, Source::Origin, Body::Bytes(passed.content)).taking(Some(room));
        for (name, value) in &passed.headers {
            answer = answer.header(name, value);
        }
        Ok(answer)
    }

    /// Counts an answer once it is on the wire.
    pub(super) fn count(&self, counted: &Counted, answer: &Answer, sent: &Sent) {
        let Counted { kind, registry, started, is_chunk } = counted;
        if *is_chunk && answer.status == 206 {
            self.chunks.note();
        }
        let (registry, source) = (registry.clone(), answer.source);
        let request = RequestLabels { registry: registry.clone(), kind, code: answer.status, source };
        self.metrics.mirror_requests.get_or_create(&request).inc();
        if let Some(reason) = answer.refused {
            let labels = RegistryReasonLabels { registry: registry.clone(), reason };
            self.metrics.mirror_refusals.get_or_create(&labels).inc();
        }
        let Some(first) = sent.first_after(*started).filter(|_| source != Source::None) else { return };
        for (source, bytes) in shares(answer, sent) {
            let labels = BytesLabels { registry: registry.clone(), source };
            self.metrics.mirror_bytes.get_or_create(&labels).inc_by(bytes);
        }
        let labels = FirstByteLabels { kind, source };
        self.metrics.mirror_first_byte_seconds.get_or_create(&labels).observe(first.as_secs_f64());
    }

    /// Notes that a body was sent to its end. What is given while it comes has the line of its pull; what
    /// is here already has one here, chunks only where somebody looks closely: a layer has hundreds.
    pub(super) fn given(&self, counted: &Counted, answer: &Answer, sent: &Sent) {
        let (Body::File(blob, span, _), Some(share)) = (&answer.body, &answer.share) else { return };
        if span.end == blob.size() {
            self.images.given(blob);
        }
        let (digest, source, bytes) = (share.digest, answer.source.as_str(), sent.bytes);
        let Place { registry, repository } = &share.place;
        let seconds = counted.started.elapsed().as_secs_f64();
        let first_byte_seconds = sent.first_after(counted.started).map(|first| first.as_secs_f64());
        if span.len() == blob.size() {
            info!(%registry, %repository, %digest, source, bytes, seconds, first_byte_seconds, "gave a blob that is here");
        } else {
            debug!(%registry, %repository, %digest, source, bytes, from = span.start, seconds, first_byte_seconds,
                "gave a part of a blob that is here");
        }
    }

    /// Notes a body that was cut short, so that the next requests for it get their 404 at once.
    pub(super) fn handed_over(&self, share: Option<&Share>, error: &SendError) {
        let reason = match error {
            SendError::Store(_) => "store",
            SendError::Rotten(_) => "rotten",
            SendError::Stalled(_) => "stalled",
            SendError::Pull(_) => "pull_failed",
            SendError::Stopped => "stopped",
            SendError::Client(_) | SendError::Slow(_) => return,
        };
        self.metrics.mirror_handovers.get_or_create(&ReasonLabels { reason }).inc();
        let Some(share) = share else { return };
        self.images.hand_over(share);
        if error.is_of_the_file() {
            // Whoever comes next must not get the same broken file.
            self.images.forget(&share.digest);
        }
    }

    /// Counts a connection that was ended for what its client did.
    pub(super) fn rejected(&self, reason: &'static str) {
        self.metrics.mirror_rejected.get_or_create(&ReasonLabels { reason }).inc();
    }
}

/// Where the bytes that went out came from.
fn shares(answer: &Answer, sent: &Sent) -> Vec<(Source, u64)> {
    match &answer.body {
        Body::Trail(reader) => reader.shares(sent.bytes),
        _ => vec![(answer.source, sent.bytes)],
    }
}

fn range(head: &Head) -> Option<ByteRange> {
    head.range.as_deref().and_then(ByteRange::parse)
}

/// Whether this may be one of the chunks of a pull that began before.
fn is_later_chunk(head: &Head, request: &Request) -> bool {
    head.method == Method::Get && matches!(request, Request::Blob { .. }) && chunks::is_later(range(head))
}

/// The part of a body that a request wants.
enum Wanted {
    Everything,
    Part(Span),
    Nothing,
}

fn matches_etag(header: Option<&str>, digest: &Digest) -> bool {
    let Some(header) = header else { return false };
    let quoted = format!("\"{digest}\"");
    header.split(',').any(|tag| matches!(tag.trim(), "*") || tag.trim() == quoted)
}

fn partial(source: Source, body: Body, span: Span, size: u64) -> Answer {
    let range = format!("bytes {}-{}/{size}", span.start, span.end - 1);
    Answer::new(206, source, body).header("Content-Range", &range)
}

fn unsatisfiable(size: u64) -> Answer {
    let error = OciError::new(416, Code::RequestInvalid, "darter: the range is not in the content");
    Answer::error(&error).header("Content-Range", &format!("bytes */{size}"))
}

/// 404, or 401 where the pull's credential is wanted: nothing else ever tells of a failure.
/// containerd repeats a 429 at once, and a 5xx would mask the origin's own answer.
fn refused(request: &Request, refusal: &Refusal) -> Answer {
    match refusal {
        Refusal::Challenge => {
            let message = "darter: the pull's own credential is wanted";
            return Answer::challenge(&OciError::new(401, Code::Unauthorized, message));
        }
        Refusal::Origin(OriginError::NotFound) | Refusal::NotHere(_) => {
            debug!(kind = request.kind(), reason = %chain(refusal), "not here");
        }
        Refusal::Pull(PullError::Origin(error)) if matches!(**error, OriginError::NotFound) => {
            debug!(kind = request.kind(), reason = %chain(refusal), "not here");
        }
        Refusal::Origin(_) | Refusal::Pull(_) => {
            info!(kind = request.kind(), reason = %chain(refusal), "not here; containerd goes to the origin");
        }
    }
    Answer::error(&OciError::not_here(request, format!("darter: {}", chain(refusal)))).because(refusal.reason())
}

/// What names no registry of ours, or is no request of a pull.
fn misunderstood(error: &OciError) -> Answer {
    let answer = Answer::error(error);
    match (error.status, error.code) {
        (404, Code::NameUnknown) => answer.because("not_mirrored"),
        (404, _) => answer.because("no_endpoint"),
        _ => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_is_the_quoted_digest() {
        let digest = Digest::of(b"x");
        assert!(matches_etag(Some(&format!("\"{digest}\"")), &digest));
        assert!(matches_etag(Some(&format!("\"other\", \"{digest}\"")), &digest));
        assert!(matches_etag(Some("*"), &digest));
        assert!(!matches_etag(Some(&digest.to_string()), &digest));
        assert!(!matches_etag(None, &digest));
    }
}
