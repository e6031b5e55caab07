//! What the operator asked for, read once at the edge and trusted afterwards.
//!
//! Three layers, the later wins: the TOML file (or the embedded default), `DARTER_…` environment
//! variables, `--set key=value`. Each layer is checked by itself, so that an error names the layer,
//! the key, and in a file the line. `layers` does the merging; here are the types.

mod check;
mod gpu;
mod kubernetes;
mod partial;
mod prewarm;
mod registries;
mod report;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use darter_core::Registry;
use darter_core::manifest::Platform;
use darter_core::units::{Rate, Seconds, Share, Size, UnitError};
use serde::{Deserialize, Serialize};

use crate::swarm::discovery::{ServiceName, ServicePort};

pub use darter_base::layers::ConfigError;
use darter_base::layers::{Fault, Settings};
pub use darter_base::log::{Log, LogFormat};
pub use gpu::{DcgmNames, Gpu, GpuMode};
pub use kubernetes::Kubernetes;
pub use prewarm::Prewarm;
pub use report::{Report, ScalerUrl};

/// The commented default configuration: what `darter config default` prints.
pub const DEFAULT: &str = include_str!("default.toml");

/// The layers of an agent's configuration.
pub type Layers = darter_base::layers::Layers<Config>;

/// The whole configuration. Key for key as in `default.toml`, which says what each means.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "default.toml documents the keys; a second text would drift from it")]
pub struct Config {
    pub agent: Agent,
    pub log: Log,
    pub mirror: Mirror,
    pub store: Store,
    pub certs_d: CertsD,
    pub containerd: Containerd,
    pub admin: Admin,
    pub origin: Origin,
    pub swarm: Swarm,
    pub seed: Seed,
    pub going: Going,
    pub kubernetes: Kubernetes,
    pub prewarm: Prewarm,
    pub gpu: Gpu,
    pub report: Report,
    pub aws: Aws,
    #[serde(default, rename = "registry", skip_serializing_if = "Vec::is_empty")]
    pub registries: Vec<RegistryConfig>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    #[serde(with = "optional")]
    pub data_dir: Option<PathBuf>,
    pub drain: Seconds,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    pub listen: SocketAddr,
    pub allow_remote: bool,
    #[serde(with = "optional")]
    pub default_registry: Option<Registry>,
    pub answer_within: Seconds,
    pub stall: Seconds,
    pub handover: Seconds,
    pub linger: Seconds,
    pub client_timeout: Seconds,
    pub parallel_chunks: bool,
    pub max_connections: usize,
    pub prefetch: Prefetch,
    pub prefetch_layers: usize,
    #[serde(with = "optional")]
    pub platform: Option<PlatformName>,
    pub tag_ttl: Seconds,
    pub proof_ttl: Seconds,
    pub proof_stale: Seconds,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefetch {
    Layers,
    Off,
}

/// `os/architecture[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformName(pub Platform);

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    pub limit: Space,
    pub min_free: Space,
    pub pin_for: Seconds,
    pub pin_share: Share,
    pub verify_one_in: u32,
}

/// An amount of disk: bytes, or a share of the file system it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Space {
    /// So many bytes.
    Bytes(Size),
    /// So many percent of the file system.
    Share(Share),
}

impl Space {
    /// In bytes, on a file system of `total` bytes.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            Self::Bytes(size) => size.0,
            Self::Share(share) => share.of(total),
        }
    }
}

impl TryFrom<String> for Space {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, UnitError> {
        if text.ends_with('%') { text.parse().map(Self::Share) } else { text.parse().map(Self::Bytes) }
    }
}

