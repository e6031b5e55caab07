//! What was asked for and what was sent: the oracle for "read from the origin only once".

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use darter_core::Digest;

use crate::wire::{Reply, Request};

/// Requests kept in the log. A test looks at a few hundred; past this only counting goes on.
const LOG_MAX: usize = 100_000;

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Credentials: the ECR API, or a bearer token server.
    Token,
    /// HEAD of a manifest.
    ManifestHead,
    /// GET of a manifest.
    Manifest,
    /// HEAD of a blob.
    BlobHead,
    /// GET of a blob at the registry, which redirects.
    Blob,
    /// A blob at the object storage that the registry redirects to.
    Object,
    /// Anything else.
    Other,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What it was for.
    pub kind: Kind,
    /// The manifest or blob, where one is meant.
    pub digest: Option<Digest>,
    /// Method and target.
    pub line: String,
    /// Its Range header; empty if none.
    pub range: String,
    /// Its Authorization header; empty if none.
    pub authorization: String,
    /// Its User-Agent.
    pub agent: String,
    /// The status of the answer.
    pub status: u16,
    bytes: Arc<AtomicU64>,
}

impl Seen {
    /// Body bytes sent so far. What the kernel took counts as sent, also if the client left before.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Requests added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// How many, whatever the answer.
    pub requests: u64,
    /// How many were answered 2xx or 3xx.
    pub granted: u64,
    /// Body bytes sent.
    pub bytes: u64,
    /// The most that were being answered at once.
    pub at_once: u64,
}

#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    granted: u64,
    bytes: Arc<AtomicU64>,
    active: u64,
    at_once: u64,
}

/// What is counted together. Without a digest: all of the kind.
type Key = (Kind, Option<Digest>);

#[derive(Debug, Default)]
struct State {
    tallies: HashMap<Key, Tally>,
    log: Vec<Seen>,
}

/// The counters of one server.
#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<State>);

/// One request while it is being answered.
pub(super) struct Active {
    counts: Arc<Counts>,
    keys: Vec<Key>,
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut state = self.counts.lock();
        for key in &self.keys {
            if let Some(tally) = state.tallies.get_mut(key) {
                tally.active -= 1;
            }
        }
    }
}

impl Counts {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request whose answer is about to be sent, and from then on the bytes of the answer.
    pub(super) fn begin(self: &Arc<Self>, request: &Request, kind: Kind, digest: Option<Digest>, reply: &mut Reply) {
        let mut keys = vec![(kind, None)];
        keys.extend(digest.map(|digest| (kind, Some(digest))));
        let bytes = Arc::new(AtomicU64::new(0));
        reply.sent.push(bytes.clone());
        let mut state = self.lock();
        for key in &keys {
            let tally = state.tallies.entry(*key).or_default();
            tally.requests += 1;
            tally.granted += u64::from((200..400).contains(&reply.status));
            tally.active += 1;
            tally.at_once = tally.at_once.max(tally.active);
            reply.sent.push(tally.bytes.clone());
        }
        if state.log.len() < LOG_MAX {
            state.log.push(Seen {
                kind,
                digest,
                line: format!("{} {}", request.method, request.target),
                range: request.header("range").to_owned(),
                authorization: request.header("authorization").to_owned(),
                agent: request.header("user-agent").to_owned(),
                status: reply.status,
                bytes,
            });
        }
        drop(state);
        reply.until_sent = Some(Box::new(Active { counts: self.clone(), keys }));
    }

    /// Everything of a kind, or of a kind and a digest.
    pub(super) fn of(&self, kind: Kind, digest: Option<Digest>) -> Count {
        let state = self.lock();
        let count = |tally: &Tally| Count {
            requests: tally.requests,
            granted: tally.granted,
            bytes: tally.bytes.load(Ordering::Relaxed),
            at_once: tally.at_once,
        };
        state.tallies.get(&(kind, digest)).map(count).unwrap_or_default()
    }

    pub(super) fn log(&self) -> Vec<Seen> {
        self.lock().log.clone()
    }

    /// Forgets what was counted. Requests still being answered go on being counted as active.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.log.clear();
        state.tallies.retain(|_, tally| tally.active > 0);
        for tally in state.tallies.values_mut() {
            (tally.requests, tally.granted, tally.at_once) = (0, 0, tally.active);
            tally.bytes.store(0, Ordering::Relaxed);
        }
    }
}
