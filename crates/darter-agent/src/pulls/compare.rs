//! What two that have the whole blob say of its pieces, before any of them is believed.
//!
//! Where they agree, no other piece is taken. Where they do not, or a piece is not what the only one says that
//! answers, one piece is read from the origin, and who is wrong there is found out before a byte of it was
//! written. Not here: which two (`darter_core::swarm`), and what becomes of a liar.

use std::sync::Arc;
use std::time::Duration;

use darter_core::swarm::PeerId;
use darter_core::swarm::attest::Attest;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::blame;
use super::target::Target;
use crate::log::chain;
use crate::metrics::ReasonLabels;
use crate::swarm::exchange::FetchError;
use crate::swarm::handle::Fetcher;

/// How long pieces that have come wait for the two. An answer takes a round trip, and one piece of each before
/// it on its connection.
pub(super) const WAIT: Duration = Duration::from_secs(1);

/// The value of each piece.
pub(super) type Values = Arc<[[u8; 32]]>;

/// Where it stands.
#[derive(Debug, Clone, Default)]
enum State {
    /// Nobody was asked, or one did not answer.
    #[default]
    Unknown,
    /// Two are asked. Nobody waits for longer than this.
    Asked(Instant),
    Known(Verdict),
}

/// What their answers tell.
#[derive(Debug, Clone)]
pub(super) enum Verdict {
    /// They agree on the value of each piece.
    Agreed(Values),
    /// This one says so, and the other does not say.
    Said(PeerId, Values),
    /// They do not agree, and these claim what the origin does not have.
    Wrong(Vec<PeerId>),
}

/// What follows for a piece that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ruling {
    Take,
    Refuse,
    /// One who has the whole blob says that it is this.
    Contradicts(PeerId, [u8; 32]),
}

impl Verdict {
    pub(super) fn on(&self, piece: u32, attest: &Attest) -> Ruling {
        let value = |values: &Values| values.get(piece as usize).copied().unwrap_or_default();
        match self {
            Self::Agreed(values) if value(values) != attest.cv => Ruling::Refuse,
            Self::Said(peer, values) if value(values) != attest.cv => Ruling::Contradicts(*peer, value(values)),
            Self::Wrong(peers) if peers.contains(&attest.importer) => Ruling::Refuse,
            Self::Agreed(_) | Self::Said(..) | Self::Wrong(_) => Ruling::Take,
        }
    }
}

/// What two others say of the pieces of one blob.
#[derive(Debug, Default)]
pub(super) struct Opinion(watch::Sender<State>);

impl Opinion {
    /// Two are asked from now on, until the guard goes. Pieces wait for so long for their answers.
    pub(super) fn ask(self: &Arc<Self>, wait: Duration) -> Asking {
        // Of what is known already nothing is forgotten.
        self.0.send_if_modified(|state| {
            let is_news = matches!(state, State::Unknown);
            if is_news {
                *state = State::Asked(Instant::now() + wait);
            }
            is_news
        });
        Asking(self.clone())
    }

    /// Whether a piece that has come may be what this says. Waits for the two, if they are being asked.
    pub(super) async fn on(&self, piece: u32, attest: &Attest) -> Ruling {
        let mut state = self.0.subscribe();
        loop {
            let until = match &*state.borrow_and_update() {
                State::Unknown => return Ruling::Take,
                State::Known(verdict) => return verdict.on(piece, attest),
                State::Asked(until) => *until,
            };
            // The sender is part of this. Past the time it is taken as if nobody had been asked.
            if timeout_at(until, state.changed()).await.is_err() {
                return Ruling::Take;
            }
        }
    }

    /// From now on.
    pub(super) fn is(&self, verdict: Verdict) {
        self.0.send_replace(State::Known(verdict));
    }
}

/// Two are being asked.
pub(super) struct Asking(Arc<Opinion>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.0.send_if_modified(|state| match state {
            State::Asked(_) => {
                *state = State::Unknown;
                true
            }
            State::Unknown | State::Known(_) => false,
        });
    }
}

