//! One thing from one registry: its origins in order, its credentials, its redirects, its patience.

use std::time::Duration;

use darter_core::Digest;
use darter_core::range::Span;
use http::{HeaderValue, Method, Response, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::challenge;
use super::credential::{Account, Credential};
use super::limits::Weight;
use super::line::{Claim, Slot};
use super::retry::{Attempts, WAIT_MAX};
use super::send::{Ask, check, discard};
use super::signed::{Key, Known};
use super::target::Target;
use super::token::Wanted;
use super::url::{Place, shown};
use super::{Inner, OriginError};

/// What a host before the registry has from the request to the head of the response, its token and its
/// storage included. `mirror.answer_within` is 2.5 s, and the registry is still to be asked.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whose answer will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    /// The registry's own: only that says what a credential may read.
    Registry,
    /// That of the hosts before it: it says what they give, and nothing of the registry.
    Others,
    /// Anybody's, those hosts first: for bytes that a digest names, once the registry opened them.
    Anyone,
}

/// What is wanted of a registry.
pub(super) struct Job<'a> {
    pub(super) method: Method,
    /// What follows `/v2/`.
    pub(super) path: String,
    /// The repository that tokens are for.
    pub(super) repository: &'a str,
    pub(super) kind: &'static str,
    pub(super) accept: Option<&'static str>,
    pub(super) range: Option<Span>,
    pub(super) weight: Weight,
    /// Whose turn it is with.
    pub(super) claim: Claim,
    /// Whether it says what a tag means.
    pub(super) by_tag: bool,
    /// The blob, whose redirect may be known already.
    pub(super) blob: Option<Digest>,
}

/// A good response head, and the right to read its body.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) slot: Option<Slot>,
}

