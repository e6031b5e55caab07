//! What all parts of the scaler share: the fleet, the newest decision, and whether this scaler leads.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::bell::Bell;
use crate::clock::Clock;
use crate::config::{Actuators, Mode};
use crate::fleet::{Actuator, Fleet};
use crate::metrics::Metrics;
use crate::reports::Lines;
use crate::{Decision, Millis, Policy, State};

/// Decisions that `/v1/decisions` has, as text.
const HISTORY_BYTES: usize = 8 << 20;

/// Whether this scaler is the one that acts: asked before every act.
#[derive(Clone)]
pub struct Lead(Arc<dyn Fn() -> bool + Send + Sync>);

impl Lead {
    /// Where there is one scaler only.
    pub fn alone() -> Self {
        Self::by(|| true)
    }

    /// By somebody's word, who keeps it cheap: it is asked often.
    pub fn by(holds: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(holds))
    }

    /// Now.
    pub fn holds(&self) -> bool {
        (self.0)()
    }
}

impl fmt::Debug for Lead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lead").field(&self.holds()).finish()
    }
}

/// One decision, with all that it was made from.
#[derive(Debug, Default)]
pub struct Moment {
    /// Counted from 1 in this life of the scaler; 0: none yet.
    pub id: u64,
    /// When.
    pub now: Millis,
    /// What was known.
    pub state: State,
    /// What follows from it.
    pub decision: Decision,
}

/// Shared by all.
#[derive(Debug)]
pub struct Hub {
    fleet: Mutex<Fleet>,
    history: Mutex<History>,
    /// Of everything.
    pub clock: Clock,
    /// Rings when there is something to decide.
    pub bell: Bell,
    /// What Prometheus sees.
    pub metrics: Metrics,
    /// Whether this scaler acts.
    pub lead: Lead,
    /// Agents that listen.
    pub lines: Lines,
    /// The newest decision.
    pub newest: watch::Sender<Arc<Moment>>,
    /// What decisions go by.
    pub policy: Policy,
    modes: Actuators,
}

/// Decisions that did something, newest last.
#[derive(Debug, Default)]
struct History {
    lines: VecDeque<(u64, String)>,
    bytes: usize,
}

impl Hub {
    /// Nothing was decided yet.
    pub fn new(fleet: Fleet, clock: Clock, policy: Policy, modes: Actuators, lead: Lead, metrics: Metrics) -> Self {
        Self {
            fleet: Mutex::new(fleet),
            history: Mutex::default(),
            clock,
            bell: Bell::default(),
            metrics,
            lead,
            lines: Lines::default(),
            newest: watch::Sender::new(Arc::new(Moment::default())),
            policy,
            modes,
        }
    }

    /// The fleet, for a moment: nothing waits while it is held.
    pub fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this actuator does.
    pub const fn mode(&self, actuator: Actuator) -> Mode {
        self.modes.mode(actuator)
    }

    /// A decision that is to be found again.
    pub fn remember(&self, id: u64, line: String) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.bytes += line.len();
        history.lines.push_back((id, line));
        while history.bytes > HISTORY_BYTES
            && let Some((_, line)) = history.lines.pop_front()
        {
            history.bytes -= line.len();
        }
    }

    /// Decisions after this one, oldest first, each as JSON.
    pub fn history(&self, since: u64) -> Vec<String> {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.lines.iter().filter(|(id, _)| *id > since).map(|(_, line)| line.clone()).collect()
    }
}
