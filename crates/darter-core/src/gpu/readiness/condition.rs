//! What a verdict is as a condition of a Kubernetes node, and when it is due to be written.
//!
//! Positive: True is good. Not here: the API server, and the times in the condition.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Finding, Reason, State, Verdict};

/// A condition is written again after so long, so that a reader can tell whether anybody still looks.
pub const HEARTBEAT: Duration = Duration::from_secs(300);
/// Where nothing but the text changes it waits so long after the last write: numbers in it may change with
/// every look, and every node of a cluster writes.
const TEXT: Duration = Duration::from_secs(30);
/// An agent that has just started does not know yet what the one before it knew.
const FIRST_LOOK: Duration = Duration::from_secs(60);
/// A text that is longer is cut: it is kept by the API server for each node, and read by people.
const MESSAGE_MAX: usize = 1000;

/// The status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The GPUs can be given work.
    True,
    /// They must not be given any.
    False,
    /// That cannot be told.
    Unknown,
}

impl Status {
    /// As Kubernetes writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }

    /// As Kubernetes writes it; anything else is unknown.
    pub fn read(text: &str) -> Self {
        match text {
            "True" => Self::True,
            "False" => Self::False,
            _ => Self::Unknown,
        }
    }
}

/// What a condition says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Whether the GPUs can be given work.
    pub status: Status,
    /// One word.
    pub reason: String,
    /// For people: what is wrong, with numbers, and what to do.
    pub message: String,
}

/// What a node's condition should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// As it is.
    AsItIs,
    /// There should be none: the node has no GPU, or nobody looks at them.
    None,
    /// This.
    Some(Condition),
}

impl Wanted {
    /// By the verdict of an agent that has run for so long. `now` is what the node has.
    pub fn of(verdict: &Verdict, agent_age: Duration, now: Option<Status>) -> Self {
        let status = match verdict.state {
            State::NotApplicable => return Self::None,
            State::Ready | State::Degraded => Status::True,
            State::NotReady => Status::False,
            State::Unknown => Status::Unknown,
        };
        let is_new = agent_age < FIRST_LOOK;
        let nobody_knows = verdict.first().is_some_and(|finding| finding.reason == Reason::GpuNodeNotObserved);
        match (status, now) {
            // A node of which nobody can say that it has GPUs gets no condition about them.
            (Status::Unknown, None) if nobody_knows => Self::AsItIs,
            // What the agent before this one knew holds until this one knows something.
            (Status::Unknown, _) if is_new => Self::AsItIs,
            _ => Self::Some(Condition { status, reason: reason(verdict), message: message(verdict) }),
        }
    }
}

impl Condition {
    /// How long until it should be written, where `last` was written so long ago.
    pub fn due(&self, last: Option<(&Self, Duration)>) -> Duration {
        let Some((last, age)) = last else { return Duration::ZERO };
        if (self.status, &self.reason) != (last.status, &last.reason) {
            return Duration::ZERO;
        }
        let every = if self.message == last.message { HEARTBEAT } else { TEXT };
        every.saturating_sub(age)
    }
}

fn reason(verdict: &Verdict) -> String {
    let first = verdict.first().filter(|_| verdict.state > State::Ready);
    first.map_or("GpusReady", |finding| finding.reason.word()).to_owned()
}

fn message(verdict: &Verdict) -> String {
    let worst: Vec<_> = verdict.reasons.iter().filter(|finding| finding.state == verdict.state).collect();
    let [first, more @ ..] = worst.as_slice() else { return READY.to_owned() };
    if verdict.state == State::Ready {
        return READY.to_owned();
    }
    let mut text = told(first);
    for finding in more {
        let _ = write!(text, "; {}", told(finding));
    }
    let advice = format!(". {}", capital(&first.reason.advice()));
    cut(text, MESSAGE_MAX.saturating_sub(advice.len())) + &advice
}

const READY: &str = "The GPUs can be given work";

