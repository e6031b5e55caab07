//! The table `[kubernetes]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::optional;

/// Which node this is for an API server, and who asks it. The keys are described in `default.toml`.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    #[serde(with = "optional")]
    pub node: Option<String>,
    #[serde(with = "optional")]
    pub kubeconfig: Option<PathBuf>,
    #[serde(with = "optional")]
    pub pod: Option<String>,
}
