//! A registry that behaves like Amazon ECR, on real sockets, with everything that goes wrong there.
//!
//! It is a fake: no AWS code, no storage, content computed or held in memory. Where it differs from
//! docker-registry it follows what is known of ECR:
//!
//! - a token API (`GetAuthorizationToken`, `SigV4` header and its region looked at, not the
//!   signature), and Basic with that token, else 401 with ECR's realm;
//! - a manifest GET has no Docker-Content-Digest, a HEAD has;
//! - a blob GET is 307 to a signed URL of a fake S3 at another address, which refuses Authorization
//!   (400), HEAD (403) and signatures that are over (403), and honours Range;
//! - a blob HEAD is 403 even with a good token.
//!
//! With `Auth::Bearer` it is a registry with a token server, as Docker Hub, GHCR and Quay are.
//! Everything is counted ([`counts`]), and anything can be made to fail ([`faults`]).

mod answers;
mod counts;
mod faults;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use darter_core::Digest;
use tokio::time::Instant;

use crate::image::{Image, Item};
use crate::net::Place;
use crate::tls::Authority;
use crate::wire::{Pace, Server};

pub use counts::{Count, Kind, Seen};
pub use faults::{Fault, Rule};

/// Who may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// Everybody.
    Public,
    /// Whoever has a token of the API, by Basic.
    Ecr,
    /// Whoever has a token of the token server, by Bearer. The server gives one to everybody, or to
    /// this user and password only.
    Bearer(Option<(String, String)>),
}

/// What an ECR is like.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who may read.
    pub auth: Auth,
    /// The 12 digits of the account.
    pub account: String,
    /// Requests for tokens must be signed for it.
    pub region: String,
    /// Whether all three servers speak https.
    pub tls: bool,
    /// Whether a blob is redirected to the object storage, else served at once.
    pub redirect: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            auth: Auth::Ecr,
            account: "123456789012".to_owned(),
            region: "us-east-1".to_owned(),
            tls: false,
            redirect: true,
        }
    }
}

/// What is in a registry, and what was said to its clients.
struct State {
    repositories: HashMap<String, Repository>,
    faults: faults::Faults,
    /// Passwords given out, and until when they are good.
    tokens: HashMap<String, Instant>,
    /// Signatures given out, and until when they are good.
    signatures: HashMap<String, Instant>,
    token_lifetime: Duration,
    signature_lifetime: Duration,
    total_pace: Option<Arc<Pace>>,
    connection_rate: Option<u64>,
    number: u64,
}

#[derive(Default)]
struct Repository {
    tags: HashMap<String, Digest>,
    manifests: HashMap<Digest, Item>,
    blobs: HashMap<Digest, Item>,
}

/// What the three servers share.
struct Shared {
    options: Options,
    /// Address of the object storage and of the registry itself, known once they listen.
    storage: std::sync::OnceLock<SocketAddr>,
    registry: std::sync::OnceLock<SocketAddr>,
    state: Mutex<State>,
    counts: Arc<counts::Counts>,
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scheme(&self) -> &'static str {
        if self.options.tls { "https" } else { "http" }
    }
}

/// A running fake ECR: the registry, the API that gives out tokens, and the object storage.
pub struct FakeEcr {
    shared: Arc<Shared>,
    authority: Option<Authority>,
    registry: Server<answers::Registry>,
    api: Server<answers::Api>,
    storage: Server<answers::Storage>,
}

impl FakeEcr {
    /// Starts one at the addresses of a place, on three free ports.
    pub fn start(place: &Place, options: Options) -> Result<Self> {
        let authority = if options.tls { Some(Authority::new()?) } else { None };
        let (address, elsewhere) = (place.address().to_string(), place.second_address());
        let tls = match &authority {
            Some(authority) => Some(authority.issue(&[&address, &elsewhere.to_string()])?.server_config()?),
            None => None,
        };
        let shared = Arc::new(Shared {
            options,
            storage: std::sync::OnceLock::new(),
            registry: std::sync::OnceLock::new(),
            state: Mutex::new(State {
                repositories: HashMap::new(),
                faults: faults::Faults::default(),
                tokens: HashMap::new(),
                signatures: HashMap::new(),
                token_lifetime: Duration::from_secs(12 * 60 * 60),
                signature_lifetime: Duration::from_secs(60 * 60),
                total_pace: None,
                connection_rate: None,
                number: 0,
            }),
            counts: Arc::default(),
        });
        let registry = Server::start(place, tls.clone(), Arc::new(answers::Registry(shared.clone())))?;
        let api = Server::start(place, tls.clone(), Arc::new(answers::Api(shared.clone())))?;
        let storage = SocketAddr::new(elsewhere, 0);
        let storage = Server::start_at(place, storage, tls, Arc::new(answers::Storage(shared.clone())))?;
        let _ = shared.registry.set(registry.address());
        let _ = shared.storage.set(storage.address());
        Ok(Self { shared, authority, registry, api, storage })
    }

