//! Whether the scaler hears this node, for `darter status`.

use std::time::{Duration, Instant};

use darter_core::status;

/// How the connection stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Where the scaler listens; empty without one.
    pub scaler: String,
    /// Since when the connection is up, if it is.
    pub connected: Option<Instant>,
    /// When a report was taken last.
    pub accepted: Option<Instant>,
    /// Why it does not work, of the last time; nothing while it works.
    pub error: Option<String>,
}

impl Standing {
    /// As it is told.
    pub fn status(&self) -> status::Report {
        let age = |at: Instant| at.elapsed().as_secs();
        status::Report {
            scaler: self.scaler.clone(),
            connected_seconds: self.connected.map(age),
            accepted_seconds: self.accepted.map(age),
            error: self.error.clone(),
        }
    }

    /// The age of the last report that was taken.
    pub fn accepted_age(&self) -> Option<Duration> {
        self.accepted.map(|at| at.elapsed())
    }
}
