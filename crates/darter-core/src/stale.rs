//! What a tag means while its registry is away: what this node saw there, what members of the swarm say
//! that they saw, and whether they agree.
//!
//! Nobody can check what a member says of a tag, so no member is believed alone: whoever knows the tag has a
//! veto, this node's own memory first of all, and without that memory two at different addresses have to
//! know it. Not here: asking them (`darter_agent::swarm::witnesses`), and who may read what it leads to
//! (`access`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::access::{CredentialKey, Place};
use crate::digest::Digest;
use crate::names::{Reference, Tag};

/// So many have to know a tag that this node does not know itself.
const WITNESSES: usize = 2;

/// A manifest, as a registry showed it to one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes, where it was told. It helps to find the manifest, and opens nothing.
    pub size: Option<u64>,
}

/// What a member is asked: what it saw at the registry itself, under a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Comes back with the answer.
    pub number: u64,
    /// The repository.
    pub place: Place,
    /// What of it.
    pub reference: Reference,
}

/// Why members give no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Discord {
    /// Two saw different things: the tag moved, or one of them lies.
    #[error("those that know it saw different things")]
    Differ,
    /// One alone knows it, and it is not this node.
    #[error("only one member knows it")]
    Few,
    /// Nobody knows it.
    #[error("nobody knows it")]
    Unknown,
}

impl Discord {
    /// The label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Differ => "differ",
            Self::Few => "few",
            Self::Unknown => "unknown",
        }
    }
}

/// What all say who know it. Who does not know it, or said nothing in time, is not in `said`.
pub fn agree(own: Option<Seen>, said: &[(IpAddr, Seen)]) -> Result<Seen, Discord> {
    let mut voices = own.into_iter().chain(said.iter().map(|(_, seen)| *seen));
    let mut agreed = voices.next().ok_or(Discord::Unknown)?;
    for seen in voices {
        let sizes = agreed.size.zip(seen.size);
        // One digest has one size: with two of them somebody lies.
        if seen.digest != agreed.digest || sizes.is_some_and(|(one, other)| one != other) {
            return Err(Discord::Differ);
        }
        agreed.size = agreed.size.or(seen.size);
    }
    // A node has as many names in the swarm as it likes, and few addresses.
    let witnesses: BTreeSet<_> = said.iter().map(|(address, _)| address.to_canonical()).collect();
    if own.is_none() && witnesses.len() < WITNESSES {
        return Err(Discord::Few);
    }
    Ok(agreed)
}

/// The tags that this node itself saw at their registries.
#[derive(Debug)]
pub struct SeenTags {
    /// What is older is no answer, to this node or to another.
    lifetime: Duration,
    max: usize,
    /// By credential too: what one may not read any more, another may have seen.
    seen: BTreeMap<(Place, Tag, CredentialKey), (Seen, Instant)>,
}

impl SeenTags {
    /// None yet.
    pub const fn new(lifetime: Duration, max: usize) -> Self {
        Self { lifetime, max, seen: BTreeMap::new() }
    }

    /// The registry said what a tag means.
    pub fn saw(&mut self, now: Instant, (place, tag, key): (Place, Tag, CredentialKey), seen: Seen) {
        self.seen.insert((place, tag, key), (seen, now));
        if self.seen.len() > self.max {
            let oldest = self.seen.iter().min_by_key(|(_, (_, at))| *at).map(|(key, _)| key.clone());
            oldest.map(|key| self.seen.remove(&key));
        }
    }

    /// The registry did not say to this credential what the tag means.
    pub fn forget(&mut self, key: &(Place, Tag, CredentialKey)) {
        self.seen.remove(key);
    }

    /// What the registry said last.
    pub fn last(&self, now: Instant, place: &Place, tag: &Tag) -> Option<Seen> {
        let by = |key: u8| (place.clone(), tag.clone(), CredentialKey([key; 32]));
        let (seen, at) = self.seen.range(by(0)..=by(u8::MAX)).map(|(_, seen)| *seen).max_by_key(|(_, at)| *at)?;
        (now.saturating_duration_since(at) < self.lifetime).then_some(seen)
    }
}

/// How often each of many may ask: some times at once, and then again and again.
#[derive(Debug)]
pub struct Allowances<K> {
    every: Duration,
    at_once: u32,
    /// When each has all of its allowance again.
    full: BTreeMap<K, Instant>,
}

impl<K: Ord> Allowances<K> {
    /// `at_once`, and one more each time that `every` is over.
    pub const fn new(every: Duration, at_once: u32) -> Self {
        Self { every, at_once, full: BTreeMap::new() }
    }

    /// Whether it may ask now. If so, that is one of its times.
    pub fn take(&mut self, now: Instant, who: K) -> bool {
        let full = self.full.entry(who).or_insert(now);
        let next = (*full).max(now) + self.every;
        let is_allowed = next.saturating_duration_since(now) <= self.every * self.at_once;
        if is_allowed {
            *full = next;
        }
        is_allowed
    }

    /// Forgets those of whom nothing is to be remembered, having all of their allowance.
    pub fn forget_rested(&mut self, now: Instant) {
        self.full.retain(|_, full| *full > now);
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.full.len()
    }

    /// Whether nobody is.
    pub fn is_empty(&self) -> bool {
        self.full.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some time to count from")]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn seen(name: &str) -> Seen {
        Seen { digest: Digest::of(name.as_bytes()), size: Some(7) }
    }

