//! What darter's parts say to each other, as types: generated from `proto/`.
//!
//! Committed, so that who reads it needs no compiler for it; a test compares it with its source.
//! Not here: what is allowed beyond the types. Who receives a message checks that.

/// Version 1: `proto/darter/v1`.
#[rustfmt::skip]
pub mod v1;
