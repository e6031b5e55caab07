//! Where members are: the file that an agent left, and the list in the configuration.

#![no_main]

use std::net::{IpAddr, SocketAddr};

use darter_agent::swarm::discovery::has_port;
use darter_agent::swarm::discovery::remembered::Content;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(content) = Content::parse(bytes) {
        let written = content.to_json().expect("addresses and a name are JSON");
        assert_eq!(Content::parse(&written).expect("what was written can be read"), content);
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for name in text.lines() {
        if let Ok(address) = name.parse::<SocketAddr>() {
            // A scope is written into the brackets, as of a link-local address.
            assert_eq!(has_port(name), address.port() > 0, "{name}");
        }
        assert!(name.parse::<IpAddr>().is_err() || !has_port(name), "{name} is an address and no more");
        if has_port(name) {
            let (host, port) = name.rsplit_once(':').expect("a port stands behind a colon");
            assert!(!host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0), "{name}");
        }
    }
});
