//! What `darter_core::swarm` decides, carried out between nodes.

pub mod exchange;
