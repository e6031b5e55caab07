//! What agents tell the scaler and do at its word: real agents, real TLS, a real kube-apiserver.

mod connection;
mod directives;
mod gpus;
mod lease;
mod nonsense;

use anyhow::Result;
use darter_api::report::{GpuReadiness, Report};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::reports::Ear;
use darter_tests::scratch::Scratch;
use darter_tests::tls::Authority;
use darter_tests::tools::Need;

/// What each of these needs.
const NEEDS: [Need; 2] = [Need::Darter, Need::MockNvml];

/// Two GPUs of which nothing is wrong.
const TWO: &str = "base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\n";

/// The longest interval that may be set: what comes before it is over came by itself.
const SELDOM: &str = "60s";

/// A server over TLS, with its certificate and a token in files.
struct Secure {
    ear: Ear,
    dir: Scratch,
}

impl Secure {
    async fn start() -> Result<Self> {
        let (authority, dir) = (Authority::new()?, Scratch::new()?);
        let ear = Ear::start(&Place::Host, Some(&authority.issue(&["127.0.0.1"])?)).await?;
        std::fs::write(dir.join("ca.pem"), authority.pem())?;
        std::fs::write(dir.join("token"), "first-token\n")?;
        ear.want(Some("Bearer first-token"));
        Ok(Self { ear, dir })
    }

    /// An agent that reports to it, seldom.
    fn options(&self, options: Options) -> Options {
        let at = |name: &str| self.dir.join(name).display().to_string();
        options
            .set("report.scaler", self.ear.url())
            .set("report.interval", SELDOM)
            .set("report.ca", at("ca.pem"))
            .set("report.token_file", at("token"))
    }
}

/// A server in plaintext and an agent without GPUs that reports to it, seldom.
async fn plain() -> Result<(Ear, Agent)> {
    let ear = Ear::start(&Place::Host, None).await?;
    let agent = Agent::start(plain_options(&ear)).await?;
    Ok((ear, agent))
}

fn plain_options(ear: &Ear) -> Options {
    Options::new(&Place::Host)
        .plain_registry("registry.example", "http://127.0.0.1:9")
        .set("gpu.mode", "off")
        .set("report.scaler", ear.url())
        .set("report.interval", SELDOM)
        .set("report.token_file", "")
}

/// Whether both GPUs were read and judged.
fn is_ready(report: &Report) -> bool {
    let gpus = report.gpus.clone().unwrap_or_default();
    gpus.readiness() == GpuReadiness::Ready && gpus.gpus.len() == 2
}

/// Whether a GPU is lost, and the node told not ready for it.
fn is_lost(report: &Report) -> bool {
    let gpus = report.gpus.clone().unwrap_or_default();
    gpus.readiness() == GpuReadiness::NotReady && gpus.gpus.iter().any(|gpu| gpu.is_lost)
}

/// A mock with two GPUs.
fn two() -> Result<Mock> {
    Mock::new(TWO)
}
