//! All that is known of the cluster, and the state that is decided on made of it.
//!
//! Pure: what was heard comes in as values, the time as an argument. Not here: who hears it.

pub mod acts;
pub mod facts;

pub use acts::{Act, Actuator, Done, Outcome, Target};
pub use facts::{Claim, Fact, Kind, NodeFact, PodFact, PoolFact, WorkloadFact};
