//! Credentials that cannot be printed: what is shown to an origin, and whose it is.
//!
//! None of these types has a Debug or Display of its content. Told apart they are by a hash.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use darter_core::Digest;
use darter_core::access::CredentialKey;
use http::HeaderValue;

/// Text that opens something.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Secret(Arc<str>);

impl Secret {
    pub(super) fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the wire and nothing else.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A user and password, as they go into an Authorization header.
#[derive(Clone, PartialEq, Eq)]
pub struct Basic(Secret);

impl Basic {
    /// Of a user and a password.
    pub(super) fn of(user: &str, password: &str) -> Self {
        Self(Secret::new(BASE64.encode(format!("{user}:{password}"))))
    }

    /// Of `base64(user:password)`; `None` if it is not that.
    pub(super) fn of_encoded(encoded: &str) -> Option<Self> {
        let decoded = BASE64.decode(encoded.trim()).ok()?;
        let text = std::str::from_utf8(&decoded).ok()?;
        text.contains(':').then(|| Self(Secret::new(BASE64.encode(text))))
    }

    /// The header's value, which http and hyper do not print.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        sensitive(&format!("Basic {}", self.0.expose()))
    }

    /// Tells this credential from others.
    pub(super) fn key(&self) -> CredentialKey {
        key("caller", self.0.expose())
    }
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Basic")
    }
}

/// What the node, or a pull, has to show for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Account {
    /// To the registry, or to its token server.
    Password(Basic),
    /// An OAuth2 refresh token, as `docker login` leaves it for registries that have their users by
    /// single sign-on. It is for the token server alone.
    Identity(Secret),
}

impl Account {
    /// What the registry itself is shown.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        match self {
            Self::Password(basic) => basic.header(),
            Self::Identity(_) => None,
        }
    }

    /// User and password, if it is that.
    pub(super) const fn basic(&self) -> Option<&Basic> {
        match self {
            Self::Password(basic) => Some(basic),
            Self::Identity(_) => None,
        }
    }

    /// Tells it from others.
    pub(super) fn key(&self) -> CredentialKey {
        match self {
            Self::Password(basic) => basic.key(),
            Self::Identity(token) => key("identity", token.expose()),
        }
    }
}

/// A header value that is not printed. `None`: it holds bytes that no header can.
pub(super) fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Whose credential a request uses.
#[derive(Debug, Clone)]
pub enum Credential {
    /// Nobody's.
    Anonymous,
    /// The node's own, as configured or as AWS gives it.
    Node,
    /// That of the pull itself, from containerd.
    Caller(Basic),
}

impl Credential {
    /// Of a user and a password that came with a pull.
    pub fn caller(user: &str, password: &str) -> Self {
        Self::Caller(Basic::of(user, password))
    }

    /// Reads an Authorization header. Only Basic: a Bearer token was made for another place, and is
    /// nobody's to hand on.
    pub fn from_header(header: &str) -> Option<Self> {
        let (scheme, encoded) = header.trim().split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        Basic::of_encoded(encoded).map(Self::Caller)
    }

    /// Tells this credential from others, without holding it.
    pub fn key(&self) -> CredentialKey {
        match self {
            Self::Anonymous => key("anonymous", ""),
            Self::Node => key("node", ""),
            Self::Caller(basic) => basic.key(),
        }
    }
}

fn key(kind: &str, text: &str) -> CredentialKey {
    CredentialKey(*Digest::of(format!("{kind}\0{text}").as_bytes()).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_read_from_basic_only() {
        let encoded = BASE64.encode("user:secret");
        assert!(matches!(Credential::from_header(&format!("basic {encoded}")), Some(Credential::Caller(_))));
        for header in ["Bearer abc", "Basic", "Basic !!!", &format!("Basic {}", BASE64.encode("no colon")), ""] {
            assert!(Credential::from_header(header).is_none(), "{header}");
        }
    }

    #[test]
    fn nothing_that_is_printed_holds_a_secret() {
        let basic = Basic::of("user", "hunter2");
        let credential = Credential::Caller(basic.clone());
        let printed = format!("{basic:?} {credential:?} {:?} {:?}", basic.header(), Secret::new("hunter2"));
        let encoded = BASE64.encode("user:hunter2");
        assert!(!printed.contains("hunter2") && !printed.contains(&encoded), "{printed}");
    }

    #[test]
    fn keys_tell_credentials_apart() {
        let caller = |password| Credential::Caller(Basic::of("user", password)).key();
        assert_eq!(caller("a"), caller("a"));
        let keys = [caller("a"), caller("b"), Credential::Anonymous.key(), Credential::Node.key()];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
        }
    }
}