fn told(finding: &Finding) -> String {
    let mut text = finding.reason.to_string();
    // One that was lost before it was asked has no name.
    let gpus: Vec<_> = finding.gpus.iter().map(String::as_str).filter(|gpu| !gpu.is_empty()).collect();
    if !gpus.is_empty() {
        let _ = write!(text, " ({})", gpus.join(", "));
    }
    if !finding.detail.is_empty() {
        let _ = write!(text, ": {}", finding.detail);
    }
    text
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let end = (0..=most.saturating_sub(3)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Duration = Duration::from_secs(3600);

    fn finding(reason: Reason, state: State, gpus: &[&str], detail: &str) -> Finding {
        let gpus = gpus.iter().map(|gpu| (*gpu).to_owned()).collect();
        Finding { reason, state, gpus, detail: detail.to_owned() }
    }

    fn verdict(state: State, reasons: Vec<Finding>) -> Verdict {
        Verdict { state, reasons }
    }

    fn wanted(verdict: &Verdict) -> Condition {
        match Wanted::of(verdict, OLD, None) {
            Wanted::Some(condition) => condition,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_numbers_and_the_way_out() {
        let lost = finding(Reason::GpuLost, State::NotReady, &["GPU-a"], "");
        let error = finding(Reason::FatalXid(79), State::NotReady, &["GPU-a", "GPU-b"], "twice");
        let mild = finding(Reason::RowRemapPending, State::Degraded, &["GPU-c"], "");
        let condition = wanted(&verdict(State::NotReady, vec![lost, error, mild]));
        assert_eq!((condition.status, condition.reason.as_str()), (Status::False, "GpuLost"));
        let told = "GpuLost (GPU-a); FatalXid(79) (GPU-a, GPU-b): twice. Drain the node and reboot it";
        assert!(condition.message.starts_with(told), "{}", condition.message);
        assert!(!condition.message.contains("RowRemapPending"), "{}", condition.message);
    }

    #[test]
    fn degraded_gpus_take_work_and_say_why_and_what_is_only_worth_a_word_is_no_reason() {
        let mild = finding(Reason::RowRemapPending, State::Degraded, &["GPU-c"], "");
        let note = finding(Reason::GfdLabelsMissing, State::Ready, &[], "");
        let condition = wanted(&verdict(State::Degraded, vec![mild, note.clone()]));
        assert_eq!((condition.status, condition.reason.as_str()), (Status::True, "RowRemapPending"));
        let condition = wanted(&verdict(State::Ready, vec![note]));
        let wanted = Condition { status: Status::True, reason: "GpusReady".to_owned(), message: READY.to_owned() };
        assert_eq!(condition, wanted);
    }

    #[test]
    fn a_gpu_without_a_name_leaves_no_empty_brackets() {
        let lost = finding(Reason::GpuLost, State::NotReady, &[""], "");
        let condition = wanted(&verdict(State::NotReady, vec![lost]));
        assert!(condition.message.starts_with("GpuLost. Drain the node"), "{}", condition.message);
    }

    #[test]
    fn a_long_text_is_cut_and_keeps_the_way_out() {
        let gpus = vec!["GPU-äöü"; 400];
        let condition = wanted(&verdict(State::NotReady, vec![finding(Reason::GpuLost, State::NotReady, &gpus, "")]));
        assert!(condition.message.len() <= MESSAGE_MAX, "{}", condition.message.len());
        assert!(condition.message.contains("…. Drain the node"), "{}", condition.message);
    }

    #[test]
    fn an_agent_that_has_just_started_takes_nothing_back_that_it_does_not_know_better() {
        let silent = verdict(State::Unknown, vec![finding(Reason::NvmlNotObserved, State::Unknown, &[], "")]);
        let (new, old) = (Duration::from_secs(59), Duration::from_secs(60));
        assert_eq!(Wanted::of(&silent, new, Some(Status::True)), Wanted::AsItIs);
        assert!(matches!(Wanted::of(&silent, old, Some(Status::True)), Wanted::Some(_)));
        assert_eq!(Wanted::of(&silent, new, None), Wanted::AsItIs);
        assert!(matches!(Wanted::of(&silent, old, None), Wanted::Some(_)), "a node that has none yet");
        let lost = verdict(State::NotReady, vec![finding(Reason::GpuLost, State::NotReady, &["GPU-a"], "")]);
        assert!(matches!(Wanted::of(&lost, new, Some(Status::True)), Wanted::Some(_)), "it knows");
    }

    #[test]
    fn a_node_without_gpus_has_no_condition_and_one_of_which_nobody_knows_gets_none() {
        let none = verdict(State::NotApplicable, Vec::new());
        assert_eq!(Wanted::of(&none, Duration::ZERO, Some(Status::True)), Wanted::None);
        let silence = finding(Reason::GpuNodeNotObserved, State::Unknown, &[], "");
        let unknown = verdict(State::Unknown, vec![silence]);
        assert_eq!(Wanted::of(&unknown, OLD, None), Wanted::AsItIs);
        assert!(matches!(Wanted::of(&unknown, OLD, Some(Status::True)), Wanted::Some(_)));
    }

    #[test]
    fn it_is_written_at_once_where_it_changes_and_as_a_heartbeat_where_it_does_not() {
        let condition = wanted(&verdict(State::Ready, Vec::new()));
        let secs = Duration::from_secs;
        assert_eq!(condition.due(None), Duration::ZERO);
        assert_eq!(condition.due(Some((&condition, secs(1)))), secs(299));
        assert_eq!(condition.due(Some((&condition, secs(301)))), Duration::ZERO);
        let status = Condition { status: Status::Unknown, ..condition.clone() };
        let reason = Condition { reason: "Other".to_owned(), ..condition.clone() };
        let message = Condition { message: "3 of 8".to_owned(), ..condition.clone() };
        assert_eq!(condition.due(Some((&status, secs(0)))), Duration::ZERO);
        assert_eq!(condition.due(Some((&reason, secs(0)))), Duration::ZERO);
        assert_eq!(condition.due(Some((&message, secs(0)))), secs(30));
    }
}
