//! The companion scaler: hears reports and demand, decides, says why, answers KEDA.
//!
//! Pure is what decides: reports and facts become a [`State`] in the [`fleet`]; [`decide`] says what to do now, with
//! a reason for each action and each hold; [`apply`] is what the state looks like once that is done; a
//! [`record::Record`] is decided again bit for bit; `simulate` plays the very same function over traces.
//! Around it is what touches the machine: [`scaler`] starts and ends it, the [`controller`] is the one loop.

#![warn(missing_docs)]

pub mod access;
pub mod apply;
pub mod bell;
pub mod clock;
pub mod config;
pub mod controller;
pub mod decide;
pub mod demand;
pub mod fleet;
pub mod grpc;
pub mod http;
pub mod hub;
pub mod keda;
pub mod kubernetes;
pub mod metrics;
pub mod policy;
pub mod reason;
pub mod record;
pub mod recorder;
pub mod render;
pub mod reports;
pub mod scaler;
pub mod simulate;
pub mod state;
pub mod time;
pub mod traces;

pub use decide::{Action, Decision, decide};
pub use policy::Policy;
pub use state::State;
pub use time::Millis;
