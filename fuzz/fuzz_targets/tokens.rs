//! The right to read a blob, as a client sends it: one spelling, and what was made up opens nothing.

#![no_main]

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use darter_core::Digest;
use darter_core::swarm::token::{Secret, Token};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(token) = text.parse::<Token>() else { return };
    assert_eq!(token.to_string(), text);
    // The secret is in no seed.
    let (secret, address) = (Secret([0xa5; 32]), IpAddr::V4(Ipv4Addr::LOCALHOST));
    let opened = token.check(&secret, &Digest::of(b"blob"), address, Duration::from_secs(1_800_000_000));
    assert!(opened.is_err(), "{text}");
});