impl Inner {
    /// Asks until there is a good answer, or none to be had: the hosts before the registry once, the
    /// registry itself again where that may help; when it throttles only if `waits_when_throttled`.
    pub(super) async fn fetch(
        &self,
        job: &Job<'_>,
        whom: Whom,
        waits_when_throttled: bool,
        who: &Credential,
    ) -> Result<Answer, OriginError> {
        let (own, others) = self.targets.split_last().ok_or(OriginError::NotFound)?;
        if whom != Whom::Registry
            && let Some(answer) = self.walk(others, job, waits_when_throttled, who).await
        {
            return Ok(answer);
        }
        if whom == Whom::Others {
            return Err(OriginError::NotFound);
        }
        let mut attempts = Attempts::new(self.kept.attempts, &self.wire.metrics);
        loop {
            match self.at(own, job, waits_when_throttled, who).await {
                Ok(answer) => return Ok(answer),
                Err(error) if error.is_throttling() && !waits_when_throttled => return Err(error),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    /// Each host before the registry once, in order, until one gives it.
    async fn walk(&self, others: &[Target], job: &Job<'_>, waits: bool, who: &Credential) -> Option<Answer> {
        for target in others.iter().filter(|target| target.resolves || !job.by_tag) {
            let answer = match target.is_own {
                true => self.at(target, job, waits, who).await.map(Some),
                false if !target.away.holds(Instant::now()) => self.hurried(target, job, who).await,
                false => Ok(None),
            };
            match answer {
                Ok(Some(answer)) => return Some(answer),
                Ok(None) => {}
                Err(error) => {
                    let (host, error) = (&target.place, crate::log::chain(&error));
                    tracing::debug!(%host, %error, "an origin does not give it; asking the next");
                }
            }
        }
        None
    }

    /// One attempt at one origin that is not the registry: short, and remembered if in vain.
    /// `None`: it is away, and was not asked.
    async fn hurried(&self, target: &Target, job: &Job<'_>, who: &Credential) -> Result<Option<Answer>, OriginError> {
        // That we are busy says nothing about the host.
        let slot = self.slot(job).await;
        // Those before us in the queue may have found out.
        if !target.away.may_ask(Instant::now()) {
            return Ok(None);
        }
        let asked = tokio::time::timeout(PATIENCE, self.head(target, job, who)).await;
        let asked = asked.unwrap_or_else(|_| {
            self.wire.count(job.kind, 0);
            Err(OriginError::TimedOut { host: target.place.to_string(), after: PATIENCE })
        });
        let (registry, host) = (&self.wire.label, &target.place);
        let away = asked.as_ref().err().filter(|error| error.is_away());
        let is_news = if away.is_some() { target.away.begins(Instant::now()) } else { target.away.ends() };
        match away {
            Some(error) if is_news => {
                let error = crate::log::chain(error);
                tracing::warn!(%registry, %host, %error, "an origin is away: going past it until it is back");
            }
            None if is_news => tracing::info!(%registry, %host, "the origin is back"),
            _ => {}
        }
        Ok(Some(Answer { response: asked?, slot }))
    }

    /// One attempt at the registry, when it may be asked: at once, or not at all, unless it `waits`.
    async fn at(&self, own: &Target, job: &Job<'_>, waits: bool, who: &Credential) -> Result<Answer, OriginError> {
        let deadline = Instant::now() + if waits { WAIT_MAX } else { Duration::ZERO };
        let slot = loop {
            // Only the storage behind the registry has to be asked where a URL is known that is good.
            let storage = self.signed(own, job, who);
            let (pauses, place) = match &storage {
                Some(storage) => (&*self.wire.storages, storage),
                None => (&self.kept.pauses, &own.place),
            };
            pauses.over(place, deadline).await?;
            let slot = self.slot(job).await;
            // Those before us in the queue may have been told to wait.
            if !pauses.holds(place) {
                break slot;
            }
        };
        let response = self.head(own, job, who).await?;
        Ok(Answer { response, slot })
    }

    /// The storage to which a URL leads that is known for the blob, and good.
    fn signed(&self, target: &Target, job: &Job<'_>, who: &Credential) -> Option<Place> {
        let known = self.kept.signed.peek(&key(target, job, job.blob?, who))?;
        match &known {
            Known::Signed { uri, .. } if known.is_good(Instant::now(), None) => Place::of(uri),
            _ => None,
        }
    }

    async fn slot(&self, job: &Job<'_>) -> Option<Slot> {
        self.kept.slots.take(job.weight, &job.claim, job.range.map_or(0, |span| span.start)).await
    }

    /// The head of what one origin answers.
    async fn head(&self, target: &Target, job: &Job<'_>, who: &Credential) -> Result<Response<Incoming>, OriginError> {
        let uri: Uri =
            format!("{}/{}", target.root, job.path).parse().map_err(|_| OriginError::Lied("no such path"))?;
        let ask = Ask {
            method: job.method.clone(),
            uri: uri.clone(),
            kind: job.kind,
            accept: job.accept,
            range: job.range,
            authorization: None,
        };
        let response = match job.blob {
            Some(digest) => self.blob_at(target, ask, job, who, &key(target, job, digest, who)).await?,
            None => {
                let (ask, response) = self.authorized(target, ask, job.repository, who).await?;
                self.wire.follow(ask, response).await?
            }
        };
        let response = check(&uri, response)?;
        if job.range.is_none() && response.status() == StatusCode::PARTIAL_CONTENT {
            return Err(OriginError::Lied("206 to a request without a range"));
        }
        Ok(response)
    }

    /// A blob, by the signed URL that is known for it where there is one.
    async fn blob_at(
        &self,
        target: &Target,
        ask: Ask,
        job: &Job<'_>,
        who: &Credential,
        key: &Key,
    ) -> Result<Response<Incoming>, OriginError> {
        let mut refused = None;
        loop {
            // Held while the registry is asked: the other ranges of the blob wait for its answer.
            let mut slot = self.kept.signed.lock(key).await?;
            let known = slot.clone().filter(|known| known.is_good(Instant::now(), refused.as_ref()));
            match known {
                Some(Known::Signed { uri, .. }) => {
                    drop(slot);
                    let mut ask = ask.clone();
                    ask.uri = uri.clone();
                    let response = self.wire.hop(&ask).await?;
                    let response = self.wire.follow(ask, response).await?;
                    if refused.is_none() && is_over(response.status()) {
                        refused = Some(uri);
                        discard(response).await;
                        continue;
                    }
                    return storage(&uri, response);
                }
                Some(Known::Direct) => {
                    drop(slot);
                    let (ask, response) = self.authorized(target, ask, job.repository, who).await?;
                    return self.wire.follow(ask, response).await;
                }
                None => {
                    *slot = None;
                    let (ask, response) = self.authorized(target, ask, job.repository, who).await?;
                    let Some(next) = self.wire.next_hop(&ask, &response)? else {
                        *slot = response.status().is_success().then_some(Known::Direct);
                        return Ok(response);
                    };
                    // Without a credential it is the URL itself that opens the blob.
                    let is_signed = ask.uri.authority() != next.uri.authority();
                    *slot = is_signed.then(|| Known::signed(next.uri.clone(), Instant::now()));
                    drop(slot);
                    discard(response).await;
                    let uri = next.uri.clone();
                    let response = self.wire.hop(&next).await?;
                    let response = self.wire.follow(next, response).await?;
                    return if is_signed { storage(&uri, response) } else { Ok(response) };
                }
            }
        }
    }

    /// The first answer of an origin that is no challenge, and the request it answers.
    async fn authorized(
        &self,
        target: &Target,
        mut ask: Ask,
        repository: &str,
        who: &Credential,
    ) -> Result<(Ask, Response<Incoming>), OriginError> {
        let account = if target.is_own { self.account(who).await? } else { None };
        let known = target.bearer();
        let wanted = |bearer| Wanted { from: &target.place, bearer, repository, account: account.as_ref() };
        ask.authorization = match &known {
            Some(bearer) => Some(self.kept.tokens.get(&self.wire, &wanted(bearer), None).await?),
            None => account.as_ref().and_then(Account::header),
        };
        let response = self.once(target, &ask).await?;
        let status = response.status();
        if status != StatusCode::UNAUTHORIZED && status != StatusCode::FORBIDDEN {
            return Ok((ask, response));
        }
        let named = challenge::bearer(response.headers()).filter(|_| status == StatusCode::UNAUTHORIZED);
        let another = match &named {
            Some(bearer) => {
                target.learn(named.clone());
                Some(self.kept.tokens.get(&self.wire, &wanted(bearer), ask.authorization.as_ref()).await?)
            }
            None => self.another(target, who, account.as_ref(), known.is_some(), status).await?,
        };
        let Some(another) = another else { return Ok((ask, response)) };
        discard(response).await;
        ask.authorization = Some(another);
        let response = self.once(target, &ask).await?;
        Ok((ask, response))
    }

    /// What an origin itself says. When it wants to be left alone, all requests of this node hear it.
    async fn once(&self, target: &Target, ask: &Ask) -> Result<Response<Incoming>, OriginError> {
        let response = self.wire.once(ask).await?;
        if target.is_own {
            self.kept.pauses.heed(&target.place, &response);
        }
        Ok(response)
    }

    async fn account(&self, who: &Credential) -> Result<Option<Account>, OriginError> {
        match who {
            Credential::Anonymous => Ok(None),
            Credential::Caller(basic) => Ok(Some(Account::Password(basic.clone()))),
            Credential::Node => self.kept.node.get(&self.wire, None).await,
        }
    }

    /// What else could be shown to an origin that took neither token nor password.
    async fn another(
        &self,
        target: &Target,
        who: &Credential,
        account: Option<&Account>,
        showed_token: bool,
        status: StatusCode,
    ) -> Result<Option<HeaderValue>, OriginError> {
        let Some(account) = account else { return Ok(None) };
        if showed_token && status == StatusCode::UNAUTHORIZED {
            // It wants Basic now.
            target.learn(None);
            return Ok(account.header());
        }
        if !matches!(who, Credential::Node) || showed_token {
            return Ok(None);
        }
        let another = self.kept.node.another(&self.wire, account, status.as_u16()).await?;
        Ok(another.as_ref().and_then(Account::header))
    }
}

/// What a signed URL of a blob is kept for.
fn key(target: &Target, job: &Job<'_>, digest: Digest, who: &Credential) -> Key {
    let credential = if target.is_own { who.key() } else { Credential::Anonymous.key() };
    Key { origin: target.root.clone(), repository: job.repository.to_owned(), digest, credential }
}

/// Whether a storage says that a signed URL is no longer good. S3 says 400 where the session behind
/// the signature is over (`ExpiredToken`).
fn is_over(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 410)
}

/// A storage that refuses a URL which the registry has just signed says nothing about the credential.
fn storage(uri: &Uri, response: Response<Incoming>) -> Result<Response<Incoming>, OriginError> {
    if is_over(response.status()) {
        let status = response.status().as_u16();
        return Err(OriginError::Status { host: shown(uri), status, retry_after: None });
    }
    Ok(response)
}
