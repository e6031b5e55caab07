//! Nodes that share: real containerds, agents and sockets, on links with a rate.

mod containerd;
mod drain;
mod going;
mod hostile;
mod kubernetes;
mod manifests;
mod origin;
mod plain;
mod private;
mod pulls;
mod seed;
mod stale;
mod swarm;
mod trouble;
mod zones;
