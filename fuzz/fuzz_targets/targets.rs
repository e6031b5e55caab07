//! The paths of the data plane, of a piece and of the values of all: one spelling, whatever a client sends.

#![no_main]

use darter_core::swarm::target::Path;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for path in [text.to_owned(), format!("/p/{text}"), format!("/v/{text}")] {
        if let Ok(parsed) = path.parse::<Path>() {
            assert_eq!(parsed.to_string(), path);
        }
    }
});
