//! The credential of one order: for registries that ask each pull for its own.

use std::fmt;

use k8s_cri::v1::AuthConfig;
use serde::{Deserialize, Serialize};

use crate::origin::Credential;

/// User and password. Held as long as the order is carried out, and never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// As for `docker login`; without a colon.
    pub username: String,
    /// A password or a token.
    pub password: String,
}

impl Login {
    pub(super) fn credential(&self) -> Credential {
        Credential::caller(&self.username, &self.password)
    }

    /// For containerd, which shows it to the mirror or to the registry.
    pub(super) fn for_cri(&self) -> AuthConfig {
        AuthConfig { username: self.username.clone(), password: self.password.clone(), ..AuthConfig::default() }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prewarm::Order;

    #[test]
    fn an_order_that_is_printed_holds_no_secret() {
        let login = Some(Login { username: "user".into(), password: "hunter2".into() });
        let order = Order { image: "reg.example/a:1".into(), store_only: false, pin: None, login };
        let printed = format!("{order:?}");
        assert!(printed.contains("Login") && !printed.contains("hunter2") && !printed.contains("user"), "{printed}");
    }
}
