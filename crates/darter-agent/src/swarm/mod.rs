//! This node among the others: what `darter_core::swarm` needs of sockets.
//!
//! `control` is connected to the other agents and carries messages, `discovery` finds where they may
//! be, `wire` and `frame` are what the messages look like, `identity` and `key` who may
//! take part. `exchange` moves the bytes of pieces, on connections of its own, `shelf` is what it
//! serves, and `tokens` the right to it where it is plaintext. `witnesses` is what members say of a registry
//! that is away. `driver` is the loop that carries out what the core decides, `handle` what the rest of the
//! agent has of it, `coming` a blob on its way; `part` puts all of it together.
//! Not here: what is asked of whom, which the core decides.

pub mod coming;
pub mod control;
pub mod discovery;
mod driver;
pub mod exchange;
pub mod frame;
pub mod handle;
pub mod identity;
pub mod key;
pub mod part;
mod shelf;
mod tokens;
pub mod wire;
pub mod witnesses;
