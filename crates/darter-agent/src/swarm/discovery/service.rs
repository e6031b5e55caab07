//! What the configuration calls a Kubernetes Service and a port of it.

use std::fmt;
use std::str::FromStr;

/// `name`, or `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName {
    /// None: that of this pod.
    pub namespace: Option<String>,
    /// Its own name.
    pub name: String,
}

impl FromStr for ServiceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if !is_label(name) || !namespace.is_none_or(is_label) {
            return Err(format!(
                "`{text}` is not a Service: expected name or namespace/name, such as kube-system/darter"
            ));
        }
        Ok(Self { namespace: namespace.map(ToOwned::to_owned), name: name.to_owned() })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// The port of an agent's control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServicePort {
    /// The same of every agent, whatever the Service says.
    Number(u16),
    /// The number that the EndpointSlice has for this name.
    Named(String),
}

impl FromStr for ServicePort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self::Number(number)),
            Err(_) if is_label(text) && !text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(Self::Named(text.to_owned()))
            }
            _ => Err(format!("`{text}` is not a port: expected the name or the number of a port of the Service")),
        }
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

/// A label of RFC 1123, which Kubernetes' names of namespaces, Services and ports are.
fn is_label(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(is_inner) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_and_ports_print_as_they_are_read_and_others_are_refused() {
        for text in ["darter", "kube-system/darter", "7/0"] {
            assert_eq!(text.parse::<ServiceName>().unwrap().to_string(), text);
        }
        let long = "a".repeat(64);
        for text in ["", "/darter", "kube-system/", "a/b/c", "Darter", "darter.gpu.svc", "-a", "a-", "a=b", &long] {
            assert!(text.parse::<ServiceName>().is_err(), "{text}");
        }
        for text in ["4002", "control", "4002tcp"] {
            assert_eq!(text.parse::<ServicePort>().unwrap().to_string(), text);
        }
        for text in ["0", "65536", "Control", "a b", ""] {
            assert!(text.parse::<ServicePort>().is_err(), "{text}");
        }
    }
}
