//! A decision with all that it was made from, as one line of JSON, and making it again.
//!
//! What differs was decided by other code, or on something that is not in the record: either is a defect.

use std::io::{self, BufRead, Read as _};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::state::StateError;
use crate::{Decision, Millis, Policy, State, decide};

/// Ten thousand nodes with two hundred images each take a hundred MB as text. What is longer is no record.
pub const LINE_MAX: u64 = 256 << 20;

/// One decision.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// What was wanted.
    pub policy: &'a Policy,
    /// What was known.
    pub state: &'a State,
    /// When.
    pub now: Millis,
    /// What was decided.
    pub decision: &'a Decision,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    policy: Policy,
    state: State,
    now: Millis,
    decision: Box<RawValue>,
}

/// Why a line cannot be decided again.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read at all.
    #[error("cannot read")]
    Read(#[from] io::Error),
    /// It is no record.
    #[error("not a record of a decision")]
    Json(#[from] serde_json::Error),
    /// It breaks the bounds of a state.
    #[error("not a state that can be decided on")]
    State(#[from] StateError),
    /// It does not end.
    #[error("longer than {} MiB, which no record is", LINE_MAX >> 20)]
    TooLong,
}

/// What deciding again gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Again {
    /// The same, to the bit.
    Same {
        /// When it was made.
        now: Millis,
        /// How many actions it has.
        actions: usize,
    },
    /// Something else.
    Differs {
        /// When it was made.
        now: Millis,
        /// Where they first differ, as a path.
        at: String,
        /// What was recorded there.
        recorded: String,
        /// What comes out now.
        decided: String,
    },
}

impl Record<'_> {
    /// The line, without its end.
    pub fn line(&self) -> Result<String, RecordError> {
        Ok(serde_json::to_string(self)?)
    }
}

/// Decides a line again.
pub fn again(line: &str) -> Result<Again, RecordError> {
    let line: Line = serde_json::from_str(line)?;
    line.state.check()?;
    let decision = decide(&line.state, &line.policy, line.now);
    let decided = serde_json::to_string(&decision)?;
    if decided == line.decision.get() {
        return Ok(Again::Same { now: line.now, actions: decision.actions.len() });
    }
    let (recorded, decided): (Value, Value) =
        (serde_json::from_str(line.decision.get())?, serde_json::from_str(&decided)?);
    let (at, recorded, decided) =
        difference("decision", &recorded, &decided).unwrap_or_else(|| ("decision".to_owned(), order(), order()));
    Ok(Again::Differs { now: line.now, at, recorded, decided })
}

fn order() -> String {
    "(the same, written otherwise)".to_owned()
}

/// Where two values first differ.
fn difference(at: &str, a: &Value, b: &Value) -> Option<(String, String, String)> {
    match (a, b) {
        _ if a == b => None,
        (Value::Object(a), Value::Object(b)) => a.keys().chain(b.keys()).find_map(|key| {
            let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
            difference(&format!("{at}.{key}"), &of(a), &of(b))
        }),
        (Value::Array(a), Value::Array(b)) => (0..a.len().max(b.len())).find_map(|n| {
            let of = |list: &[Value]| list.get(n).cloned().unwrap_or(Value::Null);
            difference(&format!("{at}[{n}]"), &of(a), &of(b))
        }),
        _ => Some((at.to_owned(), a.to_string(), b.to_string())),
    }
}

/// The next line that is not empty; none at the end. Never holds more than [`LINE_MAX`].
pub fn next_line(from: &mut impl BufRead) -> Result<Option<String>, RecordError> {
    loop {
        let mut line = String::new();
        let read = from.by_ref().take(LINE_MAX + 1).read_line(&mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if u64::try_from(read).is_ok_and(|read| read > LINE_MAX) {
            return Err(RecordError::TooLong);
        }
        if !line.trim().is_empty() {
            return Ok(Some(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> String {
        let state: State = serde_json::from_value(serde_json::json!({
            "nodes": {}, "images": [], "workloads": {}, "removals": [], "freeze": null, "watched": 5000,
            "pools": {"l4": {"micros_per_hour": 1, "gpus": 1, "nodes_least": 0, "nodes_most": 9, "buffer": 0,
                             "buffer_least": 1, "increments": [], "grew": null}},
        }))
        .unwrap();
        let (policy, now) = (Policy::default(), Millis(5000));
        let decision = decide(&state, &policy, now);
        Record { policy: &policy, state: &state, now, decision: &decision }.line().unwrap()
    }

    #[test]
    fn a_recorded_decision_is_decided_again_to_the_bit() {
        assert_eq!(again(&line()).unwrap(), Again::Same { now: Millis(5000), actions: 1 });
    }

    #[test]
    fn what_differs_is_named_by_its_path() {
        let other = line().replace(r#"{"buffer":{"pool":"l4","gpus":1}}"#, r#"{"buffer":{"pool":"l4","gpus":2}}"#);
        let expected = Again::Differs {
            now: Millis(5000),
            at: "decision.actions[0].buffer.gpus".to_owned(),
            recorded: "2".to_owned(),
            decided: "1".to_owned(),
        };
        assert_eq!(again(&other).unwrap(), expected);
    }

    #[test]
    fn what_is_no_record_or_breaks_its_bounds_is_refused() {
        assert!(matches!(again("{}"), Err(RecordError::Json(_))));
        let lost = line().replace(
            r#""workloads":{}"#,
            r#""workloads":{"a/b":{"pool":"none","gpus":1,"least":0,
            "most":1,"target_milli":1,"cold_start_micros":1,"lead_ms":1,"samples":[],"floors":[],"answered":0,"raised":null,
            "known":0,"needed":[],"gaps":[]}}"#,
        );
        assert!(matches!(again(&lost), Err(RecordError::State(StateError::NoSuchPool { .. }))));
        let mut lines = "\n\nlast".as_bytes();
        assert_eq!(next_line(&mut lines).unwrap().as_deref(), Some("last"));
        assert_eq!(next_line(&mut lines).unwrap(), None);
    }
}
