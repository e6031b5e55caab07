//! What the EndpointSlices of one Service say of where agents are. Pure.
//!
//! An endpoint counts whether it is ready or not: an agent that boots is not ready before it has
//! looked around, and one whose mirror fails may still have blobs. One that terminates does not: it
//! is leaving, and who has a connection to it keeps that.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::runtime::watcher::Event;

use super::ServicePort;

/// Which addresses count.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Which port of them.
    pub port: ServicePort,
    /// Agents listen on IPv6, else on IPv4: all on the same, and not on both.
    pub is_ipv6: bool,
}

/// The slices as they are now.
#[derive(Debug)]
pub struct Slices {
    wanted: Wanted,
    /// Of each slice that has any. No more slices than addresses are of use: beyond, the list that
    /// they make is full.
    known: BTreeMap<String, BTreeSet<SocketAddr>>,
    /// While all are listed anew the ones known before stay.
    listing: Option<BTreeMap<String, BTreeSet<SocketAddr>>>,
    max: usize,
}

impl Slices {
    /// None yet, and so many at most.
    pub const fn new(wanted: Wanted, max: usize) -> Self {
        Self { wanted, known: BTreeMap::new(), listing: None, max }
    }

    /// Takes in what happened, and says whether `addresses` is whole and may be another.
    pub fn on(&mut self, event: Event<EndpointSlice>) -> bool {
        match event {
            Event::Init => self.listing = Some(BTreeMap::new()),
            Event::InitApply(slice) => {
                if let Some(listing) = &mut self.listing {
                    insert(listing, &slice, &self.wanted, self.max);
                }
            }
            Event::InitDone => self.known = self.listing.take().unwrap_or_default(),
            Event::Apply(slice) => insert(&mut self.known, &slice, &self.wanted, self.max),
            Event::Delete(slice) => {
                self.known.remove(slice.metadata.name.as_deref().unwrap_or_default());
            }
        }
        self.listing.is_none()
    }

    /// Those of all slices.
    pub fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.known.values().flatten().copied().collect()
    }
}

fn insert(slices: &mut BTreeMap<String, BTreeSet<SocketAddr>>, slice: &EndpointSlice, wanted: &Wanted, max: usize) {
    let name = slice.metadata.name.as_deref().unwrap_or_default();
    // What it had before does not count any more, whatever it has now.
    slices.remove(name);
    let addresses = addresses(slice, wanted);
    if !addresses.is_empty() && slices.len() < max {
        slices.insert(name.to_owned(), addresses);
    }
}

fn addresses(slice: &EndpointSlice, wanted: &Wanted) -> BTreeSet<SocketAddr> {
    // The third type, FQDN, is made by nobody, and nothing is said of what it means.
    let is_ours = slice.address_type == if wanted.is_ipv6 { "IPv6" } else { "IPv4" };
    let Some(port) = port(slice, &wanted.port).filter(|_| is_ours) else { return BTreeSet::new() };
    let stays =
        |endpoint: &&Endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.terminating) != Some(true);
    // Whatever its slice says it is.
    let is_of_family = |ip: &IpAddr| ip.is_ipv6() == wanted.is_ipv6;
    // The API gives a meaning to the first address of an endpoint only.
    let first = |endpoint: &Endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok().filter(is_of_family);
    slice.endpoints.iter().filter(stays).filter_map(first).map(|ip| SocketAddr::new(ip, port)).collect()
}

