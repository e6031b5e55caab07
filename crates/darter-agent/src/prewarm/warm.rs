//! Images that are to be here before any pod of this node: ordered at the start, and again until they are here.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use darter_core::ready::State;
use futures_util::StreamExt;
use kube::runtime::watcher::DefaultBackoff;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Event, Order, Prewarm};
use crate::certs_d::States;
use crate::metrics::Metrics;

/// containerd is sent to the mirror before it pulls, where hosts.toml can be had at all.
const IN_PLACE: Duration = Duration::from_secs(10);

/// Between two tries at the most: a registry that is away for a moment costs a node no more, and one that is
/// down is not asked more often by every node of a cluster.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The images of a configuration.
pub struct Warm {
    prewarm: Prewarm,
    /// Those that are not here, in their order.
    missing: watch::Sender<Vec<String>>,
    /// How long they are tried for.
    within: Duration,
}

impl Warm {
    /// Orders nothing yet.
    pub fn new(prewarm: Prewarm, images: Vec<String>, within: Duration) -> Self {
        Self { prewarm, missing: watch::Sender::new(images), within }
    }

    /// Those that are not here.
    pub fn missing(&self) -> watch::Receiver<Vec<String>> {
        self.missing.subscribe()
    }

    /// Brings them until all are here, one after the other, or until the time is over; then does nothing more
    /// until `stop`.
    pub async fn run(self, hosts: watch::Receiver<States>, metrics: &Metrics, stop: CancellationToken) {
        self.show(metrics);
        if !self.missing.borrow().is_empty() {
            stop.run_until_cancelled(self.bring(hosts, metrics)).await;
        }
        stop.cancelled().await;
    }

    async fn bring(&self, mut hosts: watch::Receiver<States>, metrics: &Metrics) {
        let until = Instant::now() + self.within;
        let is_in_place =
            |states: &States| !states.is_empty() && states.iter().all(|(_, state)| state.check() != State::Failed);
        // Where it does not come the image is brought all the same: into the store, whoever reads it there.
        let _ = tokio::time::timeout(IN_PLACE, hosts.wait_for(is_in_place)).await;
        let (mut pauses, mut last) = (DefaultBackoff::default(), BTreeMap::new());
        loop {
            let images = self.missing.borrow().clone();
            for image in images {
                let started = Instant::now();
                match self.order(&image).await {
                    Ok(()) => {
                        info!(image, seconds = started.elapsed().as_secs_f64(), "an image that is to be here is here");
                        self.missing.send_modify(|missing| missing.retain(|other| *other != image));
                        self.show(metrics);
                    }
                    Err(reason) => {
                        if last.contains_key(&image) {
                            debug!(image, reason, "an image that is to be here cannot be brought still");
                        } else {
                            warn!(
                                image,
                                reason,
                                "an image that is to be here cannot be brought (prewarm.images); it \
                                is tried again"
                            );
                        }
                        last.insert(image, reason);
                    }
                }
            }
            let missing = self.missing.borrow().clone();
            let pause = pauses.next().unwrap_or(PAUSE_MAX).min(PAUSE_MAX);
            match until.checked_duration_since(Instant::now()) {
                _ if missing.is_empty() => return,
                Some(left) if left > pause => tokio::time::sleep(pause).await,
                _ => {
                    last.retain(|image, _| missing.contains(image));
                    let within = self.within.as_secs();
                    return warn!(?last, within, "images that are to be here are not; they are not tried any more");
                }
            }
        }
    }

    /// As `darter prewarm` orders it: into the store, pinned, and into containerd where its socket is known.
    async fn order(&self, image: &str) -> Result<(), String> {
        let order = Order { image: image.to_owned(), store_only: false, pin: None, login: None };
        let mut events = pin!(self.prewarm.clone().run(order));
        while let Some(event) = events.next().await {
            match event {
                Event::Done { .. } => return Ok(()),
                Event::Failed { reason } => return Err(reason),
                _ => {}
            }
        }
        Err("it ended without a word".to_owned())
    }

    fn show(&self, metrics: &Metrics) {
        let missing = i64::try_from(self.missing.borrow().len()).unwrap_or(i64::MAX);
        metrics.warm_images_missing.set(missing);
    }
}
