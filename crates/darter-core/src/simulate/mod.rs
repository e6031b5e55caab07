//! Plays the swarm: thousands of `Swarm` machines against each other over made-up links.
//!
//! A discrete-event model of links, an origin and faults; every decision is made by the very code
//! that the agent runs. The same scenario and seed give the same run, bit for bit. Links are FIFO
//! servers of blocks, an eighth of a piece by default: no TCP dynamics, no CPU, no disk.

mod bound;
mod faults;
mod lies;
mod outcome;
mod queue;
mod reach;
mod registry;
mod scenario;
mod transfers;
mod wires;
mod world;

pub use bound::Bound;
pub use outcome::Outcome;
pub use scenario::{Fault, Origin, Scenario};

/// Plays `scenario` to its end.
pub fn run(scenario: &Scenario) -> Outcome {
    world::World::new(scenario).run()
}
