//! What the mirror reads out of a request line: a call that says the same when it is written again,
//! or an error that the distribution API knows.

#![no_main]

use darter_core::oci::{self, Call, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|target: &str| {
    match oci::parse(target) {
        Ok(call) => {
            assert_eq!(oci::parse(&written(&call)), Ok(call), "{target:?}");
        }
        Err(error) => {
            assert!(matches!(error.status, 400 | 404), "{target:?}: {error}");
            let body: serde_json::Value = serde_json::from_str(&error.body()).expect("an error body is JSON");
            assert_eq!(body["errors"][0]["message"], error.message, "{target:?}");
        }
    }
    assert_eq!(oci::percent_decode(&oci::percent_encode(target)).as_deref(), Some(target));
});

/// The request line of a call, with `ns=` before what else the query says.
fn written(call: &Call) -> String {
    let (path, query) = match &call.request {
        Request::Base => ("/v2/".to_owned(), ""),
        Request::Manifest { repository, reference } => (format!("/v2/{repository}/manifests/{reference}"), ""),
        Request::Blob { repository, digest } => (format!("/v2/{repository}/blobs/{digest}"), ""),
        Request::Tags { repository, query } => (format!("/v2/{repository}/tags/list"), query.as_str()),
        Request::Referrers { repository, digest, query } => {
            (format!("/v2/{repository}/referrers/{digest}"), query.as_str())
        }
    };
    assert!(!path.split('/').any(|part| matches!(part, "." | "..")), "{path} climbs out of where it belongs");
    assert!(!query.split('&').any(|pair| pair.starts_with("ns=")), "ns= is passed on to the origin: {query}");
    let registry = call.registry.as_ref().map(|registry| format!("ns={}", oci::percent_encode(registry.as_str())));
    format!("{path}?{}&{query}", registry.unwrap_or_default())
}
