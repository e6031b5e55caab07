//! Images made of nothing: layers of pseudo-random bytes that a seed and a size determine.
//!
//! A layer is an uncompressed tar (`diff_id` = digest) whose content is computed when it is read,
//! at any offset, so an image of 10 GB takes no memory and no disk on its way into a registry, and
//! two runs push the same digests. Random content does not compress, as model weights do not.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use darter_core::Digest;
use darter_core::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, OCI_INDEX, OCI_MANIFEST};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Bytes that are read or computed.
#[derive(Debug, Clone)]
pub enum Content {
    /// Kept in memory.
    Bytes(Bytes),
    /// Computed when read.
    Layer(Layer),
}

impl Content {
    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Layer(layer) => layer.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from an offset and says how much of it: less only at the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let count = buffer.len().min(bytes.len() - start);
                buffer[..count].copy_from_slice(&bytes[start..start + count]);
                count
            }
            Self::Layer(layer) => layer.read_at(offset, buffer),
        }
    }

    /// All of it, for small ones.
    pub fn to_bytes(&self) -> Bytes {
        let mut buffer = vec![0; usize::try_from(self.len()).unwrap_or(usize::MAX)];
        self.read_at(0, &mut buffer);
        buffer.into()
    }

    /// Its digest, computed by reading it once.
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        let (mut offset, mut buffer) = (0, vec![0; 1 << 20]);
        loop {
            match self.read_at(offset, &mut buffer) {
                0 => return Digest::from_bytes(hash.finalize().into()),
                count => {
                    hash.update(&buffer[..count]);
                    offset += count as u64;
                }
            }
        }
    }
}

/// An uncompressed tar with one file of pseudo-random bytes.
#[derive(Debug, Clone)]
pub struct Layer {
    seed: u64,
    header: Box<[u8; HEADER_BYTES]>,
    file_bytes: u64,
}

/// A tar is made of blocks of this size, and a header is one.
const HEADER_BYTES: usize = 512;
const TAR_BLOCK: u64 = HEADER_BYTES as u64;

impl Layer {
    /// A layer whose file has so many bytes. The tar adds at most 2 KiB.
    pub fn new(seed: u64, file_bytes: u64) -> Self {
        Self { seed, header: Box::new(tar_header(&format!("layer-{seed:016x}"), file_bytes)), file_bytes }
    }

    /// Header, file, padding to whole blocks, two blocks of zeros.
    pub fn len(&self) -> u64 {
        TAR_BLOCK + self.file_bytes.next_multiple_of(TAR_BLOCK) + 2 * TAR_BLOCK
    }

    /// Never true: a tar has a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < count {
            done += self.read_part(offset + done as u64, &mut buffer[done..count]);
        }
        count
    }

    /// Reads up to the end of the header, of the file or of the zeros, whichever `offset` is in.
    fn read_part(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let file_end = TAR_BLOCK + self.file_bytes;
        let part_end = if offset < TAR_BLOCK {
            TAR_BLOCK
        } else if offset < file_end {
            file_end
        } else {
            self.len()
        };
        let count = buffer.len().min(usize::try_from(part_end - offset).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..count];
        if offset < TAR_BLOCK {
            let start = usize::try_from(offset).unwrap_or_default();
            buffer.copy_from_slice(&self.header[start..start + count]);
        } else if offset < file_end {
            random(self.seed, offset - TAR_BLOCK, buffer);
        } else {
            buffer.fill(0);
        }
        count
    }
}

/// Fills `buffer` with the bytes at `offset` of the endless sequence that `seed` begins.
///
/// `SplitMix64` with the position as its state: any part is computed without those before it.
fn random(seed: u64, offset: u64, buffer: &mut [u8]) {
    let word = |index: u64| {
        let mut z = seed.wrapping_mul(0xA24B_AED4_963E_E407).wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)).to_le_bytes()
    };
    let skip = usize::try_from(offset % 8).unwrap_or_default();
    let first = if skip == 0 { 0 } else { (8 - skip).min(buffer.len()) };
    let (head, rest) = buffer.split_at_mut(first);
    head.copy_from_slice(&word(offset / 8)[skip..skip + first]);
    for (index, chunk) in ((offset + first as u64) / 8..).zip(rest.chunks_mut(8)) {
        chunk.copy_from_slice(&word(index)[..chunk.len()]);
    }
}

