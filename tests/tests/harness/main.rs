//! The harness proves itself: what it fakes behaves as the real thing is known to, and what it starts is gone
//! afterwards.

mod cluster;
mod fakes;
mod itself;
mod nvml_mock;
