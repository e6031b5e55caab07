//! Image names: one that was read says the same when it is written, and holds nothing that could
//! become another path or URL.

#![no_main]

use darter_core::ecr::Ecr;
use darter_core::{Digest, ImageName, Reference, Registry, Repository};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(name) = text.parse::<ImageName>() {
        assert_eq!(name.to_string().parse(), Ok(name.clone()), "{text:?}");
        is_plain(&name.registry);
        is_inside(&name.repository);
        let said = name.reference.to_string();
        assert!(text.contains(&said) || said == "latest", "{text:?} became {said}");
    }
    if let Ok(registry) = text.parse::<Registry>() {
        is_plain(&registry);
        assert_eq!(registry.as_str(), text);
        if let Some(Ecr::Private { account, region, suffix, .. }) = Ecr::recognise(&registry) {
            let host = text.to_ascii_lowercase();
            assert!(host.starts_with(&account) && host.contains(&region) && host.ends_with(&suffix), "{text:?}");
        }
    }
    if let Ok(repository) = text.parse::<Repository>() {
        is_inside(&repository);
    }
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string(), text);
        assert!(!text.contains('/') && text.len() <= 128, "{text:?}");
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
        assert_eq!(Digest::from_bytes(*digest.as_bytes()), digest);
    }
});

/// A registry is a directory under certs.d, the authority of a URL, and a value of `ns=`.
fn is_plain(registry: &Registry) {
    let text = registry.as_str();
    assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b)), "{text:?}");
    assert!(!text.is_empty() && text != "." && !text.contains(".."), "{text:?}");
    assert!(text.starts_with(registry.host()) && !registry.host().is_empty(), "{text:?}");
    let port = text[registry.host().len()..].strip_prefix(':');
    assert!(port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit())), "{text:?}");
    assert!(port.is_some() || registry.host() == text, "{text:?}");
}

/// A repository is a path below `/v2/`.
fn is_inside(repository: &Repository) {
    let text = repository.as_str();
    assert!(
        text.len() <= 255 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-/".contains(&b))
    );
    for component in text.split('/') {
        let ends = [component.bytes().next(), component.bytes().last()];
        assert!(ends.iter().all(|end| end.is_some_and(|b| b.is_ascii_alphanumeric())), "{text:?}");
        assert!(!component.contains("..") && !component.contains("___"), "{text:?}");
    }
}
