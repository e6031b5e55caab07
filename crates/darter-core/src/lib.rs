//! What a darter node decides, and nothing it does.
//!
//! Everything here is a pure function or a value: time, bytes and text come in as arguments, and
//! decisions go out. No clock, no disk, no network, no randomness, nothing async; the crate builds
//! for wasm32 to prove it. `darter-agent` carries out what is decided here.

#![warn(missing_docs)]

pub mod access;
pub mod containerd_config;
pub mod digest;
pub mod ecr;
pub mod fetch;
pub mod gpu;
pub mod hex;
pub mod hosts_toml;
pub mod manifest;
pub mod names;
pub mod oci;
pub mod pieces;
pub mod range;
pub mod ready;
#[cfg(feature = "simulate")]
pub mod simulate;
pub mod stale;
pub mod startup;
pub mod status;
pub mod swarm;
pub mod units;

pub use digest::Digest;
pub use names::{ImageName, Reference, Registry, Repository, Tag};
