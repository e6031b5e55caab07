//! What EC2 announces of this node: asked for, since nobody calls.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::{Reason, Told};
use crate::config::Aws;
use crate::imds::{self, ImdsError, Notices};
use crate::log::chain;
use crate::metrics::{Metrics, ReasonLabels};

/// As often as EC2's documentation advises: the notice comes two minutes ahead.
const EVERY: Duration = Duration::from_secs(5);

/// Who did not answer so often is asked less often: it may never answer, as from a pod whose hops are counted.
const TRIES: u32 = 6;
const SELDOM: Duration = Duration::from_secs(60);

/// Tells what is announced. Never ends.
pub(super) async fn poll(aws: &Aws, metrics: &Metrics, told: &watch::Sender<Told>) {
    let (mut failures, mut announced) = (0_u32, Announced::default());
    loop {
        let error = match imds::notices(aws).await {
            Ok(notices) => announced.take(notices, metrics, told).err(),
            Err(error) => Some(error),
        };
        match error {
            None if std::mem::take(&mut failures) > 0 => {
                info!("the metadata service answers again when asked for a spot interruption notice");
            }
            None => {}
            // Who does not answer says nothing: a node that was told to go goes on going.
            Some(error) => {
                metrics.spot_notice_errors.inc();
                failures = failures.saturating_add(1);
                if failures == 1 {
                    warn!(error = %chain(&error), "cannot ask for a spot interruption notice; what only this node \
                        has goes to others when the agent is stopped. In a pod without the host's network the \
                        metadata service needs a hop limit of 2; off: going.spot_notice = \"off\"");
                }
            }
        }
        tokio::time::sleep(if failures < TRIES { EVERY } else { SELDOM }).await;
    }
}

/// What the log had last.
#[derive(Default)]
struct Announced {
    rebalance: Option<imds::Rebalance>,
    scheduled: Vec<imds::Scheduled>,
}

impl Announced {
    /// Tells each of them; an error of the one that has no time.
    fn take(&mut self, notices: Notices, metrics: &Metrics, told: &watch::Sender<Told>) -> Result<(), ImdsError> {
        let Notices { spot, rebalance, scheduled } = notices;
        let failed = |reason: Reason| {
            metrics.notice_errors.get_or_create(&ReasonLabels { reason: reason.label() }).inc();
        };
        match rebalance {
            Ok(rebalance) => {
                told.send_if_modified(|told| told.set(Reason::Rebalance, rebalance.is_some()));
                if let Some(notice) = rebalance.as_ref().filter(|_| self.rebalance != rebalance) {
                    info!(since = notice.time, "EC2 recommends to move off this spot instance");
                }
                self.rebalance = rebalance;
            }
            Err(_) => failed(Reason::Rebalance),
        }
        match scheduled {
            Ok(scheduled) => {
                told.send_if_modified(|told| told.set(Reason::Scheduled, !scheduled.is_empty()));
                for event in scheduled.iter().filter(|event| !self.scheduled.contains(event)) {
                    info!(code = event.code, not_before = event.not_before, "EC2 plans maintenance of this instance");
                }
                self.scheduled = scheduled;
            }
            Err(_) => failed(Reason::Scheduled),
        }
        let spot = spot?;
        let is_news = told.send_if_modified(|told| told.set(Reason::SpotNotice, spot.is_some()));
        if let Some(notice) = spot.filter(|_| is_news) {
            info!(action = notice.action, time = notice.time, "EC2 takes this spot instance back");
        }
        Ok(())
    }
}
