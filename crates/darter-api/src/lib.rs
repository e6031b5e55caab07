//! What darter's parts say to each other, as types: generated from `proto/`.
//!
//! Committed, so that who reads it needs no compiler for it; a test compares it with its source.
//! Not here: what is allowed beyond the types. Who receives a message checks that.

/// What KEDA asks the scaler: `proto/externalscaler.proto`.
#[rustfmt::skip]
#[allow(unused_qualifications, clippy::pedantic, clippy::use_self, reason = "generated, and not for people")]
pub mod externalscaler;
/// What agents say to the scaler, and it to them: `proto/darter/v1/report.proto`.
#[rustfmt::skip]
#[allow(unused_qualifications, clippy::pedantic, clippy::use_self, reason = "generated, and not for people")]
pub mod report;
/// What agents say to each other: `proto/darter/v1/swarm.proto`.
#[rustfmt::skip]
pub mod v1;
