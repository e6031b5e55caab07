//! Reading URLs: where they lead, what a Location means, what may be shown of them.

use std::fmt;

use http::Uri;

use super::OriginError;

/// Location headers longer than this are not followed: signed URLs have 1 to 3 KiB.
const LOCATION_MAX_BYTES: usize = 16 * 1024;

/// Scheme, host and port: who gets a request.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) https: bool,
    pub(super) host: String,
    pub(super) port: u16,
}

impl Place {
    /// Where a URL leads; `None` where it is not http(s) or has no host.
    pub(super) fn of(uri: &Uri) -> Option<Self> {
        let https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
        let host = host.to_ascii_lowercase();
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        (!host.is_empty()).then_some(Self { https, host, port })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Host and port of a URL, which is all of it that may be shown.
pub(super) fn shown(uri: &Uri) -> String {
    Place::of(uri).map_or_else(|| "?".to_owned(), |place| place.to_string())
}

/// The API root of a configured URL: `/v2` is appended unless the path has it already, as
/// containerd does with the hosts of hosts.toml.
pub(super) fn api_root(url: &str) -> Result<String, OriginError> {
    let wrong = || OriginError::Url(without_secrets(url));
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let has_user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    if Place::of(&uri).is_none() || has_user || uri.query().is_some() {
        return Err(wrong());
    }
    let root = url.trim_end_matches('/');
    let is_api = uri.path().split('/').any(|segment| segment == "v2");
    Ok(if is_api { root.to_owned() } else { format!("{root}/v2") })
}

/// A URL of the configuration without what may be secret in it.
pub fn without_secrets(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.rsplit_once('@') {
        Some((_, rest)) => format!("…@{rest}"),
        None => url.to_owned(),
    }
}

/// What a Location header means in the answer to a request for `base`.
pub(super) fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next()?;
    if location.is_empty() || location.len() > LOCATION_MAX_BYTES {
        return None;
    }
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let text = match location {
        _ if location.contains("://") && !location.starts_with(['/', '?', '.']) => location.to_owned(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ if location.starts_with('?') => format!("{scheme}://{authority}{}{location}", base.path()),
        _ => {
            let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
            format!("{scheme}://{authority}{directory}/{location}")
        }
    };
    let uri: Uri = text.parse().ok()?;
    Place::of(&uri).map(|_| uri)
}

/// The value of a query parameter, as it stands there.
pub(super) fn query<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_location_is_read_as_a_browser_would() {
        let base: Uri = "https://reg.example:5000/v2/a/blobs/x?y=z".parse().unwrap();
        for (location, wanted) in [
            ("http://s3.example/k?sig=1#part", "http://s3.example/k?sig=1"),
            ("//s3.example/k", "https://s3.example/k"),
            ("/k?a=/b", "https://reg.example:5000/k?a=/b"),
            ("k", "https://reg.example:5000/v2/a/blobs/k"),
            ("?n=2", "https://reg.example:5000/v2/a/blobs/x?n=2"),
            ("/k?to=http://elsewhere", "https://reg.example:5000/k?to=http://elsewhere"),
        ] {
            assert_eq!(resolve(&base, location).map(|uri| uri.to_string()).as_deref(), Some(wanted), "{location}");
        }
        for location in ["", "ftp://x/", "file:///etc/passwd", "https://", "gopher://x"] {
            assert_eq!(resolve(&base, location), None, "{location}");
        }
    }

    #[test]
    fn the_api_root_is_found_as_in_hosts_toml() {
        for (url, root) in [
            ("https://a.example", "https://a.example/v2"),
            ("https://a.example/", "https://a.example/v2"),
            ("https://a.example/proxy", "https://a.example/proxy/v2"),
            ("https://a.example/v2/ecr", "https://a.example/v2/ecr"),
        ] {
            assert_eq!(api_root(url).unwrap(), root);
        }
        let error = api_root("https://user:hunter2@a.example").unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
        assert!(api_root("ftp://a.example").is_err());
    }

    proptest! {
        #[test]
        fn no_location_panics(location: String) {
            let _ = resolve(&"https://reg.example/v2/".parse().unwrap(), &location);
            let _ = api_root(&location);
        }
    }
}
