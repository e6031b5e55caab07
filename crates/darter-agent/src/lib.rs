//! Does what `darter-core` decides: sockets, files, processes, clocks.
//!
//! `agent` binds, spawns and drains; each other module is one thing that the agent does. The way of
//! a GET: `mirror` reads it, `images` decides whether it may have what it asks for, `store` has it
//! or `pulls` brings it from an `origin`.

pub mod activity;
pub mod admin;
pub mod agent;
pub mod certs_d;
pub mod config;
pub mod containerd;
mod files;
pub mod going;
pub mod gpu;
pub mod head;
pub mod images;
pub mod imds;
pub mod metrics;
pub mod mirror;
pub mod node;
pub mod origin;
pub mod own_registry;
pub mod parts;
pub mod prewarm;
pub mod pulls;
pub mod report;
pub mod self_test;
pub mod sites;
pub mod store;
pub mod swarm;
mod watch;

use darter_base::kubernetes;
pub use darter_base::log;
