//! What a manifest says: its media type, what it refers to, and which layers a node will want.
//!
//! The raw bytes stay what is served and hashed; this reads them and never writes them again.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::digest::Digest;

/// Docker's image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What to ask an origin for. docker-registry answers 404 for an OCI manifest when its type is
/// missing here, and `*/*` does not count.
pub const ACCEPT: &str = "application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";

/// The distribution spec asks registries to take manifests of 4 MiB; larger ones are refused.
pub const MANIFEST_MAX_BYTES: u64 = 4 * 1024 * 1024;

/// How many things one manifest may refer to: an image has a few hundred layers at most, and each
/// reference costs memory for as long as its proof lasts.
pub const REFERENCES_MAX: usize = 4096;

/// Why bytes are not a manifest that darter serves.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not of the shape of a manifest.
    #[error("not a manifest")]
    Json(#[from] serde_json::Error),
    /// JSON, but neither an index nor an image manifest of schema 2.
    #[error("neither an index nor an image manifest of schema version 2")]
    Shape,
    /// More references than `REFERENCES_MAX`.
    #[error("refers to {0} things, and at most {REFERENCES_MAX} are taken")]
    TooMany(usize),
}

/// One thing that a manifest refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its media type, as the manifest says.
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// The platform of an entry of an index.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Platform {
    /// Such as `linux`.
    #[serde(default)]
    pub os: String,
    /// Such as `amd64`, in Go's words.
    #[serde(default)]
    pub architecture: String,
    /// Such as `v8` for arm64.
    #[serde(default)]
    pub variant: String,
}

impl Platform {
    /// linux on the processor that this program was built for, in Go's words.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: String::new() }
    }

    /// Whether this node can run an image for `other`. containerd prefers an exact variant and takes
    /// one without; a node's own variant is rarely known, so any is taken.
    fn runs(&self, other: &Self) -> bool {
        self.os == other.os
            && self.architecture == other.architecture
            && (self.variant.is_empty() || other.variant.is_empty() || self.variant == other.variant)
    }
}

/// A manifest, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// A list of manifests, one for each platform (and attestations).
    Index {
        /// The `mediaType` it states, or what its shape says.
        media_type: String,
        /// Entries in the order of the file.
        manifests: Vec<(Descriptor, Option<Platform>)>,
    },
    /// One image.
    Image {
        /// The `mediaType` it states, or what its shape says.
        media_type: String,
        /// The image configuration.
        config: Descriptor,
        /// Layers, the base first: the order in which containerd unpacks them.
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<Vec<Object<RawDescriptor>>>,
    config: Option<Object<RawDescriptor>>,
    layers: Option<Vec<Object<RawDescriptor>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Object<Platform>>,
}

impl Object<RawDescriptor> {
    /// `None` for a digest of another algorithm: containerd asks the registry for that one.
    fn read(self) -> Option<(Descriptor, Option<Platform>)> {
        let RawDescriptor { media_type, digest, size, platform } = self.0;
        let digest = digest.parse().ok()?;
        Some((Descriptor { media_type, digest, size }, platform.map(|Object(platform)| platform)))
    }
}

/// A JSON object and nothing else. A struct that derives Deserialize also takes an array of its
/// fields, and what containerd refuses must not open anything here.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfFields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfFields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields))
            }
        }
        deserializer.deserialize_map(OfFields(PhantomData)).map(Self)
    }
}