impl From<Space> for String {
    fn from(space: Space) -> Self {
        match space {
            Space::Bytes(size) => size.to_string(),
            Space::Share(share) => share.to_string(),
        }
    }
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CertsD {
    pub path: PathBuf,
    pub write: bool,
    pub adopt: bool,
    pub remove_on_exit: bool,
    pub check_every: Seconds,
    pub dial_timeout: Seconds,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Containerd {
    pub config: PathBuf,
    #[serde(with = "optional")]
    pub socket: Option<PathBuf>,
    pub content_store: ContentStore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentStore {
    Auto,
    Off,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    pub listen: SocketAddr,
    #[serde(with = "optional")]
    pub socket: Option<PathBuf>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    pub connections: usize,
    pub ranges: usize,
    #[serde(with = "optional")]
    pub bandwidth: Option<Rate>,
    pub connect_timeout: Seconds,
    pub header_timeout: Seconds,
    pub stall: Seconds,
    pub attempts: u32,
    pub allow_local: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Swarm {
    #[serde(with = "optional")]
    pub key_file: Option<PathBuf>,
    pub listen: SocketAddr,
    pub exchange_listen: SocketAddr,
    pub tls: bool,
    #[serde(with = "optional")]
    pub dns: Option<String>,
    #[serde(with = "optional")]
    pub service: Option<ServiceName>,
    #[serde(with = "optional")]
    pub endpoint_port: Option<ServicePort>,
    pub peers: Vec<String>,
    pub lookup_every: Seconds,
    #[serde(with = "optional")]
    pub zone: Option<String>,
    pub scope: Scope,
    pub max_members: usize,
    pub handover: Seconds,
}

/// Whom one node reads a registry for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Cluster,
    Zone,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    pub enabled: bool,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Going {
    pub spot_notice: SpotNotice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SpotNotice {
    Auto,
    Off,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Aws {
    #[serde(with = "optional")]
    pub account: Option<String>,
    #[serde(with = "optional")]
    pub region: Option<String>,
    pub discover: Discover,
    #[serde(with = "optional")]
    pub ecr_endpoint: Option<String>,
    #[serde(with = "optional")]
    pub imds_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Discover {
    Auto,
    Off,
}

/// One `[[registry]]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryConfig {
    pub name: Registry,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    #[serde(default = "yes")]
    pub resolve: bool,
    #[serde(default)]
    pub serve_stale: ServeStale,
    #[serde(default)]
    pub origins: Vec<String>,
    #[serde(default, with = "optional")]
    pub endpoint: Option<String>,
    #[serde(default)]
    pub plain_http: bool,
    #[serde(default, with = "optional")]
    pub ca: Option<PathBuf>,
    #[serde(default, with = "optional")]
    pub docker_config: Option<PathBuf>,
    #[serde(default, with = "optional")]
    pub username: Option<String>,
    #[serde(default, with = "optional")]
    pub password_file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    #[serde(default, with = "optional")]
    pub bandwidth: Option<Rate>,
}

impl RegistryConfig {
    /// A registry of which only the name is known.
    pub fn named(name: Registry) -> Self {
        Self {
            name,
            access: None,
            resolve: true,
            serve_stale: ServeStale::Off,
            origins: Vec::new(),
            endpoint: None,
            plain_http: false,
            ca: None,
            docker_config: None,
            username: None,
            password_file: None,
            connections: None,
            bandwidth: None,
        }
    }
}

/// Who may read what this node holds of a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Proved by an anonymous HEAD of a manifest.
    Public,
    /// Proved by a HEAD with the node's own credential.
    Node,
    /// Proved by a HEAD with the credential of the pull itself.
    Caller,
    /// 404.
    Off,
}

/// What happens to tags while the origin cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeStale {
    /// 404.
    #[default]
    Off,
    /// The digest that this node saw last.
    Node,
    /// The digest on which all members of the swarm agree that know the tag.
    Cluster,
}

const fn yes() -> bool {
    true
}

impl Settings for Config {
    const DEFAULT: &'static str = DEFAULT;
    const PREFIX: &'static str = "DARTER_";
    const RESERVED: &'static [&'static str] = &["CONFIG", "BENCH_DIR", "TEST_DIR"];
    const SHOWN_BY: &'static str = "darter config default";
    const NAMED: Option<&'static str> = Some("registry");
    type Partial = partial::Config;

    fn check(&self) -> Result<(), Fault> {
        check::check(self)
    }
}

/// What is missing on this node for a configuration to work, though the agent starts without. Reads the
/// files that it names.
pub fn warnings(layers: &Layers) -> Result<Vec<ConfigError>, ConfigError> {
    Ok(layers.warn(&registries::warnings(&layers.config()?)))
}

impl Config {
    /// The embedded default, with nothing over it.
    pub fn embedded() -> Self {
        match Layers::embedded().config() {
            Ok(config) => config,
            // Covered by a test: the embedded text is part of the program.
            Err(error) => unreachable!("the embedded default is wrong: {error}"),
        }
    }

    /// Where blobs, ingests and the journal live.
    pub fn data_dir(&self) -> PathBuf {
        if let Some(dir) = &self.agent.data_dir {
            return dir.clone();
        }
        if rustix::process::geteuid().is_root() {
            return PathBuf::from("/var/lib/darter");
        }
        let xdg = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
        xdg.or_else(home).unwrap_or_else(std::env::temp_dir).join("darter")
    }

    /// The unix socket of requests that change state.
    pub fn admin_socket(&self) -> PathBuf {
        match &self.admin.socket {
            Some(socket) => socket.clone(),
            None if rustix::process::geteuid().is_root() => PathBuf::from("/run/darter/admin.sock"),
            None => self.data_dir().join("admin.sock"),
        }
    }

    /// The platform whose layers a manifest request fetches ahead.
    pub fn platform(&self) -> Platform {
        self.mirror.platform.as_ref().map_or_else(Platform::host, |name| name.0.clone())
    }
}

impl std::str::FromStr for PlatformName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        match parts.as_slice() {
            [os, architecture] | [os, architecture, ""] if !os.is_empty() && !architecture.is_empty() => {
                Ok(Self(Platform { os: (*os).into(), architecture: (*architecture).into(), variant: String::new() }))
            }
            [os, architecture, variant] if !os.is_empty() && !architecture.is_empty() => Ok(Self(Platform {
                os: (*os).into(),
                architecture: (*architecture).into(),
                variant: (*variant).into(),
            })),
            _ => Err(format!("`{text}` is not a platform: expected os/architecture, such as linux/arm64")),
        }
    }
}

impl std::fmt::Display for PlatformName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Platform { os, architecture, variant } = &self.0;
        write!(f, "{os}/{architecture}")?;
        if variant.is_empty() { Ok(()) } else { write!(f, "/{variant}") }
    }
}

