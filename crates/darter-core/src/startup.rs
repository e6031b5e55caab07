//! What a node that has just started waits for before its startup taint goes, so that no pod comes too early.
//!
//! The mirror, hosts.toml and images are waited for until a deadline: without them pods start slower, and a node
//! that waited for ever would be paid for and never used. GPUs are waited for as long as it takes: a pod on
//! broken ones fails, and whoever deletes nodes sees that the taint stayed. Missing knowledge keeps the taint for
//! the GPUs, and for the others no longer than the deadline.
//! Not here: taking the taint off, and deleting a node whose taint stays.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gpu::readiness::State;

/// An agent that starts on a node that is past its deadline already gets so long, or the deadline if that is
/// shorter: it takes seconds to look at everything once.
const FIRST_LOOK: Duration = Duration::from_secs(30);

/// One thing that is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The mirror answers its self-test.
    Mirror,
    /// hosts.toml of every configured registry is in place.
    HostsToml,
    /// The images that are to be here before any pod are.
    Images,
    /// The GPUs can be given work.
    Gpu,
}

impl Part {
    /// All of them, in the order in which they are told.
    pub const ALL: [Self; 4] = [Self::Mirror, Self::HostsToml, Self::Images, Self::Gpu];

    /// The word in metrics, events and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::HostsToml => "hosts_toml",
            Self::Images => "images",
            Self::Gpu => "gpu",
        }
    }

    /// Whether it is waited for until the deadline only.
    pub const fn fails_open(self) -> bool {
        !matches!(self, Self::Gpu)
    }
}

/// What is known of the node's GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gpus {
    /// There are none and there should be none, or the operator has nobody look at them.
    None,
    /// They can be given work.
    Usable,
    /// They must not be given any.
    Broken,
    /// Nobody can tell, or nobody has looked yet.
    Unknown,
}

impl Gpus {
    /// By the verdict on them; `None` before the first.
    pub const fn of(verdict: Option<State>) -> Self {
        match verdict {
            Some(State::NotApplicable) => Self::None,
            Some(State::Ready | State::Degraded) => Self::Usable,
            Some(State::NotReady) => Self::Broken,
            Some(State::Unknown) | None => Self::Unknown,
        }
    }
}

/// What is known of a node. What is not known to be there is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The mirror answers its self-test.
    pub mirror: bool,
    /// hosts.toml of every configured registry is in place.
    pub hosts_toml: bool,
    /// All images that are to be here are; so it is where none is to be.
    pub images: bool,
    /// The GPUs.
    pub gpus: Gpus,
    /// How old the node is, if that is known.
    pub node_age: Option<Duration>,
    /// How long this agent has run.
    pub agent_age: Duration,
    /// What fails open is waited for until the node is so old.
    pub deadline: Duration,
}

/// Whether the taint stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It does.
    Keep {
        /// What is missing.
        waits_for: Vec<Part>,
        /// The deadline is over: what is missing does not fail open.
        is_late: bool,
    },
    /// It goes.
    Remove {
        /// What is missing all the same, and was waited for long enough.
        failed_open: Vec<Part>,
    },
}

impl Seen {
    /// How old the node is, as far as anybody knows. A clock that is wrong makes it no younger than the agent.
    pub fn age(&self) -> Duration {
        self.node_age.unwrap_or_default().max(self.agent_age)
    }

    /// How long it is until the deadline is over.
    pub fn left(&self) -> Duration {
        let first_look = FIRST_LOOK.min(self.deadline).saturating_sub(self.agent_age);
        self.deadline.saturating_sub(self.age()).max(first_look)
    }

    /// Whether a part is there.
    pub const fn has(&self, part: Part) -> bool {
        match part {
            Part::Mirror => self.mirror,
            Part::HostsToml => self.hosts_toml,
            Part::Images => self.images,
            Part::Gpu => matches!(self.gpus, Gpus::None | Gpus::Usable),
        }
    }

