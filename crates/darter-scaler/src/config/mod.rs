//! What the operator asked for, read once at the edge and trusted afterwards.
//!
//! Three layers, the later wins: the TOML file (or the embedded default), `DARTER_SCALER_…` environment
//! variables, `--set key=value`. `darter_base::layers` merges them; here are the types and what they cannot say.

mod check;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub use darter_base::layers::ConfigError;
use darter_base::layers::{Fault, Section, Settings};
use darter_base::log::Log;
use darter_core::units::{Seconds, Size};
use serde::{Deserialize, Serialize};

pub use self::words::{Days, Dollars, Milli, Minute};
use crate::Policy;
use crate::fleet::known::{PoolConfig, WorkloadConfig};
use crate::fleet::{self, Actuator};
use crate::state::Floor;

/// The commented default configuration: what `darter scaler config default` prints.
pub const DEFAULT: &str = include_str!("scaler.toml");

/// The layers of a scaler's configuration.
pub type Layers = darter_base::layers::Layers<Config>;

/// The whole configuration. Key for key as in `scaler.toml`, which says what each means.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "scaler.toml documents the keys; a second text would drift from it")]
pub struct Config {
    pub log: Log,
    pub grpc: Grpc,
    pub http: Http,
    pub access: Access,
    pub actuators: Actuators,
    pub record: Record,
    pub demand: Demand,
    pub kubernetes: Kubernetes,
    pub policy: Policy,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<Pool>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<Workload>,
}

macro_rules! tables {
    ($($(#[$attribute:meta])* $name:ident { $($(#[$of:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        #[derive(Debug, Clone, Deserialize, Serialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs, reason = "scaler.toml documents the keys")]
        $(#[$attribute])*
        pub struct $name { $($(#[$of])* pub $field: $type),* }
    )*};
}

tables! {
    Grpc {
        listen: SocketAddr,
        cert: PathBuf,
        key: PathBuf,
        keda_ca: PathBuf,
        keda_names: Vec<String>,
        insecure: bool,
        max_connections: usize,
    }
    Http { listen: SocketAddr }
    Access { mode: AccessMode, token_file: PathBuf }
    Actuators { keda: Mode, protect: Mode, copy: Mode, deletion_cost: Mode, buffer: Mode, remove: Mode }
    Record { dir: PathBuf, max_size: Size, resume_within: Seconds }
    Demand { ttl: Seconds, prometheus: String, every: Seconds }
    Kubernetes {
        enabled: bool,
        kubeconfig: PathBuf,
        service: String,
        audience: String,
        agents: Vec<String>,
        gpu_resource: String,
        pool_labels: Vec<String>,
        startup_taint: String,
        cost_annotation: String,
        static_pools: bool,
        undo_on_exit: bool,
    }
    Pool {
        name: String,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nodes: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        price_per_hour: Option<Dollars>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gpus: Option<u32>,
        #[serde(default)]
        nodes_least: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nodes_most: Option<u32>,
        #[serde(default)]
        buffer_least: u32,
    }
    Workload {
        name: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pool: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gpus: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        least: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        most: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<Milli>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cold_start: Option<Seconds>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lead: Option<Seconds>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prometheus: Option<String>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        floors: Vec<FloorAt>,
    }
    FloorAt { days: Days, from: Minute, to: Minute, replicas: u32 }
}

/// What an actuator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing, and nothing is said of it.
    Off,
    /// Nothing, and what it would have done is recorded and counted.
    Observe,
    /// It acts.
    On,
}

/// Who may say something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessMode {
    /// Whoever is on this machine.
    Loopback,
    /// Who has a token of a file.
    Tokens,
    /// Service accounts.
    Kubernetes,
}

/// The configuration with every section optional: reading a file's own text gives positions in it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only the errors of reading it are used")]
pub struct Partial {
    log: Option<Section<Log>>,
    grpc: Option<Section<Grpc>>,
    http: Option<Section<Http>>,
    access: Option<Section<Access>>,
    actuators: Option<Section<Actuators>>,
    record: Option<Section<Record>>,
    demand: Option<Section<Demand>>,
    kubernetes: Option<Section<Kubernetes>>,
    policy: Option<Policy>,
    pools: Option<Vec<Pool>>,
    workloads: Option<Vec<Workload>>,
}

impl Settings for Config {
    const DEFAULT: &'static str = DEFAULT;
    const PREFIX: &'static str = "DARTER_SCALER_";
    const RESERVED: &'static [&'static str] = &["CONFIG", "URL", "TOKEN_FILE"];
    const SHOWN_BY: &'static str = "darter scaler config default";
    const NAMED: Option<&'static str> = None;
    type Partial = Partial;

    fn check(&self) -> Result<(), Fault> {
        check::check(self)
    }
}

/// A path that is given.
pub fn given(path: &Path) -> Option<&Path> {
    (!path.as_os_str().is_empty()).then_some(path)
}

impl Actuators {
    /// What this one does.
    pub const fn mode(&self, actuator: Actuator) -> Mode {
        match actuator {
            Actuator::Keda => self.keda,
            Actuator::Protect => self.protect,
            Actuator::DeletionCost => self.deletion_cost,
            Actuator::Buffer => self.buffer,
            Actuator::Copy => self.copy,
            Actuator::Remove => self.remove,
        }
    }
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

    /// What the fleet is told of it.
    pub fn fleet(&self) -> fleet::Settings {
        let pool = |pool: &Pool| {
            let config = PoolConfig {
                nodes: pool.nodes.clone(),
                micros_per_hour: pool.price_per_hour.map(|dollars| dollars.0),
                gpus: pool.gpus,
                nodes_least: pool.nodes_least,
                nodes_most: pool.nodes_most,
                buffer_least: pool.buffer_least,
            };
            (pool.name.clone(), config)
        };
        let workload = |workload: &Workload| {
            let floor = |at: &FloorAt| Floor {
                days: at.days.0,
                from_minute: at.from.0,
                to_minute: at.to.0,
                replicas: at.replicas,
            };
            let config = WorkloadConfig {
                pool: workload.pool.clone(),
                gpus: workload.gpus,
                least: workload.least,
                most: workload.most,
                target_milli: workload.target.map(|target| target.0),
                cold_start_ms: workload.cold_start.map(ms),
                lead_ms: workload.lead.map(ms),
                floors: workload.floors.iter().map(floor).collect(),
            };
            (workload.name.clone(), config)
        };
        fleet::Settings {
            pools: self.pools.iter().map(pool).collect::<BTreeMap<_, _>>(),
            workloads: self.workloads.iter().map(workload).collect(),
            kubernetes: self.kubernetes.enabled,
            policy: self.policy.clone(),
        }
    }
}

/// Whole milliseconds.
pub(crate) fn ms(length: Seconds) -> u64 {
    u64::try_from(length.0.as_millis()).unwrap_or(u64::MAX)
}