/// A key that may be left empty: `""` in the file is `None` here, so that the default file can show
/// every key.
mod optional {
    use std::path::PathBuf;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) trait Text: Sized {
        fn read(text: &str) -> Result<Self, String>;
        fn write(&self) -> String;
    }

    impl Text for PathBuf {
        fn read(text: &str) -> Result<Self, String> {
            Ok(Self::from(text))
        }

        fn write(&self) -> String {
            self.display().to_string()
        }
    }

    macro_rules! text {
        ($($type:ty),*) => {$(
            impl Text for $type {
                fn read(text: &str) -> Result<Self, String> {
                    <$type>::from_str(text).map_err(|error| error.to_string())
                }

                fn write(&self) -> String {
                    ToString::to_string(self)
                }
            }
        )*};
    }
    text!(
        String,
        darter_core::Registry,
        darter_core::units::Rate,
        super::PlatformName,
        super::ServiceName,
        super::ServicePort,
        super::ScalerUrl
    );

    pub(super) fn deserialize<'de, T: Text, D: Deserializer<'de>>(input: D) -> Result<Option<T>, D::Error> {
        let text = String::deserialize(input)?;
        if text.is_empty() { Ok(None) } else { T::read(&text).map(Some).map_err(D::Error::custom) }
    }

    #[allow(clippy::ref_option, reason = "serde's `with` gives a reference to the field")]
    pub(super) fn serialize<T: Text, S: Serializer>(value: &Option<T>, output: S) -> Result<S::Ok, S::Error> {
        output.serialize_str(&value.as_ref().map(Text::write).unwrap_or_default())
    }
}
