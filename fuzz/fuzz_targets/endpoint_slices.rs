//! EndpointSlices as an API server may send them: a line for each event, its first letter the kind. Only addresses
//! of the right family with a port come out, and a list of all is worth what its slices are one by one.

#![no_main]

use std::net::SocketAddr;

use darter_agent::swarm::discovery::slices::{Slices, Wanted};
use darter_agent::swarm::discovery::{ServiceName, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::Event;
use libfuzzer_sys::fuzz_target;

/// Slices at most: few, so that the bound is met.
const MAX: usize = 3;

fn parse(line: &[u8]) -> Option<Event<EndpointSlice>> {
    let (kind, rest) = line.split_first()?;
    let slice = || serde_json::from_slice(rest).ok();
    Some(match kind {
        b'[' => Event::Init,
        b',' => Event::InitApply(slice()?),
        b']' => Event::InitDone,
        b'+' => Event::Apply(slice()?),
        b'-' => Event::Delete(slice()?),
        _ => return None,
    })
}

fn play(lines: &[&[u8]], wanted: &Wanted) {
    let new = || Slices::new(wanted.clone(), MAX);
    let (mut slices, mut one_by_one) = (new(), new());
    let mut is_listing = false;
    for event in lines.iter().filter_map(|line| parse(line)) {
        let (is_init, is_end) = (matches!(event, Event::Init), matches!(event, Event::InitDone));
        match &event {
            Event::Init => one_by_one = new(),
            Event::InitApply(slice) if is_listing => drop(one_by_one.on(Event::Apply(slice.clone()))),
            _ => {}
        }
        let before = slices.addresses();
        is_listing = is_init || (is_listing && !is_end);
        let is_a_part = matches!(event, Event::InitApply(_)) || is_init;
        assert_eq!(slices.on(event), !is_listing);
        let addresses = slices.addresses();
        assert!(!is_a_part || addresses == before, "a list that is not whole counts");
        if is_end {
            assert_eq!(addresses, one_by_one.addresses());
            one_by_one = new();
        }
        let is_right = |address: &SocketAddr| address.is_ipv6() == wanted.is_ipv6 && address.port() > 0;
        assert!(addresses.iter().all(is_right), "{addresses:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    for port in [ServicePort::Number(4002), ServicePort::Named("control".to_owned())] {
        for is_ipv6 in [false, true] {
            play(&lines, &Wanted { port: port.clone(), is_ipv6 });
        }
    }
    // What the configuration calls the Service and its port.
    let Some(text) = lines.first().and_then(|line| std::str::from_utf8(line).ok()) else { return };
    if let Ok(name) = text.parse::<ServiceName>() {
        assert_eq!(name.to_string(), text);
    }
    if let Ok(port) = text.parse::<ServicePort>() {
        assert_eq!(port.to_string().parse(), Ok(port));
    }
});
