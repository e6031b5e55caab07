//! The time that no protocol can beat.

use super::Scenario;

/// What the goal leaves to the model.
const TOLERANCE: f64 = 0.03;

/// `R* · p/u` of the fact sheet: in piece-times, and in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Time of one piece on an uplink, in seconds.
    pub piece_seconds: f64,
    /// Piece-times that the last node needs at least.
    pub rounds: f64,
    /// What the goal allows on top of it: three times the ramp.
    pub allowance: f64,
}

impl Bound {
    /// The bound of a scenario without faults, whose nodes all start at once.
    ///
    /// Cold: `max{ M·u/d, 1 + ⌈M(N−1)/N⌉, ⌈M/s⌉ + ⌈log2 N⌉ }`. With holders that have it whole
    /// already they are what is scarce: `s` of them, and no origin.
    pub fn of(scenario: &Scenario) -> Self {
        let pieces = scenario.layout.pieces() as f64;
        let nodes = scenario.nodes as f64;
        let up = scenario.uplink as f64;
        let piece_seconds = scenario.layout.piece_size() as f64 / up;
        let ramp = nodes.log2().ceil();
        let share = if scenario.holders > 0 { scenario.holders as f64 } else { scenario.origin.rate as f64 / up };
        let download = pieces * up / scenario.downlink as f64;
        let uploads = if scenario.holders > 0 {
            (pieces * nodes / (nodes + share)).ceil()
        } else {
            1.0 + (pieces * (nodes - 1.0) / nodes).ceil()
        };
        let source = (pieces / share).ceil() + if scenario.holders > 0 { nodes.log2().floor() } else { ramp };
        Self { piece_seconds, rounds: download.max(uploads).max(source), allowance: 3.0 * ramp }
    }

    /// The bound in seconds.
    pub fn seconds(&self) -> f64 {
        self.rounds * self.piece_seconds
    }

    /// What the goal allows, in seconds.
    pub fn goal_seconds(&self) -> f64 {
        (self.rounds + self.allowance) * self.piece_seconds * (1.0 + TOLERANCE)
    }
}
