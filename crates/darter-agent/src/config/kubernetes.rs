//! The table `[kubernetes]`.

use std::path::PathBuf;

use std::time::Duration;

use darter_core::units::Seconds;
use serde::{Deserialize, Serialize};

use super::check::{Fault, require};
use super::{Config, optional};

/// Shorter, and nothing is waited for; longer, and a node that will never be of use is paid for.
const DEADLINE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3600)];

/// Which node this is for an API server, and who asks it. The keys are described in `default.toml`.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    #[serde(with = "optional")]
    pub node: Option<String>,
    #[serde(with = "optional")]
    pub kubeconfig: Option<PathBuf>,
    pub gpu_condition: bool,
    #[serde(with = "optional")]
    pub startup_taint: Option<String>,
    pub startup_deadline: Seconds,
    #[serde(with = "optional")]
    pub pod: Option<String>,
}

pub(super) fn check_kubernetes(config: &Config) -> Result<(), Fault> {
    let settings = &config.kubernetes;
    let asks = settings.node.is_some() || settings.pod.is_some() || config.swarm.service.is_some();
    require(asks || settings.kubeconfig.is_none(), "kubernetes.kubeconfig", || {
        "has no meaning without kubernetes.node, kubernetes.pod or swarm.service: nothing is asked of an API server"
            .to_owned()
    })?;
    require(settings.startup_taint.as_deref().is_none_or(is_key), "kubernetes.startup_taint", || {
        "must be the key of a taint alone, such as darter.dev/not-ready; its effect is NoSchedule".to_owned()
    })?;
    let [least, most] = DEADLINE;
    require((least..=most).contains(&settings.startup_deadline.0), "kubernetes.startup_deadline", || {
        format!("must be from {} to {}", Seconds(least), Seconds(most))
    })
}

/// As labels are: a name, with or without a domain before it.
fn is_key(key: &str) -> bool {
    let (domain, name) = key.rsplit_once('/').unwrap_or(("a", key));
    let is_word = |text: &str, more: &[char]| {
        let is_letter = |letter: char| letter.is_ascii_alphanumeric() || more.contains(&letter);
        let ends = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_alphanumeric());
        text.chars().all(is_letter) && ends(text.chars().next()) && ends(text.chars().next_back())
    };
    is_word(domain, &['-', '.']) && domain.len() <= 253 && is_word(name, &['-', '_', '.']) && name.len() <= 63
}
