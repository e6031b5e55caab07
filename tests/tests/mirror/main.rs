//! What containerd and other clients get from the mirror of one node, and what the registry behind it sees.
//!
//! One program, as the others of this directory: most of these tests wait, and each program costs a link.

mod access;
mod bad_input;
mod conformance;
mod contract;
mod foreign;
mod hosts_toml;
mod log;
mod lying_registry;
mod mirror_faults;
mod no_ranges;
mod node_role;
mod one_fetch;
mod origin;
mod own_registry;
mod parallel;
mod refusals;
mod slow_clients;
mod slow_registry;
