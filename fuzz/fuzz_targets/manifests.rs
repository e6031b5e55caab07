//! Manifests: what darter reads in one is what a plain look at the JSON finds, in its order.

#![no_main]

use darter_core::Digest;
use darter_core::manifest::{Manifest, Platform, REFERENCES_MAX};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    // A `Value` is pickier about what darter skips: lone surrogates, numbers past f64.
    let Ok(json) = serde_json::from_slice::<Value>(bytes) else { return };
    assert!(json.is_object(), "a manifest is an object: containerd refuses anything else");
    assert_eq!(json["schemaVersion"], 2);

    let entries: Vec<&Value> = match &manifest {
        Manifest::Index { .. } => list(&json["manifests"]),
        Manifest::Image { .. } => std::iter::once(&json["config"]).chain(list(&json["layers"])).collect(),
    };
    assert!(entries.iter().all(|entry| entry.is_object()), "a descriptor is an object");
    let plain: Vec<(Digest, u64)> = entries.into_iter().filter_map(read).collect();
    let references = manifest.references();
    assert_eq!(references.iter().map(|entry| (entry.digest, entry.size)).collect::<Vec<_>>(), plain);
    assert!(references.len() <= REFERENCES_MAX + 1);

    for architecture in ["amd64", "arm64"] {
        let platform = Platform { os: "linux".into(), architecture: architecture.into(), variant: String::new() };
        let Some(chosen) = manifest.for_platform(&platform) else { continue };
        let first = list(&json["manifests"]).into_iter().find(|entry| {
            entry["platform"]["architecture"] == architecture
                && entry["platform"]["os"] == "linux"
                && read(entry).is_some()
        });
        assert_eq!(first.and_then(read), Some((chosen.digest, chosen.size)));
    }
    if let Some(stated) = json["mediaType"].as_str() {
        assert_eq!(manifest.media_type(), stated);
    }
});

fn list(value: &Value) -> Vec<&Value> {
    value.as_array().into_iter().flatten().collect()
}

/// `None` for a digest of another algorithm, which is left to the registry.
fn read(entry: &Value) -> Option<(Digest, u64)> {
    Some((entry["digest"].as_str()?.parse().ok()?, entry["size"].as_u64()?))
}
