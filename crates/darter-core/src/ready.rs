//! The readiness verdict: named checks, each with a reason, and what they add up to.

use serde::{Deserialize, Serialize};

/// How one check stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Works, with less than it could: pulls succeed, and somebody should look.
    Degraded,
    /// The node should not count on darter.
    Failed,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// A short fixed word: also the label of `darter_ready`.
    pub check: &'static str,
    /// How it stands.
    pub state: State,
    /// Why, for people.
    pub reason: String,
    /// What to do, where something is wrong and the reason does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    /// A check with its outcome.
    pub fn new(check: &'static str, state: State, reason: impl Into<String>) -> Self {
        Self { check, state, reason: reason.into(), advice: None }
    }

    /// The same, with what to do about it.
    pub fn with_advice(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }
}

/// All checks of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// False if any check failed. Degraded checks do not count: a full disk must not take the node
    /// out of service when containerd can still pull past us.
    pub ready: bool,
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// What the checks add up to.
    pub fn of(checks: Vec<Check>) -> Self {
        Self { ready: checks.iter().all(|check| check.state != State::Failed), checks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_degraded_check_does_not_make_the_node_unready() {
        let mirror = Check::new("mirror", State::Ok, "answers");
        let store = Check::new("store", State::Degraded, "the disk is full");
        assert!(Readiness::of(vec![mirror.clone(), store.clone()]).ready);
        let failed = Check::new("hosts_toml", State::Failed, "cannot be written").with_advice("make room");
        let verdict = Readiness::of(vec![mirror, store, failed]);
        assert!(!verdict.ready);
        insta::assert_snapshot!(
            serde_json::to_string(&verdict).unwrap(),
            @r#"{"ready":false,"checks":[{"check":"mirror","state":"ok","reason":"answers"},{"check":"store","state":"degraded","reason":"the disk is full"},{"check":"hosts_toml","state":"failed","reason":"cannot be written","advice":"make room"}]}"#
        );
    }
}