    /// The name by which images of this registry are called.
    pub fn name(&self) -> String {
        darter_core::ecr::Ecr::host(&self.shared.options.account, &self.shared.options.region)
    }

    /// The address of the registry.
    pub fn address(&self) -> SocketAddr {
        self.registry.address()
    }

    /// Where the registry really is.
    pub fn url(&self) -> String {
        format!("{}://{}", self.shared.scheme(), self.registry.address())
    }

    /// Where the API that gives out tokens is.
    pub fn api_url(&self) -> String {
        format!("{}://{}", self.shared.scheme(), self.api.address())
    }

    /// Where the object storage is.
    pub fn storage_url(&self) -> String {
        format!("{}://{}", self.shared.scheme(), self.storage.address())
    }

    /// Whose certificates it shows, if it speaks https.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Puts an image into a repository, without any request.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) {
        let mut state = self.shared.state();
        let repository = state.repositories.entry(repository.to_owned()).or_default();
        repository.blobs.extend(image.blobs().map(|item| (item.digest(), item.clone())));
        repository.manifests.extend(image.all_manifests().map(|item| (item.digest(), item.clone())));
        repository.tags.insert(tag.to_owned(), image.root.digest());
    }

    /// A password that is good now, as if asked for at the API: what a pod's pull credential has.
    /// The user is `AWS`.
    pub fn password(&self) -> String {
        self.shared.state().new_token()
    }

    /// Makes passwords and bearer tokens given out from now on good for so long.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.shared.state().token_lifetime = lifetime;
    }

    /// No password given out so far is good any more.
    pub fn revoke_tokens(&self) {
        self.shared.state().tokens.clear();
    }

    /// Makes signed URLs given out from now on good for so long.
    pub fn set_signature_lifetime(&self, lifetime: Duration) {
        self.shared.state().signature_lifetime = lifetime;
    }

    /// No signed URL given out so far is good any more.
    pub fn expire_signatures(&self) {
        self.shared.state().signatures.clear();
    }

    /// Makes something go wrong.
    pub fn inject(&self, rule: Rule, fault: Fault) {
        self.shared.state().faults.add(rule, fault);
    }

    /// Nothing goes wrong any more.
    pub fn clear_faults(&self) {
        self.shared.state().faults.clear();
    }

    /// Limits blobs to so many bytes a second, all connections together and each by itself.
    pub fn set_rate(&self, total: Option<u64>, connection: Option<u64>) {
        let mut state = self.shared.state();
        state.total_pace = total.map(Pace::new);
        state.connection_rate = connection;
    }

    /// Refuses every connection, to all three servers, and closes the open ones.
    pub async fn down(&mut self) {
        self.registry.down().await;
        self.api.down().await;
        self.storage.down().await;
    }

    /// Answers again, at the same addresses.
    pub fn up(&mut self) -> Result<()> {
        self.registry.up()?;
        self.api.up()?;
        self.storage.up()
    }

    /// What was counted of a kind of request.
    pub fn count(&self, kind: Kind) -> Count {
        self.shared.counts.of(kind, None)
    }

    /// What was counted of a kind of request for one manifest or blob.
    pub fn count_of(&self, kind: Kind, digest: Digest) -> Count {
        self.shared.counts.of(kind, Some(digest))
    }

    /// Blob bytes sent, from the object storage or the registry itself.
    pub fn blob_bytes(&self) -> u64 {
        self.count(Kind::Object).bytes + self.count(Kind::Blob).bytes
    }

    /// Every request, in order.
    pub fn log(&self) -> Vec<Seen> {
        self.shared.counts.log()
    }

    /// Forgets what was counted.
    pub fn reset_counts(&self) {
        self.shared.counts.reset();
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn new_token(&mut self) -> String {
        let token = format!("token-{:06}", self.number());
        self.tokens.insert(token.clone(), Instant::now() + self.token_lifetime);
        token
    }

    fn new_signature(&mut self) -> String {
        let signature = Digest::of(&self.number().to_le_bytes()).hex();
        self.signatures.insert(signature.clone(), Instant::now() + self.signature_lifetime);
        signature
    }

    fn blob(&self, digest: &Digest) -> Option<Item> {
        self.repositories.values().find_map(|repository| repository.blobs.get(digest).cloned())
    }
}

fn is_good(given_out: &HashMap<String, Instant>, key: &str) -> bool {
    given_out.get(key).is_some_and(|end| Instant::now() < *end)
}
