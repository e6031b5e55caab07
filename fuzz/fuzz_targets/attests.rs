//! An importer's word about a piece, as another node sends it: one spelling, and all of it counts.

#![no_main]

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::attest::{Attest, message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(attest) = text.parse::<Attest>() else { return };
    assert_eq!(attest.to_string(), text);
    let signed = message(&Digest::of(b"blob"), &Layout::new(1 << 30), 7, &attest.cv);
    assert!(signed.ends_with(&attest.cv), "the value is what is signed");
});
