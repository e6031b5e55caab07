//! `darter` as people and scripts use it.

mod bare;
mod fit;
mod prewarm_terminal;
mod simulate;
mod status;
