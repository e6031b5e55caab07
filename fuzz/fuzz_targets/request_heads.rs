//! The head of a request, to the mirror or to the data plane: read whole or not at all, whatever follows it.

#![no_main]

use darter_agent::head::{HEAD_MAX, Head, Parsed, parse};
use darter_core::swarm::target::Path;
use libfuzzer_sys::fuzz_target;

/// All that a head says. It has no Debug: it may hold a credential.
fn says(head: &Head) -> impl PartialEq {
    let texts = [&head.range, &head.if_range, &head.if_none_match, &head.authorization, &head.user_agent, &head.token];
    (head.method, head.target.clone(), texts.map(Clone::clone), head.close, head.has_body)
}

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    // What a client sends one after the other.
    loop {
        match parse(rest) {
            Parsed::Partial => return assert!(rest.len() < HEAD_MAX, "it is waited for without an end"),
            Parsed::Broken(status) => return assert!([400, 431, 505].contains(&status), "{status}"),
            Parsed::Whole(head, end) => {
                assert!((1..=rest.len()).contains(&end));
                let Parsed::Whole(alone, alone_end) = parse(&rest[..end]) else { panic!("what follows counts") };
                assert!(alone_end == end && says(&alone) == says(&head), "what follows counts");
                // Anywhere, but by the input alone.
                let cut = usize::from(rest[end / 2]) * 61 % end;
                assert!(cut >= HEAD_MAX || matches!(parse(&rest[..cut]), Parsed::Partial), "half a head is none");
                assert!(!head.target.starts_with("http://"), "only the path counts");
                if let Ok(path) = head.target.parse::<Path>() {
                    assert_eq!(path.to_string(), head.target);
                }
                rest = &rest[end..];
            }
        }
    }
});
