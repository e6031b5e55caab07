//! The configuration with every section optional: a file may leave out what the default has, and reading its own
//! text gives positions in it.

use darter_base::layers::Section;
use serde::Deserialize;

use crate::config as full;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only the errors of reading it are used")]
pub struct Config {
    agent: Option<Section<full::Agent>>,
    log: Option<Section<full::Log>>,
    mirror: Option<Section<full::Mirror>>,
    store: Option<Section<full::Store>>,
    certs_d: Option<Section<full::CertsD>>,
    containerd: Option<Section<full::Containerd>>,
    admin: Option<Section<full::Admin>>,
    origin: Option<Section<full::Origin>>,
    swarm: Option<Section<full::Swarm>>,
    seed: Option<Section<full::Seed>>,
    going: Option<Section<full::Going>>,
    kubernetes: Option<Section<full::Kubernetes>>,
    prewarm: Option<Section<full::Prewarm>>,
    gpu: Option<Section<full::Gpu>>,
    report: Option<Section<full::Report>>,
    aws: Option<Section<full::Aws>>,
    registry: Option<Vec<full::RegistryConfig>>,
}