/// Asks both, and looks who is wrong. Also who does not say.
pub(super) async fn compare(target: &Target, fetcher: &Fetcher, [first, second]: [PeerId; 2]) -> Compared {
    let digest = &target.job.wanted.digest;
    let silent = |peer: PeerId, said: &Result<Vec<[u8; 32]>, FetchError>| {
        let error = said.as_ref().err()?;
        debug!(%digest, %peer, error = %chain(error), "a node does not say what the pieces of its blob are");
        Some(peer)
    };
    let (one, other) = tokio::join!(fetcher.values(first), fetcher.values(second));
    let silent = [silent(first, &one), silent(second, &other)];
    let verdict = match (one, other) {
        (Ok(one), Ok(other)) => Some(differ(target, (first, one), (second, other)).await),
        (Ok(values), Err(_)) => Some(Verdict::Said(first, values.into())),
        (Err(_), Ok(values)) => Some(Verdict::Said(second, values.into())),
        (Err(_), Err(_)) => None,
    };
    Compared { verdict, silent }
}

/// What came of it.
pub(super) struct Compared {
    pub(super) verdict: Option<Verdict>,
    /// Those of the two that did not say.
    pub(super) silent: [Option<PeerId>; 2],
}

async fn differ(
    target: &Target,
    (first, one): (PeerId, Vec<[u8; 32]>),
    (second, other): (PeerId, Vec<[u8; 32]>),
) -> Verdict {
    let differing: Vec<usize> = (0..one.len()).filter(|piece| one[*piece] != other[*piece]).collect();
    // Who does not know which piece is looked at cannot lie about the others only.
    let Some(piece) = differing.get(blame::lot() % differing.len().max(1)) else {
        return Verdict::Agreed(one.into());
    };
    let (digest, differing) = (&target.job.wanted.digest, differing.len());
    warn!(%digest, %first, %second, differing, "two nodes that have a blob differ about its pieces");
    target.job.metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "differ" }).inc();
    let claims = [(first, one[*piece]), (second, other[*piece])];
    Verdict::Wrong(target.find_wrong(u32::try_from(*piece).unwrap_or(u32::MAX), &claims).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A piece with this value, as importer 9 vouches for it.
    fn piece(value: u8) -> Attest {
        Attest { importer: PeerId::from_bytes([9; 32]), cv: [value; 32], signature: [0; 64] }
    }

    /// Two pieces of value 1.
    fn values() -> Values {
        [[1; 32]; 2].into()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn pieces_wait_for_the_two_and_only_what_they_agree_on_is_taken() {
        let opinion = Arc::new(Opinion::default());
        assert_eq!(opinion.on(0, &piece(2)).await, Ruling::Take, "nobody was asked");
        let asking = opinion.ask(HOUR);
        let waiting = tokio::spawn({
            let opinion = opinion.clone();
            async move { opinion.on(1, &piece(2)).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        opinion.is(Verdict::Agreed(values()));
        drop(asking);
        assert_eq!(waiting.await.unwrap(), Ruling::Refuse);
        assert_eq!(opinion.on(1, &piece(1)).await, Ruling::Take);
        assert_eq!(opinion.on(2, &piece(1)).await, Ruling::Refuse, "there is no such piece");
    }

    #[test]
    fn what_one_says_is_a_question_and_what_a_liar_vouches_for_is_refused() {
        let [liar, other] = [9, 8].map(|n| PeerId::from_bytes([n; 32]));
        let said = Verdict::Said(other, values());
        assert_eq!((said.on(0, &piece(1)), said.on(0, &piece(2))), (Ruling::Take, Ruling::Contradicts(other, [1; 32])));
        assert_eq!(Verdict::Wrong(vec![other]).on(0, &piece(1)), Ruling::Take);
        assert_eq!(Verdict::Wrong(vec![liar]).on(0, &piece(1)), Ruling::Refuse);
    }

    #[tokio::test]
    async fn whoever_does_not_answer_holds_nothing_up() {
        let opinion = Arc::new(Opinion::default());
        let asking = opinion.ask(Duration::ZERO);
        assert_eq!(opinion.on(0, &piece(2)).await, Ruling::Take, "no time is left");
        drop(asking);
        drop(opinion.ask(HOUR));
        assert_eq!(opinion.on(0, &piece(2)).await, Ruling::Take, "it is as if nobody had been asked");
        // Late is better than never, and the next two make nobody forget it.
        drop(opinion.ask(Duration::ZERO));
        opinion.is(Verdict::Agreed(values()));
        drop(opinion.ask(HOUR));
        assert_eq!(opinion.on(0, &piece(2)).await, Ruling::Refuse);
    }
}
