//! Rights to read blobs from other nodes, where pieces go in plaintext (`swarm.tls = false`).
//!
//! Nothing on the data plane says who asks there, so a token does, which a member gets on the control
//! plane. One is asked for before the first request to a member for a blob, kept, and renewed at half
//! of its life as long as pieces are asked for: a pull waits for it once. `Table` is pure: the time is
//! an argument.
//! Not here: what a token is and whether it is right (`darter_core::swarm::token`).

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use darter_core::Digest;
use darter_core::swarm::PeerId;
use darter_core::swarm::token::{LIFETIME, Secret, Token};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::control::ControlHandle;
use super::identity::random;

/// From then on another is asked for: there is as much time again for it to come.
const RENEW: Duration = Duration::from_secs(LIFETIME.as_secs() / 2);
/// From then on one is not used any more: a request may wait for a connection.
const USABLE: Duration = Duration::from_secs(LIFETIME.as_secs() - 5);
/// A question that was not answered by then got lost, and is asked again: many round trips.
const AGAIN: Duration = Duration::from_millis(300);
/// How long a request waits for its token. Long before, somebody else is asked for the same piece too.
const PATIENCE: Duration = Duration::from_secs(2);
/// Rights that are kept: 48 neighbours of each of some 80 blobs on their way. Past this the one that was
/// used longest ago goes.
const RIGHTS_MAX: usize = 4096;

/// The tokens of this node: those that it gives, and those that it has.
pub(super) struct Tokens {
    control: ControlHandle,
    secret: Secret,
    table: Mutex<Table>,
    /// Something came, or went.
    changed: Notify,
}

impl Tokens {
    /// With a new secret: what an earlier life of this agent gave opens nothing.
    pub(super) fn new(control: ControlHandle) -> io::Result<Self> {
        Ok(Self { control, secret: Secret(random()?), table: Mutex::default(), changed: Notify::new() })
    }

    /// What the tokens that this node gives are made with.
    pub(super) const fn secret(&self) -> &Secret {
        &self.secret
    }

    /// A peer wants the right to read a blob here: a member gets it, for the address that it speaks from.
    pub(super) fn wanted(&self, from: PeerId, blob: Digest) {
        let Some((exchange, _)) = self.control.member(from) else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let token = Token::new(&self.secret, from, &blob, exchange.ip(), now);
        self.control.give_token(from, blob, token);
    }

    /// A peer gives this node the right to read a blob there.
    pub(super) fn came(&self, from: PeerId, blob: Digest, token: Token) {
        if self.table().came((from, blob), token) {
            self.changed.notify_waiters();
        } else {
            debug!(peer = %from, %blob, "a token that was not asked for");
        }
    }

    /// The last connection to a peer is gone: when it comes back it may have another secret.
    pub(super) fn lost(&self, peer: PeerId) {
        self.table().rights.retain(|(other, _), _| *other != peer);
    }

    /// A peer did not take its own token.
    pub(super) fn refused(&self, peer: PeerId, blob: Digest) {
        self.table().rights.remove(&(peer, blob));
    }

    /// The right to read a blob from a peer now. `None`: the peer does not give it.
    pub(super) async fn get(&self, peer: PeerId, blob: Digest) -> Option<Token> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the look: what comes in between is not missed.
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let now = Instant::now();
            let Look { token, is_to_ask } = self.table().look((peer, blob), now);
            if is_to_ask {
                self.control.want_token(peer, blob);
            }
            if token.is_some() || now >= deadline {
                return token;
            }
            // Either is a reason to look again.
            let _ = timeout_at(deadline.min(now + AGAIN), changed).await;
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What this node may read where.
#[derive(Default)]
struct Table {
    rights: BTreeMap<(PeerId, Digest), Right>,
}

/// The right to read one blob from one peer.
struct Right {
    /// When somebody wanted it last.
    used: Instant,
    asked: Option<Asked>,
    /// And when it was asked for: its life began no earlier.
    token: Option<(Token, Instant)>,
}

/// A question that is not answered.
struct Asked {
    first: Instant,
    last: Instant,
}

/// What there is, and whether to ask the peer.
struct Look {
    token: Option<Token>,
    is_to_ask: bool,
}

impl Table {
    /// Whoever looks and is told to ask does: until an answer is overdue nobody else is told so.
    fn look(&mut self, key: (PeerId, Digest), now: Instant) -> Look {
        if !self.rights.contains_key(&key) {
            self.make_room(now);
        }
        let right = self.rights.entry(key).or_insert_with(|| Right { used: now, asked: None, token: None });
        right.used = now;
        let token = right.token.filter(|(_, since)| now.duration_since(*since) < USABLE);
        let is_fresh = token.is_some_and(|(_, since)| now.duration_since(since) < RENEW);
        let token = token.map(|(token, _)| token);
        let is_asked = right.asked.as_ref().is_some_and(|asked| now.duration_since(asked.last) < AGAIN);
        if is_fresh || is_asked {
            return Look { token, is_to_ask: false };
        }
        // An answer to a question of long ago does not come any more.
        let first = right.asked.as_ref().map(|asked| asked.first).filter(|first| now.duration_since(*first) < PATIENCE);
        right.asked = Some(Asked { first: first.unwrap_or(now), last: now });
        Look { token, is_to_ask: true }
    }