/// A ustar header (POSIX.1-1988). Sizes up to 8 GiB fit.
fn tar_header(name: &str, file_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{file_bytes:011o}\0"));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Whose media types an image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OCI's, uncompressed layers.
    Oci,
    /// OCI's, layers packed by gzip. In memory, so for small ones.
    OciGzip,
    /// Docker's schema 2, uncompressed layers.
    Docker,
}

impl Format {
    const fn manifest(self) -> &'static str {
        match self {
            Self::Oci | Self::OciGzip => OCI_MANIFEST,
            Self::Docker => DOCKER_MANIFEST,
        }
    }

    const fn index(self) -> &'static str {
        match self {
            Self::Oci | Self::OciGzip => OCI_INDEX,
            Self::Docker => DOCKER_INDEX,
        }
    }

    const fn config(self) -> &'static str {
        match self {
            Self::Oci | Self::OciGzip => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    const fn layer(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.layer.v1.tar",
            Self::OciGzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Docker => "application/vnd.docker.image.rootfs.diff.tar",
        }
    }
}

/// One thing in a registry: what names it and what it is.
#[derive(Debug, Clone)]
pub struct Item {
    /// Media type, digest, size.
    pub descriptor: Descriptor,
    /// The bytes.
    pub content: Content,
}

impl Item {
    fn new(media_type: &str, content: Content) -> Self {
        let descriptor =
            Descriptor { media_type: media_type.to_owned(), digest: content.digest(), size: content.len() };
        Self { descriptor, content }
    }

    fn json(media_type: &str, value: &Value) -> Self {
        Self::new(media_type, Content::Bytes(value.to_string().into()))
    }

    /// Its digest.
    pub fn digest(&self) -> Digest {
        self.descriptor.digest
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.descriptor.size
    }

    fn reference(&self) -> Value {
        json!({
            "mediaType": self.descriptor.media_type,
            "digest": self.digest().to_string(),
            "size": self.size(),
        })
    }
}

/// An image, or an index of images.
#[derive(Debug, Clone)]
pub struct Image {
    /// What a tag points to: an index or an image manifest.
    pub root: Item,
    /// The manifests an index refers to; empty for a single image.
    pub manifests: Vec<Item>,
    /// The configuration of the image that an amd64 node runs.
    pub config: Item,
    /// The layers of that image, the base first.
    pub layers: Vec<Item>,
    /// Blobs of the other platforms and of the attestation.
    pub others: Vec<Item>,
}

impl Image {
    /// One amd64 image with a layer for each of `layer_bytes`.
    pub fn new(format: Format, seed: u64, layer_bytes: &[u64]) -> Result<Self> {
        let (root, config, layers) = single(format, "amd64", seed, layer_bytes)?;
        Ok(Self { root, manifests: Vec::new(), config, layers, others: Vec::new() })
    }

    /// An index of the same for amd64, a small arm64 image, and a provenance attestation as Docker's
    /// buildx pushes it.
    pub fn index(format: Format, seed: u64, layer_bytes: &[u64]) -> Result<Self> {
        let (amd64, config, layers) = single(format, "amd64", seed, layer_bytes)?;
        let (arm64, arm_config, arm_layers) = single(format, "arm64", seed ^ u64::MAX, &[4096])?;
        let statement = Item::json("application/vnd.in-toto+json", &json!({"predicateType": "none"}));
        let empty = Item::json(format.config(), &json!({"architecture": "unknown", "os": "unknown"}));
        let attestation = manifest(format, &empty, std::slice::from_ref(&statement));
        let root = Item::json(
            format.index(),
            &json!({
                "schemaVersion": 2,
                "mediaType": format.index(),
                "manifests": [
                    with_platform(&amd64, "linux", "amd64"),
                    with_platform(&arm64, "linux", "arm64"),
                    with_platform(&attestation, "unknown", "unknown"),
                ],
            }),
        );
        let others = [arm_config].into_iter().chain(arm_layers).chain([empty, statement]).collect();
        Ok(Self { root, manifests: vec![amd64, arm64, attestation], config, layers, others })
    }

    /// The same with other bytes for its root, of the same media type: a manifest that lies, say.
    pub fn with_root(mut self, content: Bytes) -> Self {
        self.root = Item::new(&self.root.descriptor.media_type, Content::Bytes(content));
        self
    }

