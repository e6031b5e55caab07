//! EC2's notice that it takes a spot instance back: asked for, since nobody calls.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, info};

use crate::config::Aws;
use crate::imds;
use crate::log::chain;

/// As often as EC2's documentation advises: the notice comes two minutes ahead.
const EVERY: Duration = Duration::from_secs(5);

/// Tells whether there is a notice. Never ends.
pub(super) async fn poll(aws: &Aws, is_told: &watch::Sender<bool>) {
    loop {
        match imds::spot_notice(aws).await {
            Ok(notice) => {
                let is_news = is_told.send_if_modified(|told| std::mem::replace(told, notice.is_some()) != *told);
                if let Some(notice) = notice.filter(|_| is_news) {
                    info!(action = notice.action, time = notice.time, "EC2 takes this spot instance back");
                }
            }
            // Who does not answer says nothing: a node that was told to go goes on going.
            Err(error) => debug!(error = %chain(&error), "cannot ask for a spot interruption notice"),
        }
        tokio::time::sleep(EVERY).await;
    }
}
