//! Where a registry may send us: not to this node and not to the cloud's metadata service.
//!
//! darter asks from the host's network with no firewall before it. A registry that could redirect
//! it to 169.254.169.254 or 127.0.0.1 would read with the node's rights (server-side request
//! forgery), so addresses are looked at after they are resolved, where they are dialled.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::url::Place;

/// Metadata addresses that are in no special range: Alibaba, Azure's wire server, Oracle.
const METADATA: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];

/// What may be dialled although it is local.
#[derive(Clone, Default)]
pub(super) struct Guard(Arc<Allowed>);

#[derive(Default)]
struct Allowed {
    /// Configured endpoints: exactly host and port.
    places: HashSet<(String, u16)>,
    /// `origin.allow_local`: a host with any port, or host:port.
    listed: HashSet<String>,
}

impl Guard {
    /// Lets through what the operator named: endpoints, and the list of `origin.allow_local`.
    pub(super) fn new<'a>(endpoints: impl IntoIterator<Item = &'a Place>, listed: &[String]) -> Self {
        Self(Arc::new(Allowed {
            places: endpoints.into_iter().map(|place| (place.host.clone(), place.port)).collect(),
            listed: listed.iter().map(|entry| entry.to_ascii_lowercase()).collect(),
        }))
    }

    /// Whether a connection to this host and port may go to this address.
    pub(super) fn allows(&self, host: &str, port: u16, address: IpAddr) -> bool {
        !is_local(address) || self.is_named(host, port)
    }

    fn is_named(&self, host: &str, port: u16) -> bool {
        let Allowed { places, listed } = &*self.0;
        let bare = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        places.contains(&(host.to_owned(), port))
            || listed.contains(host)
            || listed.contains(&bare)
            || listed.contains(&format!("{bare}:{port}"))
    }
}

/// Whether an address is this node, its link, or a metadata service. Private ranges are not: that
/// is where VPC endpoints are.
fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_local_v4(address),
        IpAddr::V6(address) => embedded(address).map_or_else(|| is_local_v6(address), is_local_v4),
    }
}

fn is_local_v4(address: Ipv4Addr) -> bool {
    address.is_loopback()
        || address.is_link_local()
        || address.octets()[0] == 0
        || address.is_broadcast()
        || address.is_multicast()
        || METADATA.contains(&address)
}

fn is_local_v6(address: Ipv6Addr) -> bool {
    // fd00:ec2::/32 holds EC2's metadata service and the Pod Identity agent.
    let is_ec2 = address.segments()[..2] == [0xfd00, 0x0ec2];
    address.is_loopback()
        || address.is_unspecified()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || is_ec2
}

/// The IPv4 address inside a mapped, compatible, NAT64 or 6to4 one: another way to write 127.0.0.1.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0xffff) | (0x64, 0xff9b, 0, 0, 0, 0) => Some(v4(g, h)),
        (0, 0, 0, 0, 0, 0) if g != 0 => Some(v4(g, h)),
        (0x2002, ..) => Some(v4(b, c)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_refused_however_they_are_written() {
        let guard = Guard::default();
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.170.23",
            "224.0.0.1",
            "255.255.255.255",
            "100.100.100.200",
            "168.63.129.16",
            "::1",
            "::",
            "fe80::1",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "::127.0.0.1",
            "2002:7f00:1::",
            "ff02::1",
        ] {
            assert!(!guard.allows("name.example", 443, address.parse().unwrap()), "{address}");
        }
        for address in ["10.77.0.2", "192.168.1.1", "172.16.0.1", "52.216.0.1", "fd12::1", "2600::1"] {
            assert!(guard.allows("name.example", 443, address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn what_the_operator_named_is_let_through_and_nothing_beside_it() {
        let endpoint = Place { https: false, host: "127.0.0.1".into(), port: 5000 };
        let listed = ["cache.local".to_owned(), "Other.local:8080".to_owned(), "[::1]:9".to_owned()];
        let guard = Guard::new([&endpoint], &listed);
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert!(guard.allows("127.0.0.1", 5000, loopback));
        assert!(!guard.allows("127.0.0.1", 5001, loopback));
        assert!(guard.allows("cache.local", 1, loopback));
        assert!(guard.allows("other.local", 8080, loopback));
        assert!(!guard.allows("other.local", 8081, loopback));
        assert!(guard.allows("::1", 9, loopback));
    }
}