    /// The same, its layers computed once and kept in memory: for a registry that sends them many
    /// times, beside programs that are measured.
    pub fn in_memory(mut self) -> Self {
        for layer in &mut self.layers {
            layer.content = Content::Bytes(layer.content.to_bytes());
        }
        self
    }

    /// Every blob: configurations and layers of all platforms.
    pub fn blobs(&self) -> impl Iterator<Item = &Item> {
        std::iter::once(&self.config).chain(&self.layers).chain(&self.others)
    }

    /// Every manifest, those of an index before the index.
    pub fn all_manifests(&self) -> impl Iterator<Item = &Item> {
        self.manifests.iter().chain(std::iter::once(&self.root))
    }

    /// What an amd64 node reads of blobs: its configuration and layers.
    pub fn pulled_blobs(&self) -> impl Iterator<Item = &Item> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// The manifest that an amd64 node runs: the one that has the configuration's digest in it.
    pub fn child(&self) -> Result<Digest> {
        let config = self.config.digest().to_string();
        let mut manifests = self.manifests.iter();
        let child = manifests.find(|item| String::from_utf8_lossy(&item.content.to_bytes()).contains(&config));
        Ok(child.context("the image has no manifest for amd64")?.digest())
    }

    /// The bytes of the layers.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(Item::size).sum()
    }
}

fn with_platform(manifest: &Item, os: &str, architecture: &str) -> Value {
    let mut entry = manifest.reference();
    entry["platform"] = json!({"os": os, "architecture": architecture});
    if os == "unknown" {
        entry["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    }
    entry
}

fn single(format: Format, architecture: &str, seed: u64, layer_bytes: &[u64]) -> Result<(Item, Item, Vec<Item>)> {
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for (number, &bytes) in (0..).zip(layer_bytes) {
        let (layer, diff_id) = layer(format, seed.wrapping_add(number), bytes)?;
        layers.push(layer);
        diff_ids.push(diff_id.to_string());
    }
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": {"Cmd": ["/none"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = Item::json(format.config(), &config);
    Ok((manifest(format, &config, &layers), config, layers))
}

/// A layer, and the digest of the tar inside it.
fn layer(format: Format, seed: u64, bytes: u64) -> Result<(Item, Digest)> {
    let tar = Content::Layer(Layer::new(seed, bytes));
    match format {
        Format::Oci | Format::Docker => {
            let item = Item::new(format.layer(), tar);
            let diff_id = item.digest();
            Ok((item, diff_id))
        }
        Format::OciGzip => {
            let packed = gzip(&tar.to_bytes())?;
            Ok((Item::new(format.layer(), Content::Bytes(packed)), tar.digest()))
        }
    }
}

fn manifest(format: Format, config: &Item, layers: &[Item]) -> Item {
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": format.manifest(),
        "config": config.reference(),
        "layers": layers.iter().map(Item::reference).collect::<Vec<_>>(),
    });
    Item::json(format.manifest(), &manifest)
}

/// Packs by the system's gzip, without name and time, so that the digest is always the same.
fn gzip(bytes: &[u8]) -> Result<Bytes> {
    let mut child = Command::new("gzip")
        .args(["--no-name", "--fast", "--stdout"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run gzip")?;
    let mut input = child.stdin.take().context("gzip has no input")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes));
        child.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("gzip failed: {}", output.status);
    }
    Ok(output.stdout.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_layer_is_the_same_as_in_the_whole() {
        let layer = Content::Layer(Layer::new(7, 10_001));
        let whole = layer.to_bytes();
        assert_eq!(whole.len() as u64, 512 + 10_240 + 1024);
        for offset in (0..whole.len()).step_by(37) {
            for length in [1, 3, 7, 8, 9, 600] {
                let mut part = vec![0; length];
                let count = layer.read_at(offset as u64, &mut part);
                assert_eq!(part[..count], whole[offset..(offset + length).min(whole.len())], "{offset}+{length}");
            }
        }
    }

    #[test]
    fn the_digests_are_the_same_on_every_machine() {
        let image = Image::new(Format::Oci, 1, &[100_000]).unwrap();
        assert_eq!(image.layers[0].digest().hex()[..16], *"301046dbbc79d437");
        assert_eq!(image.root.digest(), Image::new(Format::Oci, 1, &[100_000]).unwrap().root.digest());
    }
}
