//! The least power that a GPU takes when it does nothing, as it was seen over time.
//!
//! Idle power differs by a factor of five between kinds, and between two boards of a kind, so there is no
//! number to compare with but the GPU's own. With a program loaded it is higher than without: two numbers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gpu::Time;

/// What was learned; to be stored by the agent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Floor {
    /// Milliwatts with nothing loaded.
    pub empty_milliwatts: Option<f64>,
    /// Milliwatts with something in its memory.
    pub loaded_milliwatts: Option<f64>,
}

impl Floor {
    /// The one that applies.
    pub const fn of(&self, is_loaded: bool) -> Option<f64> {
        if is_loaded { self.loaded_milliwatts } else { self.empty_milliwatts }
    }

    fn lower(&mut self, is_loaded: bool, milliwatts: f64) {
        let floor = if is_loaded { &mut self.loaded_milliwatts } else { &mut self.empty_milliwatts };
        *floor = Some(floor.map_or(milliwatts, |floor| floor.min(milliwatts)));
    }
}

/// One stretch of idle time, whose mean is a candidate: a single low reading is none.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    is_loaded: bool,
    begin: Time,
    sum: f64,
    readings: f64,
}

/// Learns the floor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Learner {
    pub(super) floor: Floor,
    stretch: Option<Stretch>,
    /// Found, and not used before the window has none of it left: else the window would be its own witness.
    found: Option<(Time, bool, f64)>,
}

impl Learner {
    pub(super) const fn new(floor: Floor) -> Self {
        Self { floor, stretch: None, found: None }
    }

    /// A reading: whether something is loaded, and its milliwatts, if it is one of an idle GPU.
    pub(super) fn note(&mut self, now: Time, window: Duration, idle: Option<(bool, f64)>) {
        if let Some((_, is_loaded, milliwatts)) = self.found.take_if(|(at, ..)| now.since(*at) >= window) {
            self.floor.lower(is_loaded, milliwatts);
        }
        let Some((is_loaded, milliwatts)) = idle else {
            self.stretch = None;
            return;
        };
        let new = Stretch { is_loaded, begin: now, sum: 0.0, readings: 0.0 };
        let mut stretch = self.stretch.filter(|stretch| stretch.is_loaded == is_loaded).unwrap_or(new);
        stretch.sum += milliwatts;
        stretch.readings += 1.0;
        let is_whole = now.since(stretch.begin) >= window;
        if is_whole && self.found.is_none() {
            self.found = Some((now, is_loaded, stretch.sum / stretch.readings));
        }
        self.stretch = (!is_whole).then_some(stretch);
    }
}
