//! Does what `darter-core` decides: sockets, files, processes, clocks.
//!
//! `agent` binds, spawns and drains; each other module is one thing that the agent does.

pub mod config;
pub mod metrics;
pub mod store;
