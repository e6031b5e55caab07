//! Who carries an action out, whether they may, and what came of it.
//!
//! An actuator that is off or observes changes nothing, and the scaler goes on as if it had: so what it observes is
//! what it would do, and nothing is decided again and again.

use tokio::sync::mpsc::error::TrySendError;
use tracing::{info, warn};

use super::Controller;
use crate::config::Mode;
use crate::decide::Action;
use crate::fleet::{Act, Actuator, Done, Outcome, Target};
use crate::hub::Moment;
use crate::metrics::{DecisionLabels, word};
use crate::reason::{Reason, Subject, Verdict};
use crate::render::render;
use crate::reports::NotAsked;

impl Controller {
    pub(super) fn carry_out(&self, action: &Action, moment: &Moment) {
        let (hub, actuator) = (&self.hub, Actuator::of(action));
        let reason = reason(action, moment);
        let rule = reason.map_or_else(|| "none".to_owned(), |reason| word(&reason.rule));
        let said = reason.map(render).unwrap_or_default();
        let said = said.lines().next().unwrap_or_default();
        hub.metrics.decisions.get_or_create(&DecisionLabels { kind: actuator.as_str(), reason: rule }).inc();
        let outcome = match hub.mode(actuator) {
            Mode::Off => {
                hub.fleet().acted(action, moment.now);
                return;
            }
            Mode::Observe => Some(Outcome::Observed),
            // Asked before every act: it may have ended since this was decided.
            Mode::On if !hub.lead.holds() => Some(Outcome::NotLeading),
            Mode::On => self.act(action, moment, said),
        };
        if matches!(outcome, None | Some(Outcome::Done | Outcome::Observed)) {
            hub.fleet().acted(action, moment.now);
        }
        // What Kubernetes is asked for ends later: it is told then.
        let Some(outcome) = outcome else { return };
        hub.metrics.act(actuator, outcome);
        match outcome {
            Outcome::Done | Outcome::Observed => {
                info!(actuator = actuator.as_str(), outcome = outcome.as_str(), "{said}");
            }
            _ => warn!(actuator = actuator.as_str(), outcome = outcome.as_str(), "not done: {said}"),
        }
    }

    /// What came of it; none where that is told later.
    fn act(&self, action: &Action, moment: &Moment, said: &str) -> Option<Outcome> {
        let hub = &self.hub;
        let target = hub.fleet().target(action);
        let asked = match (action, &target) {
            // It is told when it asks, and pushed by what is published.
            (Action::Answer { .. }, _) => return Some(Outcome::Done),
            (Action::Protect { until, .. }, Target::Node { name, .. }) => {
                hub.lines.protect(name, until.since(moment.now), said)
            }
            (Action::Copy { image, .. }, Target::Node { name, .. }) => {
                let image = hub.fleet().image_name(*image);
                // Nobody knows what it can be asked for under.
                let Some(image) = image else { return Some(Outcome::Failed) };
                hub.lines.bring(name, &image)
            }
            _ => {
                let act = Act { action: action.clone(), reason: said.to_owned(), target };
                // Nobody writes there.
                let Some(acts) = &self.acts else { return Some(Outcome::Failed) };
                return match acts.try_send(act) {
                    Ok(()) => None,
                    Err(TrySendError::Full(_)) => Some(Outcome::Full),
                    Err(TrySendError::Closed(_)) => Some(Outcome::Failed),
                };
            }
        };
        Some(match asked {
            Ok(()) => Outcome::Done,
            Err(NotAsked::Away) => Outcome::Failed,
            Err(NotAsked::Full) => Outcome::Full,
        })
    }

    /// What came of an act at Kubernetes.
    pub(super) fn done(&self, Done { action, outcome }: &Done) {
        self.hub.metrics.act(Actuator::of(action), *outcome);
        self.hub.fleet().undone(action, *outcome);
    }
}

/// Why an action is done: the reason about what it is done to, with the verdict that it follows from.
pub(super) fn reason<'a>(action: &Action, moment: &'a Moment) -> Option<&'a Reason> {
    let node = |uid: &String| moment.state.nodes.get(uid).map(|node| Subject::Node(node.name.clone()));
    let (subject, verdict) = match action {
        Action::Answer { workload, .. } => (Subject::Workload(workload.clone()), None),
        Action::Buffer { pool, .. } => (Subject::Pool(pool.clone()), None),
        Action::Rank { pod, .. } => (Subject::Pod(pod.clone()), None),
        Action::Protect { node: uid, .. } => (node(uid)?, Some(Verdict::Kept)),
        Action::Remove { node: uid } => (node(uid)?, Some(Verdict::Removed)),
        Action::Copy { image, .. } => {
            let image = moment.state.images.get(*image as usize)?;
            (Subject::Image(image.digest.to_string()), None)
        }
    };
    let fits = |reason: &&Reason| reason.subject == subject && verdict.is_none_or(|verdict| reason.verdict == verdict);
    moment.decision.reasons.iter().find(fits)
}
