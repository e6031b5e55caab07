//! `darter` as people and scripts use it.

mod fit;
mod prewarm_terminal;
mod status;
