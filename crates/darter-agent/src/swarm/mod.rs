//! This node among the others: what `darter_core::swarm` needs of sockets.
//!
//! `control` is connected to the other agents and carries messages, `discovery` finds where they may
//! be, `wire` and `frame` are what the messages look like, `identity` and `key` who may
//! take part; `part` puts them together for the agent.
//! `exchange` moves the bytes of pieces, on connections of its own; nothing starts it yet.
//! Not here: what is asked of whom, which the core decides.

pub mod control;
pub mod discovery;
pub mod exchange;
pub mod frame;
pub mod identity;
pub mod key;
pub mod part;
pub mod wire;
