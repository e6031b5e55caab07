//! This node among the others: what `darter_core::swarm` needs of sockets.
//!
//! `control` is connected to the other agents and carries messages, `discovery` finds where they may
//! be, `wire` and `frame` are what the messages look like, `identity` and `key` who may
//! take part; `part` puts them together for the agent.
//! Not here: what is asked of whom, which the core decides; the bytes of blobs, which travel on
//! connections of their own.

pub mod control;
pub mod discovery;
pub mod frame;
pub mod identity;
pub mod key;
pub mod part;
pub mod wire;
