//! From what is known to what is done, and why.
//!
//! A pure function of eight stages, each a file: trust, classify, demand, keep-warm, headroom, protect,
//! rank, rails. Integers, ordered maps, ties by UID; the same state gives the same decision to the bit.
//! One rule stands over all others: **missing knowledge may only keep things as they are.**

mod classify;
mod demand;
mod headroom;
mod keep_time;
mod keep_warm;
mod protect;
mod rails;
mod rank;
mod scene;
#[cfg(test)]
mod tests;
mod trust;

use serde::{Deserialize, Serialize};

pub use classify::Class;
pub use trust::Trust;

use crate::reason::Reason;
use crate::{Millis, Policy, State};
use scene::Scene;

/// What to do now. Each action sets a level, and doing it twice is doing it once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Tell KEDA how many replicas a workload is to have; none is inactive.
    Answer {
        /// Which workload.
        workload: String,
        /// How many.
        replicas: u32,
    },
    /// Have a node's agent hold off its removal.
    Protect {
        /// The node's UID.
        node: String,
        /// Until when.
        until: Millis,
    },
    /// Give a pod its place in the row of those that go first.
    Rank {
        /// The node's UID.
        node: String,
        /// The pod's UID.
        pod: String,
        /// Its deletion cost: the lowest goes first.
        cost: i32,
    },
    /// Keep so many spare GPUs in a pool.
    Buffer {
        /// Which pool.
        pool: String,
        /// How many.
        gpus: u32,
    },
    /// Have a node's agent bring an image.
    Copy {
        /// The node's UID.
        node: String,
        /// Which, of the state's images.
        image: u32,
    },
    /// Delete a node's claim.
    Remove {
        /// The node's UID.
        node: String,
    },
}

/// What to do now, why, and when to ask again if nothing is heard before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// In the order of their kinds, and of names within each.
    pub actions: Vec<Action>,
    /// Workloads, pools, nodes, pods, images; each by name.
    pub reasons: Vec<Reason>,
    /// When time alone changes something.
    pub next_wake: Option<Millis>,
}

impl Decision {
    /// Notes that time alone changes something at `at`.
    fn wake(&mut self, at: Millis) {
        self.next_wake = Some(self.next_wake.map_or(at, |wake| wake.min(at)));
    }
}

/// Decides. `state` is what is known, `now` a moment that is not before anything in it.
pub fn decide(state: &State, policy: &Policy, now: Millis) -> Decision {
    let scene = Scene::new(state, policy, now);
    let mut decision = Decision::default();
    let brakes = rails::Brakes::of(&scene);
    let demands = demand::all(&scene);
    keep_warm::all(&scene, &brakes, &demands, &mut decision);
    headroom::all(&scene, &brakes, &mut decision);
    let stays = protect::all(&scene, &mut decision);
    rank::all(&scene, &stays, &mut decision);
    rails::removals(&scene, &brakes, &stays, &mut decision);
    decision
}

/// For how long the last replica of a workload is kept now, once it has nothing to do. Whoever fills the
/// state notes it with the gap that begins then ([`crate::state::Gap::kept_ms`]); none of a workload that is
/// not there.
pub fn kept_ms(state: &State, policy: &Policy, workload: &str) -> u64 {
    let found = state.workloads.get(workload);
    found.map_or(0, |workload| keep_warm::kept_ms(state, workload, policy))
}