fn port(slice: &EndpointSlice, wanted: &ServicePort) -> Option<u16> {
    match wanted {
        ServicePort::Number(number) => Some(*number),
        ServicePort::Named(name) => {
            let found = slice.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name))?;
            found.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, endpoints: &Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": { "name": name }, "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{ "name": "http", "port": 80 }, { "name": "control", "port": 5002 }],
        }))
        .unwrap()
    }

    fn one(address: &str) -> Value {
        json!([{ "addresses": [address] }])
    }

    fn slices(port: &str) -> Slices {
        Slices::new(Wanted { port: port.parse().unwrap(), is_ipv6: false }, 3)
    }

    fn have(slices: &Slices) -> Vec<String> {
        slices.addresses().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn endpoints_that_boot_count_and_those_that_leave_do_not() {
        let mut slices = slices("4002");
        slices.on(Event::Apply(slice(
            "a",
            &json!([
                { "addresses": ["10.0.0.1", "10.9.9.9"] },
                { "addresses": ["10.0.0.2"], "conditions": { "ready": true, "serving": true, "terminating": false } },
                { "addresses": ["10.0.0.3"], "conditions": { "ready": false, "serving": false } },
                { "addresses": ["10.0.0.4"], "conditions": { "ready": false, "serving": true, "terminating": true } },
                { "addresses": ["no address"] },
                { "addresses": [] },
            ]),
        )));
        assert_eq!(have(&slices), ["10.0.0.1:4002", "10.0.0.2:4002", "10.0.0.3:4002"]);
    }

    #[test]
    fn a_named_port_is_that_of_the_slice_and_a_slice_without_it_has_nobody() {
        let mut named = slices("control");
        named.on(Event::Apply(slice("a", &one("10.0.0.1"))));
        assert_eq!(have(&named), ["10.0.0.1:5002"]);
        let mut other = slices("metrics");
        other.on(Event::Apply(slice("a", &one("10.0.0.1"))));
        assert_eq!(have(&other), [""; 0]);
    }

    #[test]
    fn only_the_family_that_agents_listen_on_counts() {
        let mut six = slice("six", &one("2001:db8::1"));
        six.address_type = "IPv6".to_owned();
        let mut slices = slices("4002");
        slices.on(Event::Apply(six.clone()));
        assert_eq!(have(&slices), [""; 0]);
        slices.wanted.is_ipv6 = true;
        slices.on(Event::Apply(six));
        slices.on(Event::Apply(slice("four", &one("10.0.0.1"))));
        assert_eq!(have(&slices), ["[2001:db8::1]:4002"]);
        let mut mixed = slice("mixed", &one("10.0.0.2"));
        mixed.address_type = "IPv6".to_owned();
        slices.on(Event::Apply(mixed));
        assert_eq!(have(&slices), ["[2001:db8::1]:4002"], "whatever its slice says it is");
    }

    #[test]
    fn slices_are_one_list_that_changes_with_each_of_them() {
        let mut slices = slices("4002");
        for (name, address) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
            assert!(slices.on(Event::Apply(slice(name, &one(address)))));
        }
        assert_eq!(have(&slices), ["10.0.0.1:4002", "10.0.0.2:4002"]);
        slices.on(Event::Apply(slice("a", &one("10.0.0.3"))));
        assert_eq!(have(&slices), ["10.0.0.2:4002", "10.0.0.3:4002"]);
        slices.on(Event::Apply(slice("a", &json!([]))));
        slices.on(Event::Delete(slice("b", &one("10.0.0.2"))));
        assert_eq!(have(&slices), [""; 0]);
    }

    #[test]
    fn a_new_list_takes_the_place_of_the_old_one_only_when_it_is_whole() {
        let mut slices = slices("4002");
        slices.on(Event::Apply(slice("a", &one("10.0.0.1"))));
        assert!(!slices.on(Event::Init));
        assert!(!slices.on(Event::InitApply(slice("b", &one("10.0.0.2")))));
        assert_eq!(have(&slices), ["10.0.0.1:4002"]);
        assert!(slices.on(Event::InitDone));
        assert_eq!(have(&slices), ["10.0.0.2:4002"]);
    }

    #[test]
    fn slices_past_the_bound_are_not_kept() {
        let mut slices = slices("4002");
        for n in 1..=5 {
            slices.on(Event::Apply(slice(&format!("s{n}"), &one(&format!("10.0.0.{n}")))));
        }
        assert_eq!(have(&slices).len(), 3);
        slices.on(Event::Apply(slice("s1", &one("10.0.0.9"))));
        assert_eq!(have(&slices), ["10.0.0.2:4002", "10.0.0.3:4002", "10.0.0.9:4002"]);
    }
}
