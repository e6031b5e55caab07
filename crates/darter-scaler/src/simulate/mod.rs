//! What the scaler's decisions would have cost on a trace, by the very function that decides.

pub mod cluster;
pub mod replay;
#[cfg(test)]
mod tests;
