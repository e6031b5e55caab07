//! EC2's notice that it takes a spot instance back: asked for, since nobody calls.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::Aws;
use crate::imds;
use crate::log::chain;
use crate::metrics::Metrics;

/// As often as EC2's documentation advises: the notice comes two minutes ahead.
const EVERY: Duration = Duration::from_secs(5);

/// Who did not answer so often is asked less often: it may never answer, as from a pod whose hops are counted.
const TRIES: u32 = 6;
const SELDOM: Duration = Duration::from_secs(60);

/// Tells whether there is a notice. Never ends.
pub(super) async fn poll(aws: &Aws, metrics: &Metrics, is_told: &watch::Sender<bool>) {
    let mut failures = 0_u32;
    loop {
        match imds::spot_notice(aws).await {
            Ok(notice) => {
                if std::mem::take(&mut failures) > 0 {
                    info!("the metadata service answers again when asked for a spot interruption notice");
                }
                let is_news = is_told.send_if_modified(|told| std::mem::replace(told, notice.is_some()) != *told);
                if let Some(notice) = notice.filter(|_| is_news) {
                    info!(action = notice.action, time = notice.time, "EC2 takes this spot instance back");
                }
            }
            // Who does not answer says nothing: a node that was told to go goes on going.
            Err(error) => {
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
