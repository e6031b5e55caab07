//! The ground that the scaler stands on: the real Karpenter, with instances of nothing, and KEDA's real operator, at a
//! real control plane; before anything of darter's is put between them.
//!
//! Ignored by `cargo test`, since building the tools takes long, and so do the tests: `make test-kube` runs them, one
//! after the other.

mod activation;
mod example;
mod live;
mod nodes;
mod spare;
