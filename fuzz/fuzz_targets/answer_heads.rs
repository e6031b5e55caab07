//! The head of an answer of the data plane: read whole or not at all, and one that this node could have written.

#![no_main]

use darter_agent::swarm::exchange::answer::{HEAD_MAX, Malformed, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match parse(bytes) {
        Ok(None) => assert!(bytes.len() < HEAD_MAX, "it is waited for without an end"),
        Err(Malformed(what)) => assert!(!what.is_empty()),
        Ok(Some((answer, end))) => {
            assert!((1..=bytes.len()).contains(&end));
            assert_eq!(parse(&bytes[..end]), Ok(Some((answer, end))), "what follows counts");
            let cut = usize::from(bytes[end / 2]) * 61 % end;
            assert!(cut >= HEAD_MAX || parse(&bytes[..cut]) == Ok(None), "half a head is none");
            let written = answer.to_string();
            assert_eq!(parse(written.as_bytes()), Ok(Some((answer, written.len()))));
        }
    }
});
