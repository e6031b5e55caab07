//! The path of a piece on the data plane: one spelling, whatever a client sends.

#![no_main]

use darter_core::swarm::target::Target;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for path in [text.to_owned(), format!("/p/{text}")] {
        if let Ok(target) = path.parse::<Target>() {
            assert_eq!(target.to_string(), path);
        }
    }
});