    fn at(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn what_all_say_who_know_it_is_the_answer() {
        let both = [(at(1), seen("a")), (at(2), seen("a"))];
        assert_eq!(agree(None, &both), Ok(seen("a")));
        assert_eq!(agree(Some(seen("a")), &both), Ok(seen("a")));
        assert_eq!(agree(None, &[]), Err(Discord::Unknown));
    }

    #[test]
    fn one_that_saw_something_else_is_enough_for_no_answer() {
        let mut said: Vec<_> = (1..=9).map(|n| (at(n), seen("a"))).collect();
        assert_eq!(agree(Some(seen("b")), &said), Err(Discord::Differ), "this node's own memory");
        said.push((at(10), seen("b")));
        assert_eq!(agree(None, &said), Err(Discord::Differ));
        assert_eq!(agree(Some(seen("a")), &said), Err(Discord::Differ));
        let sizes = [(at(1), seen("a")), (at(2), Seen { size: Some(8), ..seen("a") })];
        assert_eq!(agree(None, &sizes), Err(Discord::Differ), "one digest with two sizes");
    }

    #[test]
    fn a_single_stranger_is_not_believed_whatever_its_names() {
        assert_eq!(agree(None, &[(at(1), seen("a"))]), Err(Discord::Few));
        let one = [(at(1), seen("a")), (at(1), seen("a")), ("::ffff:10.0.0.1".parse().unwrap(), seen("a"))];
        assert_eq!(agree(None, &one), Err(Discord::Few), "three names at one address");
        assert_eq!(agree(Some(seen("a")), &one[..1]), Ok(seen("a")));
        assert_eq!(agree(Some(seen("a")), &[]), Ok(seen("a")), "what this node saw needs no second witness");
    }

    #[test]
    fn a_size_that_somebody_was_told_is_everybodys() {
        let untold = Seen { size: None, ..seen("a") };
        assert_eq!(agree(Some(untold), &[(at(1), seen("a")), (at(2), untold)]), Ok(seen("a")));
        assert_eq!(agree(None, &[(at(1), untold), (at(2), untold)]), Ok(untold));
    }

    proptest! {
        #[test]
        fn a_liar_never_gets_its_digest_through_where_anybody_honest_knows_the_tag(
            own: bool, honest in 0u8..4, lies in vec((0u8..9, 0u8..3), 0..6), silent: bool,
        ) {
            let truth = seen("truth");
            let mut said: Vec<_> = (100..100 + honest).map(|n| (at(n), truth)).collect();
            said.extend(lies.iter().map(|(n, lie)| (at(*n), seen(&format!("lie {lie}")))));
            if silent {
                said.reverse();
            }
            let answer = agree(own.then_some(truth), &said);
            if own || honest > 0 {
                prop_assert!(answer.is_err() || answer == Ok(truth), "{:?}", answer);
                prop_assert!(lies.is_empty() || answer.is_err(), "and it can always say no");
            }
            let addresses: BTreeSet<_> = lies.iter().map(|(n, _)| n).collect();
            if !own && honest == 0 && addresses.len() < 2 {
                prop_assert!(answer.is_err(), "one address alone");
            }
        }
    }

    fn key(tag: &str, credential: u8) -> (Place, Tag, CredentialKey) {
        let place = Place { registry: "reg.example".parse().unwrap(), repository: "a".parse().unwrap() };
        (place, tag.parse().unwrap(), CredentialKey([credential; 32]))
    }

    #[test]
    fn a_tag_is_what_the_registry_said_last_to_any_credential_and_not_for_ever() {
        let (t0, hour) = (Instant::now(), Duration::from_secs(3600));
        let mut tags = SeenTags::new(12 * hour, 10);
        let (place, tag, _) = key("v1", 0);
        assert_eq!(tags.last(t0, &place, &tag), None);
        tags.saw(t0, key("v1", 255), seen("a"));
        tags.saw(t0 + hour, key("v1", 0), seen("b"));
        tags.saw(t0 + hour, key("v2", 7), seen("c"));
        assert_eq!(tags.last(t0 + hour, &place, &tag), Some(seen("b")));
        tags.forget(&key("v1", 0));
        assert_eq!(tags.last(t0 + hour, &place, &tag), Some(seen("a")), "what another credential saw");
        assert_eq!(tags.last(t0 + 12 * hour, &place, &tag), None, "too long ago");
    }

    #[test]
    fn the_tags_have_a_bound_and_the_oldest_goes() {
        let t0 = Instant::now();
        let mut tags = SeenTags::new(Duration::from_secs(3600), 3);
        for n in 0..5 {
            tags.saw(t0 + Duration::from_secs(n), key(&format!("v{n}"), 1), seen("a"));
        }
        let (place, ..) = key("v1", 1);
        let known = (0..5).filter(|n| tags.last(t0, &place, &format!("v{n}").parse().unwrap()).is_some());
        assert_eq!(known.collect::<Vec<_>>(), [2, 3, 4]);
    }

    #[test]
    fn who_asks_too_often_waits_for_itself_alone() {
        let (t0, every) = (Instant::now(), Duration::from_millis(100));
        let mut allowances = Allowances::new(every, 3);
        let asked = |allowances: &mut Allowances<u8>, now, who| (0..10).filter(|_| allowances.take(now, who)).count();
        assert_eq!(asked(&mut allowances, t0, 1), 3);
        assert_eq!(asked(&mut allowances, t0, 2), 3);
        assert_eq!(asked(&mut allowances, t0 + every, 1), 1);
        assert_eq!(asked(&mut allowances, t0 + every * 50, 1), 3, "no more for a long silence");
        allowances.forget_rested(t0 + every * 51);
        assert_eq!(allowances.len(), 1, "the other has all of it again");
    }
}