impl Manifest {
    /// Reads a manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let Object(raw): Object<Raw> = serde_json::from_slice(bytes)?;
        if raw.schema_version != Some(2) {
            return Err(ManifestError::Shape);
        }
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => {
                check_count(manifests.len())?;
                Ok(Self::Index {
                    media_type: raw.media_type.unwrap_or_else(|| OCI_INDEX.to_owned()),
                    manifests: manifests.into_iter().filter_map(Object::read).collect(),
                })
            }
            (None, Some(config), Some(layers)) => {
                check_count(layers.len())?;
                let (config, _) = config.read().ok_or(ManifestError::Shape)?;
                let layers = layers.into_iter().filter_map(Object::read).map(|(layer, _)| layer);
                Ok(Self::Image {
                    media_type: raw.media_type.unwrap_or_else(|| OCI_MANIFEST.to_owned()),
                    config,
                    layers: layers.collect(),
                })
            }
            // Both at once could be read as either: two readers must not see two images.
            _ => Err(ManifestError::Shape),
        }
    }

    /// Its media type, for the Content-Type header.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Index { media_type, .. } | Self::Image { media_type, .. } => media_type,
        }
    }

    /// Everything it refers to: what its proof of access opens.
    pub fn references(&self) -> Vec<&Descriptor> {
        match self {
            Self::Index { manifests, .. } => manifests.iter().map(|(manifest, _)| manifest).collect(),
            Self::Image { config, layers, .. } => std::iter::once(config).chain(layers).collect(),
        }
    }

    /// The entry of an index that a node of this platform runs: the first that fits, as containerd
    /// takes it. `None` for an image, and where nothing fits.
    pub fn for_platform(&self, platform: &Platform) -> Option<&Descriptor> {
        let Self::Index { manifests, .. } = self else { return None };
        let fits = |entry: &&(Descriptor, Option<Platform>)| entry.1.as_ref().is_some_and(|other| platform.runs(other));
        manifests.iter().find(fits).map(|(manifest, _)| manifest)
    }
}

fn check_count(count: usize) -> Result<(), ManifestError> {
    if count > REFERENCES_MAX { Err(ManifestError::TooMany(count)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    #[test]
    fn an_index_gives_the_manifest_of_the_platform() {
        let (arm, amd) = (digest("arm"), digest("amd"));
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[
                {{"mediaType":"{OCI_MANIFEST}","digest":"{arm}","size":1,"platform":{{"os":"linux","architecture":"arm64","variant":"v8"}}}},
                {{"mediaType":"{OCI_MANIFEST}","digest":"{amd}","size":2,"platform":{{"os":"linux","architecture":"amd64"}}}},
                {{"mediaType":"x","digest":"sha512:ab","size":3}}]}}"#
        );
        let index = Manifest::parse(text.as_bytes()).unwrap();
        let platform = |architecture: &str| Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: String::new(),
        };
        assert_eq!(index.media_type(), OCI_INDEX);
        assert_eq!(index.for_platform(&platform("amd64")).map(|d| d.digest), Some(amd));
        assert_eq!(index.for_platform(&platform("arm64")).map(|d| d.digest), Some(arm));
        assert_eq!(index.for_platform(&platform("riscv64")), None);
        assert_eq!(index.references().len(), 2, "the sha512 entry is left to the registry");
    }

    #[test]
    fn an_image_refers_to_its_configuration_and_layers_in_order() {
        let (config, base, top) = (digest("config"), digest("base"), digest("top"));
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{DOCKER_MANIFEST}","config":{{"digest":"{config}","size":1}},
                "layers":[{{"digest":"{base}","size":2}},{{"digest":"{top}","size":3}}]}}"#
        );
        let image = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!(image.media_type(), DOCKER_MANIFEST);
        assert_eq!(image.references().iter().map(|d| d.digest).collect::<Vec<_>>(), [config, base, top]);
    }

    #[test]
    fn what_could_be_read_as_two_things_is_refused() {
        let d = digest("x");
        for text in [
            "".to_owned(),
            "[]".to_owned(),
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            format!(r#"{{"schemaVersion":2,"manifests":[],"config":{{"digest":"{d}","size":1}},"layers":[]}}"#),
            r#"{"schemaVersion":2,"config":{"digest":"sha256:1","size":1},"layers":[]}"#.to_owned(),
            format!(r#"{{"schemaVersion":2,"config":{{"digest":"{d}","size":-1}},"layers":[]}}"#),
            format!(r#"[2,null,null,{{"digest":"{d}","size":1}},[]]"#),
            format!(r#"{{"schemaVersion":2,"manifests":[["type","{d}",1,null]]}}"#),
        ] {
            assert!(Manifest::parse(text.as_bytes()).is_err(), "{text}");
        }
        let entry = format!(r#"{{"digest":"{d}","size":1}},"#).repeat(REFERENCES_MAX + 1);
        let many = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entry.trim_end_matches(','));
        assert!(matches!(Manifest::parse(many.as_bytes()), Err(ManifestError::TooMany(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = Manifest::parse(&bytes);
        }
    }
}