    /// Keeps a token that was asked for. Whether it was.
    fn came(&mut self, key: (PeerId, Digest), token: Token) -> bool {
        let Some(right) = self.rights.get_mut(&key) else { return false };
        let Some(Asked { first, .. }) = right.asked.take() else { return false };
        right.token = Some((token, first));
        true
    }

    /// Room for one more: what nobody wanted for a token's life goes, and then what was wanted least lately.
    fn make_room(&mut self, now: Instant) {
        if self.rights.len() < RIGHTS_MAX {
            return;
        }
        self.rights.retain(|_, right| now.duration_since(right.used) < LIFETIME);
        if self.rights.len() >= RIGHTS_MAX
            && let Some(oldest) = self.rights.iter().min_by_key(|(_, right)| right.used).map(|(key, _)| *key)
        {
            self.rights.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn key(n: u32) -> (PeerId, Digest) {
        (peer(1), Digest::of(&n.to_be_bytes()))
    }

    fn token(n: u64) -> Token {
        let (blob, address) = (Digest::of(b"a"), [10, 0, 0, 1].into());
        Token::new(&Secret([1; 32]), peer(9), &blob, address, Duration::from_secs(n))
    }

    /// What a look finds, and whether it is told to ask.
    fn look(table: &mut Table, key: (PeerId, Digest), now: Instant) -> (Option<Token>, bool) {
        let Look { token, is_to_ask } = table.look(key, now);
        (token, is_to_ask)
    }

    #[test]
    fn one_asks_and_everybody_has_the_answer() {
        let (mut table, t0) = (Table::default(), Instant::now());
        assert_eq!(look(&mut table, key(1), t0), (None, true));
        for _ in 0..50 {
            assert_eq!(look(&mut table, key(1), t0 + AGAIN / 2), (None, false), "one question is enough");
        }
        assert_eq!(look(&mut table, key(2), t0), (None, true), "of another blob");
        assert!(table.came(key(1), token(1)));
        assert_eq!(look(&mut table, key(1), t0 + AGAIN), (Some(token(1)), false));
        assert_eq!(look(&mut table, key(2), t0 + AGAIN / 2), (None, false));
    }

    #[test]
    fn a_question_that_got_lost_is_asked_again() {
        let (mut table, t0) = (Table::default(), Instant::now());
        let asked: Vec<bool> = (0..5).map(|n| look(&mut table, key(1), t0 + AGAIN * n / 2).1).collect();
        assert_eq!(asked, [true, false, true, false, true]);
        // Which of the questions it answers is not known: it is as old as the first.
        assert!(table.came(key(1), token(1)));
        assert_eq!(look(&mut table, key(1), t0 + RENEW - Duration::from_millis(1)), (Some(token(1)), false));
        assert_eq!(look(&mut table, key(1), t0 + RENEW), (Some(token(1)), true));
    }

    #[test]
    fn a_token_is_renewed_while_it_still_works_and_not_used_near_its_end() {
        let (mut table, t0) = (Table::default(), Instant::now());
        look(&mut table, key(1), t0);
        table.came(key(1), token(1));
        let mut now = t0;
        for n in 1..10 {
            now += RENEW;
            assert_eq!(look(&mut table, key(1), now), (Some(token(n)), true), "renewed in the background");
            assert_eq!(look(&mut table, key(1), now), (Some(token(n)), false), "by one of those that need it");
            assert!(table.came(key(1), token(n + 1)));
            assert_eq!(look(&mut table, key(1), now), (Some(token(n + 1)), false));
        }
        assert_eq!(look(&mut table, key(1), now + USABLE), (None, true), "nobody renewed it");
        assert!(USABLE < LIFETIME && RENEW < USABLE);
    }

    #[test]
    fn an_answer_that_comes_much_too_late_does_not_count_as_old() {
        let (mut table, t0) = (Table::default(), Instant::now());
        look(&mut table, key(1), t0);
        let later = t0 + LIFETIME * 2;
        assert_eq!(look(&mut table, key(1), later), (None, true));
        table.came(key(1), token(1));
        assert_eq!(look(&mut table, key(1), later), (Some(token(1)), false));
    }

    #[test]
    fn what_nobody_asked_for_is_not_kept() {
        let (mut table, t0) = (Table::default(), Instant::now());
        assert!(!table.came(key(1), token(1)) && table.rights.is_empty());
        look(&mut table, key(1), t0);
        assert!(table.came(key(1), token(1)));
        assert!(!table.came(key(1), token(2)), "twice");
        assert_eq!(look(&mut table, key(1), t0), (Some(token(1)), false));
    }

    #[test]
    fn the_table_has_a_bound_and_parts_with_what_was_used_longest_ago() {
        let (mut table, t0) = (Table::default(), Instant::now());
        let many = u32::try_from(RIGHTS_MAX).unwrap();
        for n in 0..many {
            look(&mut table, key(n), t0 + Duration::from_micros(n.into()));
            table.came(key(n), token(1));
        }
        let soon = t0 + Duration::from_secs(1);
        assert_eq!(look(&mut table, key(0), soon).0, Some(token(1)));
        look(&mut table, key(many), soon);
        assert_eq!(table.rights.len(), RIGHTS_MAX);
        assert!(table.rights.contains_key(&key(0)) && !table.rights.contains_key(&key(1)));
        look(&mut table, key(many + 1), soon + LIFETIME);
        assert_eq!(table.rights.len(), 1, "none of the others was wanted of late");
    }
}