    /// What to do with the taint of a node that has it. Nothing here ever adds one.
    pub fn decide(&self) -> Decision {
        let is_late = self.left().is_zero();
        let missing = Part::ALL.into_iter().filter(|part| !self.has(*part));
        let (failed_open, waits_for): (Vec<_>, Vec<_>) = missing.partition(|part| is_late && part.fails_open());
        if waits_for.is_empty() { Decision::Remove { failed_open } } else { Decision::Keep { waits_for, is_late } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(300);
    const GPUS: [Gpus; 4] = [Gpus::None, Gpus::Usable, Gpus::Broken, Gpus::Unknown];

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn seen(has: [bool; 3], gpus: Gpus, node_age: Option<u64>, agent_age: u64) -> Seen {
        let [mirror, hosts_toml, images] = has;
        let (node_age, agent_age) = (node_age.map(secs), secs(agent_age));
        Seen { mirror, hosts_toml, images, gpus, node_age, agent_age, deadline: DEADLINE }
    }

    fn all_of(has: [bool; 3], gpus: Gpus) -> impl Iterator<Item = Seen> {
        let ages = [None, Some(0), Some(40), Some(299), Some(300), Some(100_000)];
        ages.into_iter().flat_map(move |node| [0, 29, 30, 40, 299, 300, 301].map(|agent| seen(has, gpus, node, agent)))
    }

    fn all() -> impl Iterator<Item = Seen> {
        let some = |bits: u8| [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
        (0..8).flat_map(move |bits| GPUS.into_iter().flat_map(move |gpus| all_of(some(bits), gpus)))
    }

    #[test]
    fn the_taint_goes_when_all_is_there_and_at_the_deadline_when_the_gpus_are() {
        let mut looked = 0;
        for seen in all() {
            let usable = matches!(seen.gpus, Gpus::None | Gpus::Usable);
            let whole = seen.mirror && seen.hosts_toml && seen.images;
            let late = seen.left().is_zero();
            let goes = matches!(seen.decide(), Decision::Remove { .. });
            assert_eq!(goes, usable && (whole || late), "{seen:?}");
            looked += 1;
        }
        assert_eq!(looked, 8 * 4 * 6 * 7);
    }

    #[test]
    fn what_is_kept_for_and_what_failed_open_are_what_is_missing_and_nothing_is_both() {
        for seen in all() {
            let missing: Vec<_> = Part::ALL.into_iter().filter(|part| !seen.has(*part)).collect();
            match seen.decide() {
                Decision::Remove { failed_open } => {
                    assert_eq!(failed_open, missing, "{seen:?}");
                    assert!(failed_open.is_empty() || seen.left().is_zero(), "{seen:?}");
                    assert!(!failed_open.contains(&Part::Gpu), "{seen:?}");
                }
                Decision::Keep { waits_for, is_late: true } => assert_eq!(waits_for, [Part::Gpu], "{seen:?}"),
                Decision::Keep { waits_for, is_late: false } => assert_eq!(waits_for, missing, "{seen:?}"),
            }
        }
    }

    #[test]
    fn to_know_less_never_takes_the_taint_away() {
        let kept = |seen: &Seen| matches!(seen.decide(), Decision::Keep { .. });
        for known in all() {
            let mut less = vec![Seen { gpus: Gpus::Unknown, ..known.clone() }];
            less.extend([
                Seen { mirror: false, ..known.clone() },
                Seen { hosts_toml: false, ..known.clone() },
                Seen { images: false, ..known.clone() },
                Seen { node_age: None, ..known.clone() },
            ]);
            for less in less {
                assert!(!kept(&known) || kept(&less), "{known:?} and {less:?}");
            }
        }
    }

    #[test]
    fn the_deadline_is_the_nodes_and_an_agent_that_comes_late_looks_before_it_gives_up() {
        let left = |node: Option<u64>, agent: u64| seen([false; 3], Gpus::None, node, agent).left().as_secs();
        assert_eq!((left(Some(0), 0), left(Some(100), 20), left(Some(300), 40)), (300, 200, 0));
        // An agent that was started again on an old node.
        assert_eq!((left(Some(9000), 0), left(Some(9000), 29), left(Some(9000), 30)), (30, 1, 0));
        // Nobody knows the node's age, or its clock is behind.
        assert_eq!((left(None, 120), left(Some(0), 120)), (180, 180));
        let short = Seen { deadline: secs(2), ..seen([false; 3], Gpus::None, Some(0), 1) };
        assert_eq!(short.left(), secs(1));
    }

    #[test]
    fn degraded_gpus_are_usable_and_a_verdict_that_is_not_there_is_none() {
        let of = [None, Some(State::Unknown), Some(State::NotReady), Some(State::Degraded), Some(State::Ready)];
        let wanted = [Gpus::Unknown, Gpus::Unknown, Gpus::Broken, Gpus::Usable, Gpus::Usable];
        assert_eq!(of.map(Gpus::of), wanted);
        assert_eq!(Gpus::of(Some(State::NotApplicable)), Gpus::None);
    }
}
