//! What this node tells the scaler, and what the scaler asks of it: one stream, which nothing here waits for.
//!
//! `gather` makes a report, with `gpus`; `bell` says when there may be news; `client` has the connection, with `token`.
//! What comes back waits at the `desk`, and `carry_out` does it: the `lease` on the own pod, which `pod` writes, and
//! images, which `prewarm` brings. `standing` is for people. Without a scaler nothing of all this runs.
//! Not here: what a scaler makes of it; conditions and taints of the node.

mod bell;
mod carry_out;
mod client;
mod desk;
mod gather;
mod gpus;
mod lease;
mod pod;
mod standing;
mod token;

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use darter_api::report::Node;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::admin::Watched;
use crate::config::Config;
use crate::going::Reason;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::prewarm::Prewarm;
use crate::pulls::Pulls;

use self::client::Teller;
use self::desk::Desk;
use self::gather::Sources;
use self::pod::OwnPod;
pub use self::standing::Standing;

/// Bytes of a text in a report: a sentence, or a name.
const TEXT_MAX: usize = 256;

/// What this node tells, before it tells anything.
pub struct Reporter {
    config: Config,
    watched: Watched,
    pulls: Pulls,
    images: Images,
    prewarm: Prewarm,
    metrics: Arc<Metrics>,
    standing: watch::Sender<Standing>,
}

/// How the connection to the scaler stands, before there is one; and for whoever wants to know, if there is a scaler.
pub fn standing(config: &Config) -> (watch::Sender<Standing>, Option<watch::Receiver<Standing>>) {
    let scaler = config.report.scaler.as_ref().map(ToString::to_string);
    let (is_on, scaler) = (scaler.is_some(), scaler.unwrap_or_default());
    let sender = watch::Sender::new(Standing { scaler, ..Standing::default() });
    let receiver = is_on.then(|| sender.subscribe());
    (sender, receiver)
}

impl Reporter {
    /// Asks and tells nobody yet.
    pub fn new(
        config: &Config,
        watched: Watched,
        (pulls, images, prewarm): (Pulls, Images, Prewarm),
        metrics: Arc<Metrics>,
        standing: watch::Sender<Standing>,
    ) -> Self {
        Self { config: config.clone(), watched, pulls, images, prewarm, metrics, standing }
    }

    /// Tells until `stop`.
    pub async fn run(self, going: watch::Receiver<Option<Reason>>, stop: CancellationToken) {
        let Some(scaler) = self.config.report.scaler.clone() else { return stop.cancelled().await };
        let settings = self.config.report.clone();
        let (namespace, found) = watch::channel(None);
        let pod = OwnPod::new(&self.config.kubernetes, namespace);
        let protect_max = settings.protect_max.0;
        let desk = Arc::new(Desk::new(pod.is_some(), protect_max, self.metrics.clone()));
        let (catalogue, store) = (self.images.catalogue(), self.watched.store.clone());
        let sources = Arc::new(Sources {
            node: node(&self.watched, &self.config),
            instance: instance(),
            began: Instant::now(),
            watched: self.watched,
            metrics: self.metrics,
            pulls: self.pulls,
            catalogue: catalogue.clone(),
            namespace: found,
            going,
            going_since: std::sync::Mutex::default(),
            desk: desk.clone(),
            sequence: AtomicU64::new(0),
        });
        let agent = format!("darter/{}", sources.node.agent_version);
        let teller = Teller { settings, scaler, agent, sources, standing: self.standing };
        let tell = async {
            // What was here before this agent is a part of its first word.
            let find = move || catalogue.find(&store);
            if let Err(error) = tokio::task::spawn_blocking(find).await {
                warn!(%error, "the images that were here before are not told");
            }
            teller.run().await;
        };
        let protect = async {
            if let Some(pod) = pod {
                carry_out::leases(&desk, pod, protect_max).await;
            }
        };
        let bring = carry_out::images(&desk, &self.prewarm);
        stop.run_until_cancelled(async { tokio::join!(tell, protect, bring) }).await;
    }
}

fn node(watched: &Watched, config: &Config) -> Node {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    Node {
        name: watched.about.node.clone(),
        boot_id: boot.ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty()),
        agent_version: watched.about.version.clone(),
        zone: config.swarm.zone.clone(),
        pod: config.kubernetes.pod.clone(),
        ..Node::default()
    }
}

/// A name that no other life of an agent has.
fn instance() -> String {
    let mut bytes = [0_u8; 16];
    if let Err(error) = getrandom(&mut bytes, GetRandomFlags::empty()) {
        // Then the time and the process tell two lives apart.
        warn!(%error, "no random bytes for the name of this life of the agent");
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        return format!("{}-{}", std::process::id(), since.as_nanos());
    }
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The beginning of a text, if it is long.
fn clip(text: &str) -> String {
    let end = (0..=TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}

/// Whole milliseconds.
fn ms(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_letters_and_lives_have_names_of_their_own() {
        assert_eq!(clip("as it is"), "as it is");
        let long = "ä".repeat(TEXT_MAX);
        assert_eq!(clip(&long), "ä".repeat(TEXT_MAX / 2));
        assert!(instance().len() == 32 && instance() != instance());
    }
}
