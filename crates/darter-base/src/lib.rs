//! What both processes, agent and scaler, need and neither owns: layers of configuration, log lines, a word
//! of a metric, how an API server is spoken to.
//!
//! Here is what was written twice otherwise. Not here: anything that only one of them does.

pub mod exposition;
pub mod kubernetes;
pub mod layers;
pub mod limits;
pub mod log;
pub mod metrics;
