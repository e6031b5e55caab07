//! What the companion scaler decides, why, and what that would have cost: pure, but for [`kubernetes`].
//!
//! Reports and watches become a [`State`]; [`decide`] says what to do now, with a reason for each action
//! and each hold; [`apply`] is what the state looks like once that is done; a [`record::Record`] is
//! decided again bit for bit. `simulate` plays the very same function over traces.
//! Not here yet: the report stream, and the loop between all these.

#![warn(missing_docs)]

pub mod apply;
pub mod decide;
pub mod fleet;
pub mod kubernetes;
pub mod policy;
pub mod reason;
pub mod record;
pub mod render;
pub mod simulate;
pub mod state;
pub mod time;
pub mod traces;

pub use decide::{Action, Decision, decide};
pub use policy::Policy;
pub use state::State;
pub use time::Millis;
