//! The registries this node mirrors, each with its origin and its rules.
//!
//! A request for any other registry is answered 404: the mirror is no open proxy.

use std::collections::HashMap;
use std::sync::Arc;

use darter_core::Registry;
use darter_core::ecr::Ecr;

use crate::config::{Access, RegistryConfig};
use crate::metrics::RegistryLabel;
use crate::origin::Origin;

/// One mirrored registry.
pub struct Site {
    /// How to reach it.
    pub origin: Origin,
    /// Its label in the metrics.
    pub label: RegistryLabel,
    /// What the operator said about it.
    pub config: RegistryConfig,
}

impl Site {
    /// A registry with the origin that was made for it.
    pub fn new(config: RegistryConfig, origin: Origin) -> Self {
        Self { origin, label: RegistryLabel::of(&config.name), config }
    }

    /// The registry's name.
    pub const fn registry(&self) -> &Registry {
        &self.config.name
    }

    /// The access policy: as configured, `node` for private ECR. `None`: `public` where an anonymous
    /// request works, else `caller`; that can differ from one repository to the next.
    pub fn access(&self) -> Option<Access> {
        let is_ecr = || matches!(Ecr::recognise(&self.config.name), Some(Ecr::Private { .. }));
        self.config.access.or_else(|| is_ecr().then_some(Access::Node))
    }
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Site").field(&self.config.name).finish()
    }
}

/// All mirrored registries.
#[derive(Debug, Default)]
pub struct Sites {
    sites: HashMap<Registry, Arc<Site>>,
    default: Option<Registry>,
}

impl Sites {
    /// These registries; `default` is the one meant by requests that name none.
    pub fn new(sites: impl IntoIterator<Item = Site>, default: Option<Registry>) -> Self {
        let sites = sites.into_iter().map(|site| (site.registry().clone(), Arc::new(site))).collect();
        Self { sites, default }
    }

    /// The registry that a request means.
    pub fn get(&self, named: Option<&Registry>) -> Option<&Arc<Site>> {
        named.or(self.default.as_ref()).and_then(|registry| self.sites.get(registry))
    }

    /// All of them, in order of name.
    pub fn all(&self) -> Vec<&Arc<Site>> {
        let mut all: Vec<_> = self.sites.values().collect();
        all.sort_by_key(|site| site.registry());
        all
    }
}
