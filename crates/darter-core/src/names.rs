//! The names in an image reference: registry, repository, tag.
//!
//! Each is a newtype that can only hold a name the OCI distribution spec allows, so that a path or
//! a URL built from one cannot escape from where it belongs.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A registry is `host` or `host:port`.
    #[error("`{0}` is not a registry: expected host or host:port, without scheme, path or wildcard")]
    Registry(String),
    /// A repository is path components of lower-case letters and digits.
    #[error("`{0}` is not a repository name")]
    Repository(String),
    /// A tag is at most 128 letters, digits, `_`, `.` and `-`.
    #[error("`{0}` is not a tag")]
    Tag(String),
    /// What follows `@` in a reference must be a sha256 digest.
    #[error("`{text}` does not end in a digest darter serves")]
    Digest {
        /// The text as given.
        text: String,
        /// What is wrong with the digest.
        #[source]
        source: DigestError,
    },
}

macro_rules! name {
    ($type:ident, $check:ident, $error:ident) => {
        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) { Ok(Self(text.to_owned())) } else { Err(NameError::$error(text.to_owned())) }
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// The registry that owns an image, as containerd names it in `ns=`: `host` or `host:port`.
///
/// It also names a directory under certs.d, so nothing that could be a path gets in.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Registry(String);
name!(Registry, is_registry, Registry);

impl Registry {
    /// The host without the port.
    pub fn host(&self) -> &str {
        match self.0.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => &self.0,
        }
    }
}

/// A repository inside a registry, such as `library/nginx`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Repository(String);
name!(Repository, is_repository, Repository);

/// A tag of a repository.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);
name!(Tag, is_tag, Tag);

/// What follows the repository: a tag that can move, or a digest that cannot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reference {
    /// A movable name; only the origin can say what it means now.
    Tag(Tag),
    /// Content itself.
    Digest(Digest),
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains(':') {
            let source = match text.parse() {
                Ok(digest) => return Ok(Self::Digest(digest)),
                Err(source) => source,
            };
            return Err(NameError::Digest { text: text.to_owned(), source });
        }
        text.parse().map(Self::Tag)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// A whole image name as a person types it, made explicit by Docker's rules: `nginx` is
/// `docker.io/library/nginx:latest`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ImageName {
    /// The registry that owns the image.
    pub registry: Registry,
    /// The repository inside it.
    pub repository: Repository,
    /// The tag or digest. A digest wins where both are given.
    pub reference: Reference,
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // The first component is a registry only if it cannot be a Docker Hub user: it has a dot or
        // a port, or is localhost.
        let (registry, rest) = match text.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_owned()),
            Some(_) => ("docker.io", text.to_owned()),
            None => ("docker.io", format!("library/{text}")),
        };
        let (path, digest) = match rest.split_once('@') {
            Some((path, digest)) => (path, Some(digest)),
            None => (rest.as_str(), None),
        };
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag.parse::<Tag>()?)),
            None => (path, None),
        };
        let reference = match (digest, tag) {
            (Some(digest), _) => {
                Reference::Digest(digest.parse().map_err(|source| NameError::Digest { text: text.to_owned(), source })?)
            }
            (None, Some(tag)) => Reference::Tag(tag),
            (None, None) => Reference::Tag(Tag("latest".to_owned())),
        };
        Ok(Self { registry: registry.parse()?, repository: repository.parse()?, reference })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = match self.reference {
            Reference::Tag(_) => ':',
            Reference::Digest(_) => '@',
        };
        write!(f, "{}/{}{separator}{}", self.registry, self.repository, self.reference)
    }
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        // An IPv6 literal without a port ends in its bracket.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    // `str::parse` would also take a sign.
    let is_port = |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0);
    let port_is_right = port.is_none_or(is_port);
    let host_is_right = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(is_host_label),
    };
    text.len() <= 255 && port_is_right && host_is_right
}

fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && label.len() <= 63
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// distribution-spec: components `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` joined by `/`, 255 in all.
fn is_repository(text: &str) -> bool {
    text.len() <= 255 && text.split('/').all(is_repository_component)
}

fn is_repository_component(component: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    is_word(first)
        && is_word(last)
        && component
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

fn is_tag(text: &str) -> bool {
    let mut bytes = text.bytes();
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= 128 && bytes.next().is_some_and(is_word) && bytes.all(|b| is_word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn image_names_follow_dockers_rules() {
        let digest = Digest::of(b"");
        for (given, explicit) in [
            ("nginx".to_owned(), "docker.io/library/nginx:latest".to_owned()),
            ("user/app:1".to_owned(), "docker.io/user/app:1".to_owned()),
            ("localhost/app".to_owned(), "localhost/app:latest".to_owned()),
            ("reg.example:5000/a/b/c:x".to_owned(), "reg.example:5000/a/b/c:x".to_owned()),
            (format!("ghcr.io/a/b:x@{digest}"), format!("ghcr.io/a/b@{digest}")),
        ] {
            assert_eq!(given.parse::<ImageName>().map(|name| name.to_string()), Ok(explicit));
        }
        for garbage in ["", "/", "a//b", "UPPER/app", "reg.example/", "app:", "app@sha256:1", "a.b/..", "-a/b.c"] {
            assert!(garbage.parse::<ImageName>().is_err(), "{garbage}");
        }
    }

    #[test]
    fn a_registry_is_never_a_path_or_a_wildcard() {
        for good in ["docker.io", "localhost:5000", "10.0.0.1", "[::1]:5000", "[fd00::2]", "EXAMPLE.com"] {
            assert!(good.parse::<Registry>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "*",
            "*.example.com",
            "_default",
            "..",
            "a/b",
            "http://a",
            "a:",
            "a:0",
            "a:65536",
            "a:+80",
            "a b",
            ".",
            "-a",
            "a..b",
            "[::1",
            "a:b:c",
        ] {
            assert!(bad.parse::<Registry>().is_err(), "{bad}");
        }
    }

    #[test]
    fn repository_names_are_those_of_the_spec() {
        for good in ["a", "a/b", "a-b", "a--b", "a__b", "a_b", "a.b", "library/nginx", "0/1"] {
            assert!(good.parse::<Repository>().is_ok(), "{good}");
        }
        for bad in ["", "A", "a/", "/a", "a//b", "a..b", "a___b", "a._b", "-a", "a-", "../a", "a/../b", "ü"] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn an_image_name_reads_its_own_text(
            registry in "[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?",
            repository in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,5}){0,3}",
            tag in "[A-Za-z0-9_][A-Za-z0-9._-]{0,20}",
        ) {
            let text = format!("{registry}/{repository}:{tag}");
            let name: ImageName = text.parse().unwrap();
            prop_assert_eq!(name.to_string(), text);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<ImageName>();
            let _ = text.parse::<Registry>();
            let _ = text.parse::<Reference>();
        }
    }
}
